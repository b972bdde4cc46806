"""Is a store what its writer committed? Every byte of it is read once; nothing is written.

The ledger says what there must be: the first line has a copy of all metadata, each line the sizes
and checksums of the files of a block. So what is looked at is the same whatever was recorded. What
the commit does not know (files a crash left, lines of commits that never were) is noted only.
Blocks are checked one after the other, a chunk at a time.
"""

import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from thimble_zarr.errors import (
    DamagedStoreError,
    NotAStoreError,
    StoreError,
    UnsupportedFormatError,
)
from thimble_zarr.format.reader import Checksums, State
from thimble_zarr.format.schema import ATTRIBUTE, FORMAT_VERSION, Schema
from thimble_zarr.store.files.base import PARTIAL
from thimble_zarr.store.files.documents import leads_out, open_regular, read_document
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.keys import (
    BOOKKEEPING,
    COMMIT,
    HOLDER,
    LEDGER,
    LOCK,
    METADATA,
    array_of,
    is_chunk_key,
)
from thimble_zarr.store.ledger import (
    Commit,
    FileChecksums,
    Line,
    read_last_line,
    read_lines,
    recorded_files,
)
from thimble_zarr.store.lock import Holder, recording_of
from thimble_zarr.store.metadata import Declared
from thimble_zarr.store.reader import StorePath
from thimble_zarr.store.shard import ShardFile, decode_vector, values_checksum

Document = dict[str, Any]

_PIECE_BYTES = 2**20

_MAX_FILE_BYTES = 2**63


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something in a store that is not as it was committed.

    Attributes
    ----------
    kind
        What it is, in a word.
    where
        The file, as a path in the store.
    what
        What is wrong there.
    repair
        What `repair` does about it.
    is_damage
        False of what harms nobody: what a crash left behind the last commit.
    first_row
        The first row that cannot be read for it, None where it concerns no rows of its own.
    """

    kind: str
    where: str
    what: str
    repair: str
    is_damage: bool = True
    first_row: int | None = None


@dataclass(frozen=True)
class Verified:
    """What was found of a store.

    Attributes
    ----------
    path
        The store.
    n_rows
        Rows that are committed, as far as that can be told.
    n_files, n_bytes
        Files of committed blocks that were read, and their size.
    findings
        In the order of the files.
    repairs
        What repairs did to the store, as the ledger has it.
    """

    path: Path
    n_rows: int
    n_files: int
    n_bytes: int
    findings: Sequence[Finding]
    repairs: Sequence[str] = ()

    @property
    def is_sound(self) -> bool:
        """Whether everything that was committed is there, as it was committed."""
        return not any(finding.is_damage for finding in self.findings)


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
class Contents:
    """What a store should hold, by its bookkeeping.

    Attributes
    ----------
    path
        The store.
    commit
        The commit record, None if it cannot be read.
    n_rows
        Rows that are committed: without a commit record, those of the sound lines.
    records
        For each file what the last committed line says of it, and after that what later ones say.
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
    commit: Commit | None
    n_rows: int = 0
    records: dict[str, list[Record]] = field(default_factory=dict)
    metadata: dict[str, Document] = field(default_factory=dict)
    lines: dict[int, tuple[int, int]] = field(default_factory=dict)
    end: int = 0
    findings: list[Finding] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)
    doubtful_until: int = 0
    _last: tuple[int, Mapping[str, Any]] | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the store was closed."""
        return self.commit is not None and self.commit.complete

    def entry(self, line: int) -> Mapping[str, Any]:
        """Return what the ledger's line at a byte says. The last one is kept."""
        if self._last is None or self._last[0] != line:
            found = told(next(read_lines(LocalFiles(self.path), line)))
            if found is None:
                raise DamagedStoreError(f"{self.path}: the ledger changed while it was read")
            self._last = (line, found)
        return self._last[1]

    def forget(self, array: str) -> None:
        """Expect an array no longer."""
        self.metadata.pop(f"{array}/{METADATA}", None)
        for key in [key for key in self.records if array_of(key) == array]:
            del self.records[key]

    def go_back(self, n_rows: int, removed: Iterable[str]) -> None:
        """Expect no more than `n_rows` rows: a run was resumed after them."""
        self.lines = {row: line for row, line in self.lines.items() if row < n_rows}
        for key in removed:
            self.records.pop(str(key), None)

    @property
    def has_whole_ledger(self) -> bool:
        """Whether every line that was committed is there, so that no other can be the last word."""
        return not any(finding.kind == "ledger" for finding in self.findings)

    @cached_property
    def recorded_files(self) -> dict[FileChecksums, str]:
        """Every file that was committed, by its checksums, as far as the ledger is there."""
        if not (self.path / LEDGER).exists():
            return {}
        return recorded_files(read_lines(LocalFiles(self.path), stop=self.end))

    def may_be_out_of_date(self, record: Record) -> bool:
        """Whether a line that is lost may have said something else of a file."""
        return record.line < self.doubtful_until

    def missing_rows(self) -> Iterator[tuple[int, int]]:
        """Yield committed rows that are in no sound line."""
        row = 0
        for first_row, (_, end_row) in sorted(self.lines.items()):
            if first_row > row:
                yield row, first_row
            row = max(row, end_row)
        if row < self.n_rows:
            yield row, self.n_rows


