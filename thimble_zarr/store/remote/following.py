"""Publish each commit of a store while it is recorded; a server that is gone is waited for."""

from collections.abc import Callable

from thimble_zarr.errors import StoreError, StoreLockedError
from thimble_zarr.store.files.base import Files, PlaceError
from thimble_zarr.store.keys import COMMIT
from thimble_zarr.store.remote.copying import Copied, MovedOnError, Reach, Source, copy_committed
from thimble_zarr.store.remote.target import Target

POLL_S = 1.0
"""How often the commit record of a run that is followed is looked at."""

_MOST_POLLS = 60
"""How many times as long the longest wait is until a server that failed is asked again."""


def copy_now(source: Source, target: Target, progress: Reach, copied: Copied) -> None:
    """Copy what is committed now, however quick the writer is."""
    while True:
        try:
            return copy_committed(source, target, progress, copied)
        except MovedOnError:
            continue


def follow(
    files: Files,
    target: Target,
    copied: Copied,
    *,
    progress: Reach,
    ended: Callable[[], bool],
    wait: Callable[[float], object],
    on_commit: Callable[[Copied], object],
    on_problem: Callable[[StoreError], object],
    gives_up: bool = False,
) -> None:
    """Copy each commit until the recording has ended.

    Parameters
    ----------
    ended
        Whether nothing more will be committed.
    wait
        Called with the seconds to wait until the next look.
    on_problem
        Called with what the server did wrong, or who else publishes there; if it raises nothing,
        the server is asked again.
    gives_up
        Whether what the server does wrong once the recording has ended is raised.
    """
    source, pause_s, known = Source(files), POLL_S, b""
    while True:
        is_last, before = ended(), (copied.n_rows, copied.complete)
        record = _record(files)
        if known and record == known and not is_last:  # else a long ledger is read every second
            wait(POLL_S)
            continue
        try:
            copy_now(source, target, progress, copied)
        except (PlaceError, StoreLockedError) as error:
            if is_last and gives_up:
                raise
            on_problem(error)
            wait(pause_s)
            pause_s = min(2 * pause_s, _MOST_POLLS * POLL_S)
            continue
        pause_s, known = POLL_S, record
        if (copied.n_rows, copied.complete) != before:
            on_commit(copied)
        if copied.complete or is_last:
            return
        wait(pause_s)


def _record(files: Files) -> bytes:
    """Return the commit record; nothing where the store has none, of which `copy_now` says more."""
    try:
        return files.get(COMMIT)
    except FileNotFoundError:
        return b""
