"""The notebook's file, read by the library it was written for."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.runs import N_STEPS, History, record
from thimble_zarr.errors import ConfigError
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.format.store import StoreReader
from thimble_zarr.interchange.notebook import export_notebook

CONFIG = TrainingConfig(lr=1e-2, steps=N_STEPS)


@pytest.fixture
def exported(tmp_path: Path) -> tuple[dict[str, torch.Tensor], History]:
    history = record(
        tmp_path / "run.zarr", recorder_options={"attrs": {"config": CONFIG.to_json()}}
    )
    export_notebook(StoreReader.open(tmp_path / "run.zarr"), tmp_path / "run.safetensors")
    return load_file(tmp_path / "run.safetensors"), history


def test_it_is_what_the_notebook_keeps(
    exported: tuple[dict[str, torch.Tensor], History],
) -> None:
    tensors, history = exported
    grad = torch.stack(history.tensors["grad"])
    grad[0] = 0
    assert torch.equal(tensors["W"], torch.stack(history.tensors["W"]))
    assert torch.equal(tensors["grad_W"], grad)
    assert torch.equal(tensors["momentum_W"], torch.stack(history.tensors["exp_avg"]).float())
    assert torch.equal(tensors["variance_W"], torch.stack(history.tensors["exp_avg_sq"]).float())
    losses = np.array([np.nan, *history.losses], dtype=np.float32)
    np.testing.assert_array_equal(tensors["losses"].numpy(), losses)


def test_hyperparameters_are_tensors_without_dimensions(
    exported: tuple[dict[str, torch.Tensor], History],
) -> None:
    tensors, _ = exported
    assert tensors["learning_rate"].item() == np.float32(1e-2)
    assert tensors["num_steps"].dtype == torch.int64
    assert tensors["num_steps"].item() == N_STEPS
    assert tensors["adam_beta2"].shape == ()
    assert (tensors["n_live"].item(), tensors["n_dead"].item()) == (7, 4)


def test_a_float32_run_does_not_fit(tmp_path: Path) -> None:
    record(tmp_path / "run.zarr", dtype=torch.float32, n_steps=1)
    with pytest.raises(ConfigError, match="would lose precision"):
        export_notebook(StoreReader.open(tmp_path / "run.zarr"), tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
