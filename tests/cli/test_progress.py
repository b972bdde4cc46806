"""Progress on stderr, where that is a terminal and where it is not."""

import io
import sys

import pytest

from thimble_zarr.cli import progress as module
from thimble_zarr.cli.progress import progress


@pytest.fixture(autouse=True)
def _at_every_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINE_INTERVAL_S", 0.0)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO, **options: object) -> str:
    """Take three steps, and return what was printed."""
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress("training", unit="step", total=3, **options) as bar:
        for step in range(3):
            bar.note(f"loss {step}")
            bar.update()
    return stderr.getvalue()


def test_without_a_terminal_progress_is_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, io.StringIO())
    assert text.splitlines()[-3:] == [
        "training: 1 of 3 steps (33%), 0 s, loss 0",
        "training: 2 of 3 steps (67%), 0 s, loss 1",
        "training: 3 of 3 steps (100%), 0 s, loss 2",
    ]
    assert "\r" not in text
    assert "\x1b" not in text


def test_a_second_bar_without_a_terminal_is_plain_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, io.StringIO()) == shown(monkeypatch, io.StringIO())


def test_without_a_terminal_short_work_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINE_INTERVAL_S", 3600.0)
    assert shown(monkeypatch, io.StringIO()) == ""


def test_a_terminal_sees_at_once_what_is_being_done(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("training", unit="step", total=3):
        assert "training" in terminal.getvalue()


@pytest.mark.parametrize("stderr", [io.StringIO(), _Terminal()])
def test_quiet_is_quiet(monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO) -> None:
    assert shown(monkeypatch, stderr, quiet=True) == ""


def test_bytes_are_shown_as_megabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress("importing", unit="B") as bar:
        bar.reach(5_000_000, 20_000_000)
        bar.reach(10_000_000, 20_000_000)
    assert stderr.getvalue().splitlines()[-1] == "importing: 10.0MB of 20.0MB (50%), 0 s"


def test_what_counts_nothing_only_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for stderr in (io.StringIO(), _Terminal()):
        monkeypatch.setattr(sys, "stderr", stderr)
        with progress("loading"):
            pass
        assert stderr.getvalue().strip() == "loading ..."


def test_without_a_total_only_what_is_done_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress("reading", unit="file") as bar:
        bar.update(1234)
    assert stderr.getvalue().splitlines()[-1] == "reading: 1,234 files, 0 s"
