"""Name the cause: why rows of a record do not follow from the rows before.

Steps that fail in a row are one run; the first of the known causes (`causes`) that explains it is a
finding. Besides, chunks that were altered after they were recorded are found by their checksums,
also where rounding swallows what was altered.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from thimble_zarr.analysis.audit.table import AnyTable, counts
from thimble_zarr.analysis.causes.catalogue import CAUSES, LOCAL, Facts, Named
from thimble_zarr.analysis.causes.evidence import Evidence, Run
from thimble_zarr.analysis.compute.windows import Selected, Source
from thimble_zarr.format.reader import AlteredChunk as Altered
from thimble_zarr.format.schema import LABELS

_MAX_RUNS = 16
"""Runs that are looked into; more of them are rarely of different causes."""

_MAX_TOLD = 4
"""Files that a finding names."""

_MAX_LOCATED = 4
"""Altered chunks in which a flipped bit is looked for, which takes seconds each."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A named cause.

    Attributes
    ----------
    code
        The cause's name.
    message
        What is wrong and how that is known, in words.
    variable
        The array that is wrong, where that is known.
    step, token, dim
        Where it begins. None where a whole step or every token is concerned. A token is a position
        along the first axis of the parameter, a dim one along all others, flattened.
    n_steps
        Steps that fail because of it.
    """

    code: str
    message: str
    variable: str | None
    step: int
    token: int | None
    dim: int | None
    n_steps: int

    def to_json(self) -> dict[str, str | int | None]:
        """Return the finding as JSON has it."""
        return asdict(self)


class FlippedBit(Named):
    """One bit of {variable} is flipped: bit {bit} at step {step}, {place}.

    With it flipped back, its chunk has the checksum it was committed with.
    """

    code = "bit-flip"


class MislabelledRow(Named):
    """The row labelled step {step} belongs to another step, or a row before it does.

    Since the row before, the optimizer counted {n_counted} steps, and the labels {n_labelled}.
    """

    code = "mislabelled-row"


class AlteredChunk(Named):
    """{variable} was changed after it was recorded: {what}.

    The checksums in the files are right, but they are not the ones in the ledger.
    """

    code = "altered-chunk"


class MoreFailures(Named):
    """Steps fail in {n_runs} more places, first at step {step}, which were not examined.

    To see why, check a range of steps (--steps).
    """

    code = "more-failures"


def find_altered(
    selected: Selected, *, before_block: Callable[[int], object] | None = None
) -> list[Altered]:
    """Return the chunks that were altered, of those that the steps of a selection depend on.

    `before_block` is called before each block of them with the row it ends before, and may wait.
    """
    rows = min(selected.rows) - 1, max(selected.rows) + 1
    integrity = selected.source.reader.integrity
    return [] if integrity is None else [*integrity.altered_chunks(rows, before_block=before_block)]


def find_causes(
    selected: Selected, table: AnyTable, altered: Sequence[Altered] | None = None
) -> list[Finding]:
    """Explain why rows do not follow from the rows before, and look for altered chunks.

    Parameters
    ----------
    selected
        What was accounted for.
    table
        What `tabulated` returned, or `accounting`, with the replay.
    altered
        What `find_altered` returned, where that was done already.

    Returns
    -------
    list of Finding
        Altered chunks first, then the causes, by the step they begin at. Empty where every row
        follows from the row before and every chunk of the steps is the one that was committed.
    """
    source = selected.on_device(table.attrs["device"]).source
    tokens, dims = np.asarray(selected.tokens), np.asarray(selected.dims)
    evidence = Evidence(source, tokens, dims, list(_runs(source, table)))
    with np.errstate(all="ignore"):
        found = [_explain(evidence, run) for run in evidence.runs[:_MAX_RUNS]]
    rest = evidence.runs[_MAX_RUNS:]
    if rest:
        where = {"step": rest[0].steps[0], "n_runs": len(rest), "n_steps": _n_steps(rest)}
        found.append(_finding(MoreFailures, where, source))
    checked = replace(selected, rows=np.searchsorted(source.steps, np.asarray(table["step"])))
    found += _mislabelled(source)
    found += _altered(checked, find_altered(checked) if altered is None else altered)
    # What was changed on disk is a fact, and other causes may follow from it.
    return sorted(_merged(found), key=lambda f: (f.code != AlteredChunk.code, f.step))


def _n_steps(runs: list[Run]) -> int:
    return sum(len(run.steps) for run in runs)


def _merged(findings: list[Finding]) -> list[Finding]:
    """Return one finding a cause, or one a place where that is what the cause is about."""
    merged: dict[tuple[object, ...], Finding] = {}
    for finding in findings:
        place = (finding.step, finding.token, finding.dim) if finding.code in LOCAL else ()
        key = (finding.code, finding.variable, *place)
        known = merged.get(key)
        n_steps = finding.n_steps + (known.n_steps if known and not place else 0)
        merged[key] = replace(known or finding, n_steps=n_steps)
    return list(merged.values())


def _mislabelled(source: Source) -> list[Finding]:
    """Look for rows whose label cannot be: between two rows the optimizer takes a step at most."""
    counts = source.recorded["optimizer_step"]
    wrong = np.diff(counts) > np.diff(source.steps)
    if source.reader.schema.schedule is None or not wrong.any():
        return []
    row = int(np.argmax(wrong)) + 1
    where: dict[str, object] = {
        "step": row,
        "variable": "step",
        "n_counted": f"{counts[row] - counts[row - 1]:.0f}",
        "n_labelled": int(source.steps[row] - source.steps[row - 1]),
        "n_steps": int(wrong.sum()),
    }
    return [_finding(MislabelledRow, where, source)]


def _altered(selected: Selected, altered: Sequence[Altered]) -> list[Finding]:
    """Name what was changed since it was recorded, as far as the selection depends on it."""
    findings, source, tokens = [], selected.source, np.asarray(selected.tokens)
    reader, first_row, last_row = source.reader, min(selected.rows) - 1, max(selected.rows)
    files: dict[str, dict[str, list[Altered]]] = {}
    for index, chunk in enumerate(altered):
        if chunk.tokens is not None and not np.isin(chunk.tokens, tokens).any():
            continue
        is_sought = index < _MAX_LOCATED and chunk.recorded_as is None
        integrity = reader.integrity if is_sought else None
        place = None if integrity is None else integrity.flipped_bit(chunk)
        if place is None:
            files.setdefault(chunk.variable, {}).setdefault(chunk.file, []).append(chunk)
        elif first_row <= place[0] <= last_row and place[1] in tokens:
            where: dict[str, object] = dict(
                zip(("step", "token", "dim", "bit"), place, strict=True)
            )
            where |= {"variable": chunk.variable, "n_steps": 1}
            findings.append(_finding(FlippedBit, where, source))
    for variable, of_variable in files.items():
        what = [_how_altered(chunks, source) for chunks in of_variable.values()]
        more = f"; and {len(what) - _MAX_TOLD:,} more files" if len(what) > _MAX_TOLD else ""
        first = min((chunk for chunks in of_variable.values() for chunk in chunks), key=_begin)
        where = {
            "variable": variable,
            "step": first.first_row,
            "token": None if first.tokens is None else int(first.tokens[0]),
            "n_steps": sum(map(len, of_variable.values())),
            "what": "; ".join(what[:_MAX_TOLD]) + more,
        }
        findings.append(_finding(AlteredChunk, where, source))
    return findings


def _begin(chunk: Altered) -> tuple[int, int]:
    return chunk.first_row, chunk.chunk or 0


def _how_altered(chunks: Sequence[Altered], source: Source) -> str:
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


def _runs(source: Source, table: AnyTable) -> Iterator[Run]:
    names, steps = np.asarray(table["recurrence"]).tolist(), np.asarray(table["step"])
    n_beyond = counts(table, "n_beyond")
    tokens, dims = np.asarray(table["first_token"]), np.asarray(table["first_dim"])
    failing = np.flatnonzero(n_beyond.any(axis=1))
    order = np.argsort(steps[failing])
    failing = failing[order]
    for indices in np.split(failing, np.flatnonzero(np.diff(steps[failing]) != 1) + 1):
        if len(indices) == 0:
            continue
        first_row = int(np.searchsorted(source.steps, steps[indices[0]]))
        yield Run(
            steps=range(first_row, first_row + len(indices)),
            counts={name: n_beyond[indices, at] for at, name in enumerate(names)},
            first={
                name: np.stack([_tokens_of(source, tokens[indices, at]), dims[indices, at]], axis=1)
                for at, name in enumerate(names)
            },
        )


def _tokens_of(source: Source, ids: np.ndarray) -> np.ndarray:
    """Return ids as positions among the recorded tokens; -1 stays."""
    tokens: np.ndarray = np.where(ids < 0, -1, np.searchsorted(source.token_ids, ids))
    return tokens


def _explain(evidence: Evidence, run: Run) -> Finding:
    for cause in CAUSES:
        facts = cause.explain(evidence, run)
        if facts is not None:
            break
    step, token, dim, variable = run.start
    where = {"step": step, "token": token, "dim": dim, "variable": variable}
    where |= {"n_steps": len(run.steps)} | dict(facts or {})
    return _finding(type(cause), where, evidence.source)


def _finding(cause: type[Named], where: Facts, source: Source) -> Finding:
    """Return a finding, of which `where` has row and position instead of step and token id."""
    schema = source.reader.schema
    for name, labels in {"step": source.steps, "token": source.token_ids}.items():
        if (at := _as_int(where.get(name))) is not None:
            where = {**where, name: int(labels[at])}
    token, dim = (_as_int(where.get(axis)) for axis in ("token", "dim"))
    words = {
        "place": "" if token is None else schema.place(token, dim),
        "row": schema.row_name,
    }
    return Finding(
        code=cause.code,
        message=" ".join((inspect.getdoc(cause) or "").split()).format(**where, **words),
        variable=_as_str(where.get("variable")),
        step=_as_int(where["step"]) or 0,
        token=token,
        dim=dim,
        n_steps=_as_int(where["n_steps"]) or 0,
    )


def _as_str(value: object) -> str | None:
    return None if value is None else str(value)


def _as_int(value: object) -> int | None:
    return value if isinstance(value, int) else None
