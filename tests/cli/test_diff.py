"""`diff` on the command line: what it prints, in which formats, and how it exits."""

import csv
import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.commands import MAIN, fails, run, strict_json
from tests.support.faults import flip_bit, rewrite
from tests.support.runs import record
from tests.support.zoo import Recorded
from thimble_zarr.cli.main import cli


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: one like the first, and one of another weight decay; never to be written to."""
    directory = tmp_path_factory.mktemp("runs")
    record(directory / "a.zarr", n_steps=7, recorder_options={"attrs": {"seed": 1}})
    shutil.copytree(directory / "a.zarr", directory / "same.zarr")
    options = {"attrs": {"seed": 2, "note": "x" * 99}}
    record(directory / "b.zarr", n_steps=9, weight_decay=0.3, recorder_options=options)
    return directory


@pytest.fixture(autouse=True)
def _in_directory(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)


def test_equal_runs_are_said_to_be_and_exit_with_0() -> None:
    result = run("diff", "a.zarr", "same.zarr")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "A          a.zarr"
    assert lines[1] == "B          same.zarr"
    assert lines[2] == (
        "Compared   8 rows, of steps 0 to 7; 11 tokens; W, grad, exp_avg, exp_avg_sq"
    )
    assert lines[3].startswith("Chunks     8 equal by the checksums they were recorded with (--val")
    assert lines[3].endswith(", 0 compared by value")
    assert lines[-1] == (
        "EQUAL as recorded: all values were the same, bit by bit, when they were recorded."
    )


def test_values_are_compared_when_asked() -> None:
    lines = run("diff", "a.zarr", "same.zarr", "--values").stdout.splitlines()
    assert lines[3] == (
        "Chunks     0 equal by the checksums they were recorded with, 8 compared by value"
    )
    assert lines[-1] == "EQUAL: all values are the same, bit by bit."


def test_different_runs_are_tables_and_exit_with_1() -> None:
    result = run("diff", "a.zarr", "b.zarr")
    assert (result.exit_code, result.stderr) == (1, "")
    lines = result.stdout.splitlines()
    assert "steps 0 to 7 (2 more in B)" in lines[2]
    table = lines.index(next(line for line in lines if line.startswith("first difference")))
    assert lines[table + 1].split()[:5] == ["weight_decay", "1", "-", "0.01", "0.3"]
    growth = next(line for line in lines if line.startswith("How it grows"))
    assert lines[lines.index(growth) + 1].split()[:3] == ["step", "W", "apart"]
    assert lines[lines.index(growth) + 2].split()[:3] == ["1", "49.09", "%"]
    assert "    0 %        0" in lines[lines.index(growth) + 2]  # the moments, at step 1
    settings = lines[lines.index(next(line for line in lines if line.startswith("what differs"))) :]
    assert settings[1].split() == ["attrs.seed", "1", "2"]
    assert settings[2].split() == ["attrs.note", "-", f"{'x' * 39}…"]
    assert lines[-1] == (
        "DIFFERENT from step 1 on, weight_decay first: configuration. weight_decay is 0.01 in A "
        "and 0.3 in B from the first step on."
    )


def test_tables_fit_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, run("diff", "a.zarr", "b.zarr").stdout.splitlines())) <= 80


def test_one_of_several_parameters_is_shown_and_the_others_are_lines(
    zoo: Recorded, tmp_path: Path
) -> None:
    def change(bits: dict[str, np.ndarray], scalars: dict[str, np.ndarray]) -> None:
        flip_bit(bits["up/W"], (6, 2, 3), 2)

    rewrite(zoo.path, tmp_path / "b.zarr", change)
    result = run("diff", zoo.path, tmp_path / "b.zarr", "--parameter", "*")
    assert result.exit_code == 1
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["query", "0", "to", "13", "none", "EQUAL"] in lines
    assert ["up", "0", "to", "13", "step", "6,", "W", "changed-without-step"] in lines
    assert "W of up first: changed-without-step." in result.stdout
    assert "row 2, col 3" in result.stdout


def test_json_is_the_result() -> None:
    result = run("diff", "a.zarr", "b.zarr", "--format", "json")
    content = strict_json(result.stdout)
    assert (result.exit_code, content["equal"]) == (1, False)
    assert content["cause"]["code"] == "configuration"
    assert content["parameters"][0]["compared"]["n_only_b"] == 2
    assert strict_json(run("diff", "a.zarr", "same.zarr", "--format", "json").stdout)["equal"]


def test_csv_has_first_differences_and_growth() -> None:
    result = run("diff", "a.zarr", "b.zarr", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert result.exit_code == 1
    assert result.stderr.startswith("DIFFERENT from step 1 on")
    assert rows[0]["variable"] == "weight_decay"
    assert {row["what"] for row in rows} == {"first", "growth"}
    assert (rows[0]["token"], rows[0]["a"], rows[0]["b"]) == ("", "0.01", "0.3")
    growth = [row for row in rows if row["what"] == "growth"]
    assert [row["variable"] for row in growth[:4]] == ["W", "grad", "exp_avg", "exp_avg_sq"]
    assert all(row["n_elements"] == "55" for row in growth)
    assert run("diff", "a.zarr", "b.zarr", "--format", "csv", "--quiet").stderr == ""


def test_what_cannot_be_compared_is_told_in_a_line(tmp_path: Path) -> None:
    assert "nothing.zarr" in fails(3, "diff", "a.zarr", "nothing.zarr")
    assert "no parameter x" in fails(2, "diff", "a.zarr", "b.zarr", "--parameter", "x")
    record(tmp_path / "wide.zarr", n_steps=2, n_dims=7)
    assert "rows of one shape" in fails(2, "diff", "a.zarr", tmp_path / "wide.zarr")
    assert run("diff", "a.zarr").exit_code == 2


def test_equal_runs_are_compared_without_what_takes_long_to_load(runs: Path) -> None:
    code = f"import sys; sys.argv[1:] = ['diff', 'a.zarr', 'same.zarr']\ntry:\n  {MAIN}\nfinally:\n"
    code += "  print(*sys.modules, file=sys.stderr)"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=runs, capture_output=True, text=True, check=True
    )
    loaded = set(shown.stderr.split())
    assert "thimble_zarr.analysis.diff.diff" in loaded
    assert not loaded & {"torch", "xarray", "zarr", "dask", "pandas", "concurrent.futures.process"}


def test_its_help_names_every_cause_that_it_shows_first() -> None:
    text = " ".join(run("diff", "--help").stdout.split())
    for name in ("initial weights", "configuration", "schedule", "data", "kernel", "resume"):
        assert name in text
    assert "diff" in cli.commands
