"""Resume a store: is it the same run, and how is it cut back to where the run continues?

A store is cut off by one line more in its ledger and then by the commit record, and only after that
are files removed. No file that stays is written to: rows behind the last one are never read, and
their block is written again when the run has filled it. So the store can be read at
any moment, as it was before or as it is after.

A killed writer may have left lines behind the last that was committed. What they promised may have
come true for some files and not for others, so they stay, and the line of the cut says for each
file that they tell of what it is now, or that it is removed.
"""

import datetime
import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np

from thimble_zarr.errors import DamagedStoreError, ResumeError, listed
from thimble_zarr.format import layout
from thimble_zarr.format.schema import Json, Schema, TokenLabels
from thimble_zarr.store.coding.predicted import decoded_checksum
from thimble_zarr.store.coding.shard_codec import chunk_slices
from thimble_zarr.store.files.base import PARTIAL
from thimble_zarr.store.keys import (
    LEDGER,
    array_of,
    chunk_index,
    is_chunk_key,
    shard_key,
    split_array_key,
)
from thimble_zarr.store.ledger import Commit, FileRecord, Ledger, Line, read_lines, seal, tell
from thimble_zarr.store.reader import StoreReader

_MAY_DIFFER = ("software", "created", "attrs", "logged")
"""What a schema has that is no property of the run's arithmetic."""

_TOLD_OTHERWISE = (
    *("shape", "dims", "whole_tokens", "stored_last"),
    *("dtypes", "optimizer", "layout", "coding"),
)
"""What follows from what the user passed, and is told in words of that."""

_PASSED_AS = {
    "parameter": "name",
    "n_threads": "torch.get_num_threads()",
    "cpu_capability": "torch.backends.cpu.get_cpu_capability()",
}
"""What the user knows other parts of a schema as, where it is not their name."""


def check_resumable(
    readers: Sequence[StoreReader],
    schemas: Mapping[str, Schema],
    labels: Mapping[str, TokenLabels],
    token_ids: Mapping[str, np.ndarray],
    *,
    kept_rows: int | None,
) -> int:
    """Return how many rows are kept, all by default, once it is clear that the run is the same.

    Raises ResumeError if something differs, which it names, fewer rows are committed, or not every
    step was recorded.
    """
    path, n_rows = readers[0].path, readers[0].n_rows
    differences = list(_differences(readers, schemas, labels, token_ids))
    if differences:
        raise ResumeError(
            f"cannot resume {path}, which recorded another run: {'; '.join(differences)}; "
            "make them as they were, or record into another store"
        )
    check_has_every_step(readers[0])
    kept_rows = n_rows if kept_rows is None else kept_rows
    if n_rows == 0:
        raise ResumeError(f"cannot resume {path}: nothing was committed; record it again")
    if not 0 < kept_rows <= n_rows:
        raise ResumeError(
            f"cannot resume {path} after step {kept_rows - 1}: steps 0 to {n_rows - 1} are "
            "committed; restore the checkpoint of one of them"
        )
    return kept_rows


def check_has_every_step(reader: StoreReader) -> None:
    """Raise ResumeError if a schedule left out steps.

    Nothing tells then which of them the optimizer took after the last row, and whether a checkpoint
    of one of them is of this run.
    """
    if reader.schema.schedule is not None:
        raise ResumeError(
            f"cannot resume {reader.path}: it has the steps of the schedule "
            f"{reader.schema.schedule} only, so no row tells where the steps that it left out "
            "ended; record the run again, or record the steps that are left into another store"
        )


