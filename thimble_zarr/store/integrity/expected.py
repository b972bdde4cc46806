"""What a store should hold, by its commit record and its ledger, and what is wrong with the two.

The first line of the ledger has a copy of all metadata, each line the sizes and checksums of the
files of a block: so what there should be is known whatever was recorded.
"""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from thimble_zarr.errors import DamagedStoreError, NotAStoreError, UnsupportedFormatError
from thimble_zarr.format.schema import ATTRIBUTE, FORMAT_VERSION
from thimble_zarr.store.files.documents import is_chunk_key, leads_out, read_document
from thimble_zarr.store.integrity.result import Discrepancy
from thimble_zarr.store.ledger import (
    FileChecksums,
    Line,
    read_last_line,
    read_lines,
    recorded_files,
)
from thimble_zarr.store.metadata import Declared
from thimble_zarr.store.reader import BOOKKEEPING, COMMIT, LEDGER, METADATA, Commit, array_of
from thimble_zarr.store.shard import Checksums

Document = dict[str, Any]

_MAX_FILE_BYTES = 2**63


@dataclass(frozen=True)
class Record:
    """What a line of the ledger says of a file.

    Attributes
    ----------
    n_bytes
        Its size.
    crc32
        That of its content, None of a shard, whose chunks have checksums of their own.
    line
        Where the line begins.
    first_row, end_row
        The rows of the line's block.
    """

    n_bytes: int
    crc32: int | None
    line: int
    first_row: int
    end_row: int


@dataclass
class Expected:
    """What a store should hold.

    Attributes
    ----------
    path
        The store.
    commit
        The commit record, None if it cannot be read.
    n_rows
        Rows that are committed: without a commit record, those of the sound lines.
    files
        What the last committed line that tells of a file says of it.
    metadata
        Every metadata document as the writer declared it; empty where that is lost.
    lines
        Where each sound committed line begins, and the row behind its last, by the first row of its
        block; the last of each.
    end
        Where the committed part of the ledger ends.
    findings
        What is wrong with the bookkeeping.
    repairs
        What repairs did, in their own words.
    doubtful_until
        The ledger is damaged up to this byte: what a line before it says may be out of date.
    """

    path: Path
    commit: Commit | None = None
    n_rows: int = 0
    files: dict[str, Record] = field(default_factory=dict)
    metadata: dict[str, Document] = field(default_factory=dict)
    lines: dict[int, tuple[int, int]] = field(default_factory=dict)
    end: int = 0
    findings: list[Discrepancy] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)
    doubtful_until: int = 0
    _last: tuple[int, Mapping[str, Any]] | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the store was closed."""
        return self.commit is not None and self.commit.complete

    @property
    def has_whole_ledger(self) -> bool:
        """Whether every line that was committed is there, so that no other can be the last word."""
        return not self.doubtful_until

    def is_doubtful(self, record: Record) -> bool:
        """Whether a line that is lost may have said something else of a file."""
        return record.line < self.doubtful_until

    def entry(self, line: int) -> Mapping[str, Any]:
        """Return what the ledger's line at a byte says. The last one is kept."""
        if self._last is None or self._last[0] != line:
            found = next(read_lines(self.path / LEDGER, line)).entry
            if found is None:
                raise DamagedStoreError(f"{self.path}: the ledger changed while it was read")
            self._last = (line, found)
        return self._last[1]

    def promised(self, key: str) -> Iterator[Record]:
        """Yield what lines behind the commit say of a file: it is that, or as it was committed.

        They are of a commit that was cut off, or of a writer that is at work.
        """
        if not (self.path / LEDGER).exists():
            return
        for line in read_lines(self.path / LEDGER, self.end):
            promise = _read_line(line)
            if isinstance(promise, _Promise) and key in promise.files:
                yield promise.files[key]

    @cached_property
    def recorded_files(self) -> dict[FileChecksums, str]:
        """Every file that was committed, by its checksums, as far as the ledger is there."""
        if not (self.path / LEDGER).exists():
            return {}
        lines = read_lines(self.path / LEDGER, stop=self.end)
        return recorded_files(line.entry for line in lines if line.entry is not None)

    @cached_property
    def documents(self) -> dict[str, Document]:
        """Every metadata document: as declared, or where that is lost as it is on disk."""
        if self.metadata:
            return self.metadata
        files = sorted(self.path.rglob(METADATA))
        return {file.relative_to(self.path).as_posix(): read_found(file)[0] for file in files}

    def declared(self, array: str) -> Declared:
        """Return what an array was declared to be; if the ledger lost that, what is on disk.

        Raises
        ------
        ValueError
            If neither can be read.
        """
        key = f"{array}/{METADATA}"
        if key in self.metadata:
            return Declared.of(self.metadata[key])
        try:
            return Declared.read(self.path / key)
        except OSError as error:
            raise ValueError(f"the metadata of {array} cannot be read: {error}") from error

    def missing_rows(self) -> Iterator[tuple[int, int]]:
        """Yield committed rows that are in no sound line."""
        row = 0
        for first_row, (_, end_row) in sorted(self.lines.items()):
            if first_row > row:
                yield row, first_row
            row = max(row, end_row)
        if row < self.n_rows:
            yield row, self.n_rows

    def add(self, promise: "_Promise", start: int) -> None:
        """Take a committed line, which begins at a byte, at its word."""
        if promise.is_resumption:  # the run went on from there
            self.lines = {row: at for row, at in self.lines.items() if row < promise.end_row}
        for key in promise.removed:
            self.files.pop(key, None)
        self.lines[promise.first_row] = (start, promise.end_row)
        self.metadata |= promise.metadata
        self.repairs += promise.repairs
        self.files |= promise.files
        for array in promise.dropped:
            self.metadata.pop(f"{array}/{METADATA}", None)
        if promise.dropped:
            gone = {*promise.dropped}
            self.files = {key: one for key, one in self.files.items() if array_of(key) not in gone}

    def doubt(self, where: str, what: str, *, until: int = _MAX_FILE_BYTES) -> None:
        """Note that the ledger is damaged before a byte, by default anywhere."""
        self.doubtful_until = max(self.doubtful_until, until)
        self.findings.append(Discrepancy("ledger", where, what))


