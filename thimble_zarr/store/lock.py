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
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Self

import filelock
import psutil

from thimble_zarr.errors import StoreError, StoreLockedError
from thimble_zarr.format.reader import Reader
from thimble_zarr.store.files.documents import leads_out, read_document
from thimble_zarr.store.reader import COMMIT, HOLDER, LOCK, Commit, StoreReader, read_declared


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who records into a store.

    Attributes
    ----------
    pid, host
        The process, and the machine it runs on.
    since
        When it began, ISO 8601, UTC.
    """

    pid: int
    host: str
    since: str

    @classmethod
    def read(cls, store: Path) -> Self | None:
        """Return who left its name in a store, None where there is none that can be read."""
        try:
            holder = cls(**read_document(store / HOLDER))
        except (OSError, ValueError, TypeError):
            return None
        known = isinstance(holder.pid, int) and isinstance(holder.host, str)
        return holder if known and isinstance(holder.since, str) else None

    @property
    def is_this_process(self) -> bool:
        """Whether it is the process that asks."""
        return self.is_here and self.pid == os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether it runs, or ran, on this machine."""
        return self.host == platform.node()

    @property
    def may_run(self) -> bool:
        """Whether it may still run: of a process on another machine nobody here knows."""
        return not self.is_here or psutil.pid_exists(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"


def _is_locked(store: Path) -> bool | None:
    """Return whether a writer holds the lock of a store, None where the system cannot tell.

    To ask is to take the lock, shared with all others who ask, for a moment.
    """
    try:
        import fcntl

        descriptor = os.open(store / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
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


class State(Enum):
    """How far a recording has come."""

    CLOSED = "closed"
    RECORDING = "recording"
    UNKNOWN = "unknown"
    CUT_OFF = "cut-off"


@dataclass(frozen=True)
class Recording:
    """Whether a recording has ended, and if not, who is or was recording.

    Attributes
    ----------
    state
        `UNKNOWN` of a recording that a process on another machine may still make.
    writer
        Who left its name; None where nobody did. A writer that ends removes it.
    """

    state: State
    writer: Holder | None = None

    @classmethod
    def of(cls, reader: Reader) -> Self:
        """Return the state of what a reader reads. A file that is no store has ended."""
        if not isinstance(reader, StoreReader) or reader.commit.complete:
            return cls(State.CLOSED)
        recording = cls.of_open_store(reader.path)
        if recording.state is State.CUT_OFF and Commit.read(reader.path / COMMIT).complete:
            return cls(State.RECORDING)  # it was, when the reader was opened
        return recording

    @classmethod
    def of_open_store(cls, store: Path) -> Self:
        """Return the state of a store that is not closed."""
        writer, is_locked = Holder.read(store), _is_locked(store)
        if is_locked or (is_locked is None and writer and writer.is_here and writer.may_run):
            return cls(State.RECORDING, writer)
        # The lock may not reach another machine that records over a network.
        is_elsewhere = writer is not None and not writer.is_here
        return cls(State.UNKNOWN if is_elsewhere else State.CUT_OFF, writer)

    def __str__(self) -> str:
        by = f" by {self.writer}" if self.writer else ""
        gone = f"its writer, {self.writer}, is gone" if self.writer else "it has no writer"
        return {
            State.CLOSED: "closed",
            State.RECORDING: f"being recorded{by}",
            State.UNKNOWN: f"being recorded{by}, or cut off",
            State.CUT_OFF: f"cut off: {gone}",
        }[self.state]


def why_empty(store: Path) -> str:
    """Return why nothing is committed in a store, as far as that is known, and what to do."""
    recording = Recording.of_open_store(store)
    writer = recording.writer
    if recording.state is not State.CUT_OFF:
        is_known = recording.state is State.RECORDING
        return (
            f"{writer or 'a process'} {'is' if is_known else 'may be'} recording into it and "
            "commits nothing before its first block is full; try again then"
        )
    gone = "nobody is recording into it" if writer is None else f"its writer, {writer}, is gone"
    return f"{gone}; {_how_to_go_on(store)}"


def _how_to_go_on(store: Path) -> str:
    """Return what to do with a store whose writer is gone before it committed a row."""
    schema = None
    with suppress(StoreError):
        schema = read_declared(store)
    if schema is not None and schema.is_imported:
        return "import the file again, with --overwrite"
    return (
        "resume it (`thimble-zarr train --resume`, resume=True) or replace it (--overwrite, "
        "overwrite=True)"
    )


def check_not_recorded(store: Path) -> None:
    """Raise StoreLockedError if a writer may be recording into a store that is not closed."""
    recording = Recording.of_open_store(store)
    if recording.state is State.RECORDING:
        raise StoreLockedError(
            f"{recording.writer or 'another process'} is recording into {store}; wait for it"
        )
    if recording.state is State.UNKNOWN:
        raise StoreLockedError(
            f"{recording.writer} may be recording into {store}; wait for it, or if it is gone, "
            f"remove {store / HOLDER}"
        )


def not_begun(store: Path) -> StoreError:
    """Return the error of who needs a row of a store that has none."""
    return StoreError(f"{store} has no committed step yet: {why_empty(store)}")


_MOMENT_S = 0.1


class WriterLock:
    """The lock of a store's one writer, held until `release`.

    Raises
    ------
    StoreLockedError
        If another writer holds it.
    """

    def __init__(self, store: Path) -> None:
        if (store / LOCK).is_symlink() or leads_out(store / LOCK, store):
            raise StoreError(f"{store / LOCK} is a link, and no writer makes one; remove it")
        self._file, self._holder = store / LOCK, store / HOLDER
        self._lock = filelock.FileLock(store / LOCK, thread_local=False)
        try:
            # Readers who ask for it hold it for a moment.
            self._lock.acquire(timeout=_MOMENT_S, poll_interval=_MOMENT_S / 4)
        except filelock.Timeout as error:
            raise StoreLockedError(
                f"{Holder.read(store) or 'another process'} is recording into {store}; wait for it "
                "or choose another path"
            ) from error
        self._held = self._file.lstat()  # no other file is given its number while it is open
        holder = Holder(
            pid=os.getpid(),
            host=platform.node(),
            since=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        self._holder.unlink(missing_ok=True)  # it might be a link
        self._holder.write_text(json.dumps(asdict(holder)), encoding="utf-8")

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
