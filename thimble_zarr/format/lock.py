"""One writer a store: a lock of the operating system, and beside it who holds it.

The system gives the lock up when its holder dies, however it dies. The name that the holder leaves
beside it is for people: what it says of a dead one is out of date, and nothing depends on it.

The lock is one of a file, not of a path: whoever holds that of a store which was removed holds
nothing of the store that another began at its path.
"""

import datetime
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import filelock
import psutil

from thimble_zarr.errors import StoreError, StoreLockedError
from thimble_zarr.format.documents import leads_out, read_document
from thimble_zarr.format.store import HOLDER, LOCK


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
        return self.host == platform.node() and self.pid == os.getpid()

    @property
    def may_run(self) -> bool:
        """Whether it may still be there: of another machine nobody here knows."""
        return self.host != platform.node() or psutil.pid_exists(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since},"


def why_empty(store: Path) -> str:
    """Return why nothing is committed in a store, as far as that is known, and what to do."""
    holder = Holder.read(store)
    if holder is not None and holder.may_run:
        is_known = holder.host == platform.node()
        return (
            f"{holder} {'is' if is_known else 'may be'} recording into it and commits nothing "
            "before its first block is full; try again then"
        )
    gone = "nobody is recording into it" if holder is None else f"its writer, {holder} is gone"
    return (
        f"{gone}; resume it (`thimble-zarr train --resume`, resume=True) or replace it "
        "(--overwrite, overwrite=True)"
    )


def not_begun(store: Path) -> StoreError:
    """Return the error of who needs a row of a store that has none."""
    return StoreError(f"{store} has no committed step yet: {why_empty(store)}")


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
            self._lock.acquire(timeout=0)
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
