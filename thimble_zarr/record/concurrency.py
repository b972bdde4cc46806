"""One call of the recorder at a time, and a last one before Python ends.

Besides training, other threads may call the recorder, and so may a signal handler (a scheduler's
warning that time is up), which runs between any two bytecodes of the recorder's own work.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import thread as executor
from contextlib import contextmanager

from thimble_zarr.errors import RecordingError
from thimble_zarr.interrupts import interrupts_held


class CallLock:
    """Held by one call at a time. Ctrl-C waits until it is released."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._lock = threading.RLock()  # a signal handler runs in the thread that holds it
        self._holder: int | None = None
        self._postponed: list[Callable[[], None]] = []

    @property
    def is_forked(self) -> bool:
        """Whether this process was forked from the one that records."""
        return os.getpid() != self._process

    @contextmanager
    def held(self) -> Iterator[None]:
        """Wait for other threads, and at the end call what was postponed."""
        if self.is_forked:
            raise RecordingError(
                "this process was forked from the one that records, and only that one can; "
                "make a recorder of its own here, with another path"
            )
        with interrupts_held(), self._lock:
            if self._holder is not None:
                raise RecordingError("the recorder was called from within its own work")
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None
                while method := self._next_postponed():
                    method()

    def postpone(self, method: Callable[[], None]) -> bool:
        """Return whether this thread holds the lock; then the method is called at the end, once."""
        if self._holder != threading.get_ident():
            return False
        if method not in self._postponed:
            self._postponed.append(method)
        return True

    def _next_postponed(self) -> Callable[[], None] | None:
        try:  # a signal handler may come between any look and the pop
            return self._postponed.pop(0)
        except IndexError:
            return None


def close_at_exit(close: Callable[[], None]) -> Callable[[], None]:
    """Call a method, and keep its recorder, until this process ends; return what forgets it.

    `atexit` would call when executors, ours and Zarr's, take no more work. A thread that opened it
    and outlives the main one is waited for, as Python does later. Errors are printed.
    """
    waiting, opener = [close], threading.current_thread()

    def close_last() -> None:
        # Python ends only after other threads than daemons; those of executors wait for its end.
        is_waited_for = not (opener.daemon or opener in executor._threads_queues)
        if waiting and is_waited_for and opener is not threading.main_thread():
            opener.join()
        for forgotten in [*waiting]:
            try:
                forgotten()
            except Exception as error:
                print(f"Error: {error}", file=sys.stderr)

    # The one way to be called before the executors are; it calls in reverse order.
    threading._register_atexit(close_last)  # type: ignore[attr-defined]
    return waiting.clear
