"""`publish` and `fetch`: a store copied to a server, while it is recorded too, and back."""

import time
from collections.abc import Callable

from thimble_zarr.errors import ConfigError, StoreError
from thimble_zarr.format.location import Location, Url, located, on_disk
from thimble_zarr.format.reader import State
from thimble_zarr.store.contents import StorePath, why_empty
from thimble_zarr.store.files.base import BusyError, Files
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.files.objects import ObjectFiles
from thimble_zarr.store.files.place import files_at
from thimble_zarr.store.keys import COMMIT
from thimble_zarr.store.lock import check_not_recorded, recording_of
from thimble_zarr.store.remote.copying import Copied, MovedOnError, Reach, copy_committed
from thimble_zarr.store.remote.target import Disk, Server, Target

_POLL_S = 1.0
"""How often the commit record of a run that is followed is looked at."""


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
    StoreExistsError
        If something else is there: another run, or this one with more rows.
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
    while True:
        try:
            before = copied.n_rows, copied.complete
            _copy(files, target, progress, copied)
            if (copied.n_rows, copied.complete) != before:
                on_commit(copied)
        except BusyError:
            if not follow:
                raise
        if copied.complete or not follow or not _goes_on(files):
            _check_begun(copied, files.path)
            return copied


def _goes_on(files: LocalFiles) -> bool:
    """Wait for the next commit; return whether there may be one, or there is one."""
    record = files.get(COMMIT)
    while True:
        is_cut_off = recording_of(files).state is State.CUT_OFF
        time.sleep(_POLL_S)
        if files.get(COMMIT) != record:
            return True
        if is_cut_off:
            return False


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
    target, copied = Disk(files), Copied()
    try:
        _copy(files_at(url), target, progress, copied)
    finally:
        target.close()
    _check_begun(copied, located(url))
    return copied


def _check_begun(copied: Copied, path: Location) -> None:
    if not copied.n_rows:
        raise StoreError(f"{path} has no committed step yet: {why_empty(path)}")


def _copy(files: Files, target: Target, progress: Reach, copied: Copied) -> None:
    while True:
        try:
            copy_committed(files, target, progress, copied)
        except MovedOnError:
            continue
        return
