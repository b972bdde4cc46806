"""A store's files in memory: what `store.files` asks of any place, in a few lines."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from thimble_zarr.format.overhead import Stopwatch


@dataclass
class MemoryFile:
    content: bytes

    @property
    def n_bytes(self) -> int:
        return len(self.content)

    def read(self, offset: int, n_bytes: int) -> bytes:
        return self.content[offset : offset + n_bytes]

    def read_into(self, memory: memoryview | bytearray, offset: int) -> int:
        found = self.read(offset, len(memory))
        memory[: len(found)] = found
        return len(found)

    def will_read(self, ranges: Sequence[tuple[int, int]]) -> None:
        """All of it is there."""

    def __enter__(self) -> "MemoryFile":
        return self

    def __exit__(self, *error: object) -> None: ...


@dataclass
class MemoryFiles:
    contents: dict[str, bytes] = field(default_factory=dict)
    path: Path = Path("/in/memory.zarr")
    is_remote = False

    @property
    def is_there(self) -> bool:
        return bool(self.contents)

    @property
    def is_vacant(self) -> bool:
        return not self.contents

    def get(self, key: str, max_bytes: int | None = None) -> bytes:
        return self.open(key).content[:max_bytes]

    def will_open(self, keys: Iterable[str], tail_bytes: int = 0) -> None:
        """All of them are there."""

    def total_bytes(self) -> int:
        return sum(map(len, self.contents.values()))

    def open(self, key: str, tail_bytes: int = 0) -> MemoryFile:
        if key not in self.contents:
            raise FileNotFoundError(key)
        return MemoryFile(self.contents[key])

    def size(self, key: str) -> int:
        return self.open(key).n_bytes

    def list(self, prefix: str = "") -> Iterator[str]:
        below = f"{prefix}/" if prefix else ""
        return iter(sorted(key for key in self.contents if key.startswith(below)))

    def writer(self, stopwatch: Stopwatch | None = None) -> "MemoryWriter":
        return MemoryWriter(self.contents)


@dataclass
class MemoryWriter:
    contents: dict[str, bytes]
    unnamed: dict[str, bytes] = field(default_factory=dict)

    def put(self, key: str, parts: Iterable[bytes]) -> int:
        try:
            self.unnamed[key] = b"".join(parts)
        except BaseException:
            self.unnamed.clear()
            raise
        return len(self.unnamed[key])

    def settle(self) -> None:
        """There is no disk to wait for."""

    def sync(self) -> None:
        self.contents |= self.unnamed
        self.unnamed.clear()

    def append(self, key: str, offset: int, content: bytes) -> None:
        self.contents[key] = self.contents.get(key, b"")[:offset].ljust(offset, b"\0") + content

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.contents.pop(key, None)

    def remove(self) -> None:
        self.contents.clear()

    def close(self) -> None:
        """Nothing works in the background."""
