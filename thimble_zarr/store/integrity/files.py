"""One file of a committed block against what the ledger says of it."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np

from thimble_zarr.store.integrity.expected import Expected
from thimble_zarr.store.integrity.result import HOW_TO_RESTORE, Discrepancy
from thimble_zarr.store.keys import array_of
from thimble_zarr.store.ledger import FileRecord
from thimble_zarr.store.shard import ShardFile, decode_vector, values_checksum

_PIECE_BYTES = 2**20


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
    committed = expected.records.get(key)
    problem = "" if committed is None else _problem(expected, key, committed)
    if committed is not None and not problem:
        return Comparison(FileState.RECORDED, committed)
    for record in expected.promised(key):
        if not _problem(expected, key, record):
            return Comparison(FileState.RECORDED, record, problem)
    try:
        itself = record_of(expected, key)
    except (OSError, ValueError, RuntimeError) as error:
        return Comparison(FileState.LOST, committed or FileRecord(n_bytes=0), problem or str(error))
    recorded = expected.recorded_files.get(itself.checksums)
    is_elsewhere = itself.chunks is not None and recorded not in (None, key)
    if not is_elsewhere and (committed is None or committed.line < expected.doubtful_bytes):
        return Comparison(FileState.UNTOLD, itself, problem)
    if recorded == key:
        problem = "it is the file of an earlier commit"
    elif recorded is not None:
        problem = f"it is the file that was recorded as {recorded}, and can be put back there"
    elif itself.chunks is None:
        problem = "its own checksum is right, but is not the one in the ledger"
    if recorded is None:
        problem = f"it was changed after it was recorded: {problem}"
    return Comparison(FileState.ALTERED, committed or itself, problem)


def find_in_file(expected: Expected, key: str) -> Iterator[Discrepancy]:
    """Find what is wrong with a committed file."""
    committed, file = expected.records[key], compare_file(expected, key)
    first_row, is_lost = committed.first_row, file.state is FileState.LOST
    if file.state is FileState.RECORDED:
        n_bytes = expected.files.size(key)
        if n_bytes != file.record.n_bytes:
            what = f"it has {n_bytes:,} bytes, not {file.record.n_bytes:,}, and the same values"
            yield Discrepancy("size", key, what, is_damage=False)
    elif file.state is not FileState.UNTOLD and committed.chunks is None:
        yield Discrepancy("damaged-values", key, file.problem, _REPAIRS_OF_VALUES[file.state])
    elif file.state is not FileState.UNTOLD:
        repair = f"end the store before row {first_row}" if is_lost else f"none: {HOW_TO_RESTORE}"
        if is_lost and first_row == 0:
            repair = "none: no row would be left; restore it from a copy"
        what = f"{file.problem} (rows {first_row} to {committed.end_row - 1})"
        yield Discrepancy("damaged-block", key, what, repair, first_row=first_row)


_REPAIRS_OF_VALUES = {
    FileState.ALTERED: "write it again, if the ledger tells the recorded values; else restore it "
    "from a copy",
    FileState.LOST: "write steps and tokens again, if all were recorded; set other values to "
    "missing; leave other labels out",
}


def record_of(expected: Expected, key: str) -> FileRecord:
    """Return what a file says itself; raise ValueError if its own checksums do not match."""
    declared, n_bytes = expected.declared(array_of(key)), expected.files.size(key)
    if not declared.is_sharded:
        content = expected.files.get(key)
        decode_vector(content, declared.file_shape[0], declared.dtype)
        return FileRecord(n_bytes=n_bytes, crc32=zlib.crc32(content))
    with _shard(expected, key, declared.n_chunks) as shard:
        checksums = [
            (shard.computed_checksum(chunk) or 0, values_checksum(shard.decode(chunk)))
            for chunk in range(declared.n_chunks)
        ]
    return FileRecord(n_bytes=n_bytes, chunks=np.array(checksums, np.uint32))


def _problem(expected: Expected, key: str, record: FileRecord) -> str:
    """Return what is wrong with a file, nothing if it is what the record says.

    A chunk that was stored again is decoded, and may hold the same values.
    """
    try:
        n_bytes = expected.files.size(key)
        if record.chunks is None:
            if n_bytes != record.n_bytes:
                return f"it has {n_bytes:,} bytes, not {record.n_bytes:,}"
            return "" if _crc32(expected, key) == record.crc32 else "its checksum does not match"
        if n_bytes == 0:
            return "it is empty"
        with _shard(expected, key, len(record.chunks)) as shard:
            for chunk, (stored, values) in enumerate(record.chunks.tolist()):
                if shard.computed_checksum(chunk) == stored:
                    continue
                if values_checksum(shard.decode(chunk)) != values:
                    return f"the values of chunk {chunk} are not those that were committed"
    except (FileNotFoundError, NotADirectoryError):
        return "it is missing"
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def _crc32(expected: Expected, key: str) -> int:
    crc32, offset = 0, 0
    with expected.files.open(key) as file:
        while piece := file.read(offset, _PIECE_BYTES):
            crc32, offset = zlib.crc32(piece, crc32), offset + len(piece)
    return crc32


def _shard(expected: Expected, key: str, n_chunks: int) -> ShardFile:
    """Return a shard, to be opened; raise ValueError if the array's metadata are lost."""
    declared = expected.declared(array_of(key))
    steps, *rest = declared.chunk_shape
    return ShardFile(
        expected.files,
        key,
        n_chunks=n_chunks,
        shape=(rest[0], steps, *rest[1:]) if rest else (steps,),
        dtype=declared.dtype,
        fill=declared.fill,
    )
