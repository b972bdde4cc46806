"""`publish` and `fetch`: a store copied to a server, while it is recorded too, and back."""

import time
from collections.abc import Callable
from contextlib import closing

from thimble_zarr.errors import ConfigError, StoreError
from thimble_zarr.format.location import Location, Url, located, on_disk
from thimble_zarr.format.reader import State
from thimble_zarr.store.contents import StorePath, why_empty
from thimble_zarr.store.files.base import BusyError
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.files.objects import ObjectFiles
from thimble_zarr.store.files.place import files_at
from thimble_zarr.store.lock import check_not_recorded, recording_of
from thimble_zarr.store.remote import following
from thimble_zarr.store.remote.copying import Copied, Reach, Source
from thimble_zarr.store.remote.target import Disk, Server


def publish(
    store: StorePath,
    url: str,
    *,
    follow: bool = False,
    progress: Reach = lambda done, total: None,
    on_commit: Callable[[Copied], object] = lambda copied: None,
) -> Copied:
    """Copy what is committed of a store to an object store, every file verified there.

    Whoever reads the copy sees one commit or the next, and never half of one. A copy that was cut
    off is gone on with when it is called again: what is there is skipped.

    Parameters
    ----------
    store
        A store on this machine. It may be recorded meanwhile.
    url
        Where the copy lies: an `s3://` or `gs://` address.
    follow
        Whether to go on until the recording has ended, and publish each commit. A server that
        cannot be reached for a while is waited for.
    progress
        Called with the bytes that were looked at, and those there are.
    on_commit
        Called after each commit that was published.

    Raises
    ------
    StoreExistsError, StoreLockedError
        If something else is there (another run, or this one with more rows), or somebody else
        publishes there.
    StoreError
        If the store is damaged, nothing is committed in it, or the server refuses.

    Examples
    --------
    >>> import thimble_zarr
    >>> thimble_zarr.publish("run.zarr", "s3://bucket/run.zarr").n_rows  # doctest: +SKIP
    14
    """
    files, address = LocalFiles(on_disk(store).absolute()), located(url)
    if not isinstance(address, Url):
        raise ConfigError(f"{url} is no address; expected s3://bucket/run.zarr")
    target, copied = Server(ObjectFiles(address)), Copied()
    with closing(target):
        if follow:
            following.follow(
                files,
                target,
                copied,
                progress=progress,
                ended=lambda: recording_of(files).state is State.CUT_OFF,
                wait=time.sleep,
                on_commit=on_commit,
                on_problem=_wait_out,
            )
        else:
            following.copy_now(Source(files), target, progress, copied)
            if copied.n_rows:
                on_commit(copied)
    _check_begun(copied, files.path)
    return copied


def _wait_out(problem: StoreError) -> None:
    """Wait for a server that may answer later, also once the recording has ended."""
    if not isinstance(problem, BusyError):
        raise problem


def fetch(url: str, store: StorePath, *, progress: Reach = lambda done, total: None) -> Copied:
    """Copy what is committed of a store on a server to this machine, every file verified.

    A copy that was cut off is gone on with when it is called again.

    Parameters
    ----------
    url
        The address of the store.
    store
        Where the copy lies.
    progress
        Called with the bytes that were looked at, and those there are.

    Raises
    ------
    StoreExistsError, StoreLockedError
        If something else is at that path, or somebody records into it.
    StoreError
        If the store is damaged, the server refuses, or nothing can be written.

    Examples
    --------
    >>> import thimble_zarr
    >>> thimble_zarr.fetch("s3://bucket/run.zarr", "run.zarr").n_rows  # doctest: +SKIP
    14
    """
    files = LocalFiles(on_disk(store).absolute())
    if not files.is_vacant:
        check_not_recorded(files)
    copied = Copied()
    with closing(Disk(files)) as target:
        following.copy_now(Source(files_at(url)), target, progress, copied)
    _check_begun(copied, located(url))
    return copied


def _check_begun(copied: Copied, path: Location) -> None:
    if not copied.n_rows:
        raise StoreError(f"{path} has no committed step yet: {why_empty(path)}")