def verify(
    path: StorePath, progress: Callable[[int, int], object] = lambda done, total: None
) -> Verified:
    """Compare a store with what was committed. It may be recorded meanwhile.

    Parameters
    ----------
    path
        The store.
    progress
        Called with the bytes that were read and those there are to read.

    Returns
    -------
    Verified

    Raises
    ------
    NotAStoreError, UnsupportedFormatError
        If there is no store at `path`, or one of another format version.
    DamagedStoreError
        If too little is left to tell what it should hold.
    StoreError
        If it cannot be read.
    """
    path = Path(path).absolute()
    try:
        contents = read_contents(path)
        findings = list(contents.findings)
        n_files = n_bytes = 0
        total = sum(records[0].n_bytes for records in contents.records.values())
        for key, records in contents.records.items():
            if not _is_committed(contents, records[0]):
                continue
            findings += check_file(contents, key)
            n_files, n_bytes = n_files + 1, n_bytes + records[0].n_bytes
            progress(n_bytes, total)
        findings += check_metadata(contents)
        findings += find_leftovers(contents)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"cannot read {path}: {error}") from error
    return Verified(path, contents.n_rows, n_files, n_bytes, findings, contents.repairs)


# --- bookkeeping ---------------------------------------------------------------------------------


def read_contents(path: Path) -> Contents:
    """Read commit record and ledger: what there should be, and what is wrong with the two."""
    _check_is_store(path)
    try:
        commit = Commit.read(LocalFiles(path))
        if _is_replaced(path, commit):
            raise DamagedStoreError("a repair was cut off before it could write it")
        contents = Contents(path, commit, commit.n_rows)
    except DamagedStoreError as error:
        contents = Contents(path, None)
        contents.findings.append(
            Finding(
                kind="commit-record",
                where=COMMIT,
                what=f"{error}",
                repair="write it again from the ledger",
            )
        )
    try:
        _read_ledger(contents)
    except (FileNotFoundError, ValueError) as error:
        what = "it is missing" if isinstance(error, FileNotFoundError) else str(error)
        _add_ledger_damage(contents, LEDGER, what)
    for first_row, end_row in contents.missing_rows():
        what = f"it has no line for rows {first_row} to {end_row - 1}"
        _add_ledger_damage(contents, LEDGER, what, until=contents.doubtful_until or _MAX_FILE_BYTES)
    if contents.commit is None and not contents.lines:
        raise DamagedStoreError(
            f"cannot read {path}: neither its commit record nor its ledger can be read, and "
            "nothing else tells what was committed; restore them from a copy"
        )
    return contents


def _is_replaced(path: Path, commit: Commit) -> bool:
    """Whether a repair has written a ledger that no longer belongs to a commit record."""
    try:
        last = read_last_line(LocalFiles(path), _MAX_FILE_BYTES)
    except (FileNotFoundError, ValueError):
        return False
    entry = told(last) if last is not None else None
    return entry is not None and entry.get("replaces") == [*msgspec.structs.astuple(commit)]


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


