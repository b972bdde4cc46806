"""A run that diverged: its weights, loss and gradient are no numbers, and JSON knows no NaN."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.commands import outcome, strict_json
from tests.support.runs import Loop, token_labels
from thimble_zarr import Recorder


@pytest.fixture
def diverged(tmp_path: Path) -> Path:
    path, loop = tmp_path / "run.zarr", Loop(dtype=torch.float32)
    with Recorder(path, loop.optimizer, parameter=loop.weight, labels=token_labels()) as recorder:
        for step in range(12):
            if step == 6:
                with torch.no_grad():
                    loop.weight[:] = np.nan
            recorder.log(loss=loop.step())
            loop.optimizer.zero_grad()
    return path


@pytest.mark.filterwarnings("ignore:the loss of step")
def test_json_has_null_for_what_is_no_number(diverged: Path) -> None:
    _, text, _ = outcome("check", diverged, "--format", "json", "--tokens", "all", "-q")
    found = strict_json(text)
    assert not found["holds"]
    (explodes,) = (of for of in found["health"] if of["code"] == "gradient-explodes")
    assert explodes["evidence"]["largest"] is None
    _, text, _ = outcome("summary", diverged, "--format", "json")
    (parameter,) = strict_json(text)["parameters"]
    assert {of["centroid_drift"] for of in parameter["groups"]} == {None}
