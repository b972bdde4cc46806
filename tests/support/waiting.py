"""Wait for what another process does."""

import time
from collections.abc import Callable


def until(holds: Callable[[], object]) -> None:
    """Wait until something holds."""
    end_s = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end_s, "it never held"
        time.sleep(0.02)
