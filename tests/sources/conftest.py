"""The notebook's file of the toy run."""

from pathlib import Path

import pytest
import torch

from tests.support.notebook_file import notebook_tensors, save
from tests.support.runs import History


@pytest.fixture
def tensors(toy_history: History) -> dict[str, torch.Tensor]:
    return notebook_tensors(toy_history)


@pytest.fixture
def file(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    return save(tmp_path / "run.safetensors", tensors)
