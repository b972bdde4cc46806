"""The viewer, started as a person starts it."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def viewer(store: Path) -> Iterator[str]:
    """Serve a run from another process, and return the address that it prints."""
    command = [sys.executable, "-m", "thimble_zarr", "view", str(store), "--no-browser", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
