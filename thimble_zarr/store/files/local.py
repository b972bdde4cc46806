"""A store on a local disk: its files are read where they lie.

No link out of the store is followed, and no pipe is opened, which would keep a reader waiting.
"""

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from thimble_zarr import tuning
from thimble_zarr.format.layout import split_range
from thimble_zarr.format.overhead import Stopwatch
from thimble_zarr.store.files.base import NotPlainFileError, OutsideError
from thimble_zarr.store.files.disk import LocalWriter

CAN_TELL = hasattr(os, "posix_fadvise")
"""Whether the system can be told what will be read."""

_PLAIN = sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_BINARY"))


class LocalFile:
    """An open file (`OpenFile`)."""

    published_as = ""

    def __init__(self, path: str) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDONLY | _PLAIN)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise NotPlainFileError("it is a link, which is not followed") from error
            raise
        found = os.fstat(self._descriptor)
        self.n_bytes = found.st_size
        if not stat.S_ISREG(found.st_mode):
            os.close(self._descriptor)
            raise NotPlainFileError("it is not a plain file")

    def __enter__(self) -> "LocalFile":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Return bytes from `offset` on, fewer only where the file ends."""
        content = os.pread(self._descriptor, n_bytes, offset)
        while 0 < len(content) < n_bytes and (
            more := os.pread(self._descriptor, n_bytes - len(content), offset + len(content))
        ):  # of a large file the system returns some at once
            content += more
        return content

    def read_into(self, memory: memoryview | bytearray, offset: int) -> int:
        """Fill memory with the bytes from `offset` on; return how many there were."""
        return os.preadv(self._descriptor, [memory], offset)

    def will_read(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Tell the system what will be read."""
        within = [(offset, size) for offset, size in ranges if offset + size <= self.n_bytes]
        tell_of_read(self._descriptor, within)


def tell_of_read(descriptor: int, ranges: Sequence[tuple[int, int]]) -> None:
    """Tell the system what will be read, unless it has the first, the last and one between.

    Of each range it is said where it begins, and how many bytes it has.
    """
    some = [*ranges[:1], *ranges[-1:], *ranges[len(ranges) // 2 :][:1]]
    # In the middle: others read the checksums at the ends alone.
    if not CAN_TELL or all(_is_at_hand(descriptor, start + size // 2) for start, size in some):
        return
    for offset, n_bytes in ranges:
        for start, stop in split_range(offset, offset + n_bytes, tuning.TUNING.told_bytes):
            with suppress(OSError):  # a file system that cannot
                os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)


def _is_at_hand(descriptor: int, offset: int) -> bool:
    """Return whether a byte can be read without the disk; no where the system cannot tell."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except (AttributeError, NotImplementedError, OSError, OverflowError):
        return False


@dataclass(frozen=True)
class LocalFiles:
    """The files below a directory (`Files`)."""

    path: Path
    is_remote = False

    @property
    def is_there(self) -> bool:
        """Whether anything is at the root."""
        return self.path.exists()

    @property
    def is_vacant(self) -> bool:
        """Whether nothing is at the root, or an empty directory."""
        return not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir()))

    def get(self, key: str, max_bytes: int | None = None) -> bytes:
        """Return the content of a file, or as much of it as is asked for."""
        with self.open(key) as file:
            return file.read(0, file.n_bytes if max_bytes is None else max_bytes)

    def open(self, key: str, tail_bytes: int = 0) -> LocalFile:
        """Open a file to read ranges of it."""
        return LocalFile(self._inside(key))

    def will_open(self, keys: Iterable[str], tail_bytes: int = 0) -> None:
        """Do nothing: a disk is quick to open files."""

    def size(self, key: str) -> int:
        """Return the size of a file in bytes."""
        found = os.lstat(self._inside(key))
        if not stat.S_ISREG(found.st_mode):
            raise NotPlainFileError("it is not a plain file")
        return found.st_size

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield the keys below a prefix of whole parts: all that is no directory."""
        for directory, names, files in os.walk(self.path / prefix):
            links = [name for name in names if Path(directory, name).is_symlink()]
            names.sort()
            for name in sorted([*files, *links]):
                yield Path(directory, name).relative_to(self.path).as_posix()

    def total_bytes(self) -> int:
        """Return the size of all files."""
        n_bytes = 0
        for key in self.list():
            with suppress(FileNotFoundError, NotPlainFileError):  # a writer may have renamed it
                n_bytes += self.size(key)
        return n_bytes

    def _inside(self, key: str) -> str:
        """Return the path of a file, once no link on the way leads out of the store."""
        directory, _, _ = key.rpartition("/")
        if directory not in self._known_inside:
            if not Path(os.path.realpath(self.path / directory)).is_relative_to(self._root):
                raise OutsideError("it lies behind a link that leads out of the store")
            self._known_inside.add(directory)
        return f"{self.path}/{key}"

    @cached_property
    def _root(self) -> str:
        return os.path.realpath(self.path)

    @cached_property
    def _known_inside(self) -> set[str]:
        return set()

    def writer(self, stopwatch: Stopwatch | None = None) -> LocalWriter:
        """Return what writes files here, and measures what the caller spends on that."""
        return LocalWriter(self.path, stopwatch or Stopwatch())

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return LocalFiles, (self.path,)
