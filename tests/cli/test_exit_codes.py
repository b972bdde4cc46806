"""Whole processes: signals, pipes and exit codes."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from tests.support.commands import MAIN, START, checked, info_of, run, told
from thimble_zarr import Recorder


def start(*args: object) -> subprocess.Popen[str]:
    """Start the command line as its own process, its output piped."""
    return subprocess.Popen(
        [sys.executable, "-c", START + MAIN, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_rows(process: subprocess.Popen[str], store: Path, n_rows: int) -> None:
    """Return when rows are committed; fail when the process ends before."""
    for _ in range(2400):
        try:
            process.wait(timeout=0.05)
        except subprocess.TimeoutExpired:
            pass
        else:
            raise AssertionError(f"ended with {process.returncode}: {process.communicate()[1]}")
        try:
            if json.loads((store / ".thimble" / "commit.json").read_text())["n_rows"] >= n_rows:
                return
        except FileNotFoundError:
            continue
    process.kill()
    raise AssertionError("nothing was committed")


@pytest.mark.soak
def test_ctrl_c_ends_a_run_cleanly_and_keeps_what_was_recorded(
    tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    store = tmp_path / "run.zarr"
    process = start("train", store, *tiny, "--steps", 20_000, "--memory", "64KiB", "--force")
    wait_for_rows(process, store, 5)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert told(stderr) == ["Interrupted."]
    content = info_of(store)
    assert content["complete"] is True
    assert 5 <= content["n_rows"] < 20_001
    assert f"Recorded {content['n_rows'] - 1:,} steps" in stdout
    assert f"thimble-zarr check {store}" in stdout
    found = checked(store, "--tokens", "all")
    assert found["steps"] == [1, content["n_rows"] - 1]
    assert found["holds"] is True


def test_sigterm_ends_a_run_cleanly_and_keeps_what_was_recorded(
    tmp_path: Path, tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: the signal comes between two bytecodes of the third step."""
    store, log = tmp_path / "run.zarr", Recorder.log
    before = signal.getsignal(signal.SIGTERM)

    def terminated(recorder: Recorder, **loss: float) -> None:
        log(recorder, **loss)
        if recorder.step == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Recorder, "log", terminated)
    result = run("train", store, *tiny)
    assert result.exit_code == 143
    assert told(result.stderr) == ["Terminated."]
    assert "thimble-zarr check" in result.stdout
    content = info_of(store)
    assert (content["complete"], content["n_rows"]) == (True, 4)
    assert checked(store, "--tokens", "all")["holds"] is True
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.soak
@pytest.mark.parametrize(
    "module", ["thimble_zarr.cli.main", "click", "tqdm", "thimble_zarr.cli.verify", "numpy"]
)
def test_ctrl_c_while_the_command_starts_is_no_traceback(trained: Path, module: str) -> None:
    """Whatever it is that is just being imported."""
    script = (
        "import signal, sys\n"
        "class Interrupter:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupter())\n"
        f"sys.argv = ['thimble-zarr', 'check', {str(trained)!r}]\n"
        "from thimble_zarr.__main__ import main; main()"
    )
    shown = subprocess.run([sys.executable, "-c", START + script], capture_output=True, text=True)
    assert (shown.returncode, shown.stdout) == (130, "")
    assert shown.stderr.strip() == "Interrupted."


@pytest.mark.soak
def test_ctrl_c_at_any_moment_of_the_start_is_no_traceback_of_ours() -> None:
    """Before our first line Python itself may show one."""
    ended = set()
    for delay_ms in range(0, 400, 10):
        process = subprocess.Popen(
            [sys.executable, "-c", f"{START}from thimble_zarr.__main__ import main; main()"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(delay_ms / 1000)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
        assert "thimble_zarr" not in stderr, f"after {delay_ms} ms"
        ended.add((process.returncode, stderr))
    assert (130, "Interrupted.\n") in ended


def test_ctrl_c_while_options_are_read_is_no_finding_of_the_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(click.Group, "parse_args", interrupt)
    assert run("check").exit_code == 130


def test_a_quiet_piped_run_prints_a_warning_as_one_line_and_nothing_else(
    tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    store = tmp_path / "run.zarr"
    process = start("train", store, *tiny, "--quiet", "--lr", "1e30", "--dtype", "float32")
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (0, ""), stderr
    assert stderr.startswith("Warning: the loss of step 2 is nan")
    assert len(stderr.splitlines()) == 1, stderr
    assert info_of(store)["n_rows"] == 6


@pytest.mark.soak
def test_a_reader_that_went_away_is_no_finding_of_the_check(trained: Path) -> None:
    process = start("check", trained, "--format", "csv", "--quiet")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    stderr = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)
    assert stderr == ""
    assert process.returncode != 1  # which would say that the formula does not hold


def test_an_error_of_a_piped_run_is_one_line_on_stderr(tmp_path: Path) -> None:
    process = start("info", tmp_path)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (3, "")
    assert stderr.startswith("Error: ")
    assert stderr.count("\n") == 1
