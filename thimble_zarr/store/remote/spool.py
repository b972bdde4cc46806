"""The spool: where a run is recorded whose address is on a server, published from there.

What is recorded is on this machine first, with all that this means for a crash. A process of its
own copies each commit to the server, so that training waits for no server, and loses nothing to
one.
"""

import importlib.util
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path

from thimble_zarr.errors import ConfigError, ResumeError, StoreError
from thimble_zarr.format.location import Location, Url, located, on_disk
from thimble_zarr.store.contents import StorePath, is_begun
from thimble_zarr.store.files.objects import ObjectFiles
from thimble_zarr.store.remote.behind import Publisher


class Spool:
    """Where a recorder writes: a path of this machine itself, or the spool of an address.

    Parameters
    ----------
    location
        Path or address of the recording.
    spool
        Where what is published is recorded; by default in the current directory, by the name that
        the address ends with.
    resume
        Whether what is there is resumed.

    Raises
    ------
    ConfigError
        If nothing can be published at the address, or a spool is named without one.
    ResumeError
        If a run to resume is on the server and not here, or nobody can tell.
    """

    def __init__(
        self, location: StorePath, spool: StorePath | None = None, *, resume: bool = False
    ) -> None:
        found = located(location)
        self.url = found if isinstance(found, Url) else None
        self._publisher: Publisher | None = None
        self._has_told = False
        self.is_published = True
        if self.url is None and spool is not None:
            raise ConfigError(
                f"`spool` says where a run is recorded that is published, and {location} is a path "
                "of this machine; give the path alone, or an address such as s3://bucket/run.zarr"
            )
        self.path = Path(location)
        if self.url is not None:
            _check_publishable(self.url)
            self.path = on_disk(self.url.name if spool is None else spool).absolute()
            if resume and not is_begun(self.path):
                _check_nothing_published(self.url, self.path)

    def publish(self) -> None:
        """Begin to publish what is recorded; raise StoreError if no process can be started."""
        if self.url is None:
            return
        try:
            self._publisher = Publisher(self.path, self.url)
            self.is_published = False
        except OSError as error:
            raise StoreError(
                f"the process that publishes to {self.url} cannot be started: {error.strerror}; "
                f"name {self.path} instead of the address, and publish it later with "
                f"`{publish_command(self.path, self.url)}`"
            ) from error

    def news(self) -> Iterator[str]:
        """Yield the first problem that publishing has, and the one that it ends with."""
        if self._publisher is None:
            return
        for problem in self._publisher.news():
            if self._publisher.has_ended:
                yield f"publishing has ended, and recording goes on in {self.path}: {problem}"
            elif not self._has_told:
                self._has_told = True
                yield (
                    f"publishing fails, and recording goes on in {self.path}: {problem}. It is "
                    "tried again and again, and what is missing is published once that succeeds"
                )

    def finish(self) -> str:
        """Wait until all is published, or cannot be; return what to say then, if anything."""
        publisher, self._publisher = self._publisher, None
        if publisher is None:
            return ""
        publisher.finish()
        self.is_published = not publisher.problem
        if self.is_published:
            return ""
        there = (
            f"steps up to {publisher.n_rows - 1:,} are" if publisher.n_rows else "nothing of it is"
        )
        command = publish_command(self.path, self.url or "")
        return (
            f"{self.path} is not published whole, and {there} at {self.url}: {publisher.problem}. "
            f"All is recorded in {self.path}; publish the rest with `{command}`, or resume the run"
        )


def publish_command(store: Location, url: str) -> str:
    """Return what to type to publish a store."""
    return f"thimble-zarr publish {shlex.quote(str(store))} {shlex.quote(url)}"


def publish_rest(spool: StorePath, url: Url | None) -> bool:
    """Publish what a finished run with an address left in its spool; warn of what cannot be.

    Return whether all is published.
    """
    if url is None:
        return True
    rest = Spool(url, spool)
    rest.publish()
    if message := rest.finish():
        warnings.warn(message, stacklevel=2)
    return rest.is_published


def _check_publishable(url: Url) -> None:
    if not ObjectFiles(url).is_listed:
        raise ConfigError(f"nothing can be put to {url}; name an s3:// or gs:// address")
    if importlib.util.find_spec("obstore") is None:
        raise ConfigError(
            f"recording to {url} needs obstore; install it: pip install 'thimble-zarr[remote]'"
        )


def _check_nothing_published(url: Url, spool: Location) -> None:
    """Raise ResumeError if the run is there that cannot be resumed without its spool."""
    fetch = f"thimble-zarr fetch {shlex.quote(url)} {shlex.quote(str(spool))}"
    try:
        is_there = ObjectFiles(url).is_there
    except StoreError as error:
        raise ResumeError(
            f"cannot resume {url}: there is no spool at {spool}, and whether a run was published "
            f"cannot be told: {error}; name the spool, or leave `resume` out to begin a run"
        ) from error
    if is_there:
        raise ResumeError(
            f"cannot resume {url}: it was published, and its spool is not at {spool}; name the "
            f"spool, or get the run with `{fetch}`"
        )