def _differences(
    readers: Sequence[StoreReader],
    schemas: Mapping[str, Schema],
    labels: Mapping[str, TokenLabels],
    token_ids: Mapping[str, np.ndarray],
) -> Iterator[str]:
    recorded = {reader.group: reader.schema for reader in readers}
    if [*recorded] != [*schemas]:
        groups = [
            ", ".join(group or "one at the root" for group in of) for of in (recorded, schemas)
        ]
        yield _differs("parameters", *groups)
        return
    for reader in readers:
        of = f"{reader.group}: " if reader.group else ""
        was, now = reader.schema, schemas[reader.group]
        before, after = _content(was, now), _content(now, was)
        for name in before | after:
            if before.get(name) != after.get(name):
                yield of + _differs(name, before.get(name), after.get(name))
        if (was.shape, was.whole_tokens) != (now.shape, now.whole_tokens):
            continue
        if was.whole_tokens is not None and reader.group in token_ids:
            was_ids, ids = reader.read_token_ids(), token_ids[reader.group]
            if gone := np.setdiff1d(was_ids, ids).tolist():
                new = np.setdiff1d(ids, was_ids).tolist()
                yield of + _differs(f"ids of {now.row_name}s", listed(gone), listed(new))
                continue  # what labels them follows
        if reader.group in labels:
            known, given = reader.read_labels(), labels[reader.group]
            for name in ("count", "live", "dead"):  # texts may be spelled otherwise
                values = [getattr(one, name) for one in (known, given)]
                if not any(one is None for one in values) and not np.array_equal(*values):
                    yield f"{of}the {name} of the tokens differs"
    sizes = [[(one.shape, one.dtypes) for one in of.values()] for of in (recorded, schemas)]
    was_steps, steps = (next(iter(of.values())).layout.block_steps for of in (recorded, schemas))
    if sizes[0] == sizes[1] and was_steps != steps:
        yield _differs("memory_bytes", f"blocks of {was_steps} steps", steps)


def _differs(name: str, recorded: object, now: object) -> str:
    was, is_now = ("none" if value is None else value for value in (recorded, now))
    return f"{name}: {was} recorded, {is_now} now"


def _content(schema: Schema, other: Schema) -> dict[str, Any]:
    """Return what must be as in another schema, by what the user knows it as."""
    some, shape = schema.whole_tokens, schema.shape
    dtypes = {name: native for name, native in schema.dtypes.items() if name in other.dtypes}
    natives = {*dtypes.values()}
    follows = {*schema.optimizer.variables} ^ {*other.optimizer.variables}  # from its flags
    content: dict[str, Any] = {
        "torch": schema.software.get("torch"),
        "coding": schema.coding.name,
        "shape": shape if some is None else (some, *shape[1:]),
        "dims": schema.dims if len(shape) == len(other.shape) else None,
        "tokens": "all" if some is None else f"{schema.n_tokens:,} of {some:,}",
        "variables": ", ".join(name for name in schema.dtypes if name not in follows),
        # One, unless they were imported.
        "dtype": natives.pop() if len(natives) == 1 else ", ".join(map(" ".join, dtypes.items())),
    }
    content |= {f"optimizer.{name}": value for name, value in asdict(schema.optimizer).items()}
    for known in fields(schema):
        if known.name not in (*_MAY_DIFFER, *_TOLD_OTHERWISE):
            content[_PASSED_AS.get(known.name, known.name)] = getattr(schema, known.name)
    return content


