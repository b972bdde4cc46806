"""Copy what is committed of a store, in an order in which whoever reads the copy never sees half.

The ledger goes first, because a line is a promise: it must be there before any file that it tells
of. Then go the files that it tells of and the metadata of arrays, then the commit record, and at
last the metadata of the root. Where rows were taken back, the copy is first cut as the store was. A
copy that was cut off is gone on with: what is there is skipped.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from threading import Lock

from thimble_zarr.errors import DamagedStoreError, StoreExistsError
from thimble_zarr.store.contents import Contents, reading
from thimble_zarr.store.files.base import Files
from thimble_zarr.store.files.memory import MemoryFiles
from thimble_zarr.store.files.objects import Arrived
from thimble_zarr.store.integrity.altered import name_of_chunks
from thimble_zarr.store.integrity.expected import Expected, read_found
from thimble_zarr.store.integrity.files import difference
from thimble_zarr.store.integrity.metadata import document_difference
from thimble_zarr.store.keys import COMMIT, LEDGER, METADATA
from thimble_zarr.store.ledger import Commit, FileRecord, Ledger, Line, read_lines
from thimble_zarr.store.remote.target import Target

Reach = Callable[[int, int], object]
"""Called with the bytes that were looked at, and those there are."""

_AT_ONCE = 4
"""Files that are copied at once. Each is held in memory."""


class MovedOnError(Exception):
    """The writer has committed while files were copied: begin again."""


@dataclass(frozen=True)
class Snapshot:
    """What was committed of a store at a moment.

    Attributes
    ----------
    commit, record
        The commit record, and its bytes.
    lines
        The ledger as far as it is committed, and the whole lines behind: of a commit that is being
        made, or was cut off, files may be there already.
    expected, promised
        What the store should hold, and what the lines behind the commit say of files.
    """

    files: Files
    commit: Commit
    record: bytes
    lines: bytes
    expected: Expected
    promised: Mapping[str, list[FileRecord]]

    @property
    def records(self) -> Mapping[str, FileRecord]:
        """What is committed of each file."""
        return self.expected.ledger.records

    def is_in(self, sizes: Mapping[str, int]) -> bool:
        """Return whether all its files are among those that are somewhere, in their sizes."""
        sound = all(sizes.get(key) == record.n_bytes for key, record in self.records.items())
        return sound and {METADATA, *self.expected.ledger.metadata} <= sizes.keys()

    def document(self, key: str) -> bytes:
        """Return metadata; raise DamagedStoreError or MovedOnError if they are not as declared."""
        content = self.files.get(key)
        found, problem = read_found(MemoryFiles({key: content}), key)
        declared = self.expected.ledger.metadata.get(key, found)
        if problem := problem or document_difference(self.expected, found, declared):
            self.check_not_moved_on()
            raise DamagedStoreError(
                f"{self.files.path}: {key}: {problem}; `thimble-zarr verify` tells more"
            )
        return content

    def fitting(self, key: str, content: bytes) -> FileRecord:
        """Return the record that content fits; raise DamagedStoreError or MovedOnError if none."""
        files = MemoryFiles({key: content})
        one = Expected(files, ledger=self.expected.ledger)
        problem = ""
        for record in chain([self.records[key]], self.promised.get(key, [])):
            if not (problem := _difference(one, key, record)):
                return record
        self.check_not_moved_on()
        raise DamagedStoreError(
            f"{self.files.path}: {key} is not what was committed: {problem}; nothing of it is "
            "copied; `thimble-zarr verify` tells more"
        )

    def check_not_moved_on(self) -> None:
        """Raise MovedOnError if the writer has committed, or begun to, since it was read."""
        if self.files.get(COMMIT) != self.record or self.files.size(LEDGER) > len(self.lines):
            raise MovedOnError


@dataclass
class Source:
    """A store that is copied, while it is recorded too: of its ledger only what is new is read."""

    files: Files
    _ledger: Ledger = field(default_factory=Ledger)
    _lines: bytes = b""
    _crc32: int = 0

    def snapshot(self) -> Snapshot:
        """Return what is committed now.

        Raises NotAStoreError, UnsupportedFormatError or DamagedStoreError.
        """
        Contents.read(self.files)
        record = self.files.get(COMMIT)
        with reading(self.files.path):
            commit = Commit.read(MemoryFiles({COMMIT: record}))
        try:
            if commit.ledger_bytes >= len(self._lines):
                with suppress(ValueError):  # it is not what it was: it was repaired
                    return self._read_on(commit, record)
            self._forget()
            return self._read_on(commit, record)
        except ValueError as error:
            self._forget()
            raise DamagedStoreError(
                f"{self.files.path}: the ledger is not the one that was committed; "
                "`thimble-zarr verify` tells more"
            ) from error

    def _forget(self) -> None:
        self._ledger, self._lines, self._crc32 = Ledger(), b"", 0

    def _read_on(self, commit: Commit, record: bytes) -> Snapshot:
        """Read what comes after the lines that are known; raise ValueError if it does not fit."""
        found = [*read_lines(self.files, len(self._lines))]
        committed = [line for line in found if line.stop <= commit.ledger_bytes]
        behind = [line for line in found[len(committed) :] if line.entry is not None]
        new = b"".join(line.content for line in committed)
        crc32 = zlib.crc32(new, self._crc32)
        if (len(self._lines) + len(new), crc32) != (commit.ledger_bytes, commit.ledger_crc32):
            raise ValueError
        for line in committed:
            self._ledger.add(line)
        self._lines, self._crc32 = self._lines + new, crc32
        promised: dict[str, list[FileRecord]] = {}
        for line in behind:
            for key, told in line.records().items():
                promised.setdefault(key, []).append(told)
        lines = self._lines + b"".join(line.content for line in behind)
        ledger, n_bytes = self._ledger, commit.ledger_bytes
        expected = Expected(self.files, commit, commit.n_rows, ledger, n_bytes)
        return Snapshot(self.files, commit, record, lines, expected, promised)


def _difference(expected: Expected, key: str, record: FileRecord) -> str:
    try:
        return difference(expected, key, record)
    except (FileNotFoundError, ValueError) as error:
        return str(error)


@dataclass
class Copied:
    """What was copied, and what was there before.

    Attributes
    ----------
    n_rows, complete
        Rows that the copy has, and whether the recording has ended.
    n_files, n_bytes
        Files that were written, and their size.
    n_skipped
        Files that were there.
    """

    n_rows: int = 0
    complete: bool = False
    n_files: int = 0
    n_bytes: int = 0
    n_skipped: int = 0


def copy_committed(source: Source, target: Target, reach: Reach, copied: Copied) -> None:
    """Copy what is committed now, and note it in `copied`.

    Raises
    ------
    StoreExistsError, StoreLockedError
        If something else is there, or somebody else writes there.
    MovedOnError
        If the writer was quicker.
    """
    snapshot = source.snapshot()
    if not snapshot.commit.n_rows:
        return
    sizes = target.sizes()
    known = _known(snapshot, target, sizes)
    n_known = known.ledger_bytes
    is_whole = target_record(target, sizes) == snapshot.record and snapshot.is_in(sizes)
    if is_whole and target.keeps_what_it_took:
        copied.n_rows, copied.complete = snapshot.commit.n_rows, snapshot.commit.complete
        return
    if target.claim():  # another may have been here meanwhile
        return copy_committed(source, target, reach, copied)
    copy = _Copy(snapshot, target, copied, reach)
    copy.write(LEDGER, snapshot.lines)
    if (cut := _cut(snapshot, known)) is not None:
        copy.write(COMMIT, cut.to_bytes())
    copy.files_of_blocks({key for key in sizes if sizes[key] == copy.size(key)}, n_known)
    documents = [key for key in snapshot.expected.ledger.metadata if key != METADATA]
    copy.documents(documents)
    target.sync()
    copy.write(COMMIT, snapshot.record)
    copy.write(METADATA, snapshot.document(METADATA))
    target.delete(key for key in _removed(snapshot, n_known) if key in sizes)
    copied.n_rows, copied.complete = snapshot.commit.n_rows, snapshot.commit.complete


def target_record(target: Target, sizes: Mapping[str, int]) -> bytes | None:
    """Return the bytes of the commit record of a copy, None where there is none."""
    return target.files.get(COMMIT) if COMMIT in sizes else None


def _known(snapshot: Snapshot, target: Target, sizes: Mapping[str, int]) -> Commit:
    """Return what the copy has committed, nothing by default; raise StoreExistsError if it is none.

    What a commit tells of was seen to be there when it was made.
    """
    where = target.files.path
    record, commit = target_record(target, sizes), Commit()
    if record is not None:
        with reading(where):
            commit = Commit.read(MemoryFiles({COMMIT: record}))
        n_bytes = commit.ledger_bytes
        if n_bytes > snapshot.commit.ledger_bytes:
            raise StoreExistsError(
                f"{where} holds {commit.n_rows:,} rows, and {snapshot.files.path} has not all that "
                "was committed there; choose another place"
            )
        is_same = zlib.crc32(snapshot.lines[:n_bytes]) == commit.ledger_crc32
    elif LEDGER in sizes:
        lines = read_lines(target.files)
        is_same = next(lines, _NONE).content == next(_lines(snapshot.lines), _NONE).content
    else:
        is_same = not sizes
    if not is_same:
        raise StoreExistsError(
            f"{where} holds something else than {snapshot.files.path}, and is never overwritten; "
            "choose another place"
        )
    return commit


_NONE = Line(0, b"", None)


def _lines(content: bytes, start: int = 0) -> Iterator[Line]:
    return read_lines(MemoryFiles({LEDGER: content}), start)


def _cut(snapshot: Snapshot, known: Commit) -> Commit | None:
    """Return what was committed when rows that a copy has were taken back, where any were.

    Rows that it never had may have been taken back, too: that changes nothing of it. Blocks that
    were recorded again have the keys of those that were taken back: before they go, the copy must
    not count these any more.
    """
    cut, crc32 = None, zlib.crc32(snapshot.lines[: known.ledger_bytes])
    for line in _lines(snapshot.lines[: snapshot.commit.ledger_bytes], known.ledger_bytes):
        crc32 = zlib.crc32(line.content, crc32)
        if line.entry is None or line.entry.resumed is None:
            continue
        n_rows = line.entry.rows[1]
        if n_rows < (cut or known).n_rows:
            cut = Commit(n_rows=n_rows, ledger_bytes=line.stop, ledger_crc32=crc32)
    return cut


def _removed(snapshot: Snapshot, n_known: int) -> Iterable[str]:
    """Yield the files that were removed, or dropped, since a copy was made."""
    for line in _lines(snapshot.lines[: snapshot.commit.ledger_bytes], n_known):
        if line.entry is not None:
            yield from (key for key in line.entry.removed if key not in snapshot.records)


@dataclass
class _Reached:
    """Adds the bytes up that were looked at, in whichever thread that was."""

    reach: Reach
    total: int
    _n_done: int = 0
    _lock: Lock = field(default_factory=Lock)

    def add(self, n_bytes: int) -> None:
        """Say that there are more."""
        with self._lock:
            self._n_done += n_bytes
            self.reach(self._n_done, self.total)


@dataclass
class _Copy:
    """Writes files, several at once, and counts them."""

    snapshot: Snapshot
    target: Target
    copied: Copied
    reach: Reach

    def size(self, key: str) -> int:
        """Return the size of a committed file, -1 of others."""
        record = self.snapshot.records.get(key)
        return -1 if record is None else record.n_bytes

    def files_of_blocks(self, there: set[str], n_known: int) -> None:
        """Write all committed files but those that a commit of the copy tells of."""
        records, missing = self.snapshot.records, []
        reached = _Reached(self.reach, sum(record.n_bytes for record in records.values()))
        for key, record in records.items():
            if key in there and record.line < n_known and self._is_sound(key, record):
                self.copied.n_skipped += 1
                reached.add(record.n_bytes)
            else:
                missing.append(key)
        for n_bytes in self._each(lambda key: self._copy_file(key, reached.add), missing):
            self._count(n_bytes)

    def _is_sound(self, key: str, record: FileRecord) -> bool:
        """Return whether a file of a commit of the copy is what was committed."""
        if self.target.keeps_what_it_took:
            return True
        files = MemoryFiles({key: self.target.files.get(key)})
        return not _difference(Expected(files, ledger=self.snapshot.expected.ledger), key, record)

    def documents(self, keys: Iterable[str]) -> None:
        """Write metadata."""
        document = self.snapshot.document
        for n_bytes in self._each(lambda key: self._write(key, document(key)), [*keys]):
            self._count(n_bytes)

    def _each(self, call: Callable[[str], int | None], keys: Sequence[str]) -> Iterator[int | None]:
        """Make a call for each key, several at once, and yield what they return, in order."""
        executor = ThreadPoolExecutor(_AT_ONCE)
        try:
            yield from executor.map(call, keys)
        finally:
            executor.shutdown(cancel_futures=True)

    def _copy_file(self, key: str, arrived: Arrived) -> int | None:
        content = self.snapshot.files.get(key)
        record = self.snapshot.fitting(key, content)
        return self._write(key, content, name_of_chunks(record), arrived)

    def write(self, key: str, content: bytes) -> None:
        """Write a file, unless it is there."""
        self._count(self._write(key, content))
        self.target.sync()

    def _write(
        self,
        key: str,
        content: bytes,
        published_as: str = "",
        arrived: Arrived = lambda n_bytes: None,
    ) -> int | None:
        """Write a file, and return its size, None if it is there."""
        if self.target.has(key, content):
            arrived(len(content))
            return None
        self.target.put(key, content, published_as, arrived)
        return len(content)

    def _count(self, n_bytes: int | None) -> None:
        if n_bytes is None:
            self.copied.n_skipped += 1
        else:
            self.copied.n_files += 1
            self.copied.n_bytes += n_bytes
