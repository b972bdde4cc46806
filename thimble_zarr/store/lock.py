"""One writer a store: a lock of the operating system, and beside it who holds it.

The system gives the lock up when its holder dies, however it dies. The name that the holder leaves
beside it is for people, and stays when it is killed.

The lock is one of a file, not of a path: whoever holds that of a store which was removed holds
nothing of the store that another began at its path.
"""

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Self

import filelock
import msgspec
import psutil

from thimble_zarr.errors import StoreError, StoreLockedError
from thimble_zarr.format.reader import Recording, State
from thimble_zarr.store.files.base import Files, NotPlainFileError, read_document
from thimble_zarr.store.files.disk import make_directory
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.keys import HOLDER, LOCK


class Holder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who records into a store, since when (ISO 8601, UTC)."""

    pid: int
    host: str
    since: str

    @classmethod
    def read(cls, files: Files, key: str = HOLDER) -> Self | None:
        """Return who left its name in a store, None where there is none that can be read."""
        try:
            return msgspec.convert(read_document(files, key), cls)
        except (OSError, ValueError):
            return None

    @property
    def is_this_process(self) -> bool:
        """Whether it is the process that asks."""
        return self.is_here and self.pid == os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether it runs, or ran, on this machine."""
        return self.host == platform.node()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"


def _is_locked(files: Files) -> bool | None:
    """Return whether a writer holds the lock of a store, None where the system cannot tell.

    To ask is to take the lock, shared with all others who ask, for a moment.
    """
    try:
        import fcntl

        descriptor = os.open(Path(files.path) / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def recording_of(files: Files) -> Recording:
    """Return how far the recording of a store is that is not closed."""
    if files.is_remote:  # a lock reaches no further than its machine
        return Recording(State.UNKNOWN)
    holder, is_locked = Holder.read(files), _is_locked(files)
    writer = None if holder is None else str(holder)
    local = holder if holder is not None and holder.is_here else None
    if is_locked or (is_locked is None and local is not None and psutil.pid_exists(local.pid)):
        return Recording(State.RECORDING, writer)
    # The lock may not reach another machine that records over a network.
    is_elsewhere = holder is not None and local is None
    return Recording(State.UNKNOWN if is_elsewhere else State.CUT_OFF, writer)


def check_not_recorded(files: Files) -> None:
    """Raise StoreLockedError if a writer may be recording into a store that is not closed."""
    recording = recording_of(files)
    if recording.state is State.RECORDING:
        raise StoreLockedError(
            f"{recording.writer or 'another process'} is recording into {files.path}; wait for it"
        )
    if recording.state is State.UNKNOWN:
        raise StoreLockedError(
            f"{recording.writer} may be recording into {files.path}; wait for it, or if it is "
            f"gone, remove {files.path / HOLDER}"
        )


_MOMENT_S = 0.1


class WriterLock:
    """The lock of a store's one writer, held until `release`.

    Raises StoreLockedError if another writer holds it.
    """

    def __init__(self, store: Path) -> None:
        files = LocalFiles(store)
        self._file, self._holder = store / LOCK, store / HOLDER
        try:
            files.size(LOCK)
        except FileNotFoundError:
            pass
        except NotPlainFileError as error:
            raise StoreError(
                f"{self._file} is a link, and no writer makes one; remove it"
            ) from error
        make_directory(self._file.parent)
        self._lock = filelock.FileLock(self._file, thread_local=False)
        try:
            # Readers who ask for it hold it for a moment.
            self._lock.acquire(timeout=_MOMENT_S, poll_interval=_MOMENT_S / 4)
        except filelock.Timeout as error:
            raise StoreLockedError(
                f"{Holder.read(files) or 'another process'} is recording into {store}; wait for it "
                "or choose another path"
            ) from error
        self._held = self._file.lstat()  # no other file is given its number while it is open
        holder = Holder(
            pid=os.getpid(),
            host=platform.node(),
            since=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        self._holder.unlink(missing_ok=True)  # it might be a link
        self._holder.write_text(json.dumps(msgspec.structs.asdict(holder)), encoding="utf-8")

    @property
    def is_in_place(self) -> bool:
        """Whether the lock that is held is still that of the store, and not of one that is gone.

        A file system that does not number its files tells only whether there is a lock.
        """
        try:
            found = self._file.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        is_numbered = found.st_ino and self._held.st_ino
        return not is_numbered or os.path.samestat(found, self._held)

    def release(self) -> None:
        """Give the lock up. Safe to call twice."""
        try:
            if self._lock.is_locked and self.is_in_place:
                self._holder.unlink(missing_ok=True)
        finally:
            self._lock.release()