def _read_ledger(contents: Contents) -> None:
    commit = contents.commit
    crc32 = 0
    for line in read_lines(LocalFiles(contents.path)):
        is_committed = commit is None or line.start < commit.ledger_bytes
        if is_committed:
            contents.end = line.stop
            crc32 = zlib.crc32(line.content, crc32)
        problem = _add_line(contents, line, is_committed=is_committed)
        if problem and is_committed and not (commit is None and not line.content.endswith(b"\n")):
            _add_ledger_damage(contents, f"{LEDGER}, byte {line.start}", problem, until=line.start)
        elif problem or not is_committed:
            contents.findings.append(
                Finding(
                    kind="uncommitted-line",
                    where=f"{LEDGER}, byte {line.start}",
                    what="a line of a commit that was cut off, or that is being made now",
                    repair="cut it off",
                    is_damage=False,
                )
            )
    counted = max((end_row for _, end_row in contents.lines.values()), default=0)
    if commit is None:
        contents.n_rows = counted
    elif contents.end != commit.ledger_bytes or (
        contents.has_whole_ledger and crc32 != commit.ledger_crc32
    ):
        what = "it is not the one that was committed, or is cut off"
        _add_ledger_damage(contents, LEDGER, what)
    elif contents.has_whole_ledger and counted != commit.n_rows:
        contents.n_rows = counted
        contents.findings.append(
            Finding(
                kind="commit-record",
                where=COMMIT,
                what=f"it claims {commit.n_rows:,} rows, and the ledger has {counted:,}",
                repair="write it again from the ledger",
            )
        )


def _add_line(contents: Contents, line: Line, *, is_committed: bool) -> str:
    """Note what a line says; return what is wrong with it."""
    entry = told(line)
    if entry is None:
        return line.problem
    try:
        first_row, end_row = entry["rows"]
        records = {
            key: Record(file["bytes"], file.get("crc32"), line.start, first_row, end_row)
            for key, file in entry["files"].items()
        }
        for key, record in records.items():
            if not is_chunk_key(key) or type(record.n_bytes) is not int:
                return f"it has a file {key!r} of {record.n_bytes!r} bytes, as no store has"
            if record.crc32 is None:
                _checksums(entry, key)
        documents = entry.get("metadata", {})
        metadata = {key: dict(document) for key, document in documents.items()}
        for document in metadata.values():
            if "shape" in document or document.get("node_type") != "group":
                Declared.of(document)
        removed, dropped = (
            [str(name) for name in entry.get(names, ())] for names in ("removed", "dropped")
        )
        if not all(type(row) is int and row >= 0 for row in (first_row, end_row)):
            return f"it has rows {first_row!r} to {end_row!r}"
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        return f"a line is malformed: {error!r}"
    repaired = entry.get("repaired")
    if is_committed and isinstance(repaired, list):
        contents.repairs += map(str, repaired)
    if is_committed and "resumed" in entry:
        contents.go_back(end_row, removed)
    if is_committed:
        contents.lines[first_row] = (line.start, end_row)
        contents.metadata |= metadata
        for array in dropped:
            contents.forget(array)
    for key, record in records.items():
        if is_committed:
            contents.records[key] = [record]
        else:
            contents.records.setdefault(key, []).append(record)
    return ""


def told(line: Line) -> Mapping[str, Any] | None:
    """Return what a line says, None where that cannot be read."""
    return None if line.entry is None else msgspec.to_builtins(line.entry)


def _add_ledger_damage(
    contents: Contents, where: str, what: str, *, until: int = _MAX_FILE_BYTES
) -> None:
    """Note that a line that begins at a byte is damaged, by default any of them."""
    contents.doubtful_until = max(contents.doubtful_until, until)
    contents.findings.append(
        Finding(
            kind="ledger",
            where=where,
            what=what,
            repair="write the line again from the block's files, if their own checksums are right",
        )
    )


def _checksums(entry: Mapping[str, Any], key: str) -> list[Checksums]:
    """Return what a line of the ledger says of the chunks of a shard."""
    return [Checksums(*map(int, pair)) for pair in entry["chunks"][array_of(key)]]


# --- files of committed blocks -------------------------------------------------------------------


