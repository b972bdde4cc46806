"""Ctrl-C takes effect around the work of the recorder, never within it.

Python raises KeyboardInterrupt between any two bytecodes: also after an executor has taken a block
and before its caller has noted so, or after a condition of the standard library took its lock and
before the `with` that would give it back. No order of statements stands that. So while the recorder
works the signal is only noted, and it is raised again when the work is done.
"""

import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType


@contextmanager
def interrupts_held(within: CodeType | None = None) -> Iterator[None]:
    """Hold SIGINT back; if it came, raise it again at the end. Blocks may be nested.

    Does nothing outside the main thread, where Python handles no signal, and where SIGINT has no
    handler in Python. However often it comes, it is held: the recorder only ever waits for a block
    that is being written.

    Parameters
    ----------
    within
        Hold it only while this function runs, and let the handler before have it otherwise. That
        holds it from the function's first bytecode on, which no statement in the function can.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came = False

    def hold(signum: int, frame: FrameType | None) -> None:
        nonlocal came
        running = (caller.f_code for caller, _ in traceback.walk_stack(frame))
        if within is None or within in running:
            came = True
        else:
            before(signum, frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is hold:  # and not one that was set in the block
            signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)
