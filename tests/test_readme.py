"""The README: its commands and code run, its output is real, and its numbers are measured."""

import json
import os
import shlex
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest

import thimble_zarr
from benchmarks.__main__ import EARLY_STEP, markdown
from tests.support.documents import ROOT, Reader, blocks, follow, recipe, shape
from thimble_zarr.__main__ import main
from thimble_zarr.cli.train import DEMO
from thimble_zarr.experiment.trainer import TrainingData

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAX_LINES = 220


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


@pytest.fixture(scope="module")
def reader(directory: Path, default_data: TrainingData) -> Reader:
    """Who followed the README in the directory."""
    return follow(ROOT / "README.md", directory, default_data)


def test_every_block_ran(reader: Reader) -> None:
    assert reader.ran == [block for block in blocks(README) if block.not_run is None]
    assert {block.language for block in reader.ran} == {"console", "python", "text"}


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= MAX_LINES


def test_the_loop_recorded_what_it_did(reader: Reader, directory: Path) -> None:
    ds = thimble_zarr.open_dataset(directory / "mine.zarr")
    assert ds.sizes["step"] == 51
    assert int(thimble_zarr.accounting(ds).n_different.sum()) == 0
    assert not np.isnan(ds.loss[1:]).any()


def test_the_demo_has_dead_tokens(reader: Reader, directory: Path) -> None:
    ds = thimble_zarr.open_dataset(directory / "runs/demo.zarr")
    assert ds.sizes["token"] == 10_000
    assert 0 < int(ds.dead.sum()) < 5_000
    assert ds.adam_residual.dtype == np.float32
    assert float(ds.loss[-1]) < float(ds.loss[1]) - 1


def test_make_does_what_the_readme_says_to_do_without_it() -> None:
    assert any(line.endswith(" -m venv .venv") for line in recipe("demo"))
    assert " -m pytest" in recipe("test")[-1]


def test_the_demo_is_the_one_that_is_told_of() -> None:
    (script,) = entry_points(group="console_scripts", name="thimble-zarr")
    assert script.load() is main
    assert not any(word.startswith("--steps") for word in shlex.split(recipe("demo")[-1]))
    assert (DEMO.steps, DEMO.batch_size) == (150, 16)  # what the output is of


@pytest.mark.soak
def test_make_demo_as_it_is(tmp_path: Path) -> None:
    program, *arguments = shlex.split(recipe("demo")[-1])
    shown = subprocess.run(
        [Path(sys.executable).parent / Path(program).name, *arguments],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "2"},  # it trains, and then forks to check
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Training to step 150" in shown.stderr
    printed = {shape(line) for line in shown.stdout.splitlines()}
    (output,) = (block for block in blocks(README) if block.language == "text")
    for line in output.content.splitlines():
        assert line == "..." or shape(line) in printed, line


def test_the_numbers_are_the_measured_ones() -> None:
    results = json.loads((ROOT / "benchmarks/results.json").read_text())
    assert markdown(results, EARLY_STEP, results["about"]["steps"]) in README
