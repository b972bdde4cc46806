"""The ledger and the commit record: JSON that ends with its own checksum.

The commit record says how many rows count, and the ledger has a line for each commit.

A line is a promise: it is on disk before any file that it tells of has its name. So whatever a
crash left, each file is the one that the last committed line tells of, or one of a line behind it,
and a line that was torn told of nothing yet. (A chunk file ends with its own crc32c, and the crc32c
of any such file is the same constant: lines need another, and have CRC-32.)
"""

import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, Self, TypeVar

import msgspec
import numpy as np

from thimble_zarr.errors import DamagedStoreError, StoreError
from thimble_zarr.format.audited import AuditCounts
from thimble_zarr.format.documents import (
    MAX_DOCUMENT_BYTES,
    Json,
    TooLargeError,
    check_depth,
    check_size,
    decoded,
)
from thimble_zarr.format.overhead import Overhead
from thimble_zarr.format.versions import FORMAT_VERSION, is_read
from thimble_zarr.store.files.base import Files, OpenFile
from thimble_zarr.store.keys import COMMIT, LEDGER, METADATA, array_of, is_chunk_key, is_metadata

T = TypeVar("T")

Document = Mapping[str, Any]
"""The content of a `zarr.json`."""

MAX_LINE_BYTES = MAX_DOCUMENT_BYTES
"""Longest line that is read. A line has some 30 bytes a chunk of its block."""

_PIECE_BYTES = 2**16
_MAX_COMMIT_BYTES = 4096
_SEAL = b', "crc32": '
Count = Annotated[int, msgspec.Meta(ge=0)]
Crc = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
Marked = dict[str, list[tuple[Count, Count]]]  # by group, as first row and behind the last


class Commit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The commit record.

    Attributes
    ----------
    n_rows
        Committed rows: rows 0 to `n_rows - 1` can be read.
    complete
        True once the writer has closed the store.
    ledger_bytes, ledger_crc32
        How much of the ledger counts, and the CRC-32 of that much.
    """

    n_rows: Count = 0
    complete: bool = False
    ledger_bytes: Count = 0
    ledger_crc32: Count = 0

    @classmethod
    def read(cls, files: Files) -> Self:
        """Read the commit record of a store; raise DamagedStoreError if there is no sound one."""
        try:
            record = unseal(files.get(COMMIT, _MAX_COMMIT_BYTES), dict[str, Any])
            if not is_read(record.pop("format_version", None)):
                raise ValueError("it has another format version")
            return msgspec.convert(record, cls)
        except FileNotFoundError as error:
            raise DamagedStoreError("it has no commit record") from error
        except ValueError as error:
            raise DamagedStoreError(f"its commit record is malformed: {error}") from error

    @classmethod
    def read_checked(cls, files: Files) -> Self:
        """Read it, unless it claims other rows than the last line that it covers.

        A ledger that cannot be read, or is cut off, says nothing against it.
        """
        commit = cls.read(files)
        try:
            last = read_last_line(files, commit.ledger_bytes)
        except (OSError, ValueError):
            return commit
        end, n_rows = 0, 0
        if last is not None:
            end, n_rows = last.stop, last.entry.rows[1] if last.entry else commit.n_rows
        if end == commit.ledger_bytes and n_rows != commit.n_rows:
            raise DamagedStoreError(
                f"its commit record claims {commit.n_rows:,} rows, and the ledger has {n_rows:,}; "
                "`thimble-zarr repair` writes the record again from the ledger"
            )
        return commit

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        return seal({"format_version": FORMAT_VERSION, **msgspec.structs.asdict(self)})


class FileEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a line says of a file: its size, and unless it is a shard its CRC-32."""

    bytes: Count
    crc32: Crc | None = None


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of the ledger: a commit, a cut where the run was resumed, or a repair.

    `rows` are the first row of the block and the one behind its last. `chunks` has for each array
    with shards the `Checksums` of each chunk of its shard, 0 of one that is left out, and `values`
    for each array of keyframes the checksum of each chunk of its variable, once that is decoded.
    `filled` and `missing` are by group the rows, as first and behind the last, of which only the
    gradient was copied: the rest was worked out, or is not known. `metadata`, every document, are
    in the first line and after a repair. A cut says when the run was `resumed` after the last of
    the rows, and which files are `removed`; a repair what was `repaired`, which arrays are
    `dropped`, and which commit record it `replaces`.
    """

    rows: tuple[Count, Count]
    files: dict[str, FileEntry]
    chunks: dict[str, list[tuple[Crc, Crc]]]
    values: dict[str, list[Crc]] = {}
    metadata: dict[str, dict[str, Any]] = {}
    overhead: dict[str, int | float] | None = None
    audit: dict[str, Count] | None = None
    filled: Marked = {}
    missing: Marked = {}
    removed: list[str] = []
    dropped: list[str] = []
    resumed: str | None = None
    repaired: str | list[str] | None = None
    replaces: list[int | bool] | None = None


FileChecksums = int | tuple[int, ...]
"""What a file is known by: its CRC-32, or of a shard the stored checksums of its chunks, 0 of one
that is left out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FileRecord:
    """What a line of the ledger says of a file.

    `crc32` is None of a shard, which has the `Checksums` of its `chunks`: uint32, shape
    `(chunk, 2)`; one of keyframes also the checksums of decoded `values`: uint32, `(chunk,)`. The
    rows are those of the line's block, and `line` is where the line begins.
    """

    n_bytes: int
    crc32: int | None = None
    chunks: np.ndarray | None = None
    values: np.ndarray | None = None
    first_row: int = 0
    end_row: int = 0
    line: int = 0

    @property
    def checksums(self) -> FileChecksums:
        """What the file is known by among all that were recorded."""
        return tuple(self.chunks[:, 0].tolist()) if self.chunks is not None else self.crc32 or 0