def _is_committed(contents: Contents, record: Record) -> bool:
    return record.line < contents.end


def check_file(contents: Contents, key: str) -> Iterator[Finding]:
    """Find what is wrong with a committed file."""
    committed, *later = contents.records[key]
    problem = _problem(contents, key, committed)
    if problem is None:
        n_bytes = (contents.path / key).lstat().st_size
        if n_bytes != committed.n_bytes:
            yield Finding(
                kind="size",
                where=key,
                what=f"it has {n_bytes:,} bytes, not {committed.n_bytes:,}, and the same values",
                repair="none: nothing is lost",
                is_damage=False,
            )
        return
    if any(_problem(contents, key, record) is None for record in later):
        return
    if any(_problem(contents, key, record) is None for record in _written_since(contents, key)):
        return
    is_sound = is_sound_by_itself(contents, key)
    if is_sound and contents.may_be_out_of_date(committed):
        return
    rows = f"rows {committed.first_row} to {committed.end_row - 1}"
    if is_sound and committed.crc32 is None:
        yield Finding(
            kind="damaged-block",
            where=key,
            what=f"{how_altered(contents, key)} ({rows})",
            repair=f"none: {HOW_TO_RESTORE}",
            first_row=committed.first_row,
        )
    elif is_sound:
        yield Finding(
            kind="damaged-values",
            where=key,
            what=how_altered(contents, key),
            repair="write it again, if the ledger tells the recorded values; else restore it from "
            "a copy",
        )
    elif committed.crc32 is None:
        yield Finding(
            kind="damaged-block",
            where=key,
            what=f"{problem} ({rows})",
            repair=f"end the store before row {committed.first_row}"
            if committed.first_row
            else "none: no row would be left; restore it from a copy",
            first_row=committed.first_row,
        )
    else:
        yield Finding(
            kind="damaged-values",
            where=key,
            what=problem,
            repair="write steps and tokens again, if all were recorded; set other values to "
            "missing; leave other labels out",
        )


HOW_TO_RESTORE = "restore the file from a copy (`thimble-zarr check` may name what was changed)"
"""What to do about a file that was changed by a program that gave it good checksums."""


def how_altered(contents: Contents, key: str) -> str:
    """Return how a file differs from the committed one, though its own checksums are right."""
    recorded = _recorded_as(contents, key)
    if recorded == key:
        return "it is the file of an earlier commit"
    if recorded is not None:
        return f"it is the file that was recorded as {recorded}, and can be put back there"
    last, *_ = contents.records[key]
    how = "its own checksum is right, but is not the one in the ledger"
    if last.crc32 is None:
        how = _problem(contents, key, last) or how
    return f"it was changed after it was recorded: {how}"


def _recorded_as(contents: Contents, key: str) -> str | None:
    """Return the key under which a file was recorded, None if it never was."""
    if contents.records[key][0].crc32 is not None:
        return contents.recorded_files.get(_crc32(contents.path / key))
    with shard_file(contents, key, declared_array(contents, array_of(key)).n_chunks) as shard:
        return contents.recorded_files.get(tuple(shard.stored_checksums()))


def _written_since(contents: Contents, key: str) -> Iterator[Record]:
    """Yield what a writer that is at work has promised of a file by now."""
    fresh = Contents(contents.path, None)
    for line in read_lines(LocalFiles(contents.path), contents.end):
        _add_line(fresh, line, is_committed=False)
    yield from fresh.records.get(key, [])


def is_sound_by_itself(contents: Contents, key: str) -> bool:
    """Whether a file's own checksums match, whatever the ledger says."""
    if _no_plain_file(contents, key):
        return False
    try:
        declared = declared_array(contents, array_of(key))
        if declared.is_sharded:
            return bool(own_checksums(contents, key))
        with open_regular(contents.path / key) as stream:
            decode_vector(stream.read(), declared.file_shape[0], declared.dtype)
    except (OSError, ValueError, RuntimeError):
        return False
    return True


