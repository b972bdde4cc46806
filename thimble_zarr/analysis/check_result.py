"""What a check found, as data: by parameter of the store and subset of its tokens."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from thimble_zarr.analysis.audit.table import COLUMNS, EXTENDED, Table, has_formula
from thimble_zarr.analysis.compute.variables import how_to_record, missing_inputs
from thimble_zarr.analysis.health.condition import Concern
from thimble_zarr.analysis.verdict import Verdict
from thimble_zarr.causes.catalogue import Finding
from thimble_zarr.format.documents import finite
from thimble_zarr.format.location import Location
from thimble_zarr.format.schema import Json, Schema

if TYPE_CHECKING:
    import pandas as pd

SUMMARY = ("count", "mean", "std", "min", "25%", "50%", "75%", "max")
"""Numbers that sum up a column."""


@dataclass(frozen=True)
class ReplayedArray:
    """How many values were compared and have the replay's bits, and the largest distance (ULP).

    Of those that differ `not_judged` have an infinite bound: rounding may carry them anywhere.
    `first` is the `step`, `token` and `dim` of the first value that differs; None where none does.
    """

    total: int
    equal: int
    not_judged: int
    max_ulp: float
    first: Mapping[str, int] | None


@dataclass(frozen=True)
class _Checked:
    """What was checked: a run, and the parameter's name if the store holds several."""

    store: Location
    parameter: str | None = None

    @property
    def name(self) -> str:
        """The run, and which of its parameters if it has several."""
        return f"{self.store}, {self.parameter}" if self.parameter else f"{self.store}"

    def _to_json(self) -> dict[str, Json]:
        return {"store": str(self.store), **_named(self.parameter)}


@dataclass(frozen=True, kw_only=True)
class SubsetResult(_Checked):
    """What a check found of a subset of a parameter's tokens.

    Attributes
    ----------
    schema
        What was recorded.
    subset, n_tokens
        The subset's name, and how many tokens it has.
    steps, n_recorded
        First and last selected step, and how many of them were recorded. Those whose row before
        was not are not checked.
    extended
        Whether `columns` has more than the original notebook tabulates.
    numbers
        All numbers by name, as arrays: what `accounting` returns as a dataset.
    findings, verdict
        The causes of what fails, and the answer in words.
    health
        What no fault makes but a person wants to know. It does not change the answer.
    """

    schema: Schema
    subset: str
    n_tokens: int
    steps: tuple[int, int]
    n_recorded: int
    extended: bool
    numbers: Table
    findings: Sequence[Finding]
    verdict: Verdict
    health: Sequence[Concern] = ()

    @property
    def holds(self) -> bool:
        """Whether every row follows from the row before."""
        return self.verdict.holds

    @property
    def is_partial(self) -> bool:
        """Whether something of the rows could not be checked, which the verdict names."""
        numbers = self.numbers
        is_judged = "recurrence" in numbers or has_formula(numbers)
        if any(np.any(numbers.get(name, 0)) for name in ("n_unbounded", "n_unbounded_rounding")):
            return True
        return not is_judged or any(numbers.attrs.get(of) for of in ("not_replayed", "not_judged"))

    @property
    def not_replayed(self) -> str:
        """What was not recorded that the replay needs; empty where it can be made."""
        missing = missing_inputs("unexplained", self.schema)
        return how_to_record(missing, self.schema) if missing else ""

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """The steps, and the columns of the formula, or without it those of the replay."""
        numbers = self.numbers
        columns = {"t": numbers["step"]}
        if has_formula(numbers):
            extended = (name for name in EXTENDED if self.extended and name in numbers)
            return columns | {name: numbers[name] for name in (*COLUMNS, *extended)}
        for at, array in enumerate(numbers["recurrence"].tolist()):
            for name in ("n_different", "n_beyond", "max_ulp"):
                columns[f"{name}_{array}"] = numbers[name][:, at]
        return columns

    @property
    def summary(self) -> dict[str, dict[str, float]]:
        """Of each column but the steps: count, mean, std, min, quartiles and max, without NaN."""
        return {name: _summary(values) for name, values in self.columns.items() if name != "t"}

    @property
    def replay(self) -> dict[str, ReplayedArray] | None:
        """What the replay gives, by array; None without one."""
        numbers = self.numbers
        if "recurrence" not in numbers:
            return None
        total, found = int(numbers["n_elements"]) * len(numbers["step"]), {}
        for at, name in enumerate(numbers["recurrence"].tolist()):
            n_different, first = numbers["n_different"][:, at], None
            if n_different.any():
                row = int((n_different > 0).argmax())
                token, dim = (int(numbers[f"first_{axis}"][row, at]) for axis in ("token", "dim"))
                first = {"step": int(numbers["step"][row]), "token": token, "dim": dim}
            max_ulp = float(numbers["max_ulp"][:, at].max())
            n_equal = total - int(n_different.sum())
            not_judged = int(numbers["n_unbounded"][:, at].sum())
            found[name] = ReplayedArray(total, n_equal, not_judged, max_ulp, first)
        return found

    def to_json(self) -> dict[str, Json]:
        """Return the result as JSON has it: what is not a finite number is null."""
        columns, numbers = self.columns, self.numbers
        replay = {name: finite(asdict(of)) for name, of in (self.replay or {}).items()}
        rows = zip(*(values.tolist() for values in columns.values()), strict=True)
        return {
            **self._to_json(),
            "tokens": {"subset": self.subset, "n": self.n_tokens},
            "steps": [int(numbers["step"].min()), int(numbers["step"].max())],
            "n_skipped": int(numbers["skipped"].sum()),
            "n_steps": {"checked": len(numbers["step"]), "recorded": self.n_recorded},
            "rows": [finite(dict(zip(columns, row, strict=True))) for row in rows],
            "summary": {name: finite(of) for name, of in self.summary.items()},
            "replay": replay or None,
            "replay_device": numbers.attrs.get("device"),
            "replayed_by": numbers.attrs.get("replayed_by"),
            "not_exact_because": numbers.attrs.get("not_exact_because"),
            "not_replayed_because": numbers.attrs.get("not_replayed"),
            "findings": [finding.to_json() for finding in self.findings],
            "health": [concern.to_json() for concern in self.health],
            "holds": self.holds,
            "has_ended": self.verdict.has_ended,
            "verdict": self.verdict.text,
        }