def read_expected(path: Path) -> Expected:
    """Read commit record and ledger: what there should be, and what is wrong with the two.

    Raises
    ------
    NotAStoreError, UnsupportedFormatError
        If there is no store at `path`, or one of another format version.
    DamagedStoreError
        If too little is left to tell what it should hold.
    """
    _check_is_store(path)
    expected = Expected(path)
    try:
        commit = Commit.read(path / COMMIT)
        if _is_replaced(path, commit):
            raise DamagedStoreError("a repair was cut off before it could write it")
        expected.commit, expected.n_rows = commit, commit.n_rows
    except DamagedStoreError as error:
        expected.findings.append(Discrepancy("commit-record", COMMIT, str(error)))
    try:
        _read_ledger(expected)
    except FileNotFoundError:
        expected.doubt(LEDGER, "it is missing")
    except ValueError as error:
        expected.doubt(LEDGER, str(error))
    for first_row, end_row in expected.missing_rows():
        what = f"it has no line for rows {first_row} to {end_row - 1}"
        expected.doubt(LEDGER, what, until=expected.doubtful_until or _MAX_FILE_BYTES)
    if expected.commit is None and not expected.lines:
        raise DamagedStoreError(
            f"cannot read {path}: neither its commit record nor its ledger can be read, and "
            "nothing else tells what was committed; restore them from a copy"
        )
    return expected


def read_found(file: Path) -> tuple[Document, str]:
    """Return a document, and what is wrong with it."""
    try:
        document = read_document(file)
    except (FileNotFoundError, NotADirectoryError):
        return {}, "it is missing"
    except ValueError as error:
        return {}, f"it cannot be read: {error}"
    return (document, "") if isinstance(document, dict) else ({}, "it is not an object")


def checksums_in(entry: Mapping[str, Any], key: str) -> list[Checksums]:
    """Return what a line of the ledger says of the chunks of a shard."""
    return [Checksums(*map(int, pair)) for pair in entry["chunks"][array_of(key)]]


def _is_replaced(path: Path, commit: Commit) -> bool:
    """Whether a repair has written a ledger that no longer belongs to a commit record."""
    try:
        last = read_last_line(path / LEDGER, _MAX_FILE_BYTES)
    except (FileNotFoundError, ValueError):
        return False
    entry = last.entry if last is not None else None
    return entry is not None and entry.get("replaces") == [*astuple(commit)]