def tell(records: Mapping[str, FileRecord]) -> dict[str, Json]:
    """Return what a line says of files: its `files` and `chunks`, which `Line.records` reads."""
    files: dict[str, Json] = {}
    chunks: dict[str, Json] = {}
    values: dict[str, Json] = {}
    for key, record in records.items():
        files[key] = {"bytes": record.n_bytes}
        if record.crc32 is not None:
            files[key] = {"bytes": record.n_bytes, "crc32": record.crc32}
        if record.chunks is not None:
            chunks[array_of(key)] = record.chunks.tolist()
        if record.values is not None:
            values[array_of(key)] = record.values.tolist()
    told: dict[str, Json] = {"files": files, "chunks": chunks}
    return told | ({"values": values} if values else {})


@dataclass(frozen=True)
class Line:
    """A line of the ledger, from the byte `start` on: what it says, or why that cannot be read."""

    start: int
    content: bytes
    entry: Entry | None
    problem: str = ""

    @classmethod
    def parse(cls, start: int, content: bytes) -> Self:
        """Return a line, sound or not."""
        try:
            if not content.endswith(b"\n"):
                raise SealError
            entry = unseal(content, Entry)
            check_depth(entry.metadata)  # all else has a type
            return cls(start, content, entry)
        except SealError:
            return cls(start, content, None, "the checksum of a line does not match")
        except ValueError as error:
            return cls(start, content, None, f"a line is malformed: {error}")

    @property
    def stop(self) -> int:
        """The byte behind its last."""
        return self.start + len(self.content)

    def records(self, prefix: str | None = "") -> dict[str, FileRecord]:
        """Return what it says of each file whose key begins with a prefix, of none without one.

        Raises ValueError if it cannot be read, or tells of a file that no store has.
        """
        if self.entry is None:
            raise ValueError(self.problem)
        first_row, end_row = self.entry.rows
        records = {}
        for key, file in self.entry.files.items():
            if not is_chunk_key(key):
                raise ValueError(f"it has a file {key!r} of {file.bytes} bytes, as no store has")
            if prefix is None or not key.startswith(prefix):
                continue
            chunks = self.entry.chunks.get(array_of(key))
            values = self.entry.values.get(array_of(key))
            if (chunks is None) == (file.crc32 is None):
                raise ValueError(f"a line is malformed: it has no checksum of {key}, or two")
            records[key] = FileRecord(
                n_bytes=file.bytes,
                crc32=file.crc32,
                chunks=None if chunks is None else np.array(chunks, np.uint32).reshape(-1, 2),
                values=None if values is None else np.array(values, np.uint32),
                first_row=first_row,
                end_row=end_row,
                line=self.start,
            )
        return records


