"""Run a whole process and measure it."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measured:
    """One process, from start to end.

    Attributes
    ----------
    wall_s
        Elapsed time, seconds.
    peak_rss_bytes
        Largest resident set, bytes.
    stdout
        What it printed.
    bytes_read
        What it read by calls, start-up of Python included; mapped files are not in it. Zero where
        the system does not tell.
    """

    wall_s: float
    peak_rss_bytes: int
    stdout: str
    bytes_read: int = 0

    @property
    def json(self) -> dict[str, float]:
        """What it printed last, as JSON."""
        content: dict[str, float] = json.loads(self.stdout.splitlines()[-1])
        return content


def measure(command: Sequence[str]) -> Measured:
    """Run a command to its end; stderr is passed through.

    Raises
    ------
    subprocess.CalledProcessError
        If it fails. Exit code 1, a check that found something, is a result and no failure.
    """
    with tempfile.TemporaryFile("w+") as stdout:
        start_s = time.perf_counter()
        process = subprocess.Popen(command, stdout=stdout)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        wall_s = time.perf_counter() - start_s
        n_read = bytes_read(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in (0, 1):
            raise subprocess.CalledProcessError(process.returncode, command)
        stdout.seek(0)
        kilo = 1 if sys.platform == "darwin" else 1024
        return Measured(wall_s, usage.ru_maxrss * kilo, stdout.read(), n_read)


def bytes_read(pid: int | str = "self") -> int:
    """Return the bytes that a process, which may have just ended, has read by calls so far."""
    try:
        counters = Path(f"/proc/{pid}/io").read_text(encoding="ascii")
    except OSError:
        return 0
    return int(counters.split()[1])
