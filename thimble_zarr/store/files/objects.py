"""A store on a server: in an object store (S3, Google Cloud Storage), or behind a web server.

A request takes some ten milliseconds however little it asks for, so what will be read is asked for
early, in few requests at once, and the caller waits for the first of them only.

What opens the server comes from the environment, as obstore reads it; it is neither kept nor shown.
A server's answer may repeat it, and so nothing of an answer is shown but a code that is known.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import cached_property, lru_cache
from typing import Any, Self, TypeVar

from thimble_zarr import tuning
from thimble_zarr.errors import ConfigError
from thimble_zarr.format.layout import split_range
from thimble_zarr.format.location import Url
from thimble_zarr.format.overhead import Stopwatch
from thimble_zarr.store.files import hub
from thimble_zarr.store.files.answers import named_errors
from thimble_zarr.store.files.base import ChangedError, FileWriter, NotListedError, PlaceError

T = TypeVar("T")

Arrived = Callable[[int], object]
"""Called with the bytes of each part of a file that has arrived, and perhaps in other threads."""

Version = dict[str, str]
"""What a server calls one version of a file: S3 goes by its `e_tag`, Google by its `version`."""

_SERVED_LISTS = ("s3", "gs")
"""Servers that tell which files there are: web servers have no common way to."""


@dataclass(frozen=True)
class _Part:
    """Bytes of a file from `start` on, and what the server says of the file: size and version."""

    start: int
    content: memoryview
    n_bytes: int
    version: object
    published_as: str = ""

    @property
    def stop(self) -> int:
        """The byte behind the last."""
        return self.start + len(self.content)


@dataclass
class _Fetched:
    """Bytes that were asked for early, and which of their ranges nobody has read yet."""

    start: int
    stop: int
    part: "Future[_Part]"
    unread: set[tuple[int, int]]


class ObjectFile:
    """A file on a server (`OpenFile`), of which some bytes are there: those it was opened with."""

    def __init__(self, name: str, fetch: Callable[[dict[str, Any]], _Part], first: _Part) -> None:
        self._name, self._fetch, self._first = name, fetch, first
        self._fetched: list[_Fetched] = []
        self._told: set[tuple[int, int]] = set()
        self._unread = set[tuple[int, int]]()
        self.n_bytes, self.published_as = first.n_bytes, first.published_as

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for fetched in self._fetched:
            fetched.part.cancel()
        self._fetched.clear()

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Return bytes from `offset` on, fewer only where the file ends."""
        memory = bytearray(max(0, min(n_bytes, self.n_bytes - offset)))
        self.read_into(memory, offset)
        return bytes(memory)

    def read_into(self, memory: memoryview | bytearray, offset: int) -> int:
        """Fill memory with the bytes from `offset` on; return how many there were."""
        n_bytes = max(0, min(len(memory), self.n_bytes - offset))
        if n_bytes:
            part = self._part(offset, n_bytes)
            at = offset - part.start
            memory[:n_bytes] = part.content[at : at + n_bytes]
        return n_bytes

    def will_read(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Ask for ranges, those that lie close together at once, unless they are there."""
        wanted = {(start, n) for start, n in ranges if start + n <= self.n_bytes} - self._told
        self._told |= wanted
        there = {one for one in wanted if _covers(self._first, *one)}
        if len(self._first.content) > tuning.TUNING.opening_bytes:
            self._unread |= there
        for start, stop, covered in _coalesced(sorted(wanted - there)):
            asked = {"range": (start, stop)}
            part = _threads(os.getpid()).submit(self._same, asked)
            self._fetched.append(_Fetched(start, stop, part, covered))

    def _part(self, offset: int, n_bytes: int) -> _Part:
        """Return bytes of the file that have a range in them."""
        if _covers(part := self._first, offset, n_bytes):
            if (offset, n_bytes) in self._unread:
                self._unread.remove((offset, n_bytes))
                if not self._unread:  # all that was announced has been read
                    nothing = memoryview(b"")
                    self._first = replace(part, start=self.n_bytes, content=nothing)
            return part
        for fetched in self._fetched:
            if fetched.start <= offset and offset + n_bytes <= fetched.stop:
                fetched.unread.discard((offset, n_bytes))
                if not fetched.unread:
                    self._fetched.remove(fetched)
                return fetched.part.result()
        # Who reads on from the bytes that are there will want more: ask for twice as much.
        reads_on, length = self._first.start <= offset <= self._first.stop, n_bytes
        if reads_on:
            more = min(2 * len(self._first.content), tuning.TUNING.request_bytes)
            length = min(max(n_bytes, more), self.n_bytes - offset)
        part = self._same({"range": (offset, offset + length)})
        if reads_on:
            self._first = part
        return part

    def _same(self, asked: dict[str, Any]) -> _Part:
        """Return bytes of the file that was opened; raise ChangedError if it is no longer there."""
        part = self._fetch(asked)
        if (part.n_bytes, part.version) != (self.n_bytes, self._first.version):
            raise ChangedError(
                f"{self._name} was replaced while it was read; give the command again"
            )
        start, stop = asked["range"]
        if (part.start, part.stop) != (start, stop):
            n_bytes = len(part.content)
            raise PlaceError(
                f"{self._name}: {stop - start} bytes were asked for, and {n_bytes} came"
            )
        return part


def _covers(part: _Part, offset: int, n_bytes: int) -> bool:
    return part.start <= offset and offset + n_bytes <= part.stop


def _coalesced(
    ranges: Iterable[tuple[int, int]],
) -> Iterator[tuple[int, int, set[tuple[int, int]]]]:
    """Put ranges together that lie so close that at most a fifth more is asked for than wanted."""
    start, stop, n_wanted, covered = 0, 0, 0, set[tuple[int, int]]()
    for offset, n_bytes in ranges:
        end = max(stop, offset + n_bytes)
        n_more = max(0, end - max(stop, offset))
        fits = end - start <= tuning.TUNING.request_bytes
        if covered and not (fits and 5 * (end - start) <= 6 * (n_wanted + n_more)):
            yield start, stop, covered
            covered = set()
        if not covered:
            start, n_wanted, n_more = offset, 0, n_bytes
            end = offset + n_bytes
        stop, n_wanted = end, n_wanted + n_more
        covered.add((offset, n_bytes))
    if covered:
        yield start, stop, covered


def _version(found: Any) -> Version:
    return {name: found[name] for name in ("e_tag", "version") if found.get(name)}


@dataclass(frozen=True)
class ObjectFiles:
    """The files below an address (`Files`), for reading."""

    path: Url
    _ahead: dict[tuple[str, int], "Future[_Part]"] = field(
        default_factory=dict, compare=False, repr=False
    )
    is_remote = True

    @property
    def is_there(self) -> bool:
        """Whether anything is at the address; where nobody can tell, yes."""
        return not self.is_listed or any(self.list())

    @property
    def is_vacant(self) -> bool:
        """Whether nothing is at the address."""
        return not self.is_there

    def get(self, key: str, max_bytes: int | None = None) -> bytes:
        """Return the content of a file, or as much of it as is asked for."""
        with self.open(key) as file:
            return file.read(0, file.n_bytes if max_bytes is None else max_bytes)

    def open(self, key: str, tail_bytes: int = 0) -> ObjectFile:
        """Open a file: with the bytes at its end, or if there are none with those at its start."""
        ahead = self._ahead.pop((key, tail_bytes), None)
        first = self._first(key, tail_bytes) if ahead is None else ahead.result()
        return ObjectFile(self.path / key, lambda asked: self._fetch(key, asked), first)

    def will_open(self, keys: Iterable[str], tail_bytes: int = 0) -> None:
        """Begin to open files."""
        for key in keys:
            if (key, tail_bytes) not in self._ahead:
                opening = _threads(os.getpid()).submit(self._first, key, tail_bytes)
                self._ahead[key, tail_bytes] = opening

    def size(self, key: str) -> int:
        """Return the size of a file in bytes."""
        if (ahead := self._ahead.get((key, 0))) is not None:
            return ahead.result().n_bytes
        n_bytes: int = self.head(key)["size"]
        return n_bytes

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield the keys below a prefix of whole parts."""
        return (found["path"] for found in self.found(prefix))

    def total_bytes(self) -> int:
        """Return the size of all files."""
        return sum(found["size"] for found in self.found())

    def put(
        self,
        key: str,
        content: bytes,
        published_as: str = "",
        arrived: Arrived = lambda n_bytes: None,
    ) -> str | None:
        """Upload a file, which is there once all of it is; return what the server calls it.

        A large one goes up in parts, one after the other: so little is on its way at once that it
        arrives in time over a slow link, too.
        """
        options: dict[str, Any] = {}
        if published_as:
            options["attributes"] = {_PUBLISHED_AS: published_as}
        n_bytes, part_bytes = len(content), tuning.TUNING.upload_bytes
        with named_errors(self.path, key):
            put = self._obstore.put
            if n_bytes > 2 * part_bytes:
                parts = _parts(content, part_bytes, arrived)
                options |= {"chunk_size": part_bytes, "max_concurrency": 1}
                found = put(self._uplink, key, parts, use_multipart=True, **options)
            else:
                server = self._uplink if n_bytes > _QUICK_BYTES else self._server
                found = put(server, key, content, use_multipart=False, **options)
                arrived(n_bytes)
        tag: str | None = found["e_tag"]
        return tag

    def put_if(self, key: str, content: bytes, replacing: Version | None = None) -> Version | None:
        """Upload a small file if there is none, or only in place of this version of it.

        Return the version that it has now; None if something else is there.
        """
        mode = "create" if replacing is None else replacing
        errors = self._obstore.exceptions
        with named_errors(self.path, key):
            try:
                put = self._obstore.put
                return _version(put(self._server, key, content, mode=mode, use_multipart=False))
            except (errors.AlreadyExistsError, errors.PreconditionError):
                return None
            except (errors.NotSupportedError, NotImplementedError):
                return _version({"e_tag": self.put(key, content)})

    def version(self, key: str) -> tuple[Version, datetime]:
        """Return which version of a file is there, and since when."""
        found = self.head(key)
        return _version(found), found["last_modified"]

    def head(self, key: str) -> Any:
        """Return what the server says of a file."""
        with named_errors(self.path, key):
            return self._obstore.head(self._server, key)

    def delete(self, keys: Iterable[str]) -> None:
        """Remove files, which may be gone already."""
        for key in keys:
            with suppress(FileNotFoundError), named_errors(self.path, key):
                self._obstore.delete(self._server, key)

    def writer(self, stopwatch: Stopwatch | None = None) -> FileWriter:
        """Raise ConfigError: a store is written on a disk, and then published."""
        raise ConfigError(f"nothing is recorded at {self.path} itself; name a path of this machine")

    def found(self, prefix: str = "") -> Iterator[Any]:
        """Yield what the server says of each file: `path`, `size` and `e_tag`."""
        if not self.is_listed:
            raise NotListedError(f"a web server does not tell which files are at {self.path}")
        with named_errors(self.path, prefix):
            for found in self._obstore.list(self._server, prefix or None):
                yield from found

    @property
    def is_listed(self) -> bool:
        """Whether the server tells which files there are."""
        return self.path.partition(":")[0] in _SERVED_LISTS

    def _first(self, key: str, tail_bytes: int) -> _Part:
        """Return the bytes that a file is opened with."""
        start = (0, tuning.TUNING.opening_bytes)
        return self._fetch(key, {"range": {"suffix": tail_bytes} if tail_bytes else start})

    def _fetch(self, key: str, asked: dict[str, Any]) -> _Part:
        """Return bytes of a file; of an empty one none."""
        with named_errors(self.path, key):
            try:
                found = self._obstore.get(self._server, key, options=asked)
            except self._obstore.exceptions.GenericError as error:
                # There is no range of an empty file.
                if _NO_RANGE not in str(error):
                    raise
                found = self._obstore.get(self._server, key)
            meta, content = found.meta, memoryview(found.bytes())
        version = meta["e_tag"] or meta["last_modified"]
        published_as = str(found.attributes.get(_PUBLISHED_AS, ""))
        return _Part(found.range[0], content, meta["size"], version, published_as)

    @cached_property
    def _obstore(self) -> Any:
        return _obstore(self.path)

    @property
    def _server(self) -> Any:
        """What talks to the server."""
        return self._connection(tuning.TUNING.request_timeout_s)

    @property
    def _uplink(self) -> Any:
        """What talks to the server where an upload may take long: its answer comes after that."""
        return self._connection(tuning.TUNING.upload_timeout_s)

    def _connection(self, timeout_s: float) -> Any:
        """Return what waits so long for an answer, in the process that the first was made in."""
        _check_process(self.path)
        if timeout_s not in self._connections:
            self._connections[timeout_s] = _connect(self.path, self._obstore, timeout_s)
        return self._connections[timeout_s]

    @cached_property
    def _connections(self) -> dict[float, Any]:
        return {}

    def __reduce__(self) -> tuple[type, tuple[Url]]:
        return ObjectFiles, (self.path,)


_PUBLISHED_AS = "thimble-published-as"
"""What is kept beside a file that was uploaded. Whoever replaces the file, replaces it too."""

_QUICK_BYTES = 2**18
"""Files up to this length arrive so soon that the server has to answer as to any request."""

_NO_RANGE = "416 Range Not Satisfiable"


def _obstore(path: Url) -> Any:
    """Return the library; raise ConfigError if it is missing."""
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise ConfigError(
            f"reading {path} needs obstore; install it: pip install 'thimble-zarr[remote]'"
        ) from error
    return obstore


_process: list[int] = []
"""The process that talks to servers, once one does."""


def _check_process(path: Url) -> None:
    """Raise PlaceError in a process that was forked after its parent had talked to a server.

    The library's threads are not there, and a request would wait for them for ever.
    """
    if _process and _process[0] != os.getpid():
        raise PlaceError(
            f"{path} cannot be read in a forked process, once its parent has read from a server; "
            "start the process by `spawn`"
        )


def _parts(content: bytes, part_bytes: int, arrived: Arrived) -> Iterator[memoryview]:
    """Yield a file in parts; when the next is asked for, one more has arrived, or all but one."""
    for start, stop in split_range(0, len(content), part_bytes):
        yield memoryview(content)[start:stop]
        arrived(stop - start)


def _connect(path: Url, obstore: Any, timeout_s: float) -> Any:
    """Return what talks to a server, with what the environment says of it."""
    address, more = str(path), dict[str, Any]()
    if path.startswith(hub.SCHEME):
        address, more = hub.web_address(path), {"default_headers": hub.headers()}
    options = more | {
        "timeout": timedelta(minutes=10),  # the body included
        # From when a request begins to go out until it is answered: an upload is within it.
        "read_timeout": timedelta(seconds=timeout_s),
        "connect_timeout": timedelta(seconds=min(5, tuning.TUNING.request_timeout_s)),
        # Where the environment names another server, it says by which protocol.
        "allow_http": not address.startswith("https:"),
    }
    retries = {
        "max_retries": tuning.TUNING.request_retries,
        "retry_timeout": timedelta(seconds=max(120, 2 * timeout_s)),
        "backoff": {
            "init_backoff": timedelta(milliseconds=100),
            "max_backoff": timedelta(seconds=5),
            "base": 2,
        },
    }
    _process[:] = _process or [os.getpid()]
    with named_errors(path, ""):
        return obstore.store.from_url(address, client_options=options, retry_config=retries)


def aside(call: Callable[..., T], *args: Any) -> "Future[T]":
    """Make a call that waits for files to be fetched, while the caller goes on."""
    return _threads(os.getpid(), "aside").submit(call, *args)


@lru_cache(maxsize=2)
def _threads(process: int, purpose: str = "remote") -> ThreadPoolExecutor:
    """Return threads of this process that wait for servers, or for threads that do."""
    n_threads = tuning.TUNING.requests_at_once
    return ThreadPoolExecutor(n_threads, thread_name_prefix=f"thimble-zarr-{purpose}")
