"""Ctrl-C at any bytecode of what writes stores, or of what it calls in the standard library."""

import concurrent.futures
import contextlib
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from traceback import walk_stack
from types import CodeType, FrameType

import numpy as np
import pytest
import torch

import thimble_zarr.record
import thimble_zarr.store.files.disk
from tests.support.notebook_file import import_notebook, notebook_tensors, save
from tests.support.runs import TINY_MEMORY, Loop, record
from thimble_zarr import Recorder
from thimble_zarr.interrupts import interrupts_held
from thimble_zarr.store.reader import StoreReader

N_STEPS = 5

every = pytest.mark.parametrize("every", [89, pytest.param(11, marks=pytest.mark.soak)])
"""Of some 2000 places that a run passes, one in so many is tried. With 1 it takes minutes."""

TRACED = {
    str(file)
    for file in (
        *Path(thimble_zarr.record.__file__).parent.glob("*.py"),
        Path(thimble_zarr.store.files.disk.__file__),
        *Path(concurrent.futures.__file__).parent.glob("*.py"),
        *(Path(module.__file__) for module in (contextlib, signal, threading)),
    )
}


def is_finalizing(frame: FrameType) -> bool:
    """Return whether an object is done away with, where Python shows every error to nobody."""
    return any(caller.f_code.co_name == "__del__" for caller, _ in walk_stack(frame))


Place = tuple[str, str, int]
"""A bytecode: file, function and offset."""

if sys.version_info >= (3, 12):
    TOOL, INSTRUCTION = sys.monitoring.DEBUGGER_ID, sys.monitoring.events.INSTRUCTION


class Interrupter:
    """Sends SIGINT just before a bytecode runs for the n-th time.

    Without a bytecode it counts what runs. With one it looks at that function only, which is quick.
    """

    def __init__(self, place: Place | None = None, time: int = 1) -> None:
        self.seen: Counter[Place] = Counter()
        self._target = (place, time)
        self._thread = threading.get_ident()

    def start(self) -> None:
        """Look at the bytecodes of this thread from here on."""
        if sys.version_info < (3, 12):
            sys.settrace(self._trace)
            return
        sys.monitoring.use_tool_id(TOOL, "tests")
        sys.monitoring.register_callback(TOOL, INSTRUCTION, self._instruction)
        sys.monitoring.restart_events()
        sys.monitoring.set_events(TOOL, INSTRUCTION)

    def stop(self) -> None:
        """Look at none."""
        if sys.version_info < (3, 12):
            sys.settrace(None)
        elif sys.monitoring.get_tool(TOOL) is not None:
            sys.monitoring.set_events(TOOL, 0)
            sys.monitoring.free_tool_id(TOOL)

    def _trace(self, frame: FrameType, event: str, arg: object) -> object:
        if not self._is_watched(frame.f_code):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self._pass(frame.f_code, frame.f_lasti, frame)
        return self._trace

    def _instruction(self, code: CodeType, offset: int) -> object:
        if not self._is_watched(code):
            return sys.monitoring.DISABLE
        if threading.get_ident() == self._thread:
            self._pass(code, offset, sys._getframe(1))
        return None

    def _is_watched(self, code: CodeType) -> bool:
        target, _ = self._target
        function = (code.co_filename, code.co_qualname)
        return code.co_filename in TRACED and (target is None or function == target[:2])

    def _pass(self, code: CodeType, offset: int, frame: FrameType) -> None:
        place = (code.co_filename, code.co_qualname, offset)
        self.seen[place] += 1
        if (place, self.seen[place]) == self._target and not is_finalizing(frame):
            self.stop()
            signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def _sigint_as_in_a_terminal() -> Iterator[None]:
    """A test run that was started in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def run(path: Path, interrupter: Interrupter) -> tuple[list[torch.Tensor], bool]:
    """Record in blocks of two rows; return the weights of each step and whether Ctrl-C came."""
    loop, weights = Loop(dtype=torch.float32), []
    try:
        with Recorder(
            path, loop.optimizer, parameter=loop.weight, memory_bytes=TINY_MEMORY, audit="raise"
        ) as recorder:
            for step in range(N_STEPS):
                if step == 1:  # from here on there are rows to lose
                    interrupter.start()
                loss = loop.step()
                weights.append(loop.weight.detach().clone())
                recorder.log(loss=loss)
                if step == 3:
                    recorder.flush()
    except KeyboardInterrupt:
        return weights, True
    finally:
        interrupter.stop()
    return weights, False


def check_nothing_is_lost(path: Path, interrupter: Interrupter) -> bool:
    weights, interrupted = run(path, interrupter)
    assert interrupted or len(weights) == N_STEPS
    reader = StoreReader.open(path)
    assert reader.commit.complete
    assert len(weights) + 1 <= reader.n_rows <= len(weights) + 2
    np.testing.assert_array_equal(reader.read("W", (1, len(weights) + 1)), torch.stack(weights))
    assert not any("thimble-zarr-writer" in thread.name for thread in threading.enumerate())
    return interrupted


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> Counter[Place]:
    """The places a run passes, and how often."""
    interrupter = Interrupter()
    run(tmp_path_factory.mktemp("whole") / "run.zarr", interrupter)
    return interrupter.seen


@every
def test_ctrl_c_at_any_bytecode_loses_no_row(
    tmp_path: Path, passed: Counter[Place], every: int
) -> None:
    tried = sorted(passed)[::every]
    n_interrupted = 0
    for index, place in enumerate(tried):
        try:
            n_interrupted += check_nothing_is_lost(
                tmp_path / f"{index}.zarr", Interrupter(place, passed[place])
            )
        except Exception as error:
            error.add_note(f"interrupted at {place}")
            raise
    assert n_interrupted > 0.5 * len(tried)  # a run does not always wait at the same places


def test_ctrl_c_at_the_first_bytecode_of_the_exit_loses_no_row(
    tmp_path: Path, passed: Counter[Place]
) -> None:
    first = min(place for place in passed if place[1] == "Recorder.__exit__")
    assert check_nothing_is_lost(tmp_path / "run.zarr", Interrupter(first))


def import_(file: Path, interrupter: Interrupter) -> bool:
    """Make a store of a notebook's file; return whether Ctrl-C left nothing, and not all of it."""
    path = file.with_suffix(".zarr")
    before = set(file.parent.iterdir())
    try:
        interrupter.start()
        import_notebook(file, path)
    except KeyboardInterrupt:
        interrupter.stop()
        assert set(file.parent.iterdir()) == before or StoreReader.open(path).commit.complete
        return not path.exists()
    finally:
        interrupter.stop()
        assert not any("thimble-zarr-writer" in thread.name for thread in threading.enumerate())
        shutil.rmtree(path, ignore_errors=True)
    return False


