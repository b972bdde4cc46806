"""What a store asks of the place where its files lie: a local disk, an object store, a test's dict.

A key is a path from the root of the store, with `/` between its parts (`store.keys`). A place
serves plain files only: it follows no link out of the store and opens no pipe, because a store may
come from anywhere.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, Self

from thimble_zarr.errors import StoreError
from thimble_zarr.format import documents
from thimble_zarr.format.location import Location
from thimble_zarr.format.overhead import Stopwatch

PARTIAL = ".partial"
"""What the key of a file ends with that is being written."""


class NotPlainFileError(ValueError):
    """A key leads to something that is not opened: a link, a directory or a pipe."""


class PlaceError(StoreError):
    """A place that is no disk cannot be read or written."""


class BusyError(PlaceError):
    """A server cannot be reached, or does not answer as it should; it may do so later."""


class NotListedError(PlaceError):
    """A place does not tell which files it has."""


class ChangedError(PlaceError):
    """A file was replaced by another one after it was opened."""


class OutsideError(NotPlainFileError):
    """A key leads out of the store, by a link on the way."""


class OpenFile(Protocol):
    """A file of which ranges are read. Use it as a context manager, in one thread."""

    @property
    def n_bytes(self) -> int:
        """Its size when it was opened."""

    @property
    def published_as(self) -> str:
        """What its chunks were known by when it was uploaded; empty where that is not known.

        Whoever uploads another file in its place, puts another word there, or none.
        """

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Return bytes from `offset` on, fewer only where the file ends."""

    def read_into(self, memory: memoryview | bytearray, offset: int) -> int:
        """Fill memory with the bytes from `offset` on; return how many there were."""

    def will_read(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Say which ranges, `(offset, n_bytes)`, will be read, so that they may be fetched."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


class Files(Protocol):
    """The files of a store, for reading. Small to pickle, safe to share by threads.

    Where a key has no file its methods raise FileNotFoundError, where it leads to something else
    NotPlainFileError, and where the place cannot be read OSError.
    """

    @property
    def is_remote(self) -> bool:
        """Whether each request takes long, so that what will be asked for is better told early."""

    @property
    def path(self) -> Location:
        """Where the store lies, as errors name it."""

    @property
    def is_there(self) -> bool:
        """Whether anything is at the root."""

    @property
    def is_vacant(self) -> bool:
        """Whether a store may be created at the root: nothing is there, or an empty directory."""

    def get(self, key: str, max_bytes: int | None = None) -> bytes:
        """Return the content of a file, or as much of it as is asked for."""

    def open(self, key: str, tail_bytes: int = 0) -> OpenFile:
        """Open a file to read ranges of it, first so many bytes at its end."""

    def will_open(self, keys: Iterable[str], tail_bytes: int = 0) -> None:
        """Say which files will be opened or got next, so that they may be fetched."""

    def size(self, key: str) -> int:
        """Return the size of a file in bytes."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield the keys below a prefix of whole parts, also of what is not opened.

        Raises NotListedError where nobody can tell.
        """

    def total_bytes(self) -> int:
        """Return the size of all files; raise NotListedError where nobody can tell."""

    def writer(self, stopwatch: Stopwatch | None = None) -> "FileWriter":
        """Return what writes files here, and measures what the caller spends on that."""


class FileWriter(Protocol):
    """Writes the files of a store. One thread uses it at a time, and closes it."""

    def put(self, key: str, parts: Iterable[bytes]) -> int:
        """Write a file, which gets its key when `sync` is called; return its size.

        After a crash it is the old one or the new one, whole. If it cannot be written, neither it
        nor what was put since the last `sync` gets its key. No key is put twice before `sync`.
        """

    def settle(self) -> None:
        """Wait until what was put survives a power loss, though not yet under its key.

        If any of it could not be written, that is an OSError, and none of it gets its key.
        """

    def sync(self) -> None:
        """Give every file that was put its key, for good.

        If one could not be written or get its key, that is an OSError; others may have theirs.
        """

    def append(self, key: str, offset: int, content: bytes) -> None:
        """Make `content` what a file ends with from `offset` on; it survives a power loss.

        The file stays as it is up to `offset`, whatever happens.
        """

    def delete(self, keys: Iterable[str]) -> None:
        """Remove files for good, before anything that is done later. They may be gone already."""

    def remove(self) -> None:
        """Remove all there is, as far as that can be done."""

    def close(self) -> None:
        """End what works in the background. Safe to call twice."""


def read_document(files: Files, key: str) -> Any:
    """Return a JSON document of a store, which may come from anywhere.

    Raises ValueError if it is not JSON, too large, too deep, or no plain file.
    """
    with files.open(key) as file:
        if file.n_bytes > documents.MAX_DOCUMENT_BYTES:
            raise ValueError(f"it is larger than {documents.MAX_DOCUMENT_BYTES:,} bytes")
        return documents.parsed(file.read(0, file.n_bytes))
