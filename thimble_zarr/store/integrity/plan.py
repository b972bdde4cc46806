"""What a repair does, as data: nothing of it is done yet."""

import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from thimble_zarr.store.integrity.expected import Expected, Record
from thimble_zarr.store.integrity.result import HOW_TO_RESTORE
from thimble_zarr.store.metadata import Declared
from thimble_zarr.store.reader import array_of


@dataclass
class Plan:
    """What a repair does.

    Attributes
    ----------
    expected
        What there should be.
    n_rows
        Rows that stay.
    steps
        What is done, in words, in order.
    hopeless
        Why the store cannot be repaired; then nothing is done.
    altered
        How files that stay as they are differ from those that were committed.
    written
        Contents of the files that are written again.
    removed
        Files that go.
    dropped
        Arrays that are left out from now on.
    settled
        Shards that are not what the last committed line says, but a line behind it.
    rebuilt
        Lines of the ledger made from the files of their blocks, by the first rows of these.
    values
        What the ledger says from now on of the files that are no shards.
    lines
        Lines that are added to the ledger.
    changes_ledger, changes_commit
        Whether ledger and commit record are written again.
    """

    expected: Expected
    n_rows: int
    steps: list[str] = field(default_factory=list)
    hopeless: list[str] = field(default_factory=list)
    altered: dict[str, str] = field(default_factory=dict)
    written: dict[str, bytes] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    settled: dict[str, Record] = field(default_factory=dict)
    rebuilt: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    values: dict[str, dict[str, int]] = field(default_factory=dict)
    lines: list[bytes] = field(default_factory=list)
    changes_ledger: bool = False
    changes_commit: bool = False

    @property
    def left(self) -> list[str]:
        """Damage that stays, in words."""
        return [
            f"{key} is left as it is: {what}; {HOW_TO_RESTORE}"
            for key, what in self.altered.items()
            if key not in self.removed
        ]

    @property
    def is_cut(self) -> bool:
        """Whether rows go that were committed."""
        return self.n_rows < self.expected.n_rows

    def arrays(self) -> Iterator[tuple[str, Declared]]:
        """Yield every array that stays, and what is declared of it."""
        for key, document in self.expected.documents.items():
            array = array_of(key)
            if document.get("node_type") == "array" and array not in self.dropped:
                with suppress(ValueError):
                    yield array, Declared.of(document)

    def write(self, key: str, content: bytes, why: str) -> None:
        """Write a file again."""
        self.written[key] = content
        self.steps.append(f"write {key} again: {why}")


def file_record(content: bytes) -> dict[str, int]:
    """Return what the ledger says of a file that is no shard."""
    return {"bytes": len(content), "crc32": zlib.crc32(content)}
