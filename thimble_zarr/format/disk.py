"""Files that are on disk whole or not at all, also after a power loss.

A file is written under a temporary name, fsynced and renamed, and then its directory is fsynced.
Waiting for the disk takes no processor, and waiting for many files takes little longer than for
one: so a few threads wait while the next file is encoded and written.
"""

import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from thimble_zarr.format.overhead import Stopwatch

_N_THREADS = 8


class Disk:
    """Writes files. One thread uses it at a time.

    Parameters
    ----------
    stopwatch
        Measures what the caller spends on encoding, writing and waiting for the disk.
    """

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch
        self._threads = ThreadPoolExecutor(_N_THREADS, thread_name_prefix="thimble-zarr-disk")
        self._unsynced: list[Future[None]] = []

    def write(self, file: Path, parts: Iterable[bytes]) -> int:
        """Replace `file`, by the next `sync` at the latest, and return its size.

        After a crash it is the old or the new one, whole.
        """
        n_bytes = 0
        with self._stopwatch.time("write_s"):
            file.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as undo:
            stream = undo.enter_context(file.with_name(f"{file.name}.partial").open("wb"))
            for part in self._stopwatch.time_each("encode_s", parts):
                with self._stopwatch.time("write_s"):
                    stream.write(part)
                n_bytes += len(part)
            with self._stopwatch.time("write_s"):
                stream.flush()
            undo.pop_all()
        self._unsynced.append(self._threads.submit(_replace, file, stream))
        return n_bytes

    def sync(self, directories: Iterable[Path]) -> None:
        """Wait until all that was written survives a power loss, under its name.

        Parameters
        ----------
        directories
            Those that the files lie in.

        Raises
        ------
        OSError
            If any of them could not be written.
        """
        with self._stopwatch.time("sync_s"):
            unsynced, self._unsynced = self._unsynced, []
            for future in unsynced:
                future.result()
            for _ in self._threads.map(_sync_directory, set(directories)):
                pass

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()


def _replace(file: Path, stream: BinaryIO) -> None:
    """Give a temporary file its name once its content is on disk."""
    with stream:
        os.fsync(stream.fileno())
    Path(stream.name).replace(file)


def _sync_directory(directory: Path) -> None:
    """Make renames in `directory` survive a power loss; Windows has no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
