"""Where a copy of a store is written: on a server, or on a disk."""

import hashlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from threading import Lock
from typing import Protocol

from thimble_zarr import tuning
from thimble_zarr.errors import ConfigError
from thimble_zarr.format.layout import split_range
from thimble_zarr.store.contents import disk_errors_named
from thimble_zarr.store.files.base import Files, PlaceError
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.files.objects import Arrived, ObjectFiles
from thimble_zarr.store.keys import HOLDER, LOCK, PUBLISHER
from thimble_zarr.store.lock import WriterLock
from thimble_zarr.store.remote.claim import Claim


class Target(Protocol):
    """Takes files, in several threads. What `put` returned from is there for good after `sync`."""

    @property
    def files(self) -> Files:
        """What is there."""

    @property
    def keeps_what_it_took(self) -> bool:
        """Whether a file that was compared when it came need not be compared again."""

    def claim(self) -> bool:
        """See that nobody else writes here; return whether that is new, and `sizes` may be old.

        Raises StoreLockedError if somebody does.
        """

    def sizes(self) -> Mapping[str, int]:
        """Return the size of each file that is there."""

    def has(self, key: str, content: bytes) -> bool:
        """Return whether a file is there with that content, as far as that can be told quickly."""

    def put(self, key: str, content: bytes, published_as: str, arrived: Arrived) -> None:
        """Write a file, and see that it is there; `published_as` is what chunks are known by."""

    def sync(self) -> None:
        """Give every file its key for good."""

    def delete(self, keys: Iterable[str]) -> None:
        """Remove files."""


class Server:
    """A place in an object store, which says of each file the MD5 of what it received."""

    keeps_what_it_took = True

    def __init__(self, files: ObjectFiles) -> None:
        if not files.is_listed:
            raise ConfigError(f"nothing can be put to {files.path}; name an s3:// or gs:// address")
        self.files = files
        self._claim = Claim(files)

    def claim(self) -> bool:
        """Take the claim of its one publisher, until it is closed."""
        is_new = self._claim.take()
        if is_new:
            self.__dict__.pop("_found", None)
        return is_new

    def close(self) -> None:
        """Give the claim back."""
        self._claim.release()

    @cached_property
    def _found(self) -> dict[str, tuple[int, str | None]]:
        found = {of["path"]: (of["size"], of["e_tag"]) for of in self.files.found()}
        found.pop(PUBLISHER, None)
        return found

    def sizes(self) -> Mapping[str, int]:
        """Return the size of each file that was there when it was first asked."""
        return {key: size for key, (size, _) in self._found.items()}

    def has(self, key: str, content: bytes) -> bool:
        """Return whether it was there with that size and MD5."""
        size, tag = self._found.get(key, (-1, None))
        return size == len(content) and tag in _tags(content)

    def put(self, key: str, content: bytes, published_as: str, arrived: Arrived) -> None:
        """Upload a file; it is there, whole, once the server confirms its checksum."""
        self._claim.check()
        tag = self.files.put(key, content, published_as, arrived)
        if tag not in _tags(content) and self.files.get(key) != content:
            where = self.files.path / key
            raise PlaceError(f"{where}: the server has something else than was sent")
        self._found[key] = len(content), tag

    def sync(self) -> None:
        """Do nothing: what is put is there."""

    def delete(self, keys: Iterable[str]) -> None:
        """Remove files."""
        for key in keys:
            self.files.delete([key])
            self._found.pop(key, None)


def _tags(content: bytes) -> tuple[str, str]:
    """Return what a server may call a file: its MD5, or that of the MD5s of its parts."""
    spans = split_range(0, len(content), tuning.TUNING.upload_bytes)
    parts = [content[start:stop] for start, stop in spans]
    in_parts = _md5(b"".join(map(_md5, parts))).hex()
    return f'"{_md5(content).hex()}"', f'"{in_parts}-{len(parts)}"'


def _md5(content: bytes) -> bytes:
    return hashlib.md5(content, usedforsecurity=False).digest()


class Disk:
    """A directory of this machine."""

    keeps_what_it_took = False

    def __init__(self, files: LocalFiles) -> None:
        self.files = files
        self._writer, self._lock = files.writer(), Lock()
        self._claim: WriterLock | None = None

    def claim(self) -> bool:
        """Take the lock of the store's one writer, until it is closed."""
        if self._claim is not None:
            return False
        with disk_errors_named(f"write {self.files.path}", "name another place"):
            self._claim = WriterLock(self.files.path)
        return True

    def sizes(self) -> Mapping[str, int]:
        """Return the size of each file that is there."""
        keys = (key for key in self.files.list() if key not in (LOCK, HOLDER))
        return {key: self.files.size(key) for key in keys}

    def has(self, key: str, content: bytes) -> bool:
        """Return whether a file is there with that content."""
        try:
            return self.files.get(key) == content
        except FileNotFoundError:
            return False

    def put(self, key: str, content: bytes, published_as: str, arrived: Arrived) -> None:
        """Write a file."""
        with self._lock, disk_errors_named(f"write {self.files.path}", "name another place"):
            self._writer.put(key, [content])
        arrived(len(content))

    def sync(self) -> None:
        """Give every file its key for good."""
        with disk_errors_named(f"write {self.files.path}", "name another place"):
            self._writer.sync()

    def delete(self, keys: Iterable[str]) -> None:
        """Remove files."""
        self._writer.delete(keys)

    def close(self) -> None:
        """End what works in the background, and give the lock back."""
        self._writer.close()
        if self._claim is not None:
            self._claim.release()
