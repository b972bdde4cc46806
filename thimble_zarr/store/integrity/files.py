"""One file of a committed block against what the ledger says of it."""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from itertools import chain

import numpy as np

from thimble_zarr.format.layout import SCALAR_CHUNK_STEPS
from thimble_zarr.store.coding.shard_codec import ShardFile, decode_vector, values_checksum
from thimble_zarr.store.integrity.expected import Expected
from thimble_zarr.store.integrity.verify_result import HOW_TO_RESTORE, Discrepancy
from thimble_zarr.store.keys import array_of, chunk_index
from thimble_zarr.store.ledger import FileRecord


class FileState(Enum):
    """What became of a file."""

    RECORDED = auto()  # it is what a line of the ledger says
    UNTOLD = auto()  # its own checksums are right, and the line that told of it is lost
    ALTERED = auto()  # its own checksums are right, and it is not what the ledger says
    LOST = auto()  # it cannot be decoded, or is not there


@dataclass(frozen=True)
class Comparison:
    """What became of a file, how it differs from what was committed, and what to record of it.

    The record is that of the line which it fits, else the last; an untold file's is its own.
    """

    state: FileState
    record: FileRecord
    problem: str = ""


def compare_file(expected: Expected, key: str) -> Comparison:
    """Read a file and tell what became of it."""
    committed, problem = expected.ledger.records.get(key), ""
    try:
        for record in chain([committed] if committed else [], expected.promised(key)):
            if not (differs := difference(expected, key, record)):
                return Comparison(FileState.RECORDED, record)
            problem = problem or differs
        itself = _record_of(expected, key)
    except (FileNotFoundError, NotADirectoryError, ValueError, RuntimeError) as error:
        if isinstance(error, OSError):
            problem = "it is missing" if error.errno else "it is empty"
        record = committed or FileRecord(n_bytes=0)
        return Comparison(FileState.LOST, record, problem or str(error))
    recorded = expected.recorded_files.get(itself.checksums)
    is_elsewhere = (
        itself.chunks is not None and recorded not in (None, key) and not expected.is_sparse(key)
    )
    if not is_elsewhere and (committed is None or committed.line < expected.doubtful_bytes):
        return Comparison(FileState.UNTOLD, itself)
    if recorded == key:
        problem = "it is the file of an earlier commit"
    elif recorded is not None:
        problem = f"it is the file that was recorded as {recorded}, and can be put back there"
    else:
        if itself.chunks is None:
            problem = "its own checksum is right, but is not the one in the ledger"
        problem = f"it was changed after it was recorded: {problem}"
    return Comparison(FileState.ALTERED, committed or itself, problem)


def differing_chunks(
    shard: ShardFile, record: FileRecord, checksums: Iterable[int]
) -> Iterator[int]:
    """Yield the chunks of a shard that do not hold the recorded values.

    Only those are decoded whose checksum, as they are stored, is another one.
    """
    assert record.chunks is not None
    for chunk, ((stored, values), found) in enumerate(
        zip(record.chunks.tolist(), checksums, strict=True)
    ):
        if found != stored and values_checksum(shard.decode(chunk)) != values:
            yield chunk


def find_in_file(expected: Expected, key: str) -> Iterator[Discrepancy]:
    """Find what is wrong with a committed file."""
    committed, file = expected.ledger.records[key], compare_file(expected, key)
    first_row, is_lost = committed.first_row, file.state is FileState.LOST
    if file.state is FileState.RECORDED:
        n_bytes = expected.files.size(key)
        if n_bytes != file.record.n_bytes:
            what = f"it has {n_bytes:,} bytes, not {file.record.n_bytes:,}, and the same values"
            yield Discrepancy("size", key, what, "none: nothing is lost", is_damage=False)
    elif file.state is not FileState.UNTOLD and committed.chunks is None:
        repair = "write it again, if the ledger tells its values; else restore it from a copy"
        if is_lost and expected.computes_with(key):
            first = chunk_index(key) * SCALAR_CHUNK_STEPS
            repair = f"compute it again, if the ledger proves that; else {_ends_before(first)}"
        elif is_lost:
            repair = (
                "write steps and tokens again, if all were recorded; set other values to missing; "
                "leave other labels out"
            )
        yield Discrepancy("damaged-values", key, file.problem, repair)
    elif file.state is not FileState.UNTOLD:
        repair = _ends_before(first_row) if is_lost else f"none: {HOW_TO_RESTORE}"
        what = f"{file.problem} (rows {first_row} to {committed.end_row - 1})"
        yield Discrepancy("damaged-block", key, what, repair, first_row=first_row)


def _ends_before(row: int) -> str:
    """Return what a repair does about rows that are lost, from one on."""
    if row == 0:
        return "none: no row would be left; restore it from a copy"
    return f"end the store before row {row}"


def difference(expected: Expected, key: str, record: FileRecord) -> str:
    """Return how a file differs from a record, nothing if it holds the recorded values."""
    if record.chunks is None:
        n_bytes = expected.files.size(key)
        if n_bytes != record.n_bytes:
            return f"it has {n_bytes:,} bytes, not {record.n_bytes:,}"
        is_same = zlib.crc32(expected.files.get(key)) == record.crc32
        return "" if is_same else "its checksum does not match"
    n_chunks = expected.declared(array_of(key)).n_chunks
    if len(record.chunks) != n_chunks:
        return f"the ledger has {len(record.chunks)} chunks of it, not {n_chunks}"
    with _shard(expected, key) as shard:
        if expected.files.is_remote:
            shard.will_read(range(n_chunks))
        checksums = map(shard.computed_checksum, range(n_chunks))
        for chunk in differing_chunks(shard, record, checksums):
            return f"the values of chunk {chunk} are not those that were committed"
    return ""


def _record_of(expected: Expected, key: str) -> FileRecord:
    """Return what a file says itself; raise ValueError if its own checksums do not match."""
    declared, n_bytes = expected.declared(array_of(key)), expected.files.size(key)
    if not declared.is_sharded:
        content = expected.files.get(key)
        decode_vector(content, declared.file_shape, declared.dtype)
        return FileRecord(n_bytes=n_bytes, crc32=zlib.crc32(content))
    with _shard(expected, key) as shard:
        checksums = [
            (shard.computed_checksum(chunk), values_checksum(shard.decode(chunk)))
            for chunk in range(declared.n_chunks)
        ]
    return FileRecord(n_bytes=n_bytes, chunks=np.array(checksums, np.uint32))


def _shard(expected: Expected, key: str) -> ShardFile:
    """Return a shard, to be opened; raise ValueError if the array's metadata are lost."""
    declared = expected.declared(array_of(key))
    steps, *rest = declared.chunk_shape
    return ShardFile(
        expected.files,
        key,
        n_chunks=declared.n_chunks,
        shape=(rest[0], steps, *rest[1:]) if rest else (steps,),
        dtype=declared.dtype,
        fill=declared.fill,
        compression=declared.compression,
    )