@dataclass
class Ledger:
    """What lines of a ledger say together, once they are added one after the other.

    Attributes
    ----------
    prefix
        What the keys of the files begin with that are noted: of all by default, of none if None.
    records
        For each file that is not removed what the last line that tells of it says.
    ends
        The row behind each block, by its first row.
    metadata
        Every metadata document as it was declared.
    overhead
        What recording took, by the first row of each block: all commits of it together.
    audits
        How many steps of a block were audited, by its first row, where they were.
    marked
        By the first row of a block which of its rows are filled in, and which missing, by group.
    resumed_after, repairs
        Steps after which the run was resumed, and what repairs did, in their own words.
    """

    prefix: str | None = ""
    records: dict[str, FileRecord] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)
    metadata: dict[str, Document] = field(default_factory=dict)
    overhead: dict[int, Overhead] = field(default_factory=dict)
    audits: dict[int, AuditCounts] = field(default_factory=dict)
    marked: dict[int, tuple[Marked, Marked]] = field(default_factory=dict)
    resumed_after: list[int] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, files: Files, commit: Commit, *, prefix: str | None = "") -> Self:
        """Add up the committed part of a ledger.

        Raises ValueError if any line of it cannot be read, or it has not that size and CRC-32.
        """
        ledger, stop, found = cls(prefix), 0, 0
        for line in read_lines(files, stop=commit.ledger_bytes):
            try:
                ledger.add(line)
            except ValueError as error:
                raise ValueError(f"its line at byte {line.start}: {error}") from error
            stop, found = line.stop, zlib.crc32(line.content, found)
        if (stop, found) != (commit.ledger_bytes, commit.ledger_crc32):
            raise ValueError("it is not the one that was committed")
        return ledger

    def add(self, line: Line) -> None:
        """Take a line at its word; raise ValueError, and change nothing, if it cannot be read."""
        records, entry = line.records(self.prefix), line.entry
        assert entry is not None
        if not all(map(is_metadata, entry.metadata)):
            raise ValueError("it has metadata of a place that no store has")
        first_row, end_row = entry.rows
        if entry.resumed is not None:  # the run went on from there
            self.ends = {row: end for row, end in self.ends.items() if row < end_row}
            self.audits = {row: of for row, of in self.audits.items() if row < end_row}
            self.marked = {row: of for row, of in self.marked.items() if row < end_row}
            self.resumed_after.append(end_row - 1)
            for key in entry.removed:
                self.records.pop(key, None)
        self.ends[first_row] = end_row
        self.records |= records
        self.metadata |= entry.metadata
        for array in entry.dropped:
            self.metadata.pop(f"{array}/{METADATA}", None)
            for key in [key for key in self.records if array_of(key) == array]:
                del self.records[key]
        if isinstance(entry.repaired, list):
            self.repairs += entry.repaired
        if entry.resumed is None and entry.repaired is None:  # a block was written
            self.marked[first_row] = entry.filled, entry.missing
        if entry.audit is not None:
            self.audits[first_row] = AuditCounts.from_json(entry.audit)
        if entry.overhead is not None:
            n_bytes = sum(file.bytes for file in entry.files.values())
            spent = Overhead.from_json(entry.overhead) + Overhead(n_bytes=n_bytes)
            self.overhead[first_row] = self.overhead.get(first_row, Overhead()) + spent


class SealError(ValueError):
    """A checksum at the end of JSON does not match, or there is none."""


