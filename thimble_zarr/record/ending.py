"""What is still open when Python ends is closed while its threads can still work."""

import os
import sys
import threading
import weakref
from collections.abc import Callable


def close_at_exit(close: Callable[[], None]) -> None:
    """Call a bound method when this process ends by itself, if its object is still there.

    Not by `atexit`: those calls come when executors, ours and Zarr's, take no more work. A process
    that was forked off, as workers of a DataLoader are, has no part in it. An error is printed, as
    nobody can catch it.
    """
    owner, method = os.getpid(), weakref.WeakMethod(close)

    def at_exit() -> None:
        still_there = method()
        if still_there is not None and os.getpid() == owner:
            try:
                still_there()
            except Exception as error:
                print(f"Error: {error}", file=sys.stderr)

    # The one way to be called before the executors are; it calls in reverse order.
    threading._register_atexit(at_exit)  # type: ignore[attr-defined]
