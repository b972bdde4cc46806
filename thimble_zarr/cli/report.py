"""What a check found, as people and machines read it."""

import csv
import io
import itertools
import json
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thimble_zarr.cli.options import aligned
from thimble_zarr.cli.width import text_width, wrapped

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from thimble_zarr.analysis.audit.table import Table
    from thimble_zarr.analysis.causes.findings import Finding
    from thimble_zarr.analysis.compute.windows import Selected
    from thimble_zarr.analysis.verdict import Verdict
    from thimble_zarr.format.schema import Schema

DEFAULT_ROWS = 10
"""Steps that the table shows, so that all of a check fits on a screen."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """What a check found of a subset of a run's tokens.

    Attributes
    ----------
    store
        Where the run is.
    subset
        The subset's name.
    parameter
        The parameter's name, where the store holds several.
    selected
        What was selected of the run.
    table
        Its table.
    extended
        Whether to show the columns `EXTENDED`.
    findings
        What `find_causes` returned.
    found
        The verdict.
    """

    store: Path
    parameter: str | None
    subset: str
    selected: "Selected"
    table: "Table"
    extended: bool
    findings: "Sequence[Finding]"
    found: "Verdict"

    @property
    def n_recorded(self) -> int:
        """Selected steps that were recorded. Those whose row before was not are not checked."""
        return int((self.selected.steps > 0).sum())

    @property
    def not_replayed(self) -> str:
        """What was not recorded that the replay needs; empty where it can be made."""
        from thimble_zarr.analysis.compute.variables import how_to_record, missing_inputs

        missing = missing_inputs("unexplained", self.schema)
        return how_to_record(missing, self.schema) if missing else ""

    @property
    def of(self) -> str:
        """The run, and which of its parameters if it has several."""
        return f"{self.store}, {self.parameter}" if self.parameter else f"{self.store}"

    @property
    def schema(self) -> "Schema":
        """What was recorded."""
        return self.selected.source.reader.schema


def rendered(sections: Sequence[Section], format_: str) -> str:
    """Return the sections of a run in a format of `--format` for machines."""
    return csv_text(every_step(sections)) if format_ == "csv" else json_text(as_json(sections))


def in_words(sections: Sequence[Section]) -> str:
    """Return verdicts and findings, of which subset where there are several."""
    if len(sections) == 1:
        return section_in_words(sections[0])
    return "\n".join(section_in_words(section, f"{section.subset}: ") for section in sections)


def section_in_words(section: Section, of: str = "") -> str:
    """Return verdict and findings, and before them of what."""
    causes = (
        wrapped(f"  {finding.code}: {finding.message}", indent="    ")
        for finding in section.findings
    )
    return "\n".join([wrapped(of + section.found.text), *causes])


def section_as_text(section: Section, n_rows: int) -> str:
    """Return all that was found of a subset, with `n_rows` steps of its table, or one more."""
    from thimble_zarr.analysis.audit.table import has_formula

    parts = [_title(section)]
    parts += [_as_table(_rows(section), n_rows)] if has_formula(section.table) else []
    parts += [replay_table(section)] if "recurrence" in section.table else []
    return "\n\n".join([*parts, section_in_words(section)]) + "\n"


def every_step(sections: Sequence[Section]) -> Iterator["Labelled"]:
    """Yield the columns of each section, and which subset it is where there are several."""
    for section in sections:
        yield {"subset": section.subset} if len(sections) > 1 else {}, _columns(section)


Labelled = tuple[Mapping[str, str], Mapping[str, "np.ndarray"]]
"""What every row of a table has in common, by name, and the columns."""


def csv_text(tables: Iterable[Labelled]) -> str:
    """Return every row of some tables, empty where one lacks a column, or is NaN."""
    tables = list(tables)
    names = dict.fromkeys(name for table in tables for part in table for name in part)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names)
    for labels, columns in tables:
        cells: dict[str, Iterable[object]] = {n: itertools.repeat(labels[n]) for n in labels}
        for name, values in columns.items():
            cells[name] = ("" if value != value else value for value in values.tolist())
        missing = itertools.repeat("")
        writer.writerows(zip(*(cells.get(name, missing) for name in names), strict=False))
    return file.getvalue()


def json_text(content: object) -> str:
    """Return strict JSON."""
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def as_json(sections: Sequence[Section]) -> dict[str, Any]:
    """Return the sections of a run as JSON has them: what is not a finite number is null."""
    if len(sections) == 1:
        return _section_as_json(sections[0])
    parameter = {"parameter": sections[0].parameter} if sections[0].parameter else {}
    return {
        "store": str(sections[0].store),
        **parameter,
        "subsets": [*map(_section_as_json, sections)],
    }


def _columns(section: Section) -> dict[str, "np.ndarray"]:
    """Return the steps, and the columns of the formula, or without it those of the replay.

    Of each recurrence these say how many elements differ, how many of them by more than they may,
    and how far.
    """
    from thimble_zarr.analysis.audit.table import COLUMNS, EXTENDED, has_formula

    table = section.table
    columns = {"t": table["step"]}
    if has_formula(table):
        extended = (name for name in EXTENDED if section.extended and name in table)
        return columns | {name: table[name] for name in (*COLUMNS, *extended)}
    for at, recurrence in enumerate(table["recurrence"].tolist()):
        for name in ("n_different", "n_beyond", "max_ulp"):
            columns[f"{name}_{recurrence}"] = table[name][:, at]
    return columns


def _rows(section: Section) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame(_columns(section))


def share_of(part: int, total: int) -> str:
    """Return a share in percent, never 100 of what is not all."""
    return f"{math.floor(1e6 * part / total) / 1e4:g} %"


def replay_table(section: Section) -> str:
    """Return the replay for people, a line for each recurrence."""
    table = section.table
    reason = table.attrs["not_exact_because"]
    exact = not reason or not table["n_different"].any()
    how = "to the bit" if exact else f"not to the bit, because {reason}"
    lines = [("", "elements", "equal", "share", "first differing", "max ULP")]
    for name, found in _replay(table).items():
        total, equal, first = found["total"], found["equal"], found["first"]
        where = "none"
        if first:
            place = section.schema.place(first["token"], first["dim"])
            where = f"step {first['step']}, {place}"
        ulp = f"{found['max_ulp']:g}"
        lines.append((name, f"{total:,}", f"{equal:,}", share_of(equal, total), where, ulp))
    title = wrapped(f"Replay on {table.attrs['device']}, {how}", indent="  ")
    return f"{title}\n{aligned(lines, width=text_width())}"


def _replay(table: "Table") -> "dict[str, dict[str, Any]]":
    """Return for each recurrence how many elements are equal, and the first that is not."""
    found = {}
    total = int(table["n_elements"]) * len(table["step"])
    for at, name in enumerate(table["recurrence"].tolist()):
        n_different = table["n_different"][:, at]
        first = None
        if n_different.any():
            row = int((n_different > 0).argmax())
            first = {
                "step": int(table["step"][row]),
                "token": int(table["first_token"][row, at]),
                "dim": int(table["first_dim"][row, at]),
            }
        found[name] = {
            "total": total,
            "equal": total - int(n_different.sum()),
            "max_ulp": float(table["max_ulp"][:, at].max()),
            "first": first,
        }
    return found


def _title(section: Section) -> str:
    schema, steps = section.schema, section.selected.steps
    first, last = max(1, int(steps[0])), int(steps[-1])
    title = (
        f"Store    {section.of}: {schema.dtypes['W']}, {schema.optimizer.name} "
        f"({schema.optimizer.implementation})\n"
        f"{f'{schema.row_name.capitalize()}s':<8} "
        f"{section.subset}: {len(section.selected.tokens):,} of {schema.n_tokens:,}\n"
        f"Steps    {first if first == last else f'{first} to {last}'}{_left_out(section)}"
    )
    return "\n".join(wrapped(line, indent=" " * 9) for line in title.splitlines())


def _left_out(section: Section) -> str:
    """Return which steps are not checked or were not taken, and what is not checked, if any."""
    words, n_checked = "", len(section.table["step"])
    if n_checked < section.n_recorded:
        words += (
            f": {n_checked:,} of {section.n_recorded:,} recorded steps are checked; of the others "
            "the row before was not recorded"
        )
    if n_skipped := int(section.table["skipped"].sum()):
        words += f"; {n_skipped:,} skipped by the optimizer"
    if section.not_replayed:
        words += f"\nChecked  AdamW's formula, without a replay: {section.not_replayed}"
    return words


def _summary(rows: "pd.DataFrame") -> "pd.DataFrame":
    import numpy as np

    with np.errstate(invalid="ignore"):  # a ratio is infinite where nothing moved
        return rows.drop(columns="t").describe()


def _as_table(rows: "pd.DataFrame", n_rows: int) -> str:
    n_shown = min(n_rows + n_rows % 2, len(rows))  # as many from either end
    title = (
        "" if n_shown == len(rows) else f"{n_shown} of {len(rows):,} steps (--rows N shows more)\n"
    )
    steps = _fitted(rows, "t", index=False, max_rows=n_shown)
    if len(rows) == 1:
        return steps
    summary = _summary(rows).T[["mean", "std", "min", "50%", "max"]]
    return f"{title}{steps}\n\nSummary\n{_fitted(summary.rename(columns={'50%': 'median'}))}"


def _fitted(table: "pd.DataFrame", *first: str, **options: Any) -> str:
    """Return a table for people, cut into several where it is too wide, each with `first`."""
    left, parts = [name for name in table.columns if name not in first], []
    while left:
        n_columns, text = len(left), ""
        while n_columns:
            text = table[[*first, *left[:n_columns]]].to_string(**options)
            if n_columns == 1 or len(text.partition("\n")[0]) <= text_width():
                break
            n_columns -= 1
        parts.append(text)
        left = left[n_columns:]
    return "\n\n".join(parts)


def _section_as_json(section: Section) -> dict[str, Any]:
    rows, table = _rows(section), section.table
    replay = _replay(table) if "recurrence" in table else None
    for of in (replay or {}).values():
        of["max_ulp"] = of["max_ulp"] if math.isfinite(of["max_ulp"]) else None
    return {
        "store": str(section.store),
        **({"parameter": section.parameter} if section.parameter else {}),
        "tokens": {"subset": section.subset, "n": len(section.selected.tokens)},
        "steps": [int(rows.t.min()), int(rows.t.max())],
        "n_skipped": int(table["skipped"].sum()),
        "n_steps": {"checked": len(rows), "recorded": section.n_recorded},
        "rows": [_finite(row) for row in rows.to_dict("records")],
        "summary": {name: _finite(column.to_dict()) for name, column in _summary(rows).items()},
        "replay": replay,
        "replay_device": table.attrs.get("device"),
        "not_exact_because": table.attrs.get("not_exact_because"),
        "findings": [finding.to_json() for finding in section.findings],
        "holds": section.found.holds,
        "has_ended": section.found.has_ended,
        "verdict": section.found.text,
    }


def _finite(values: Mapping[Hashable, float]) -> dict[str, float | None]:
    return {str(name): v if math.isfinite(v) else None for name, v in values.items()}
