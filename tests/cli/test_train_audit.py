"""`train --audit`: what it says, and how it ends."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from thimble_zarr.cli.main import cli
from thimble_zarr.experiment.trainer import Training
from thimble_zarr.store.reader import StoreReader


@pytest.fixture
def train(tmp_path: Path, tiny: tuple[str, ...]) -> Callable[..., Result]:
    path = str(tmp_path / "run.zarr")
    return lambda *options: CliRunner().invoke(cli, ["train", path, *tiny, *options])


@pytest.fixture
def alien(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a weight after the third step."""
    take_step, taken = Training.step, []

    def step(training: Training) -> float:
        loss = take_step(training)
        taken.append(loss)
        if len(taken) == 3:
            with torch.no_grad():
                training.embedding[17, 5] += 1
        return loss

    monkeypatch.setattr(Training, "step", step)


def test_every_step_is_audited(train: Callable[..., Result], tmp_path: Path) -> None:
    result = train("--audit", "raise")
    assert result.exit_code == 0, result.output
    assert "Audit    5 steps, all explained" in result.stdout
    shown = CliRunner().invoke(cli, ["info", str(tmp_path / "run.zarr")]).stdout
    assert "Audit 5 steps, all explained, while it was recorded" in " ".join(shown.split())
    shown = CliRunner().invoke(cli, ["info", str(tmp_path / "run.zarr"), "--format", "json"]).stdout
    assert json.loads(shown)["audit"] == {"checked": 5, "unexplained": 0}


def test_without_it_nothing_is_said_of_it(train: Callable[..., Result], tmp_path: Path) -> None:
    assert "Audit" not in train().stdout
    shown = CliRunner().invoke(cli, ["info", str(tmp_path / "run.zarr"), "--format", "json"]).stdout
    assert json.loads(shown)["audit"] is None


@pytest.mark.usefixtures("alien")
def test_what_no_step_made_ends_it_as_what_a_check_found(
    train: Callable[..., Result], tmp_path: Path
) -> None:
    result = train("--audit", "raise")
    assert result.exit_code == 1, result.output
    assert "step 4 of transformer.wte.weight does not follow" in result.stderr
    assert "at token 17, dim 5, W is" in result.stderr
    reader = StoreReader.open(tmp_path / "run.zarr")
    assert reader.commit.complete
    assert reader.n_rows == 6


@pytest.mark.usefixtures("alien")
def test_it_ends_before_the_next_step_if_every_step_is_audited(
    train: Callable[..., Result], tmp_path: Path
) -> None:
    result = train("--audit", "raise", "--audit-every-step")
    assert result.exit_code == 1, result.output
    assert StoreReader.open(tmp_path / "run.zarr").n_rows == 5
    assert train("--audit-every-step").exit_code == 2


@pytest.mark.usefixtures("alien")
def test_or_warns_of_it(train: Callable[..., Result]) -> None:
    with pytest.warns(UserWarning, match="step 4 of transformer.wte.weight does not follow"):
        result = train("--audit", "warn")
    assert result.exit_code == 0, result.output
