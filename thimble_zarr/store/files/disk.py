"""Files that are on a local disk whole or not at all, also after a power loss.

A file is written under a temporary name and fsynced; then it is renamed, and then its directory is
fsynced. Waiting for the disk takes no processor, and waiting for many files takes little longer
than for one: so a few threads wait while the next file is encoded and written. Ctrl-C takes effect
between files, because a lock of the threads that it leaves taken would never be given back.

Nothing else in the package writes into a store: what `os` is asked for here is all that a crash can
cut off.
"""

import os
import shutil
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

from thimble_zarr.format.overhead import Stopwatch
from thimble_zarr.interrupts import interrupts_held
from thimble_zarr.store.files.base import PARTIAL

_N_THREADS = 8

_MOST_UNSYNCED = 64
"""Files that wait for the disk at once. Each is open, and a process may open 1024 by default."""

_BINARY = getattr(os, "O_BINARY", 0)


class LocalWriter:
    """Writes files below a directory (`FileWriter`), which is made when something is put there."""

    def __init__(self, path: Path, stopwatch: Stopwatch) -> None:
        self._path, self._stopwatch = path, stopwatch
        self._threads = ThreadPoolExecutor(_N_THREADS, thread_name_prefix="thimble-zarr-disk")
        self._unsynced: deque[Future[None]] = deque()
        self._unnamed: list[Path] = []
        self._directories = {path.parent}

    @interrupts_held()
    def put(self, key: str, parts: Iterable[bytes]) -> int:
        """Write a file, which gets its key when `sync` is called; return its size."""
        n_bytes, file = 0, self._path / key
        with self._stopwatch.time("write_s"):
            make_directory(file.parent)
        with ExitStack() as undo:
            undo.callback(self._unnamed.clear)
            while len(self._unsynced) >= _MOST_UNSYNCED:
                with self._stopwatch.time("sync_s"):
                    self._unsynced.popleft().result()
            descriptor = os.open(_partial(file), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _BINARY)
            undo.callback(os.close, descriptor)
            for part in self._stopwatch.time_each("encode_s", parts):
                with self._stopwatch.time("write_s"):
                    _write_all(descriptor, part)
                n_bytes += len(part)
            undo.pop_all()
        self._unsynced.append(self._threads.submit(_sync, descriptor))
        self._unnamed.append(file)
        return n_bytes

    @interrupts_held()
    def settle(self) -> None:
        """Wait until what was put survives a power loss, though not yet under its key."""
        with self._stopwatch.time("sync_s"):
            unsynced, self._unsynced = self._unsynced, deque()
            try:
                for future in unsynced:
                    future.result()
            except OSError:
                self._unnamed.clear()
                raise

    @interrupts_held()
    def sync(self) -> None:
        """Give every file that was put its key, for good; the first time also the root its name."""
        self.settle()
        with self._stopwatch.time("sync_s"):
            unnamed, self._unnamed = self._unnamed, []
            for file in unnamed:
                os.replace(_partial(file), file)  # noqa: PTH105  # one module asks the system
            directories, self._directories = self._directories, set()
            directories.update(file.parent for file in unnamed)
            for _ in self._threads.map(sync_directory, directories):
                pass

    def append(self, key: str, offset: int, content: bytes) -> None:
        """Make `content` what a file ends with from `offset` on; it survives a power loss."""
        file = self._path / key
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | _BINARY)
        try:
            os.ftruncate(descriptor, offset)
            os.lseek(descriptor, offset, os.SEEK_SET)
            _write_all(descriptor, content)
            with self._stopwatch.time("sync_s"):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if offset == 0:  # it may be new
            sync_directory(file.parent)

    def delete(self, keys: Iterable[str]) -> None:
        """Remove files for good, and directories that nothing is left in."""
        directories, left = set(), set()
        for key in keys:
            with suppress(FileNotFoundError):
                os.unlink(self._path / key)  # noqa: PTH108
            directories.add((self._path / key).parent)
        for directory in sorted(directories, reverse=True):  # what lies deeper comes first
            with suppress(OSError):  # it is not empty
                while directory != self._path:
                    os.rmdir(directory)  # noqa: PTH106
                    directory = directory.parent
            left.add(directory)
        for directory in left:
            with suppress(FileNotFoundError):
                sync_directory(directory)

    def remove(self) -> None:
        """Remove all there is, as far as that can be done."""
        shutil.rmtree(self._path, ignore_errors=True)

    @interrupts_held()
    def close(self) -> None:
        """End the threads. Safe to call twice."""
        self._threads.shutdown()


def make_directory(directory: Path) -> None:
    """Create a directory and those above it, so that a power loss leaves them there."""
    missing = []
    while not directory.is_dir():
        missing.append(directory)
        directory = directory.parent
    for directory in reversed(missing):
        try:
            os.mkdir(directory)  # noqa: PTH102
        except FileExistsError:
            if not directory.is_dir():
                raise
        sync_directory(directory.parent)


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` survive a power loss; Windows has no such call."""
    if os.name != "nt":
        _sync(os.open(directory, os.O_RDONLY))


def _partial(file: Path) -> Path:
    return file.with_name(f"{file.name}{PARTIAL}")


def _sync(descriptor: int) -> None:
    """Wait until what a file or directory holds is on disk, and close it."""
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, content: bytes) -> None:
    rest = memoryview(content)
    while len(rest):
        rest = rest[os.write(descriptor, rest) :]
