"""One publisher at a time: a file beside the store on a server says who writes there.

Servers put a file only if there is none, or only in place of the one that was read: whoever is
second learns of it. The holder puts the file again now and then, so that its age says whether the
holder is alive. A server that knows no such conditions has no claims, and all publishers may write.
"""

import datetime
import json
import os
import platform
from contextlib import suppress
from threading import Event, Thread

import msgspec
import psutil

from thimble_zarr.errors import StoreError, StoreLockedError
from thimble_zarr.store.files.objects import ObjectFiles, Version
from thimble_zarr.store.keys import PUBLISHER
from thimble_zarr.store.lock import Holder

_RENEWED_S = 30.0
"""How often the holder puts its file again."""

_STALE_S = 300.0
"""Age at which a claim counts no more. Clocks of two machines differ, but not by minutes."""


class Claim:
    """The right to write to a place on a server: taken before the first file, renewed meanwhile."""

    def __init__(self, files: ObjectFiles) -> None:
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        self._files = files
        self._holder = Holder(pid=os.getpid(), host=platform.node(), since=since)
        self._content = json.dumps(msgspec.structs.asdict(self._holder)).encode()
        self._version: Version | None = None
        self._ended, self._is_lost, self._renewer = Event(), False, Thread(target=self._renew)

    def take(self) -> bool:
        """Take it; return whether it is new, and whatever was known of the place is old.

        Raises StoreLockedError if another publisher has it.
        """
        if self._is_lost:
            self._is_lost, self._version = False, None
        if self._version is not None:
            return False
        self._version = self._put() or self._taken_over() or self._put()
        if self._version is None:
            raise StoreLockedError(self._refusal(Holder.read(self._files, PUBLISHER)))
        if not self._renewer.is_alive():
            self._renewer = Thread(target=self._renew, name="thimble-zarr-claim", daemon=True)
            self._renewer.start()
        return True

    def check(self) -> None:
        """Raise StoreLockedError if another publisher took over."""
        if self._is_lost:
            raise StoreLockedError(self._refusal(Holder.read(self._files, PUBLISHER)))

    def release(self) -> None:
        """Give it back, if it is held. Safe to call twice."""
        self._ended.set()
        if self._renewer.is_alive():
            self._renewer.join()
        if self._version is not None:
            with suppress(StoreError):  # it grows old
                if self._put(self._version) is not None:
                    self._files.delete([PUBLISHER])
            self._version = None

    def _put(self, replacing: Version | None = None) -> Version | None:
        try:
            return self._files.put_if(PUBLISHER, self._content, replacing)
        except FileNotFoundError:  # somebody has removed it
            return None

    def _taken_over(self) -> Version | None:
        """Take the place of a holder that is gone; return which version the file has then.

        None if it gave the claim back, or another was quicker.
        """
        holder = Holder.read(self._files, PUBLISHER)
        try:
            found, renewed = self._files.version(PUBLISHER)
        except FileNotFoundError:
            return None
        is_ours = holder == self._holder  # the answer to the first request was lost
        if not (is_ours or self._is_gone(holder, renewed)):
            raise StoreLockedError(self._refusal(holder))
        return self._put(found)

    def _is_gone(self, holder: Holder | None, renewed: datetime.datetime) -> bool:
        if holder is not None and holder.is_here and not psutil.pid_exists(holder.pid):
            return True
        age = datetime.datetime.now(datetime.UTC) - renewed
        return age.total_seconds() > _STALE_S

    def _refusal(self, holder: Holder | None) -> str:
        return (
            f"{holder or 'another process'} is publishing to {self._files.path}; wait for it, or "
            f"choose another place. If it is gone, publish again {_STALE_S / 60:.0f} minutes after "
            f"it went, or remove {self._files.path / PUBLISHER}"
        )

    def _renew(self) -> None:
        while not self._ended.wait(_RENEWED_S):
            if self._version is None or self._is_lost:
                continue
            with suppress(StoreError):  # the server is gone: the next time
                version = self._put(self._version)
                self._version, self._is_lost = version or self._version, version is None
