"""What is still open when Python ends is closed while its threads can still work.

Until then it is kept, though nobody else may know it any more: what was recorded and not committed
yet would be lost with it.
"""

import functools
import sys
import threading
from collections.abc import Callable
from concurrent.futures import thread as executor

from thimble_zarr.errors import RecordingError

_open: dict[Callable[[], None], threading.Thread] = {}
"""What closes each, and the thread that opened it."""


def close_at_exit(close: Callable[[], None]) -> None:
    """Call a bound method when this process ends by itself, unless `is_closed` was called with it.

    Not by `atexit`: those calls come when executors, ours and Zarr's, take no more work. A thread
    that goes on when the main one has ended is waited for first, as Python itself does later. An
    error is printed, as nobody can catch it.
    """
    _register()
    _open[close] = threading.current_thread()


def is_closed(close: Callable[[], None]) -> None:
    """Forget a method that `close_at_exit` was called with."""
    _open.pop(close, None)


@functools.cache
def _register() -> None:
    # The one way to be called before the executors are; it calls in reverse order.
    threading._register_atexit(_close_all)  # type: ignore[attr-defined]


def close_after(error: BaseException | None, close: Callable[[], None]) -> None:
    """Close what failed with an error, or with None; an error of closing does not hide it.

    Raises
    ------
    RecordingError
        If there was no error before. To one that there was it is added as a note.
    """
    try:
        close()
    except RecordingError as closing_error:
        if error is None:
            raise
        error.add_note(str(closing_error))


def _close_all() -> None:
    for close, opener in reversed([*_open.items()]):
        if _is_waited_for(opener):
            opener.join()
        if close in _open:
            try:
                close()
            except Exception as error:
                print(f"Error: {error}", file=sys.stderr)


def _is_waited_for(thread: threading.Thread) -> bool:
    """Return whether Python ends only after a thread; those of executors wait for its end."""
    is_of_executor = thread in executor._threads_queues
    return not (thread is threading.main_thread() or thread.daemon or is_of_executor)
