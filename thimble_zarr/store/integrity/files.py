"""One file of a committed block against what the ledger says of it."""

import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from thimble_zarr.store.files.documents import leads_out, open_regular
from thimble_zarr.store.integrity.expected import Expected, Record, checksums_in
from thimble_zarr.store.integrity.result import HOW_TO_RESTORE, Discrepancy
from thimble_zarr.store.reader import array_of
from thimble_zarr.store.shard import Checksums, ShardFile, decode_vector, values_checksum

_PIECE_BYTES = 2**20


class State(Enum):
    """What became of a file."""

    RECORDED = auto()
    """It is what a line of the ledger says."""
    UNTOLD = auto()
    """Its own checksums are right, and the line that told of it is lost."""
    ALTERED = auto()
    """Its own checksums are right, and it is not what the ledger says."""
    LOST = auto()
    """It cannot be decoded, or is not there."""


@dataclass(frozen=True)
class FileState:
    """What became of a file.

    Attributes
    ----------
    key
        The file, as a path in the store.
    state
        See there.
    record
        What the ledger says of it: the line that it fits, else the last that was committed.
    problem
        How it differs from what was committed.
    """

    key: str
    state: State
    record: Record | None
    problem: str = ""


def compare_file(expected: Expected, key: str) -> FileState:
    """Read a file and tell what became of it."""
    committed, problem = expected.files.get(key), ""
    if committed is not None:
        problem = _problem(expected, key, committed)
        if not problem:
            return FileState(key, State.RECORDED, committed)
    for record in expected.promised(key):
        if not _problem(expected, key, record):
            return FileState(key, State.RECORDED, record, problem)
    try:
        known = own_checksums(expected, key)
    except (OSError, ValueError, RuntimeError) as error:
        return FileState(key, State.LOST, committed, problem or str(error))
    if committed is None or expected.is_doubtful(committed):
        return FileState(key, State.UNTOLD, committed, problem)
    return FileState(key, State.ALTERED, committed, _how_altered(expected, key, known, problem))


def find_in_file(expected: Expected, key: str) -> Iterator[Discrepancy]:
    """Find what is wrong with a committed file."""
    file, committed = compare_file(expected, key), expected.files[key]
    rows = f"rows {committed.first_row} to {committed.end_row - 1}"
    is_block = committed.crc32 is None
    first_row = committed.first_row if is_block else None
    kind = "damaged-block" if is_block else "damaged-values"
    what = f"{file.problem} ({rows})" if is_block else file.problem
    if file.record is committed and file.state is State.RECORDED:
        n_bytes = (expected.path / key).lstat().st_size
        if n_bytes != committed.n_bytes:
            what = f"it has {n_bytes:,} bytes, not {committed.n_bytes:,}, and the same values"
            yield Discrepancy("size", key, what, is_damage=False)
    elif file.state is State.ALTERED:
        repair = f"none: {HOW_TO_RESTORE}"
        if not is_block:
            repair = (
                "write it again, if the ledger tells the recorded values; else restore it from "
                "a copy"
            )
        yield Discrepancy(kind, key, what, repair, first_row=first_row)
    elif file.state is State.LOST:
        repair = f"end the store before row {first_row}"
        if first_row == 0:
            repair = "none: no row would be left; restore it from a copy"
        elif first_row is None:
            repair = (
                "write steps and tokens again, if all were recorded; set other values to missing; "
                "leave other labels out"
            )
        yield Discrepancy(kind, key, what, repair, first_row=first_row)


def own_checksums(expected: Expected, key: str) -> list[Checksums] | int:
    """Return the checksums of a shard's chunks as the file itself has them, else its CRC-32.

    Raises
    ------
    ValueError
        If its own checksums do not match.
    OSError
        If it cannot be read.
    """
    if problem := _no_plain_file(expected, key):
        raise ValueError(problem)
    declared = expected.declared(array_of(key))
    if not declared.is_sharded:
        with open_regular(expected.path / key) as stream:
            content = stream.read()
        decode_vector(content, declared.file_shape[0], declared.dtype)
        return zlib.crc32(content)
    with _shard(expected, key, declared.n_chunks) as shard:
        return [
            Checksums(shard.computed_checksum(chunk) or 0, values_checksum(shard.decode(chunk)))
            for chunk in range(declared.n_chunks)
        ]


def _problem(expected: Expected, key: str, record: Record) -> str:
    """Return what is wrong with a file, nothing if it is what the record says."""
    if problem := _no_plain_file(expected, key):
        return problem
    file = expected.path / key
    n_bytes = file.lstat().st_size
    if record.crc32 is not None:
        if n_bytes != record.n_bytes:
            return f"it has {n_bytes:,} bytes, not {record.n_bytes:,}"
        return "" if _crc32(file) == record.crc32 else "its checksum does not match"
    if n_bytes == 0:
        return "it is empty"
    return _shard_problem(expected, key, record)


def _no_plain_file(expected: Expected, key: str) -> str:
    """Return why a file is not opened, nothing if it may be."""
    file = expected.path / key
    if leads_out(file.parent, expected.path):
        return "it lies behind a link that leads out of the store"
    try:
        found = file.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return "it is missing"
    return "" if stat.S_ISREG(found.st_mode) else "it is not a plain file"


def _crc32(file: Path) -> int:
    crc32 = 0
    with open_regular(file) as stream:
        while piece := stream.read(_PIECE_BYTES):
            crc32 = zlib.crc32(piece, crc32)
    return crc32


def _shard_problem(expected: Expected, key: str, record: Record) -> str:
    """Compare every chunk of a shard with its checksums.

    A chunk that was stored again is decoded, and may hold the same values.
    """
    checksums = checksums_in(expected.entry(record.line), key)
    try:
        with _shard(expected, key, len(checksums)) as shard:
            for chunk, committed in enumerate(checksums):
                if shard.computed_checksum(chunk) == committed.stored:
                    continue
                if values_checksum(shard.decode(chunk)) != committed.values:
                    return f"the values of chunk {chunk} are not those that were committed"
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def _shard(expected: Expected, key: str, n_chunks: int) -> ShardFile:
    """Return a shard, to be opened; raise ValueError if the array's metadata are lost."""
    declared = expected.declared(array_of(key))
    steps, *rest = declared.chunk_shape
    return ShardFile(
        f"{expected.path}/{key}",
        n_chunks=n_chunks,
        shape=(rest[0], steps, *rest[1:]) if rest else (steps,),
        dtype=declared.dtype,
        fill=declared.fill,
    )


def _how_altered(expected: Expected, key: str, known: list[Checksums] | int, problem: str) -> str:
    """Return how a file differs from the committed one, though its own checksums are right."""
    recorded = recorded_as(expected, known)
    if recorded == key:
        return "it is the file of an earlier commit"
    if recorded is not None:
        return f"it is the file that was recorded as {recorded}, and can be put back there"
    if isinstance(known, int):
        problem = "its own checksum is right, but is not the one in the ledger"
    return f"it was changed after it was recorded: {problem}"


def recorded_as(expected: Expected, known: list[Checksums] | int) -> str | None:
    """Return the key under which a file was recorded, None if it never was."""
    stored = known if isinstance(known, int) else tuple(chunk.stored for chunk in known)
    return expected.recorded_files.get(stored)