def own_checksums(contents: Contents, key: str) -> list[Checksums]:
    """Return the checksums of a shard's chunks, as the file itself has them.

    Raises
    ------
    ValueError
        If they do not match.
    OSError
        If it cannot be read.
    """
    declared = declared_array(contents, array_of(key))
    with shard_file(contents, key, declared.n_chunks) as shard:
        return [
            Checksums(shard.computed_checksum(chunk) or 0, values_checksum(shard.decode(chunk)))
            for chunk in range(declared.n_chunks)
        ]


def matching_record(contents: Contents, key: str) -> Record | None:
    """Return the line's word that a file fits: the last committed one's, or a later one's."""
    for record in contents.records[key]:
        if _problem(contents, key, record) is None:
            return record
    return None


def _problem(contents: Contents, key: str, record: Record) -> str | None:
    """Return what is wrong with a file, None if it is what the record says."""
    if problem := _no_plain_file(contents, key):
        return problem
    file = contents.path / key
    n_bytes = file.lstat().st_size
    if record.crc32 is not None:
        if n_bytes != record.n_bytes:
            return f"it has {n_bytes:,} bytes, not {record.n_bytes:,}"
        return None if _crc32(file) == record.crc32 else "its checksum does not match"
    if n_bytes == 0:
        return "it is empty"
    return _shard_problem(contents, key, record)


def _no_plain_file(contents: Contents, key: str) -> str:
    """Return why a file is not opened, nothing if it may be."""
    file = contents.path / key
    if leads_out(file.parent, contents.path):
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


def _shard_problem(contents: Contents, key: str, record: Record) -> str | None:
    """Compare every chunk of a shard with its checksums.

    A chunk that was stored again is decoded, and may hold the same values.
    """
    checksums = _checksums(contents.entry(record.line), key)
    try:
        with shard_file(contents, key, len(checksums)) as shard:
            for chunk, committed in enumerate(checksums):
                try:
                    if shard.computed_checksum(chunk) == committed.stored:
                        continue
                    if values_checksum(shard.decode(chunk)) != committed.values:
                        return f"the values of chunk {chunk} are not those that were committed"
                except (ValueError, RuntimeError) as error:
                    return str(error)
    except ValueError as error:
        return str(error)
    return None


def shard_file(contents: Contents, key: str, n_chunks: int) -> ShardFile:
    """Return a shard, to be opened.

    Raises
    ------
    ValueError
        If the array's metadata are lost.
    """
    declared = declared_array(contents, array_of(key))
    steps, *rest = declared.chunk_shape
    return ShardFile(
        LocalFiles(contents.path),
        key,
        n_chunks=n_chunks,
        shape=(rest[0], steps, *rest[1:]) if rest else (steps,),
        dtype=declared.dtype,
        fill=declared.fill,
    )


def declared_array(contents: Contents, array: str) -> Declared:
    """Return what an array was declared to be; if the ledger lost that, what is on disk.

    Raises
    ------
    ValueError
        If neither can be read.
    """
    key = f"{array}/{METADATA}"
    if key in contents.metadata:
        return Declared.of(contents.metadata[key])
    try:
        return Declared.read(LocalFiles(contents.path), key)
    except OSError as error:
        raise ValueError(f"the metadata of {array} cannot be read: {error}") from error


# --- metadata ------------------------------------------------------------------------------------


def check_metadata(contents: Contents) -> Iterator[Finding]:
    """Compare every metadata document with the one that was declared."""
    if not contents.metadata:
        yield from _check_undeclared(contents)
    read = {key: read_found(contents.path / key) for key in contents.metadata}
    on_disk = {key: found for key, (found, _) in read.items()}
    for key, declared in contents.metadata.items():
        found, problem = read[key]
        problem = problem or _difference(contents, found, declared)
        if problem:
            yield Finding(
                kind="metadata",
                where=key,
                what=problem,
                repair="write it again as it was declared",
            )
        elif found.get("node_type") == "group":
            yield from _check_consolidated(contents, key, on_disk)


