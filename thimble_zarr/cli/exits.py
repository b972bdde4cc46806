"""Exit codes: the worse, the higher; and a signal that asks to end."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

FOUND, USAGE, UNREADABLE, INTERRUPTED, TERMINATED = 1, 2, 3, 130, 143


def exit_code(error: Exception) -> int:
    """Return the exit code of an error."""
    return USAGE if isinstance(error, ValueError | TypeError | FileExistsError) else UNREADABLE


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
