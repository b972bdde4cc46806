"""What a check found: tables and words for people; csv and json, with every step, for machines."""

import csv
import io
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from thimble_zarr.analysis.audit.table import has_formula
from thimble_zarr.analysis.check_result import ParameterResult, SubsetResult
from thimble_zarr.analysis.health.condition import Concern
from thimble_zarr.report.text import (
    DEFAULT_ROWS,
    aligned,
    number_column,
    packed,
    text_width,
    wrapped,
)


def as_text(results: Sequence[ParameterResult], n_rows: int | None = None) -> str:
    """Return what people read: of a single subset all that was found, of several a line each.

    With `n_rows`, the steps of its table to show, all of each comes before the lines.
    """
    subsets = [subset for of in results for subset in of.subsets]
    alone = len(results) == len(subsets) == 1
    parts = []
    if alone or n_rows is not None:
        parts += [_subset_as_text(subset, n_rows or DEFAULT_ROWS) for subset in subsets]
    if not alone:
        parts.append(overview(results) + "\n")
    return "\n".join(parts)


def in_words(results: Sequence[ParameterResult]) -> str:
    """Return verdicts, findings and health; of several parameters or stores the overview."""
    if len(results) > 1:
        return overview(results)
    subsets = results[0].subsets
    of = (f"{subset.subset}: " if len(subsets) > 1 else "" for subset in subsets)
    return "\n".join([*map(_in_words, subsets, of), *_health(subsets)])


def _in_words(subset: SubsetResult, of: str = "") -> str:
    """Return verdict and findings, and before them of what."""
    causes = (f"  {finding.code}: {finding.message}" for finding in subset.findings)
    words = [wrapped(of + subset.verdict.text), *(wrapped(line, indent="    ") for line in causes)]
    return "\n".join(words)


def _health(subsets: Sequence[SubsetResult]) -> list[str]:
    """Return a line for each kind of concern: the first, of whom it is, and how many more."""
    found: dict[tuple[str, object], list[tuple[SubsetResult, Concern]]] = {}
    for subset in subsets:
        for concern in subset.health:
            kind = concern.code, concern.evidence.get("variable")
            found.setdefault(kind, []).append((subset, concern))
    lines = []
    for (subset, concern), *others in found.values():
        is_same = all(other.message == concern.message for _, other in others)
        whose = "" if len(others) + 1 == len(subsets) and is_same else _of(subset, subsets)
        more = f" And {len(others):,} more." if others and whose else ""
        lines.append(wrapped(f"Health: {whose}{concern.message}{more}", indent="  "))
    return lines


def _of(subset: SubsetResult, subsets: Sequence[SubsetResult]) -> str:
    """Return the name of a subset, with what tells it from the others."""
    several = len({other.name for other in subsets}) > 1
    return f"{subset.name}, {subset.subset}: " if several else f"{subset.subset}: "


def _subset_as_text(subset: SubsetResult, n_rows: int) -> str:
    """Return all that was found of a subset, with `n_rows` steps of its table, or one more."""
    parts = [_title(subset)]
    parts += [_steps_table(subset, n_rows)] if has_formula(subset.numbers) else []
    parts += [_replay_table(subset)] if subset.replay else []
    words = "\n".join([_in_words(subset), *_health([subset])])
    return "\n\n".join([*parts, words]) + "\n"


def _title(subset: SubsetResult) -> str:
    schema, last = subset.schema, subset.steps[1]
    first = max(1, subset.steps[0])
    title = (
        f"Store    {subset.name}: {schema.dtypes['W']}, {schema.optimizer.name} "
        f"({schema.optimizer.implementation})\n"
        f"{f'{schema.row_name.capitalize()}s':<8} "
        f"{subset.subset}: {subset.n_tokens:,} of {schema.n_tokens:,}\n"
        f"Steps    {first if first == last else f'{first} to {last}'}{_left_out(subset)}"
    )
    return "\n".join(wrapped(line, indent=" " * 9) for line in title.splitlines())


def _left_out(subset: SubsetResult) -> str:
    """Return which steps are not checked or were not taken, and what is not checked, if any."""
    words, n_checked = "", len(subset.numbers["step"])
    if n_checked < subset.n_recorded:
        words += (
            f": {n_checked:,} of {subset.n_recorded:,} recorded steps are checked; of the others "
            "the row before was not recorded"
        )
    if n_skipped := int(subset.numbers["skipped"].sum()):
        words += f"; {n_skipped:,} skipped by the optimizer"
    if subset.not_replayed:
        formula = f"{subset.schema.optimizer.name}'s formula"
        words += f"\nChecked  {formula}, without a replay: {subset.not_replayed}"
    return words


def _steps_table(subset: SubsetResult, n_rows: int) -> str:
    """Return as many steps from either end, and a summary of all."""
    columns, n_steps = subset.columns, len(subset.numbers["step"])
    n_ends, rows, gap_at, title = (n_rows + 1) // 2, np.arange(n_steps), 0, ""
    if 2 * n_ends < n_steps:
        rows, gap_at = np.concatenate([rows[:n_ends], rows[-n_ends:]]), n_ends
        title = f"{len(rows)} of {n_steps:,} steps (--rows N shows more)\n"
    first, *others = (
        number_column(name, of[rows].tolist(), gap_at=gap_at) for name, of in columns.items()
    )
    steps = packed(first, others)
    return steps if n_steps == 1 else f"{title}{steps}\n\nSummary\n{_summary_table(subset)}"


