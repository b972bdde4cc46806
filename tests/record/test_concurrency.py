"""Calls of the recorder from signal handlers, other threads and forked processes."""

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.support.runs import TINY_MEMORY, Loop
from thimble_zarr import Recorder, accounting, open_dataset
from thimble_zarr.errors import RecordingError
from thimble_zarr.record.block import Block
from thimble_zarr.record.concurrency import CallLock
from thimble_zarr.store.reader import StoreReader

SIGNAL = signal.SIGUSR1 if sys.platform != "win32" else signal.SIGINT


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


@pytest.fixture
def handle() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Sets what a signal calls."""
    before = signal.getsignal(SIGNAL)
    yield lambda method: signal.signal(SIGNAL, lambda *_: method())
    signal.signal(SIGNAL, before)


def assert_exact(path: Path, *, n_steps: int) -> None:
    ds = open_dataset(path)
    assert ds.sizes["step"] == n_steps + 1
    assert not ds.grad[1:].isnull().any()
    assert int(accounting(ds).n_different.sum()) == 0


class Signalled(dict):
    """What a row is copied from; a signal comes in the middle of it."""

    def __getitem__(self, name: str) -> torch.Tensor:
        if name == "exp_avg_sq":
            signal.raise_signal(SIGNAL)
        return super().__getitem__(name)


def test_a_flush_that_comes_into_the_copying_of_a_row_waits_for_its_end(
    path: Path, handle: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a scheduler's warning may that time is up."""
    loop, append = Loop(), Block.append
    with Recorder(path, loop.optimizer, parameter=loop.weight) as recorder:
        handle(recorder.flush)
        loop.step()
        with monkeypatch.context() as patch:
            patch.setattr(
                Block, "append", lambda b, tensors, *a, **k: append(b, Signalled(tensors), *a, **k)
            )
            loop.step()
        assert recorder.committed_step == 2
        loop.step()
    assert_exact(path, n_steps=3)


def test_a_close_that_comes_into_the_copying_of_a_row_keeps_the_row(
    path: Path, handle: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, append = Loop(), Block.append
    recorder = Recorder(path, loop.optimizer, parameter=loop.weight)
    handle(recorder.close)
    loop.step()
    monkeypatch.setattr(
        Block, "append", lambda b, tensors, *a, **k: append(b, Signalled(tensors), *a, **k)
    )
    loop.step()
    assert StoreReader.open(path).commit.complete
    assert_exact(path, n_steps=2)


def test_another_thread_may_flush(path: Path) -> None:
    loop, ended = Loop(), threading.Event()
    with Recorder(path, loop.optimizer, parameter=loop.weight, memory_bytes=TINY_MEMORY) as r:

        def flush() -> None:
            while not ended.is_set():
                r.flush()

        flushing = threading.Thread(target=flush)
        flushing.start()
        for _ in range(50):
            loop.step()
        ended.set()
        flushing.join()
    assert_exact(path, n_steps=50)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_leaves_the_recording_alone(path: Path) -> None:
    loop = Loop()
    with Recorder(path, loop.optimizer, parameter=loop.weight) as recorder:
        loop.step()
        if (child := os.fork()) == 0:
            code = 1
            try:
                recorder.close()  # does nothing, and above all does not wait
                with pytest.raises(RecordingError, match="was forked"):
                    recorder.flush()
                with pytest.raises(RecordingError, match="was forked"):
                    loop.step()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        loop.step()
    assert_exact(path, n_steps=2)


@pytest.fixture
def at_exit(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What Python would call at its end."""
    called: list[Callable[[], None]] = []
    monkeypatch.setattr(threading, "_register_atexit", called.append)
    return called


def test_what_is_open_at_the_end_is_closed_when_its_thread_has_ended(
    path: Path, at_exit: list[Callable[[], None]]
) -> None:
    begun, main_ended = threading.Event(), threading.Event()

    def train() -> None:
        loop = Loop()
        with Recorder(path, loop.optimizer, parameter=loop.weight):
            begun.set()
            assert main_ended.wait(10)
            for _ in range(5):
                loop.step()

    training = threading.Thread(target=train)
    training.start()
    assert begun.wait(10)
    main_ended.set()
    (close,) = at_exit
    close()
    assert not training.is_alive()
    assert_exact(path, n_steps=5)


def test_what_nobody_closed_nor_knows_is_closed_at_the_end(
    path: Path, at_exit: list[Callable[[], None]]
) -> None:

    def train() -> None:
        loop = Loop()
        Recorder(path, loop.optimizer, parameter=loop.weight)
        for _ in range(5):
            loop.step()

    train()
    gc.collect()
    (close,) = at_exit
    close()
    assert_exact(path, n_steps=5)
    close()


@pytest.mark.soak
@pytest.mark.parametrize("forgotten", [True, False])
def test_a_recording_goes_on_until_what_trains_has_ended(path: Path, *, forgotten: bool) -> None:
    """A thread trains longer than the main one, or nobody knows the recorder any more."""
    script = f"""
import gc, threading, time
from tests.support.runs import Loop
from thimble_zarr import Recorder

def train():
    loop = Loop()
    recorder = Recorder({str(path)!r}, loop.optimizer, parameter=loop.weight)
    begun.set()
    for _ in range(20):
        loop.step()
        time.sleep({0 if forgotten else 0.02})
    if not {forgotten}:
        recorder.close()

begun = threading.Event()
if {forgotten}:
    train()
    gc.collect()
else:
    threading.Thread(target=train).start()
    begun.wait()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert_exact(path, n_steps=20)
    assert StoreReader.open(path).commit.complete


class Worker:
    """Notes what it does."""

    def __init__(self) -> None:
        self.calls = CallLock()
        self.done: list[str] = []
        self.within: Callable[[], object] = lambda: None

    def work(self) -> None:
        with self.calls.held():
            self.done.append("begin")
            self.within()
            self.done.append("end")

    def flush(self) -> None:
        if not self.calls.postpone(self.flush):
            with self.calls.held():
                self.done.append("flush")


def test_what_is_postponed_is_done_once() -> None:
    worker = Worker()
    worker.within = lambda: [worker.flush() for _ in range(3)]
    worker.work()
    assert worker.done == ["begin", "end", "flush"]
    worker.flush()
    assert worker.done[3:] == ["flush"]


def test_what_is_postponed_is_done_after_an_error() -> None:
    worker = Worker()

    def fail() -> None:
        worker.flush()
        raise OSError("the disk is gone")

    worker.within = fail
    with pytest.raises(OSError, match="the disk is gone"):
        worker.work()
    assert worker.done == ["begin", "flush"]


def test_work_within_work_is_refused() -> None:
    worker = Worker()
    worker.within = worker.work
    with pytest.raises(RecordingError, match="within its own work"):
        worker.work()
    worker.within = lambda: None
    worker.work()
