"""What a store should hold, by its commit record and its ledger, and what is wrong with the two.

The first line of the ledger has a copy of all metadata, each line the sizes and checksums of the
files of a block: so what there should be is known whatever was recorded.
"""

import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property

import msgspec

from thimble_zarr.errors import DamagedStoreError, NotAStoreError, StoreError
from thimble_zarr.format.schema import ATTRIBUTE, Schema
from thimble_zarr.store.contents import Contents
from thimble_zarr.store.files.base import Files, NotListedError, read_document
from thimble_zarr.store.integrity.verify_result import Discrepancy
from thimble_zarr.store.keys import (
    BOOKKEEPING,
    COMMIT,
    LEDGER,
    METADATA,
    array_of,
    is_chunk_key,
    metadata_key,
    split_array_key,
)
from thimble_zarr.store.ledger import (
    Commit,
    Document,
    FileChecksums,
    FileRecord,
    Ledger,
    Line,
    read_last_line,
    read_lines,
    recorded_files,
    told_files,
)
from thimble_zarr.store.metadata import Declared, is_of_rows, rows_an_item

_MAX_FILE_BYTES = 2**63


@dataclass
class Expected:
    """What a store should hold.

    Attributes
    ----------
    commit
        The commit record, None if it cannot be read.
    n_rows
        Rows that are committed: without a commit record, those of the sound lines.
    ledger, ledger_bytes
        What the sound committed lines say together, and where the committed part ends.
    doubtful_bytes
        The ledger is damaged before this byte: what it says up to there may be out of date.
    findings
        What is wrong with the two.
    """

    files: Files
    commit: Commit | None = None
    n_rows: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    ledger_bytes: int = 0
    doubtful_bytes: int = 0
    findings: list[Discrepancy] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether the store was closed."""
        return self.commit is not None and self.commit.complete

    def lines(self, start: int = 0, stop: int | None = None) -> Iterator[Line]:
        """Yield lines of the ledger, none where it is missing."""
        with suppress(FileNotFoundError):
            yield from read_lines(self.files, start, stop)

    def promised(self, key: str) -> Iterator[FileRecord]:
        """Yield what lines behind the commit say of a file, which may be as they say by now.

        They are of a commit that was cut off, or of a writer that is at work.
        """
        lines = self.lines(self.ledger_bytes)
        return (record for told, record in told_files(lines) if told == key)

    @cached_property
    def recorded_files(self) -> dict[FileChecksums, str]:
        """Every file that was committed, by its checksums, as far as the ledger is there."""
        return recorded_files(self.lines(stop=self.ledger_bytes))

    def listed(self, prefix: str = "") -> list[str]:
        """Return the keys below a prefix, none where nobody tells which there are."""
        try:
            return [*self.files.list(prefix)]
        except NotListedError:
            return []

    @cached_property
    def documents(self) -> dict[str, Document]:
        """Every metadata document: as declared, or where that is lost as it is on disk.

        Then an array without a chunk that no writer of ours declares is somebody else's.
        """
        if self.ledger.metadata:
            return self.ledger.metadata
        keys = self.listed()
        of_arrays = [*filter(is_chunk_key, keys), *self.ledger.records]
        places = {METADATA, *(metadata_key(array_of(key)) for key in of_arrays)}
        documents = {}
        for key in sorted({*places, *(key for key in keys if key.endswith(f"/{METADATA}"))}):
            document, problem = read_found(self.files, key)
            if problem or key in places or not misfit(key, document):
                documents[key] = document
        return documents

    @cached_property
    def arrays(self) -> dict[str, Declared]:
        """What is declared of each array, unless that is lost."""
        arrays = {}
        for key, document in self.documents.items():
            with suppress(ValueError):
                arrays[array_of(key)] = Declared.of(document)
        return arrays

    def declared(self, array: str) -> Declared:
        """Return what an array was declared to be; raise ValueError if that is lost."""
        if array not in self.arrays:
            raise ValueError("nothing tells what its array was declared to be")
        return self.arrays[array]

    def files_of_arrays(self, n_rows: int, *, sharded: bool) -> Iterator[tuple[str, Declared, int]]:
        """Yield each shard, or else each other file, of so many rows: also where it begins.

        An array of shards of which the ledger has none is somebody else's.
        """
        recorded = {array_of(key) for key in self.ledger.records}
        for array, declared in self.arrays.items():
            if declared.is_sharded != sharded or (sharded and recorded and array not in recorded):
                continue
            is_long = sharded or is_of_rows(self.documents[metadata_key(array)])
            length = self.rows_a_file(array) if is_long else declared.file_shape[0]
            for index in range(-(-(n_rows if is_long else declared.shape[0]) // length)):
                rest = ".0" * (len(declared.shape) - 1)
                yield f"{array}/c.{index}{rest}", declared, index * length

    def schema(self, group: str) -> Schema | None:
        """Return what is declared of a parameter, None if that is lost."""
        with suppress(StoreError, LookupError, TypeError):
            attributes = self.documents[metadata_key(group)]["attributes"]
            return Schema.from_attribute(attributes[ATTRIBUTE])
        return None

    def computes_with(self, key: str) -> Schema | None:
        """Return the schema of a parameter whose states are computed from the values of a file."""
        group, name = split_array_key(array_of(key))
        schema = self.schema(group)
        if schema is None or schema.coding.program is None or name == "loss":
            return None
        return schema if name in schema.numbers else None

    def is_sparse(self, key: str) -> bool:
        """Whether files of an array may be alike, as they hold what is normally nothing."""
        group, name = split_array_key(array_of(key))
        schema = self.schema(group)
        return schema is not None and name in schema.arrays and schema.arrays[name].is_sparse

    def rows_a_file(self, array: str) -> int:
        """Return how many rows a file of an array is of."""
        return rows_an_item(self.documents[metadata_key(array)]) * self.arrays[array].file_shape[0]

    def doubt(self, where: str, what: str, *, before: int = _MAX_FILE_BYTES) -> None:
        """Note that the ledger is damaged before a byte, by default anywhere."""
        self.doubtful_bytes = max(self.doubtful_bytes, before)
        repair = "write the line again from the block's files, if their own checksums are right"
        self.findings.append(Discrepancy("ledger", where, what, repair))

    def doubt_commit(self, what: str) -> None:
        """Note that the commit record is not what the ledger says."""
        repair = "write it again from the ledger"
        self.findings.append(Discrepancy("commit-record", COMMIT, what, repair))


def read_expected(files: Files) -> Expected:
    """Read commit record and ledger: what there should be, and what is wrong with the two.

    Raises NotAStoreError or UnsupportedFormatError where there is no store or one of another
    version, and DamagedStoreError if too little is left to tell what it should hold.
    """
    expected = Expected(files)
    try:
        Contents.read(files)
    except NotAStoreError:
        if not any(expected.listed(BOOKKEEPING)):
            raise
    except DamagedStoreError:
        pass  # as is found among the metadata
    try:
        commit = Commit.read(files)
        if _is_replaced(files, commit):
            raise DamagedStoreError("a repair was cut off before it could write it")
        expected.commit, expected.n_rows = commit, commit.n_rows
    except DamagedStoreError as error:
        expected.doubt_commit(str(error))
    try:
        _read_ledger(expected)
    except (FileNotFoundError, ValueError) as error:
        expected.doubt(LEDGER, "it is missing" if isinstance(error, OSError) else str(error))
    row, n_rows = 0, expected.n_rows
    for first_row, end_row in [*sorted(expected.ledger.ends.items()), (n_rows, n_rows)]:
        if row < first_row:
            what = f"it has no line for rows {row} to {first_row - 1}"
            expected.doubt(LEDGER, what, before=expected.doubtful_bytes or _MAX_FILE_BYTES)
        row = max(row, end_row)
    if expected.commit is None and not expected.ledger.ends:
        raise DamagedStoreError(
            f"cannot read {files.path}: neither its commit record nor its ledger can be read, and "
            "nothing else tells what was committed; restore them from a copy"
        )
    return expected


def read_found(files: Files, key: str) -> tuple[Document, str]:
    """Return a document, and what is wrong with it."""
    try:
        document = read_document(files, key)
    except (FileNotFoundError, NotADirectoryError):
        return {}, "it is missing"
    except ValueError as error:
        return {}, f"it cannot be read: {error}"
    return (document, "") if isinstance(document, dict) else ({}, "it is not an object")


def _is_replaced(files: Files, commit: Commit) -> bool:
    """Whether a repair has written a ledger that no longer belongs to a commit record."""
    with suppress(FileNotFoundError, ValueError):
        last = read_last_line(files, _MAX_FILE_BYTES)
        replaces = last.entry.replaces if last is not None and last.entry is not None else None
        return replaces == [*msgspec.structs.astuple(commit)]
    return False


def _read_ledger(expected: Expected) -> None:
    commit, crc32 = expected.commit, 0
    for line in read_lines(expected.files):
        where = f"{LEDGER}, byte {line.start}"
        is_torn = commit is None and not line.content.endswith(b"\n")
        if is_torn or (commit is not None and line.start >= commit.ledger_bytes):
            kind, repair = "uncommitted-line", "cut it off"
            what = "a line of a commit that was cut off, or that is being made now"
            expected.findings.append(Discrepancy(kind, where, what, repair, is_damage=False))
            continue
        expected.ledger_bytes, crc32 = line.stop, zlib.crc32(line.content, crc32)
        try:
            for key, document in line.entry.metadata.items() if line.entry is not None else ():
                if problem := misfit(key, document):
                    raise ValueError(problem)
            expected.ledger.add(line)
        except ValueError as error:
            expected.doubt(where, str(error), before=line.stop)
    n_rows = max(expected.ledger.ends.values(), default=0)
    if commit is None:
        expected.n_rows = n_rows
    elif expected.ledger_bytes != commit.ledger_bytes or (
        not expected.doubtful_bytes and crc32 != commit.ledger_crc32
    ):
        expected.doubt(LEDGER, "it is not the one that was committed, or is cut off")
    elif not expected.doubtful_bytes and n_rows != commit.n_rows:
        expected.n_rows = n_rows
        expected.doubt_commit(f"it claims {commit.n_rows:,} rows, and the ledger has {n_rows:,}")


def misfit(key: str, document: Document) -> str:
    """Return how a document describes an array or the root as no writer does, or nothing."""
    try:
        if "shape" in document or document.get("node_type") != "group":
            Declared.of(document)
        elif key == METADATA and "layout" in document["attributes"][ATTRIBUTE]:
            Schema.from_attribute(document["attributes"][ATTRIBUTE])
    except (StoreError, ValueError, LookupError, TypeError) as error:
        return f"it is malformed: {error}"
    return ""