def _summary_table(subset: SubsetResult) -> str:
    summary = subset.summary
    width = max(map(len, summary))
    columns = (
        number_column(
            name.replace("50%", "median"), [of[name] for of in summary.values()], sign=" "
        )
        for name in ("mean", "std", "min", "50%", "max")
    )
    return packed([name.ljust(width) for name in ("", *summary)], columns)


def _replay_table(subset: SubsetResult) -> str:
    """Return the replay for people, a line for each recurrence."""
    attrs = subset.numbers.attrs
    reason = attrs["not_exact_because"]
    is_exact = not reason or not subset.numbers["n_different"].any()
    how = "to the bit" if is_exact else f"not to the bit, because {reason}"
    lines = [("", "elements", "equal", "share", "first differing", "max ULP")]
    for name, found in (subset.replay or {}).items():
        total, equal, first, where = found.total, found.equal, found.first, "none"
        if first:
            where = f"step {first['step']}, {subset.schema.place(first['token'], first['dim'])}"
        ulp = f"{found.max_ulp:g}"
        lines.append((name, f"{total:,}", f"{equal:,}", _share(equal, total), where, ulp))
    title = wrapped(f"Replay on {attrs['device']}, {how}", indent="  ")
    return f"{title}\n{aligned(lines, width=text_width())}"


def _share(part: int, total: int) -> str:
    """Return a share in percent, never 100 of what is not all."""
    return f"{math.floor(1e6 * part / total) / 1e4:g} %"


def overview(results: Sequence[ParameterResult]) -> str:
    """Return a line a store, parameter and subset, in words what does not hold, and all health."""
    subsets = [subset for of in results for subset in of.subsets]
    replayed = any("recurrence" in subset.numbers for subset in subsets)
    equal = "equal bits" if replayed else "within rounding"
    heads = ("store", "parameter", "tokens", "steps", "cosine", equal, "")
    lines: list[tuple[str, ...]] = []
    for of in results:
        failed = (str(of.store), of.parameter or "-", *["-"] * 4, "not checked")
        lines += [failed] if of.error is not None else map(_line, of.subsets)
    titles, table = [], []
    for head, cells in zip(heads, zip(*lines, strict=True), strict=True):
        is_alike = len({*cells}) == 1 < len(lines)
        if {*cells} == {"-"}:
            continue
        if head in ("store", "parameter", "steps") and is_alike:  # it is told above the table
            titles.append(f"{head.capitalize():<9} {cells[0]}")
        else:
            table.append((head, *cells))
    shown = aligned(zip(*table, strict=True), width=text_width())
    told = [subset for subset in subsets if not subset.holds or subset.is_partial]
    words = [_in_words(subset, f"{subset.name}, {subset.subset}: ") for subset in told]
    health = "\n".join(_health(subsets))
    return "\n\n".join(filter(None, ["\n".join(titles), shown, *words, health]))


def _line(subset: SubsetResult) -> tuple[str, ...]:
    numbers, found, schema = subset.numbers, subset.verdict, subset.schema
    cosines = "-"
    if has_formula(numbers):
        cosines = " to ".join(f"{numbers['cosine_similarity'][step]:.4f}" for step in (0, -1))
    steps, n_recorded = numbers["step"], subset.n_recorded
    some = f", {len(steps):,} of {n_recorded:,}" if len(steps) < n_recorded else ""
    judged = (numbers.get(name) for name in ("n_different", "n_beyond_rounding"))
    wrong, equal = next((of for of in judged if of is not None), None), "-"
    if wrong is not None:
        total = int(numbers["n_elements"]) * wrong.size
        equal = _share(total - int(wrong.sum()), total)
    rows = "" if schema.has_tokens else f" {schema.row_name}s"
    return (
        str(subset.store),
        subset.parameter or "-",
        f"{subset.subset}: {subset.n_tokens:,}{rows}",
        f"{steps[0]} to {steps[-1]}{some}",
        cosines,
        equal,
        (
            f"HOLDS{' in part' if subset.is_partial else ''}"
            if found.holds
            else f"FAILS from step {found.step}"
        )
        + ("" if found.has_ended else ", not ended"),
    )


Labelled = tuple[Mapping[str, str], Mapping[str, np.ndarray]]
"""What every row of a table has in common, by name, and the columns."""


def as_json(results: Sequence[ParameterResult]) -> str:
    """Return strict JSON: what `to_json` of a result returns, of several a list of all."""
    found = [of.to_json() for of in results]
    content = found[0] if len(found) == 1 else found
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def as_csv(results: Sequence[ParameterResult]) -> str:
    """Return every step, and first of which store, parameter and subset if there are several."""
    several = any(of.parameter for of in results if of.subsets)
    tables = []
    for of in results:
        labels = {} if len(results) == 1 else {"store": str(of.store)}
        labels |= {"parameter": of.parameter or ""} if labels and several else {}
        tables += [(labels | of.label(subset), subset.columns) for subset in of.subsets]
    return csv_text(tables) if tables else ""


def csv_text(tables: Sequence[Labelled]) -> str:
    """Return every row of some tables, empty where one lacks a column, or is NaN."""
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
