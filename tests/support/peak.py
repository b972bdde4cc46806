"""Peak memory of scripts that tests run, each in a process of its own.

A server that has imported what they import forks these processes: an import takes seconds.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import pytest

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak memory")

PEAK = """
import json, sys
def peak():
    # Not ru_maxrss: a process begins with that of the process which started it.
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
"""
"""Gives a script `peak()`: bytes of memory that were resident at most, so far."""


def measured(script: str, *arguments: object) -> Any:
    """Run a script that may call `peak`, and return the JSON in the last line it prints.

    It begins with the memory of the server, so compare two peaks of the same script.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps([PEAK + script, *map(str, arguments)]) + "\n")
    server.stdin.flush()
    exit_code, printed = json.loads(server.stdout.readline())
    assert exit_code == 0, printed
    return json.loads(printed.splitlines()[-1])


@functools.cache
def _server() -> "subprocess.Popen[str]":
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.support.peak"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        # What is freed goes back to the system. Without this that depends on where it lay.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)},
    )
    atexit.register(server.communicate)
    return server


def _serve() -> None:
    _warm_up()
    for line in sys.stdin:
        script, *arguments = json.loads(line)
        with tempfile.TemporaryFile("w+", encoding="utf-8") as printed:
            if (pid := os.fork()) == 0:
                _run(script, arguments, printed.fileno())
            _, status = os.waitpid(pid, 0)
            printed.seek(0)
            print(json.dumps([os.waitstatus_to_exitcode(status), printed.read()]), flush=True)


def _warm_up() -> None:
    """Import what the scripts need; an optimizer imports much of torch when it takes a step."""
    import torch
    import xarray  # noqa: F401

    from tests.support.runs import Loop
    from thimble_zarr.cli import tokens  # noqa: F401
    from thimble_zarr.experiment import trainer  # noqa: F401

    torch.set_num_threads(1)  # threads would not be there after a fork
    Loop().step()


def _run(script: str, arguments: list[str], descriptor: int) -> None:
    exit_code = 1
    try:
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.argv = ["-c", *arguments]
        exec(script, {"__name__": "__main__"})
        exit_code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


if __name__ == "__main__":
    _serve()
