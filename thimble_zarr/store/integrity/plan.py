"""What a repair does, as data: nothing of it is done yet."""

import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from thimble_zarr.format.schema import Json
from thimble_zarr.store.integrity.expected import Expected
from thimble_zarr.store.integrity.result import HOW_TO_RESTORE
from thimble_zarr.store.keys import array_of
from thimble_zarr.store.ledger import Commit, FileRecord, seal
from thimble_zarr.store.metadata import Declared


@dataclass
class Plan:
    """What a repair does.

    Attributes
    ----------
    expected
        What there should be.
    n_rows
        Rows that stay.
    records
        The files of blocks that stay, and what the ledger says of them from now on.
    steps
        What is done, in words, in order.
    hopeless
        Why the store cannot be repaired; then nothing is done.
    altered
        How files that stay as they are differ from those that were committed.
    written, removed
        Contents of the files that are written again, and files that go.
    dropped
        Arrays that are left out from now on.
    rebuilt
        The rows of blocks whose lines are made from their files: the row behind each, by its first.
    lines, changes_ledger, commit
        Lines that are added to the ledger, whether it is written again at all, and the commit
        record, None if it stays.
    """

    expected: Expected
    n_rows: int
    records: dict[str, FileRecord] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)
    hopeless: list[str] = field(default_factory=list)
    altered: dict[str, str] = field(default_factory=dict)
    written: dict[str, bytes] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    rebuilt: dict[int, int] = field(default_factory=dict)
    lines: list[bytes] = field(default_factory=list)
    changes_ledger: bool = False
    commit: Commit | None = None

    @property
    def left(self) -> list[str]:
        """Damage that stays, in words."""
        return [
            f"{key} is left as it is: {what}; {HOW_TO_RESTORE}"
            for key, what in self.altered.items()
            if key in self.records
        ]

    def arrays(self) -> Iterator[tuple[str, Declared]]:
        """Yield every array that stays, and what is declared of it."""
        for key, document in self.expected.documents.items():
            array = array_of(key)
            if document.get("node_type") == "array" and array not in self.dropped:
                with suppress(ValueError):
                    yield array, Declared.of(document)

    def keep(self, key: str, record: FileRecord) -> None:
        """Keep a file, of which the ledger says something else from now on if it must."""
        self.records[key] = record
        self.changes_ledger |= record is not self.expected.records.get(key)

    def write(self, key: str, content: bytes, why: str) -> None:
        """Write a file of values again."""
        self.written[key] = content
        self.records[key] = FileRecord(n_bytes=len(content), crc32=zlib.crc32(content))
        self.steps.append(f"write {key} again: {why}")

    def add_line(self, first_row: int, end_row: int, **more: Json) -> None:
        """Add a line to the ledger for a block as it is; the last one for all other files too."""
        files: dict[str, Json] = {}
        chunks: dict[str, Json] = {}
        for key, record in self.records.items():
            if record.chunks is None and "replaces" in more:
                files[key] = record.to_json()
            elif record.chunks is not None and record.first_row == first_row:
                files[key], chunks[array_of(key)] = record.to_json(), record.chunks.tolist()
        line: dict[str, Json] = {"rows": (first_row, end_row), "files": files, "chunks": chunks}
        self.lines.append(seal(line | more) + b"\n")
