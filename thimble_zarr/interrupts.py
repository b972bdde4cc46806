"""What Ctrl-C and SIGTERM do: they take effect around what cannot be cut off, never within it.

Python raises KeyboardInterrupt between any two bytecodes: also after an executor has taken a block
and before its caller has noted so, or after a condition of the standard library took its lock and
before the `with` that would give it back: whoever waits for it next waits for ever. No order of
statements stands that. So while the recorder works, or a file is handed to the threads that wait
for the disk, the signal is only noted, and it is raised again when that is done. The command line
catches it in `cli.main`, says what was saved, and ends with exit code 130, or 143 for SIGTERM.
"""

# `signal` wraps it, and looks numbers up in enums, which takes a fifth of what a step costs here.
import _signal  # type: ignore[import-not-found]
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType

HELD = (signal.SIGINT, signal.SIGTERM)
"""Signals that people and schedulers end a run with."""


@contextmanager
def interrupts_held(within: CodeType | None = None) -> Iterator[None]:
    """Hold SIGINT and SIGTERM back; if one came, raise it again at the end. Blocks may be nested.

    Does nothing outside the main thread, where Python handles no signal, and to a signal that has
    no handler in Python: by default SIGTERM has none, and kills. However often they come, they are
    held: what is held only ever waits for a block that is being written.

    Parameters
    ----------
    within
        Hold them only while this function runs, and let the handler before have them otherwise.
        That holds them from the function's first bytecode on, which no statement in it can.
    """
    before = {signum: of for signum in HELD if callable(of := _signal.getsignal(signum))}
    if threading.current_thread() is not threading.main_thread() or not before:
        yield
        return
    came: set[int] = set()

    def hold(signum: int, frame: FrameType | None) -> None:
        running = (caller.f_code for caller, _ in traceback.walk_stack(frame))
        if within is None or within in running:
            came.add(signum)
        else:
            before[signal.Signals(signum)](signum, frame)

    for signum in before:
        _signal.signal(signum, hold)
    try:
        yield
    finally:
        for held, handler in before.items():
            if _signal.getsignal(held) is hold:  # and not one that was set in the block
                _signal.signal(held, handler)
        for number in sorted(came, reverse=True):  # a handler of SIGTERM may only take a note
            signal.raise_signal(number)


class Terminated(KeyboardInterrupt):
    """SIGTERM came, as a scheduler sends it: it ends a run as Ctrl-C does."""


@contextmanager
def terminated_cleanly() -> Iterator[None]:
    """Raise Terminated where SIGTERM comes, which would kill Python with no word to anyone.

    Outside the main thread, and where SIGTERM is ignored, nothing changes.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        yield
        return

    def terminate(signum: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