def plan_cut(readers: Sequence[StoreReader], n_rows: int) -> tuple[Ledger, Commit, bytes]:
    """Return the ledger, a commit of it that has `n_rows` rows, and the line that makes it so.

    The commit is of what comes before the line: all that is sound. Nothing is written. Raises
    DamagedStoreError if ledger or files are not what was committed.
    """
    files, commit = readers[0].files, readers[0].commit
    try:
        ledger = Ledger.read(files, commit)
    except ValueError as error:
        raise _damaged(readers, LEDGER) from error
    # A line that was torn promised nothing, and one of a cut only that nothing changes.
    behind = [*itertools.takewhile(_is_of_commit, read_lines(files, commit.ledger_bytes))]
    promised = _promised(readers, behind)
    known = {*ledger.records, *promised}
    gone = {key for key in known if _begins_at(readers, key) >= n_rows}
    block_steps = readers[0].schema.layout.block_steps
    block = (n_rows - 1) // block_steps
    first_row = block * block_steps
    last_block = {*_files_of_block(readers, block)}
    told = {}
    for key in (*sorted(last_block & known), *sorted({*promised} - gone - last_block)):
        records = [ledger.records[key]] if key in ledger.records else []
        told[key] = _fitting(readers, key, [*records, *promised.get(key, [])])
    if n_rows < ledger.ends.get(first_row, n_rows):
        for reader in readers:
            for key, values in _values_left(reader, first_row, n_rows):
                told[key] = replace(told[key], values=values)
    entry: dict[str, Json] = {
        "rows": (first_row, n_rows),
        **tell(told),
        "removed": sorted(gone),
        "resumed": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    content = b"".join(line.content for line in behind)
    before = Commit(
        n_rows=n_rows,
        ledger_bytes=commit.ledger_bytes + len(content),
        ledger_crc32=zlib.crc32(content, commit.ledger_crc32),
    )
    return ledger, before, seal(entry) + b"\n"


def _files_of_block(readers: Sequence[StoreReader], block: int) -> Iterator[str]:
    """Yield the files of a block that have rows of no other."""
    for reader in readers:
        schema = reader.schema
        shapes = dict.fromkeys(schema.arrays, schema.shape)
        shapes |= {name: of.shape for name, of in schema.logged.items()}
        for name, shape in shapes.items():
            yield shard_key(reader.arrays.key(name), block, shape)


def _values_left(
    reader: StoreReader, first_row: int, n_rows: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the checksums of what stays of a block's decoded values, by the keys of keyframes."""
    schema, order = reader.schema, reader.schema.stored_order
    shape = schema.layout.chunk_tokens, schema.layout.block_steps, schema.n_dims
    coded = [of for of in schema.arrays.values() if of.is_keyframe]
    values: dict[str, list[int]] = {of.name: [] for of in coded}
    with reader.opened() as opened:
        for of_chunk in chunk_slices(schema.n_tokens, schema.layout.chunk_tokens):
            tokens = range(schema.n_tokens)[of_chunk] if order is None else order[of_chunk]
            for of in coded:
                bits = opened.read(of.variable, (first_row, n_rows), tokens)
                values[of.name].append(decoded_checksum(bits, shape, schema.fill(of.variable)))
    for name, checksums in values.items():
        key = shard_key(
            reader.arrays.key(name), first_row // schema.layout.block_steps, schema.shape
        )
        yield key, np.array(checksums, np.uint32)


def _promised(readers: Sequence[StoreReader], lines: list[Line]) -> dict[str, list[FileRecord]]:
    """Return what lines behind the commit say of each file."""
    promised = dict[str, list[FileRecord]]()
    try:
        for key, record in (told for line in lines for told in line.records().items()):
            promised.setdefault(key, []).append(record)
    except ValueError as error:
        raise _damaged(readers, LEDGER) from error
    return promised


def _is_of_commit(line: Line) -> bool:
    return line.entry is not None and line.entry.resumed is None


def leftovers(readers: Sequence[StoreReader], n_rows: int) -> Iterator[str]:
    """Yield files that a store of `n_rows` rows does not have: later rows, and unfinished files."""
    for key in readers[0].files.list():
        is_later = is_chunk_key(key) and _begins_at(readers, key) >= n_rows
        if is_later or key.endswith(PARTIAL):
            yield key


def _begins_at(readers: Sequence[StoreReader], key: str) -> int:
    """Return the first row of a file; labels of tokens have none, and never go."""
    group, name = split_array_key(array_of(key))
    for reader in readers:
        if reader.group == group and name in (*reader.schema.arrays, *reader.schema.logged):
            return chunk_index(key) * reader.schema.layout.block_steps
        if reader.group == group and name in reader.schema.per_step:
            return chunk_index(key) * layout.SCALAR_CHUNK_STEPS
    return -1


def _fitting(readers: Sequence[StoreReader], key: str, records: Sequence[FileRecord]) -> FileRecord:
    """Return the record that tells of a file as it is. If there is one only, it is not read."""
    if len(records) == 1:
        return records[0]
    group, name = split_array_key(array_of(key))
    reader = next(reader for reader in readers if reader.group == group)
    if records[0].crc32 is not None:
        content = reader.files.get(key)
        found = len(content), zlib.crc32(content)
        fitting = [record for record in records if (record.n_bytes, record.crc32) == found]
    else:
        with reader.arrays.block(name, _begins_at(readers, key)) as shard:
            stored = tuple(shard.stored_checksums())
        fitting = [record for record in records if record.checksums == stored]
    if not fitting:
        raise _damaged(readers, key)
    return fitting[0]


def _damaged(readers: Sequence[StoreReader], key: str) -> DamagedStoreError:
    return DamagedStoreError(
        f"cannot resume {readers[0].path}: {key} is not what was committed; see what is "
        "damaged with `thimble-zarr verify`, and cut it off with `thimble-zarr repair`"
    )