def _check_consolidated(
    contents: Contents, key: str, on_disk: Mapping[str, Document]
) -> Iterator[Finding]:
    """Check a group's copies of the metadata below it, which many tools read in their place."""
    consolidated, group = on_disk[key].get("consolidated_metadata"), array_of(key)
    problem, is_damage = "", False
    if consolidated is None:
        if contents.is_complete and key == METADATA:
            problem = "it has no copy of the arrays' metadata, which other tools read faster"
    elif damage := _wrong_copy(contents, group, consolidated):
        problem, is_damage = damage, True
    elif not copies_fit(contents.path, group, consolidated, on_disk):
        problem = "its copies of the arrays' metadata are out of date"
    if problem:
        yield Finding(
            kind="consolidated-metadata",
            where=key,
            what=problem,
            repair="consolidate again",
            is_damage=is_damage,
        )


def _wrong_copy(contents: Contents, group: str, consolidated: object) -> str:
    """Return which copy in a group is not what was declared, and how."""
    copies = consolidated.get("metadata") if isinstance(consolidated, dict) else None
    if not isinstance(copies, dict):
        return "its copies of the arrays' metadata are malformed"
    for path, declared in _below(group, contents.metadata):
        copy = copies.get(path)
        problem = (
            _difference(contents, copy, declared) if isinstance(copy, dict) else "it is missing"
        )
        if problem:
            return f"its copy of the metadata of {path} is wrong: {problem}"
    return ""


def _check_undeclared(contents: Contents) -> Iterator[Finding]:
    """Check what can be checked where the ledger has no copy of the metadata."""
    found, problem = read_found(contents.path / METADATA)
    if not problem:
        try:
            attribute = found["attributes"][ATTRIBUTE]
            if "layout" in attribute:
                Schema.from_attribute(attribute)
        except (DamagedStoreError, LookupError, TypeError) as error:
            problem = f"its `{ATTRIBUTE}` attribute is malformed: {error}"
    if problem:
        yield Finding(
            kind="metadata",
            where=METADATA,
            what=problem,
            repair="none: nothing else tells what was recorded; restore it from a copy",
        )
    problems = {}
    for key in files_of(contents.path):
        place = array_of(key)
        if place and (is_chunk_key(key) or key.endswith(f"/{METADATA}")):
            problems[place] = read_found(contents.path / place / METADATA)[1]
    for array in dict.fromkeys(map(array_of, contents.records)):
        try:
            declared_array(contents, array)
        except ValueError as error:
            problems[array] = str(error)
    for place, problem in problems.items():
        if problem:
            yield Finding(
                kind="metadata",
                where=f"{place}/{METADATA}",
                what=problem,
                repair="none: nothing else tells what was declared; restore it from a copy",
            )


def read_found(file: Path) -> tuple[Document, str]:
    """Return a document, and what is wrong with it."""
    try:
        document = read_document(LocalFiles(file.parent), file.name)
    except (FileNotFoundError, NotADirectoryError):
        return {}, "it is missing"
    except ValueError as error:
        return {}, f"it cannot be read: {error}"
    return (document, "") if isinstance(document, dict) else ({}, "it is not an object")


def _difference(contents: Contents, found: Document, declared: Document) -> str:
    """Return in what a document differs from the declared one, in more than may change."""
    changing = {"shape", "consolidated_metadata"}
    names = sorted((found.keys() | declared.keys()) - changing)
    missing = object()
    for name in names:
        if not is_same(found.get(name, missing), declared.get(name, missing)):
            return f"its {name} is not what was declared"
    if "shape" not in declared:
        return "it has a shape" if "shape" in found else ""
    shape, expected = found.get("shape"), list(declared["shape"])
    if is_per_step(declared):
        least = contents.n_rows
        if not (isinstance(shape, list) and shape and type(shape[0]) is int and shape[0] >= least):
            return f"its shape is {shape}, and {least} rows were committed"
        if contents.is_complete and shape[0] != least:
            return f"its shape is {shape}, and the store was closed with {least} rows"
        expected = [shape[0], *expected[1:]]
    return "" if is_same(shape, expected) else f"its shape is {shape}, not {expected}"


def is_same(found: object, declared: object) -> bool:
    """Whether two JSON values are the same: 1, 1.0 and true are not."""
    if isinstance(declared, dict) and isinstance(found, dict):
        return declared.keys() == found.keys() and all(
            is_same(found[name], declared[name]) for name in declared
        )
    if isinstance(declared, list) and isinstance(found, list):
        return len(found) == len(declared) and all(map(is_same, found, declared))
    return type(found) is type(declared) and found == declared


