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

INTERVAL_S = 0.02
"""Between two looks at the memory of a process and its children, at least."""

LOOKING = 1 / 40
"""Share of a core that may be spent looking: to add up the pages of processes takes milliseconds of
a core that they could use, and holds them up."""


@dataclass(frozen=True)
class Measured:
    """One process, from start to end.

    Attributes
    ----------
    wall_s
        Elapsed time, seconds.
    peak_rss_bytes
        Largest resident set, bytes; of a process that forks, the largest sum of its own and its
        children's, among which what they share is divided (PSS).
    stdout
        What it printed.
    bytes_read
        What it read by calls, start-up of Python included; mapped files are not in it. Zero where
        the system does not tell.
    cpu_s
        Processor time of the process and all that it waited for, seconds.
    """

    wall_s: float
    peak_rss_bytes: int
    stdout: str
    bytes_read: int = 0
    cpu_s: float = 0.0

    @property
    def json(self) -> dict[str, float]:
        """What it printed last, as JSON."""
        content: dict[str, float] = json.loads(self.stdout.splitlines()[-1])
        return content


def measure(command: Sequence[str]) -> Measured:
    """Run a command to its end; stderr is passed through.

    A small process starts it: where a process is forked, its peak memory begins with the parent's.

    Raises
    ------
    subprocess.CalledProcessError
        If it fails. Exit code 1, a check that found something, is a result and no failure.
    """
    with tempfile.TemporaryFile("w+") as stdout, tempfile.NamedTemporaryFile("r") as numbers:
        starter = [sys.executable, "-I", "-S", __file__, numbers.name, *command]
        code = subprocess.run(starter, stdout=stdout, check=False).returncode
        if code not in (0, 1):
            raise subprocess.CalledProcessError(code, command)
        stdout.seek(0)
        return Measured(stdout=stdout.read(), **json.load(numbers))


def start() -> int:
    """Run the command of the command line, leave the numbers in a file, return the exit code."""
    _, numbers, *command = sys.argv
    start_s = time.perf_counter()
    process = subprocess.Popen(command)
    n_resident = 0
    if sys.platform == "linux":  # elsewhere nobody says what was read, and by how many
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            looked_s = -time.process_time()
            n_resident = max(n_resident, tree_bytes(process.pid))
            looked_s += time.process_time()
            time.sleep(max(INTERVAL_S, looked_s / LOOKING))
    n_read = bytes_read(process.pid)
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - start_s
    process.returncode = os.waitstatus_to_exitcode(status)
    kilo = 1 if sys.platform == "darwin" else 1024
    measured = {
        "wall_s": wall_s,
        "peak_rss_bytes": max(usage.ru_maxrss * kilo, n_resident),
        "bytes_read": n_read,
        "cpu_s": usage.ru_utime + usage.ru_stime,
    }
    Path(numbers).write_text(json.dumps(measured), encoding="ascii")
    return process.returncode


def tree_bytes(pid: int) -> int:
    """Return the memory of a process that has children, and theirs; what is shared counts once."""
    pids = tree(pid)
    return sum(map(proportional_bytes, pids)) if len(pids) > 1 else 0


def tree(pid: int) -> list[int]:
    """Return a process and all that it started."""
    try:
        threads = [file.read_text("ascii") for file in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:  # it has just ended
        return []
    children = map(int, " ".join(threads).split())
    return [pid, *(below for child in children for below in tree(child))]


def proportional_bytes(pid: int) -> int:
    """Return the resident set of a process, of what is shared its share."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    kilobytes = [line.split()[1] for line in lines if line.startswith("Pss:")]
    return 1024 * sum(map(int, kilobytes))


def bytes_read(pid: int | str = "self") -> int:
    """Return the bytes that a process, which may have just ended, has read by calls so far."""
    try:
        counters = Path(f"/proc/{pid}/io").read_text(encoding="ascii")
    except OSError:
        return 0
    return int(counters.split()[1])


if __name__ == "__main__":
    code = start()
    sys.exit(code if code >= 0 else 128 - code)
