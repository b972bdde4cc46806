"""Peak memory of scripts that tests run in processes of their own."""

import json
import subprocess
import sys
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
    """Run a script that may call `peak`, and return the JSON in the last line it prints."""
    shown = subprocess.run(
        [sys.executable, "-c", PEAK + script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    return json.loads(shown.stdout.splitlines()[-1])
