"""A call in a process of its own: its result, its error, and its end."""

import os
import signal
import sys
import time
from multiprocessing import active_children
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from thimble_zarr.analysis.compute import aside as module
from thimble_zarr.analysis.compute.aside import aside
from thimble_zarr.analysis.compute.run import Progress
from thimble_zarr.errors import StoreError, ThimbleError


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have calls be made in a process, although torch is there, which is not used in them."""
    monkeypatch.setattr(module, "_can_fork", lambda: True)


def told(n_done: int, n_total: int) -> None:
    """Be told how far something is."""


@pytest.mark.usefixtures("forked")
def test_a_call_is_made_meanwhile_and_tells_how_far_it_is(tmp_path: Path) -> None:
    def call(progress: Progress) -> int:
        while not (tmp_path / "go").exists():
            time.sleep(0.01)
        progress(1, 2)
        progress(2, 2)
        return os.getpid()

    reached = []
    with aside(call, "the test") as result:
        (tmp_path / "go").touch()
        assert result(lambda *n: reached.append(n)) != os.getpid()
    assert reached == [(1, 2), (2, 2)]


@pytest.mark.usefixtures("forked")
def test_its_error_is_raised_where_its_result_is_asked_for() -> None:
    def call(progress: Progress) -> None:
        raise StoreError("cannot read it")

    with aside(call, "the test") as result, pytest.raises(StoreError, match="cannot read it"):
        result(told)


class HeldError(Exception):
    """Holds something that need not be able to be pickled, or made again."""

    def __init__(self, held: object) -> None:
        super().__init__("held")
        self.held = held


class NotMadeAgain:
    """Can be pickled only."""

    def __reduce__(self) -> tuple[object, ...]:
        return int, ("no number",)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("held", [lambda: None, NotMadeAgain()], ids=["pickled", "made again"])
def test_an_error_that_cannot_be_sent_is_told_in_words(held: object) -> None:
    error = HeldError(held)

    def call(progress: Progress) -> None:
        raise error

    with aside(call, "the test") as result, pytest.raises(RuntimeError, match="HeldError: held"):
        result(told)


@pytest.mark.usefixtures("forked")
def test_an_interrupt_right_after_the_start_leaves_no_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(connection: Connection) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Connection, "close", interrupted)  # of the end that the process has
    before = {process.pid for process in active_children()}
    with pytest.raises(KeyboardInterrupt), aside(lambda progress: time.sleep(600), "the test"):
        pass
    assert {process.pid for process in active_children()} <= before


@pytest.mark.usefixtures("forked")
def test_a_killed_process_is_an_error() -> None:
    def call(progress: Progress) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with aside(call, "the test") as result, pytest.raises(ThimbleError, match="the test was kil"):
        result(told)


@pytest.mark.usefixtures("forked")
def test_nobody_who_leaves_waits_for_it(tmp_path: Path) -> None:
    def call(progress: Progress) -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        (tmp_path / "pid").rename(tmp_path / "begun")
        time.sleep(600)

    def leave() -> None:
        with aside(call, "the test"):
            while not (tmp_path / "begun").exists():
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "begun").read_text()), 0)


@pytest.mark.parametrize("name", ["torch", "distributed", "obstore"])
def test_it_is_made_here_where_no_process_can_be_forked_safely(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for known in ("torch", "distributed", "obstore"):
        monkeypatch.delitem(sys.modules, known, raising=False)
    monkeypatch.setattr(module, "n_cpus", lambda: 2)
    assert module._can_fork() == (sys.platform == "linux")
    monkeypatch.setitem(sys.modules, name, sys)
    with aside(lambda progress: os.getpid(), "the test") as result:
        assert result(told) == os.getpid()
