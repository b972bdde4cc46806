"""Files in memory: those that are being copied, and a place that shows what is asked of any."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from thimble_zarr.format.location import Location
from thimble_zarr.format.overhead import Stopwatch


@dataclass
class MemoryFile:
    """An open file (`OpenFile`)."""

    content: bytes
    published_as = ""

    @property
    def n_bytes(self) -> int:
        """Its size."""
        return len(self.content)

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Return bytes from `offset` on."""
        return self.content[offset : offset + n_bytes]

    def read_into(self, memory: memoryview | bytearray, offset: int) -> int:
        """Fill memory with the bytes from `offset` on."""
        found = self.read(offset, len(memory))
        memory[: len(found)] = found
        return len(found)

    def will_read(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Do nothing: all of it is there."""

    def __enter__(self) -> "MemoryFile":
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing."""


@dataclass
class MemoryFiles:
    """Files by key (`Files`)."""

    contents: dict[str, bytes] = field(default_factory=dict)
    path: Location = Path("/in/memory.zarr")
    is_remote = False

    @property
    def is_there(self) -> bool:
        """Whether there is any file."""
        return bool(self.contents)

    @property
    def is_vacant(self) -> bool:
        """Whether there is none."""
        return not self.contents

    def get(self, key: str, max_bytes: int | None = None) -> bytes:
        """Return the content of a file, or as much of it as is asked for."""
        return self.open(key).content[:max_bytes]

    def will_open(self, keys: Iterable[str], tail_bytes: int = 0) -> None:
        """Do nothing: all of them are there."""

    def total_bytes(self) -> int:
        """Return the size of all files."""
        return sum(map(len, self.contents.values()))

    def open(self, key: str, tail_bytes: int = 0) -> MemoryFile:
        """Open a file to read ranges of it."""
        if key not in self.contents:
            raise FileNotFoundError(key)
        return MemoryFile(self.contents[key])

    def size(self, key: str) -> int:
        """Return the size of a file."""
        return self.open(key).n_bytes

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield the keys below a prefix of whole parts."""
        below = f"{prefix}/" if prefix else ""
        return iter(sorted(key for key in self.contents if key.startswith(below)))

    def writer(self, stopwatch: Stopwatch | None = None) -> "MemoryWriter":
        """Return what writes files here."""
        return MemoryWriter(self.contents)


@dataclass
class MemoryWriter:
    """Writes them (`FileWriter`)."""

    contents: dict[str, bytes]
    unnamed: dict[str, bytes] = field(default_factory=dict)

    def put(self, key: str, parts: Iterable[bytes]) -> int:
        """Write a file, which gets its key when `sync` is called."""
        try:
            self.unnamed[key] = b"".join(parts)
        except BaseException:
            self.unnamed.clear()
            raise
        return len(self.unnamed[key])

    def settle(self) -> None:
        """Do nothing: there is no disk to wait for."""

    def sync(self) -> None:
        """Give every file its key."""
        self.contents |= self.unnamed
        self.unnamed.clear()

    def append(self, key: str, offset: int, content: bytes) -> None:
        """Make `content` what a file ends with from `offset` on."""
        self.contents[key] = self.contents.get(key, b"")[:offset].ljust(offset, b"\0") + content

    def delete(self, keys: Iterable[str]) -> None:
        """Remove files."""
        for key in keys:
            self.contents.pop(key, None)

    def remove(self) -> None:
        """Remove all there is."""
        self.contents.clear()

    def close(self) -> None:
        """Do nothing: nothing works in the background."""
