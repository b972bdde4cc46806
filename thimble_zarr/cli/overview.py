"""What a check found of several runs or parameters, as people and machines read it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from thimble_zarr.cli.exits import FOUND, exit_code
from thimble_zarr.cli.options import aligned
from thimble_zarr.cli.report import (
    Section,
    as_json,
    csv_text,
    every_step,
    json_text,
    section_in_words,
    share_of,
)


@dataclass(frozen=True)
class Checked:
    """A parameter of a run that was checked, or why it could not be.

    Attributes
    ----------
    store
        Where the run is.
    parameter
        The parameter's name, where the store holds several.
    sections
        One a subset of its tokens.
    error
        Why there are none.
    """

    store: Path
    parameter: str | None = None
    sections: Sequence[Section] = ()
    error: Exception | None = None

    @property
    def exit_code(self) -> int:
        """What the command says of it."""
        if self.error is not None:
            return exit_code(self.error)
        return 0 if all(section.found.holds for section in self.sections) else FOUND


def rendered_runs(runs: Sequence[Checked], format_: str) -> str:
    """Return the runs in a format of `--format`."""
    if format_ == "csv":
        return _as_csv(runs)
    if format_ == "json":
        return json_text([_as_json(run) for run in runs])
    return overview(runs) + "\n"


_OPTIONAL = ("parameter", "first cosine", "last cosine")
"""Columns of the overview that are left out where no line has them."""


def overview(runs: Sequence[Checked]) -> str:
    """Return a line a run, parameter and subset, and in words what fails."""
    sections = [section for run in runs for section in run.sections]
    replayed = any("recurrence" in section.table for section in sections)
    equal = "equal bits" if replayed else "within rounding"
    lines: list[tuple[str, ...]] = [
        ("store", "parameter", "tokens", "steps", "first cosine", "last cosine", equal, "")
    ]
    for run in runs:
        unchecked = (str(run.store), run.parameter or "-", *["-"] * 5, "not checked")
        lines += map(_line, run.sections) if run.sections else [unchecked]
    columns = zip(*lines, strict=True)
    told = [
        (head, *cells) for head, *cells in columns if head not in _OPTIONAL or {*cells} != {"-"}
    ]
    lines = [*zip(*told, strict=True)]
    failing = [section for section in sections if not section.found.holds]
    words = [f"{at.of}, {at.subset}: {section_in_words(at)}" for at in failing]
    return "\n\n".join([aligned(lines), *words])


def _line(section: Section) -> tuple[str, ...]:
    from thimble_zarr.analysis.table import has_formula

    table, found = section.table, section.found
    cosines = ["-", "-"]
    if has_formula(table):
        cosines = [f"{table['cosine_similarity'][step]:.4f}" for step in (0, -1)]
    rows = "" if section.schema.has_tokens else f" {section.schema.row_name}s"
    return (
        str(section.store),
        section.parameter or "-",
        f"{section.subset}: {len(section.selected.tokens):,} of {section.schema.n_tokens:,}{rows}",
        f"{table['step'][0]} to {table['step'][-1]}{_some(section)}",
        *cosines,
        _share(section),
        ("HOLDS" if found.holds else f"FAILS from step {found.step}")
        + ("" if found.has_ended else ", not ended"),
    )


def _some(section: Section) -> str:
    """Return how many steps are checked where it is not every one that was recorded."""
    n_checked, n_recorded = len(section.table["step"]), section.n_recorded
    return f", {n_checked:,} of {n_recorded:,}" if n_checked < n_recorded else ""


def _share(section: Section) -> str:
    """Return the share of numbers that are the replayed ones, or else of changes in bounds."""
    table = section.table
    wrong = table["n_different" if "recurrence" in table else "n_beyond_rounding"]
    total = int(table["n_elements"]) * wrong.size
    return share_of(total - int(wrong.sum()), total)


def _as_csv(runs: Sequence[Checked]) -> str:
    """Return every step of every run, and first which run and which of its parameters."""
    several = any(run.parameter for run in runs if run.sections)
    tables = [
        ({**_labels(run, several=several), **labels}, columns)
        for run in runs
        for labels, columns in every_step(run.sections)
    ]
    return csv_text(tables) if tables else ""


def _labels(run: Checked, *, several: bool) -> dict[str, str]:
    return {"store": str(run.store), **({"parameter": run.parameter or ""} if several else {})}


def _as_json(run: Checked) -> dict[str, object]:
    if run.error is not None:
        parameter = {"parameter": run.parameter} if run.parameter else {}
        return {"store": str(run.store), **parameter, "error": str(run.error)}
    return as_json(run.sections)
