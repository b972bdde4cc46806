"""Recordings in processes that are killed: a server that has imported torch forks each of them.

`python -m tests.support.crashing` reads a line of JSON for each process to start: the name of a
function of this module and its arguments. It answers with the process's id, and when that ends with
how.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.support.runs import TINY_MEMORY, Loop, token_labels
from thimble_zarr import Recorder
from thimble_zarr.errors import RecordingError
from thimble_zarr.format.coding import CodingName

FLUSH_EVERY = 7


def record(path: str, said: str, n_steps: int, coding: CodingName = "plain") -> None:
    """Record a toy run, and write down what `flush` promised as soon as it returns."""
    loop = Loop()
    with (
        Path(said).open("w", buffering=1) as promised,
        Recorder(
            path,
            loop.optimizer,
            parameter=loop.weight,
            labels=token_labels(),
            memory_bytes=TINY_MEMORY,
        ) as recorder,
    ):
        for step in range(1, n_steps + 1):
            recorder_loss = loop.step()
            recorder.log(loss=recorder_loss)
            loop.optimizer.zero_grad()
            if step % FLUSH_EVERY == 0:
                recorder.flush()
                promised.write(f"{step}\n")


def record_with_small_files(path: str, said: str, n_bytes: int) -> None:
    """Record until the system takes no more in a file; the training loop has to see it."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
    with contextlib.suppress(RecordingError):
        record(path, said, 10_000)
        os._exit(1)
    os._exit(17)


class Server:
    """Starts processes that need not import anything."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.crashing"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert self._answer() == "ready"

    def start(self, function: str, *arguments: object) -> int:
        """Start a function in a process of its own, and return the process's id."""
        self._say({"function": function, "arguments": [str(a) for a in arguments]})
        return int(self._answer())

    def wait(self, pid: int) -> int:
        """Wait for a process; return its exit code, negative if a signal ended it."""
        self._say({"wait": pid})
        return int(self._answer())

    def close(self) -> None:
        self._process.communicate()

    def _say(self, what: dict[str, object]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline().strip()
        assert answer, "the server ended"
        return answer


@contextlib.contextmanager
def server() -> Iterator[Server]:
    running = Server()
    try:
        yield running
    finally:
        running.close()


def _serve() -> None:
    torch.set_num_threads(1)  # threads would not be there after a fork
    os.fsync = lambda descriptor: None  # a killed process leaves its files to the system
    _warm_up()
    print("ready", flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        if "wait" in task:
            _, status = os.waitpid(task["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _run(task)
        print(pid, flush=True)


def _warm_up() -> None:
    """Record a step: an optimizer imports much of torch only then, and Zarr begins its thread.

    Zarr forgets that thread in a forked process; the others have ended.
    """
    with tempfile.TemporaryDirectory() as directory:
        record(f"{directory}/run.zarr", f"{directory}/promised", 2)
        record(f"{directory}/predicted.zarr", f"{directory}/promised", 2, "predicted")


def _run(task: dict[str, object]) -> None:
    code = 1
    try:
        function, arguments = task["function"], task["arguments"]
        assert isinstance(arguments, list)
        typed = [int(value) if value.isdigit() else value for value in arguments]
        globals()[str(function)](*typed)
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def kill_after(pid: int, delay_s: float) -> None:
    time.sleep(delay_s)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _serve()