@dataclass(frozen=True, kw_only=True)
class ParameterResult(_Checked):
    """What a check found of a parameter: of each subset of its tokens, or an error."""

    subsets: tuple[SubsetResult, ...] = ()
    error: Exception | None = None

    @property
    def holds(self) -> bool:
        """Whether it could be checked, and every row follows from the row before."""
        return self.error is None and all(subset.holds for subset in self.subsets)

    def label(self, subset: SubsetResult) -> dict[str, str]:
        """Return what tells a subset from the others; nothing if there are none."""
        return {"subset": subset.subset} if len(self.subsets) > 1 else {}

    def to_json(self) -> dict[str, Json]:
        """Return the result as JSON has it: a subset, or several of them, or the error."""
        if self.error is not None:
            return self._to_json() | {"error": str(self.error)}
        found = [subset.to_json() for subset in self.subsets]
        return found[0] if len(found) == 1 else self._to_json() | {"subsets": found}


@dataclass(frozen=True)
class CheckResult:
    """What `check` found. Iterate over it for each subset of each parameter (`SubsetResult`).

    Of `parameters`, those that could not be checked have an `error`.
    """

    store: Location
    parameters: tuple[ParameterResult, ...]

    def __iter__(self) -> Iterator[SubsetResult]:
        return (subset for parameter in self.parameters for subset in parameter.subsets)

    @property
    def holds(self) -> bool:
        """Whether all could be checked, and every row follows from the row before."""
        return all(parameter.holds for parameter in self.parameters)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The causes of what fails, of all subsets."""
        return tuple(finding for subset in self for finding in subset.findings)

    @property
    def health(self) -> tuple[Concern, ...]:
        """What no fault makes but a person wants to know, of all subsets."""
        return tuple(concern for subset in self for concern in subset.health)

    @property
    def verdict(self) -> str:
        """The answer in words, a line for each subset of each parameter."""
        lines, results = [], list(self)
        if len(results) == len(self.parameters) == 1:
            return results[0].verdict.text
        for parameter in self.parameters:
            of = f"{parameter.parameter}, " if parameter.parameter else ""
            lines += [f"{of}{each.subset}: {each.verdict.text}" for each in parameter.subsets]
            lines += [f"{of}not checked: {parameter.error}"] if parameter.error else []
        return "\n".join(lines)

    @cached_property
    def table(self) -> "pd.DataFrame":
        """The columns step by step; first the parameter and subset if there are several."""
        import pandas as pd

        several = len(self.parameters) > 1
        tables = [
            pd.DataFrame((_named(of.parameter) if several else {}) | of.label(each) | each.columns)
            for of in self.parameters
            for each in of.subsets
        ]
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

    def to_json(self) -> Json:
        """Return what `thimble-zarr check --format json` prints; a list of several parameters."""
        found = [parameter.to_json() for parameter in self.parameters]
        return found[0] if len(found) == 1 else found


def _summary(values: np.ndarray) -> dict[str, float]:
    missing = np.isnan(values)
    known = values[~missing]
    numbers = [len(known), *[math.nan] * 7]
    with np.errstate(invalid="ignore"):  # a ratio is infinite where nothing moved
        if len(known):
            numbers[1] = np.where(missing, 0, values).sum(dtype=np.float64) / len(known)
            numbers[3:] = known.min(), *np.percentile(known, [25, 50, 75]), known.max()
        if len(known) > 1:
            squares = np.where(missing, 0, (numbers[1] - values) ** 2)
            numbers[2] = np.sqrt(squares.sum() / (len(known) - 1))
    return {name: float(number) for name, number in zip(SUMMARY, numbers, strict=True)}


def _named(parameter: str | None) -> dict[str, str]:
    return {"parameter": parameter} if parameter else {}
