"""Name the cause: why rows of a record do not follow from the rows before.

Steps that fail one after the other are one failure; the first of the known causes (`CAUSES`)
that explains it is a finding. Besides, chunks that were altered after they were recorded are found
by their checksums, also where rounding swallows what was altered.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from thimble_zarr.analysis.audit.table import AnyTable, counts
from thimble_zarr.analysis.compute.source import Selected, Source
from thimble_zarr.causes.catalogue import CAUSES, NO_FAULTS, Finding, explain
from thimble_zarr.causes.cause import ROWS_NOT_KEPT, Named
from thimble_zarr.causes.evidence import Evidence, Failure
from thimble_zarr.causes.replay import recurrences
from thimble_zarr.format.reader import AlteredChunk
from thimble_zarr.format.schema import LABELS
from thimble_zarr.optim.base import COUNT

_MAX_FAILURES = 16
"""Failures that are looked into; more of them are rarely of different causes."""

_MAX_TOLD = 4
"""Files that a finding names."""

_MAX_LOCATED = 4
"""Altered chunks in which a flipped bit is looked for, which takes seconds each."""


FLIPPED_BIT = Named(
    "bit-flip",
    "One bit of {variable} is flipped: bit {bit} at step {step}, {place}. With it flipped back, "
    "its chunk has the checksum it was committed with.",
)
MISLABELLED_ROW = Named(
    "mislabelled-row",
    "The row labelled step {step} belongs to another step, or a row before it does. Since the row "
    "before, the optimizer counted {n_counted} steps, and the labels {n_labelled}.",
)
ALTERED_CHUNK = Named(
    "altered-chunk",
    "{variable} was changed after it was recorded: {what}. The checksums in the files are right, "
    "but they are not the ones in the ledger.",
)
MORE_FAILURES = Named(
    "more-failures",
    "Steps fail in {n_more} more places, first at step {step}, which were not examined. To see "
    "why, check a range of steps (--steps).",
)


def find_altered(
    selected: Selected, *, before_block: Callable[[int], object] | None = None
) -> list[AlteredChunk]:
    """Return the chunks that were altered, of those that the steps of a selection depend on.

    `before_block` is called before each block of them with the row it ends before, and may wait.
    """
    rows = min(selected.rows) - 1, max(selected.rows) + 1
    integrity = selected.source.reader.integrity
    return [] if integrity is None else [*integrity.altered_chunks(rows, before_block=before_block)]


def find_causes(
    selected: Selected, table: AnyTable, altered: Sequence[AlteredChunk] | None = None
) -> list[Finding]:
    """Explain why rows do not follow from the rows before, and look for altered chunks.

    Parameters
    ----------
    selected
        What was accounted for.
    table
        What `tabulated` returned, or `accounting`, with the replay if there can be one.
    altered
        What `find_altered` returned, where that was done already.

    Returns
    -------
    list of Finding
        Altered chunks first, then the causes, by the step they begin at. Empty where every row
        follows from the row before and every chunk of the steps is the one that was committed.
    """
    source = selected.on_device(table.attrs.get("device")).source
    found = _explained(selected, source, table) if "recurrence" in table else []
    checked = replace(selected, rows=np.searchsorted(source.steps, np.asarray(table["step"])))
    found += _mislabelled(source)
    found += find_missing(selected)
    found += _altered(checked, find_altered(checked) if altered is None else altered)
    # What was changed on disk is a fact, and other causes may follow from it.
    return sorted(_merged(found), key=lambda f: (f.code != ALTERED_CHUNK.code, f.step))


def _explained(selected: Selected, source: Source, table: AnyTable) -> list[Finding]:
    tokens, dims = np.asarray(selected.tokens), np.asarray(selected.dims)
    schema, names = source.reader.schema, (*np.asarray(table["recurrence"]).tolist(),)
    if not schema.optimizer.ELEMENTWISE and names == recurrences(schema):
        # These may be a subset, but their steps were taken with the whole parameter.
        tokens, dims = np.arange(len(source.token_ids)), np.arange(schema.n_dims)
    failures = [*_failures(source, table)]
    failing = {row for failure in failures for row in failure.steps}
    rows = np.searchsorted(source.steps, np.asarray(table["step"]))
    evidence = Evidence(source, tokens, dims, failures, sound={*rows.tolist()} - failing)
    found, rest = list[Finding](), [*evidence.failures]
    while rest and sum(one.code not in NO_FAULTS for one in found) < _MAX_FAILURES:
        found.append(explain(evidence, rest.pop(0)))
    if rest:
        n_steps = sum(len(failure.steps) for failure in rest)
        facts = {"step": rest[0].steps[0], "n_more": len(rest), "n_steps": n_steps}
        found.append(Finding.of(MORE_FAILURES, facts, source))
    return found


def _failures(source: Source, table: AnyTable) -> Iterator[Failure]:
    names, steps = np.asarray(table["recurrence"]).tolist(), np.asarray(table["step"])
    n_beyond, ids = counts(table, "n_beyond"), counts(table, "first_token")
    tokens = np.where(ids < 0, -1, np.searchsorted(source.token_ids, ids))
    first = np.stack([tokens, counts(table, "first_dim")], axis=-1)
    failing = np.flatnonzero(n_beyond.any(axis=1))
    failing = failing[np.argsort(steps[failing])]
    for at in np.split(failing, np.flatnonzero(np.diff(steps[failing]) != 1) + 1):
        if len(at):
            row = int(np.searchsorted(source.steps, steps[at[0]]))
            yield Failure(range(row, row + len(at)), (*names,), n_beyond[at], first[at])


def _merged(findings: list[Finding]) -> list[Finding]:
    """Return one finding a cause, or one a place where that is what the cause is about."""
    local = {cause.code for cause in CAUSES if cause.is_local}
    merged: dict[tuple[object, ...], Finding] = {}
    for finding in findings:
        place = (finding.step, finding.token, finding.dim) if finding.code in local else ()
        key = (finding.code, finding.variable, *place)
        known = merged.get(key)
        n_steps = finding.n_steps + (known.n_steps if known and not place else 0)
        merged[key] = replace(known or finding, n_steps=n_steps)
    return list(merged.values())


def _mislabelled(source: Source) -> list[Finding]:
    """Look for rows whose label cannot be: between two rows the optimizer takes a step at most."""
    counted, labelled = np.diff(source.recorded[COUNT]), np.diff(source.steps)
    wrong = np.flatnonzero(counted > labelled)
    if source.reader.schema.schedule is None or not len(wrong):
        return []
    first = wrong[0]
    facts = {
        "step": first + 1,
        "variable": "step",
        "n_counted": f"{counted[first]:.0f}",
        "n_labelled": labelled[first],
        "n_steps": len(wrong),
    }
    return [Finding.of(MISLABELLED_ROW, facts, source)]


def find_missing(selected: Selected) -> list[Finding]:
    """Return what is missing of the rows from the first to the last of a selection."""
    source, findings = selected.source, []
    first_row, last_row = min(selected.rows), max(selected.rows)
    for first, stop in source.missing:
        if first > last_row or stop <= first_row:
            continue
        steps = source.steps[first - 1 : stop + 1].tolist()
        why = "the recording ended within a step, so that nobody knows where they led"
        if stop < len(source.steps):
            why = (
                f"the gradients do not lead from step {steps[0]} to step {steps[-1]}, because "
                "something besides the optimizer changed W or a state"
            )
        last = int(source.steps[stop - 1])
        what = f" {steps[1]}" if last == steps[1] else f"s {steps[1]} to {last}"
        facts = {"step": first, "variable": "W", "n_steps": stop - first, "steps": what, "why": why}
        findings.append(Finding.of(ROWS_NOT_KEPT, facts, source))
    return findings


def _altered(selected: Selected, altered: Sequence[AlteredChunk]) -> list[Finding]:
    """Name what was changed since it was recorded, as far as the selection depends on it."""
    findings, source, tokens = [], selected.source, np.asarray(selected.tokens)
    first_row, last_row = min(selected.rows) - 1, max(selected.rows)
    integrity = source.reader.integrity
    files: dict[str, dict[str, list[AlteredChunk]]] = {}
    for index, chunk in enumerate(altered):
        if chunk.tokens is not None and not np.isin(chunk.tokens, tokens).any():
            continue
        place = None
        if integrity is not None and index < _MAX_LOCATED and chunk.recorded_as is None:
            place = integrity.flipped_bit(chunk)
        if place is None:
            files.setdefault(chunk.variable, {}).setdefault(chunk.file, []).append(chunk)
        elif first_row <= place[0] <= last_row and place[1] in tokens:
            facts: dict[str, Any] = dict(zip(("step", "token", "dim", "bit"), place, strict=True))
            known = {"variable": chunk.variable, "n_steps": 1}
            findings.append(Finding.of(FLIPPED_BIT, facts | known, source))
    for variable, chunks in files.items():
        what = [_how_altered(of_file, source) for of_file in chunks.values()]
        more = f"; and {len(what) - _MAX_TOLD:,} more files" if len(what) > _MAX_TOLD else ""
        every = [chunk for of_file in chunks.values() for chunk in of_file]
        first = min(every, key=lambda chunk: (chunk.first_row, chunk.chunk or 0))
        facts = {
            "variable": variable,
            "step": first.first_row,
            "token": None if first.tokens is None else first.tokens[0],
            "n_steps": len(every),
            "what": "; ".join(what[:_MAX_TOLD]) + more,
        }
        findings.append(Finding.of(ALTERED_CHUNK, facts, source))
    return findings


def _how_altered(chunks: Sequence[AlteredChunk], source: Source) -> str:
    """Return what became of a file, some chunks of which are not those that were recorded."""
    first = chunks[0]
    begin = "" if first.variable in LABELS else f" (from step {source.steps[first.first_row]} on)"
    if first.recorded_as == first.file:
        return f"{first.file}{begin} is the file of an earlier commit"
    if first.recorded_as is not None:
        return f"{first.file}{begin} is the file that was recorded as {first.recorded_as}"
    if len(chunks) == first.n_chunks > 1:
        return f"{first.file}{begin} is not a file of this run"
    of = f" in {len(chunks):,} of {first.n_chunks:,} chunks" if first.n_chunks > 1 else ""
    return f"{first.file}{begin} has other values{of}"