@every
def test_ctrl_c_at_any_bytecode_of_an_import_leaves_nothing(tmp_path: Path, every: int) -> None:
    """And ends: a lock that it left taken would be waited for, for ever."""
    file = save(tmp_path / "run.safetensors", notebook_tensors(record(tmp_path / "run")))
    interrupter = Interrupter()
    import_(file, interrupter)
    n_interrupted = 0
    tried = sorted(interrupter.seen)[::every]
    for place in tried:
        for time in (1, interrupter.seen[place]):
            n_interrupted += import_(file, Interrupter(place, time))
    assert n_interrupted > 0.5 * len(tried)  # threads do not always wait at the same places


def test_ctrl_c_is_held_to_the_end_of_the_outermost_block() -> None:
    done = []

    def work() -> None:
        with interrupts_held():
            with interrupts_held():
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
                done.append("inner")
            done.append("outer")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["inner", "outer"]


def test_ctrl_c_is_held_within_a_function_only() -> None:
    done = []

    def function() -> None:
        signal.raise_signal(signal.SIGINT)
        done.append("function")

    def work() -> None:
        with interrupts_held(within=function.__code__):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            function()
            done.append("block")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["function", "block"]


def test_sigterm_is_held_where_it_has_a_handler() -> None:
    done = []

    def note(signum: int, frame: FrameType | None) -> None:
        done.append("handler")

    before = signal.signal(signal.SIGTERM, note)
    try:
        with interrupts_held():
            signal.raise_signal(signal.SIGTERM)
            done.append("work")
        assert signal.getsignal(signal.SIGTERM) is note
    finally:
        signal.signal(signal.SIGTERM, before)
    assert done == ["work", "handler"]


def test_a_handler_that_was_set_in_the_block_stays() -> None:
    came = []
    with interrupts_held():
        signal.signal(signal.SIGINT, lambda *args: came.append(args))
    signal.raise_signal(signal.SIGINT)
    assert len(came) == 1
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts_held():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_other_threads_hold_nothing() -> None:
    def work() -> None:
        with interrupts_held():
            seen.append(signal.getsignal(signal.SIGINT))

    seen: list[object] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