def seal(entry: Mapping[str, Json]) -> bytes:
    """Return an entry as JSON, with the checksum of all that comes before it as the last item.

    Raises StoreError if it is more than is read.
    """
    content = json.dumps(entry).encode()[:-1]
    sealed = content + _SEAL + str(zlib.crc32(content)).encode() + b"}"
    try:
        check_size(sealed + b"\n")
    except TooLargeError as error:
        raise StoreError(
            f"a line of the ledger cannot be written: {error}; record fewer parameters in a store"
        ) from error
    return sealed


def unseal(content: bytes, kind: type[T]) -> T:
    """Return the entry that `seal` made, without its checksum.

    Raises ValueError if its checksum does not match, or it is not of that kind.
    """
    value, _, checksum = content.rstrip(b"\n").rpartition(_SEAL)
    if checksum != str(zlib.crc32(value)).encode() + b"}":
        raise SealError("its checksum does not match")
    return decoded(value + b"}", kind)


class _Stream(io.RawIOBase):
    """An open file of a store as one that Python reads lines of."""

    def __init__(self, file: OpenFile, offset: int) -> None:
        self._file, self._offset = file, offset

    def readable(self) -> bool:
        return True

    def readinto(self, memory: Any) -> int:
        n_bytes = self._file.read_into(memory, self._offset)
        self._offset += n_bytes
        return n_bytes


def read_lines(files: Files, start: int = 0, stop: int | None = None) -> Iterator[Line]:
    """Yield the lines of a ledger, one in memory at a time, sound or not.

    `start` and `stop` are the bytes to read, whole lines: to the end by default, where the last may
    not be whole.
    """
    with files.open(LEDGER) as file:
        end = file.n_bytes if stop is None else min(stop, file.n_bytes)
        lines = io.BufferedReader(_Stream(file, start), _PIECE_BYTES)
        while start < end and (content := lines.readline(min(end - start, MAX_LINE_BYTES))):
            yield Line.parse(start, content)
            start += len(content)


def read_last_line(files: Files, stop: int) -> Line | None:
    """Return the line that ends at a byte, or where the file ends before it; None if it has none.

    It reads a few times the longest line at most, whatever the file holds.
    """
    content = b""
    with files.open(LEDGER) as ledger:
        start = stop = min(stop, ledger.n_bytes)
        while start and b"\n" not in content[:-1] and len(content) <= MAX_LINE_BYTES:
            n_bytes = min(start, max(_PIECE_BYTES, len(content)))
            start -= n_bytes
            content = ledger.read(start, n_bytes) + content
    begin = content[:-1].rfind(b"\n") + 1
    return Line.parse(start + begin, content[begin:]) if content else None


def unchanged_rows(files: Files, commit: Commit, n_bytes: int, crc32: int) -> int:
    """Return how many of the first rows were there when the ledger had that size and CRC-32.

    None were, if it does not begin so; `sys.maxsize` if nothing was cut off or repaired since.
    Raises ValueError if a line that was added cannot be read.
    """
    found = 0
    for line in read_lines(files, stop=n_bytes):
        found = zlib.crc32(line.content, found)
    if found != crc32:
        return 0
    unchanged = sys.maxsize
    for line in read_lines(files, n_bytes, commit.ledger_bytes):
        if line.entry is None:
            raise ValueError(line.problem)
        if line.entry.repaired is not None:
            return 0
        if line.entry.resumed is not None:
            unchanged = min(unchanged, line.entry.rows[1])
    return unchanged


def told_files(lines: Iterable[Line]) -> Iterator[tuple[str, FileRecord]]:
    """Yield each file that sound lines tell of, and what they say of it, in their order."""
    for line in lines:
        with suppress(ValueError):
            yield from line.records().items()


def recorded_files(lines: Iterable[Line]) -> dict[FileChecksums, str]:
    """Return every file that sound lines ever told of, by what it is known by.

    One without a chunk is known by nothing: there may be many.
    """
    told = ((record.checksums, key) for key, record in told_files(lines))
    return {checksums: key for checksums, key in told if checksums and any_chunk(checksums)}


def any_chunk(checksums: FileChecksums) -> bool:
    """Return whether a file has any chunk that is not left out."""
    return isinstance(checksums, int) or any(checksums)