def _check_is_store(path: Path) -> None:
    """Raise NotAStoreError or UnsupportedFormatError for what is none, or another version's."""
    if not path.exists():
        raise NotAStoreError(f"there is nothing at {path}; check the path")
    if path.is_file():
        raise NotAStoreError(
            f"{path} is not a thimble-zarr store but a file; a store is a directory. `thimble-zarr "
            "check` and `thimble-zarr import` read the file of the original notebook"
        )
    if not (path / BOOKKEEPING).is_dir():
        raise NotAStoreError(
            f"{path} is not a thimble-zarr store: it has no {BOOKKEEPING}; "
            "record one with `thimble-zarr train` or `thimble_zarr.Recorder`"
        )
    if leads_out(path / BOOKKEEPING, path):
        raise DamagedStoreError(f"cannot read {path}: {BOOKKEEPING} is a link, and not followed")
    attribute = read_found(path / METADATA)[0].get("attributes", {})
    attribute = attribute.get(ATTRIBUTE) if isinstance(attribute, dict) else None
    version = attribute.get("format_version") if isinstance(attribute, dict) else None
    if type(version) is int and version != FORMAT_VERSION:
        raise UnsupportedFormatError(
            f"cannot read {path}: it has format version {version}, and this release reads version "
            f"{FORMAT_VERSION}; install the thimble-zarr that wrote it, or a newer one"
        )


@dataclass(frozen=True, kw_only=True)
class _Promise:
    """What a line of the ledger promises."""

    first_row: int
    end_row: int
    files: dict[str, Record]
    metadata: dict[str, Document]
    is_resumption: bool
    removed: list[str]
    dropped: list[str]
    repairs: list[str]


def _read_line(line: Line) -> _Promise | str:
    """Return what a line says, or what is wrong with it."""
    if line.entry is None:
        return "the checksum of a line does not match"
    try:
        first_row, end_row = line.entry["rows"]
        files = {
            key: Record(file["bytes"], file.get("crc32"), line.start, first_row, end_row)
            for key, file in line.entry["files"].items()
        }
        for key, record in files.items():
            if not is_chunk_key(key):
                return f"it has a file {key!r} of {record.n_bytes!r} bytes, as no store has"
            if record.crc32 is None:
                checksums_in(line.entry, key)
        metadata = {key: dict(one) for key, one in line.entry.get("metadata", {}).items()}
        for document in metadata.values():
            if "shape" in document or document.get("node_type") != "group":
                Declared.of(document)
        repaired = line.entry.get("repaired")
        return _Promise(
            first_row=first_row,
            end_row=end_row,
            files=files,
            metadata=metadata,
            is_resumption="resumed" in line.entry,
            removed=[str(key) for key in line.entry.get("removed", ())],
            dropped=[str(array) for array in line.entry.get("dropped", ())],
            repairs=[str(step) for step in repaired] if isinstance(repaired, list) else [],
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        return f"a line is malformed: {error!r}"


def _read_ledger(expected: Expected) -> None:
    commit, crc32 = expected.commit, 0
    for line in read_lines(expected.path / LEDGER):
        promise, where = _read_line(line), f"{LEDGER}, byte {line.start}"
        is_committed = commit is None or line.start < commit.ledger_bytes
        if is_committed:
            expected.end, crc32 = line.stop, zlib.crc32(line.content, crc32)
        is_torn = commit is None and not line.content.endswith(b"\n")
        if is_torn or not is_committed:
            what = "a line of a commit that was cut off, or that is being made now"
            expected.findings.append(Discrepancy("uncommitted-line", where, what, is_damage=False))
        elif isinstance(promise, _Promise):
            expected.add(promise, line.start)
        else:
            expected.doubt(where, promise, until=line.stop)
    counted = max((end_row for _, end_row in expected.lines.values()), default=0)
    if commit is None:
        expected.n_rows = counted
    elif expected.end != commit.ledger_bytes or (
        expected.has_whole_ledger and crc32 != commit.ledger_crc32
    ):
        expected.doubt(LEDGER, "it is not the one that was committed, or is cut off")
    elif expected.has_whole_ledger and counted != commit.n_rows:
        expected.n_rows = counted
        what = f"it claims {commit.n_rows:,} rows, and the ledger has {counted:,}"
        expected.findings.append(Discrepancy("commit-record", COMMIT, what))
