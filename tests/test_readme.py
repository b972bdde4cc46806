"""The README's commands and code run, and its numbers are the measured ones."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import thimble_zarr
from benchmarks.__main__ import EARLY_STEP, markdown
from benchmarks.faults import summary
from thimble_zarr.__main__ import main
from thimble_zarr.cli.main import cli
from thimble_zarr.cli.train import DEMO
from thimble_zarr.experiment import trainer
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.experiment.trainer import TrainingData, load_data

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [content for name, content in BLOCKS if name == language]


FROM = ("corpus", "tokenizer", "token_mask", "vocab_size")
"""Settings that say what is trained on."""

COMMANDS = [
    line.removeprefix("$ ").split("  #")[0].strip()
    for block in blocks("console")
    for line in block.splitlines()
]


@pytest.fixture(scope="module")
def default_once(default_data: TrainingData) -> Iterator[None]:
    """Encode the default corpus once, and not for every run of it."""

    def load(config: TrainingConfig) -> TrainingData:
        defaults = TrainingConfig()
        same = all(getattr(config, name) == getattr(defaults, name) for name in FROM)
        return default_data if same else load_data(config)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(trainer, "load_data", load)
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, default_once: None) -> Iterator[Path]:
    """A directory in which every command of the README was run, in order."""
    directory = tmp_path_factory.mktemp("readme")
    (directory / "README.md").write_text(README, encoding="utf-8")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(directory)
        for command in COMMANDS:
            if command.startswith("thimble-zarr"):
                result = CliRunner().invoke(cli, shlex.split(command)[1:], catch_exceptions=False)
                assert result.exit_code == 0, f"{command}\n{result.output}"
        yield directory


def test_every_command_is_known_to_this_test() -> None:
    programs = {command.split()[0] for command in COMMANDS}
    assert programs == {
        "make",
        "python3",
        "thimble-zarr",
        ".venv/bin/pip",
        ".venv/bin/thimble-zarr",
    }


def test_the_commands_ran_and_left_what_they_promise(directory: Path) -> None:
    for name in ("run.zarr", "other.zarr", "the.json", "table.csv", "tokenizer.json"):
        assert (directory / name).exists()
    assert (directory / "imported.zarr").is_dir()
    check = json.loads((directory / "the.json").read_text())
    assert check["tokens"] == {"subset": "text: the", "n": 1}
    assert check["holds"] is True
    assert len((directory / "table.csv").read_text().splitlines()) == 31


# What the trainers do with what they stand on, and say of a machine without a GPU.
@pytest.mark.filterwarnings("default:::pytorch_lightning", "default:.*LeafSpec")
@pytest.mark.filterwarnings("default:.*(pin_memory|num_workers|checkpoint)")
def test_the_python_runs(directory: Path) -> None:
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    # The loop takes 50 steps, and 10 after a resumption.
    for name, n_steps in (("mine.zarr", 60), ("trainer.zarr", 5), ("lightning.zarr", 8)):
        ds = thimble_zarr.open_dataset(directory / name)
        assert ds.sizes["step"] == n_steps + 1
        assert int(thimble_zarr.accounting(ds).n_different.sum()) == 0
        assert not np.isnan(ds.loss[1:]).any()
    residual = names["ds"].sel(token=names["ds"].dead).adam_residual
    assert residual.dtype == np.float32
    assert residual.sizes["token"] == int(names["ds"].dead.sum()) > 0
    assert names["runs"].sizes["run"] == 2


def test_every_block_of_python_imports_what_it_uses() -> None:
    trees = [ast.parse(block) for block in blocks("python")]
    imported = [
        {
            alias.asname or alias.name.partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        for tree in trees
    ]
    everywhere = set().union(*imported)
    assert {"torch", "thimble_zarr", "Recorder", "windows"} <= everywhere
    for tree, here in zip(trees, imported, strict=True):
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
        made = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        assert used & everywhere <= here, ast.unparse(tree)
        assert not made & everywhere, ast.unparse(tree)


def recipe(target: str) -> list[str]:
    shown = subprocess.run(
        ["make", "--always-make", "--dry-run", "--no-print-directory", target],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if "MAKE" not in name},
        capture_output=True,
        text=True,
        check=True,
    )
    return shown.stdout.splitlines()


def test_make_does_what_the_readme_says_to_do_without_it() -> None:
    by_hand = [command for command in COMMANDS if command.startswith(".venv/bin/pip")]
    assert any(
        command.split("pip install ")[1] in line for line in recipe("test") for command in by_hand
    )
    assert recipe("test")[-1].startswith(".venv/bin/python -m pytest")


def shape(line: str) -> str:
    """Return a line without what differs between runs: numbers, and where the cosine is least."""
    return re.sub(r"[-\s\d.,]+", " # ", line.split("; cosine")[0])


@pytest.fixture(scope="module")
def demo() -> list[str]:
    """The arguments that `make demo` gives the tool, from the recipe itself."""
    program, *arguments = shlex.split(recipe("demo")[-1])
    assert program == ".venv/bin/thimble-zarr"
    (script,) = entry_points(group="console_scripts", name="thimble-zarr")
    assert script.load() is main
    assert not any(argument.startswith("--steps") for argument in arguments)
    assert (DEMO.steps, DEMO.batch_size) == (150, 16)  # as the README says
    return arguments


def assert_ends_as_the_readme_shows(stdout: str) -> None:
    assert re.search(r"Tokens +dead: [\d,]+ of 10,000", stdout)
    first, last = re.search(r"loss ([\d.]+) -> ([\d.]+)", stdout).groups()
    assert float(last) < float(first) - 1
    assert re.search(r"^HOLDS to the bit: ", stdout, flags=re.MULTILINE)
    assert "runs/demo.zarr" in stdout.split("Look next")[1]
    printed = {shape(line) for line in stdout.splitlines()}
    for line in blocks("text")[0].splitlines():
        assert line == "..." or shape(line) in printed, line


def test_make_demo_ends_with_the_verdict(
    demo: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, default_once: None
) -> None:
    """What `make demo` runs, with dead tokens and a falling loss.

    Fewer steps are as long a table: it shows the first 5 and the last 5. Smaller batches print
    the same; `make soak` runs the demo as it is.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("thimble_zarr.cli.train.DEMO", replace(DEMO, batch_size=4))
    result = CliRunner().invoke(cli, [*demo, "--steps=41"], catch_exceptions=False)
    assert (result.exit_code, result.stderr) == (0, "")
    assert_ends_as_the_readme_shows(result.stdout)


@pytest.mark.soak
def test_make_demo_as_it_is(demo: list[str], tmp_path: Path) -> None:
    shown = subprocess.run(
        [Path(sys.executable).parent / "thimble-zarr", *demo],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "2"},  # it trains, and then forks to check
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stderr == ""
    assert_ends_as_the_readme_shows(shown.stdout)


def test_every_command_of_the_tool_is_in_the_table() -> None:
    (table,) = re.findall(r"^\| command \|.*?\n\n", README, flags=re.MULTILINE | re.DOTALL)
    documented = re.findall(r"^\| `([a-z]+)` \|", table, flags=re.MULTILINE)
    assert sorted(documented) == sorted(cli.commands)


def test_the_numbers_are_the_measured_ones() -> None:
    results = json.loads((ROOT / "benchmarks/results.json").read_text())
    assert markdown(results, EARLY_STEP, results["about"]["steps"]) in README


def test_the_planted_faults_are_the_counted_ones() -> None:
    results = json.loads((ROOT / "benchmarks/faults.json").read_text())
    assert summary(results) in " ".join(README.split())
