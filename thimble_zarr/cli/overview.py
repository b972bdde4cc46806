"""What a check found of several runs or parameters, as people and machines read it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from thimble_zarr.cli.exits import FOUND, exit_code
from thimble_zarr.cli.options import aligned
from thimble_zarr.cli.report import (
    DEFAULT_ROWS,
    Section,
    as_json,
    csv_text,
    every_step,
    json_text,
    section_as_text,
    section_in_words,
    share_of,
)
from thimble_zarr.cli.width import text_width


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


def as_text(runs: Sequence[Checked], n_rows: int | None) -> str:
    """Return what people read: of a single subset all that was found, of several a line each.

    With `n_rows` all of each, before the lines.
    """
    sections = [section for run in runs for section in run.sections]
    is_single = len(runs) == len(sections) == 1
    parts = []
    if is_single or n_rows is not None:
        n_shown = DEFAULT_ROWS if n_rows is None else n_rows
        parts += [section_as_text(section, n_shown) for section in sections]
    if not is_single:
        parts.append(overview(runs) + "\n")
    return "\n".join(parts)


def rendered_runs(runs: Sequence[Checked], format_: str) -> str:
    """Return several runs in a format of `--format` for machines."""
    return _as_csv(runs) if format_ == "csv" else json_text([_as_json(run) for run in runs])


_TITLES = ("store", "parameter", "steps")
"""Columns of the overview that are told above it where all lines say the same."""


def overview(runs: Sequence[Checked]) -> str:
    """Return a line a run, parameter and subset, and in words what fails."""
    sections = [section for run in runs for section in run.sections]
    replayed = any("recurrence" in section.table for section in sections)
    equal = "equal bits" if replayed else "within rounding"
    heads = ("store", "parameter", "tokens", "steps", "cosine", equal, "")
    lines: list[tuple[str, ...]] = []
    for run in runs:
        unchecked = (str(run.store), run.parameter or "-", *["-"] * 4, "not checked")
        lines += map(_line, run.sections) if run.sections else [unchecked]
    columns = dict(zip(heads, zip(*lines, strict=True), strict=True))
    columns = {head: cells for head, cells in columns.items() if {*cells} != {"-"}}
    alike = {
        head: columns[head][0]
        for head in _TITLES
        if len(lines) > 1 and head in columns and len({*columns[head]}) == 1
    }
    titles = "\n".join(f"{head.capitalize():<9} {cell}" for head, cell in alike.items())
    table = [(head, *cells) for head, cells in columns.items() if head not in alike]
    shown = aligned([*zip(*table, strict=True)], width=text_width())
    failing = [section for section in sections if not section.found.holds]
    words = [section_in_words(section, f"{section.of}, {section.subset}: ") for section in failing]
    return "\n\n".join(filter(None, [titles, shown, *words]))


def _line(section: Section) -> tuple[str, ...]:
    from thimble_zarr.analysis.audit.table import has_formula

    table, found = section.table, section.found
    cosines = "-"
    if has_formula(table):
        cosines = " to ".join(f"{table['cosine_similarity'][step]:.4f}" for step in (0, -1))
    rows = "" if section.schema.has_tokens else f" {section.schema.row_name}s"
    return (
        str(section.store),
        section.parameter or "-",
        f"{section.subset}: {len(section.selected.tokens):,}{rows}",
        f"{table['step'][0]} to {table['step'][-1]}{_some(section)}",
        cosines,
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