def is_per_step(document: Document) -> bool:
    """Whether the first axis of an array is the steps."""
    names = document.get("dimension_names")
    return isinstance(names, list) and "step" in names[:1]


def copies_fit(
    store: Path, group: str, consolidated: object, documents: Mapping[str, Document]
) -> bool:
    """Whether a group's copies are those of documents, and perhaps of others that lie below it."""
    if is_same(consolidated, consolidated_copies(group, documents)):
        return True
    others = {
        key: read_found(store / key)[0]
        for key in files_of(store)
        if key.endswith(f"/{METADATA}") and key not in documents
    }
    return is_same(consolidated, consolidated_copies(group, {**documents, **others}))


def consolidated_copies(group: str, documents: Mapping[str, Document]) -> Document:
    """Return the copies that a group should have of documents, by their keys, that are below it."""
    copies = {}
    for path, document in _below(group, documents):
        copy = {name: value for name, value in document.items() if name != "consolidated_metadata"}
        if copy.get("node_type") == "group":
            copy["consolidated_metadata"] = _consolidated({})
        copies[path] = copy
    return _consolidated(copies)


def _below(group: str, documents: Mapping[str, Document]) -> Iterator[tuple[str, Document]]:
    """Yield documents below a group, by the paths of what they describe from there."""
    for key, document in documents.items():
        path = array_of(key)
        if path != group and (not group or path.startswith(f"{group}/")):
            yield path.removeprefix(f"{group}/"), document


def _consolidated(copies: Document) -> Document:
    return {"kind": "inline", "must_understand": False, "metadata": copies}


# --- what is there beyond ------------------------------------------------------------------------


def is_at_work(contents: Contents) -> bool:
    """Whether another process may be recording."""
    if contents.is_complete:
        return False
    files = LocalFiles(contents.path)
    recording, holder = recording_of(files), Holder.read(files)
    is_this_process = holder is not None and holder.is_this_process
    return recording.state is not State.CUT_OFF and not is_this_process


def find_leftovers(contents: Contents) -> Iterator[Finding]:
    """Find what no committed line knows. A writer that is at work may be making it.

    Without a sound ledger nobody can tell which chunks are left over, and none is called so.
    """
    if is_at_work(contents):
        return
    known = {METADATA, COMMIT, LEDGER, LOCK, *contents.metadata}
    holder = Holder.read(LocalFiles(contents.path))
    known |= {HOLDER} if holder is not None and holder.is_this_process else set()
    for key, records in contents.records.items():
        known |= {key} if _is_committed(contents, records[0]) else set()
    for key in files_of(contents.path):
        if key not in known and (what := _what_is_left(contents, key)):
            yield Finding(
                kind="leftover", where=key, what=what, repair="remove it", is_damage=False
            )
        elif key not in known and not (is_chunk_key(key) or key.endswith(f"/{METADATA}")):
            yield Finding(
                kind="stray",
                where=key,
                what=f"{_kind_of_file(contents.path / key)} that no store has",
                repair="none: whoever put it there may want it",
                is_damage=False,
            )


def _what_is_left(contents: Contents, key: str) -> str:
    """Return what a crash left a file as, nothing where it was no crash or nobody can tell."""
    if key == HOLDER:
        return (
            f"left by a writer that is gone, {Holder.read(LocalFiles(contents.path)) or 'unknown'}"
        )
    if key.endswith(PARTIAL):
        return "a file that was not written to its end"
    if is_chunk_key(key) and contents.lines and contents.has_whole_ledger:
        return "a file of a block that was never committed"
    return ""


def _kind_of_file(file: Path) -> str:
    mode = file.lstat().st_mode
    if stat.S_ISLNK(mode):
        return "a link"
    return "a file" if stat.S_ISREG(mode) else "something that is not a plain file and"


def files_of(path: Path) -> Iterator[str]:
    """Yield everything below a store that is no directory."""
    for directory, names, files in os.walk(path):
        links = [name for name in names if (Path(directory) / name).is_symlink()]
        for name in sorted([*files, *links]):
            yield (Path(directory) / name).relative_to(path).as_posix()
