"""What must be in the notebook's file, what may be, and what its scalars say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.notebook_file import import_notebook, refused, save
from tests.support.runs import N_DIMS, N_STEPS, N_TOKENS
from thimble_zarr.errors import ConfigError, DamagedStoreError, NotAStoreError
from thimble_zarr.sources.exporting import export_notebook
from thimble_zarr.sources.open import open_file_alone

N_ROWS = N_STEPS + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W": None}, "it has no recording: no W or embeddings or embedding_history, only "),
        ({"embeddings": torch.zeros(1)}, "it has W and embeddings, which should be the same"),
        ({"W": torch.zeros(N_TOKENS, N_DIMS)}, r"W has shape \(11, 5\), expected"),
        ({"W": torch.zeros(0, N_TOKENS, N_DIMS)}, r"W has shape \(0, 11, 5\)"),
        (
            {"grad_W": torch.zeros(N_STEPS, N_DIMS, N_TOKENS)},
            r"grad_W has shape \(13, 5, 11\), expected \(14, 11, 5\) or \(13, 11, 5\)",
        ),
        (
            {"grad_W": torch.zeros(N_STEPS - 1, N_TOKENS, N_DIMS)},
            "grad_W has 12 rows beside 14 of W, expected as many .* or one less",
        ),
        ({"losses": torch.zeros(3)}, r"losses has shape \(3,\), expected \(14,\) or \(13,\)"),
        ({"lr": torch.tensor(3.0)}, "several values of learning_rate and lr"),
        ({"adam_epsilon": torch.tensor(float("nan"))}, "adam_epsilon is nan"),
        (
            {"variance_W": torch.zeros(N_ROWS, N_TOKENS, N_DIMS, dtype=torch.int32)},
            "variance_W is int32",
        ),
        ({"grad_W": torch.ones(N_ROWS, N_TOKENS, N_DIMS)}, "grad_W of row 0.* is not zero"),
    ],
    ids=range(11),
)
def test_another_layout_is_refused(
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    changes: dict[str, torch.Tensor | None],
    message: str,
) -> None:
    changed = {name: t for name, t in (tensors | changes).items() if t is not None}
    refused(save(tmp_path / "run.safetensors", changed), NotAStoreError, message)


def test_a_model_is_refused_in_a_short_message(tmp_path: Path) -> None:
    model = {f"layers.{index}.weight": torch.zeros(2) for index in range(1000)}
    file = save(tmp_path / "model.safetensors", model)
    with pytest.raises(NotAStoreError, match="it has no recording") as raised:
        open_file_alone(file)
    assert len(str(raised.value)) < 1000


def test_what_a_store_has_no_room_for_is_not_dropped_in_silence(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    file = save(tmp_path / "run.safetensors", tensors | {"activations": torch.zeros(200, 200)})
    assert open_file_alone(file).n_rows == N_ROWS  # to check it is no harm
    for attempt in (
        lambda: import_notebook(file, tmp_path / "run.zarr"),
        lambda: export_notebook(open_file_alone(file), tmp_path / "x.safetensors"),
    ):
        with pytest.raises(ConfigError, match="activations"):
            attempt()
    assert list(tmp_path.iterdir()) == [file]


def test_settings_are_read_whatever_lies_before_them(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    tensors["a"] = torch.zeros(2**13, dtype=torch.int64)  # takes all the room there is
    reader = open_file_alone(save(tmp_path / "run.safetensors", tensors))
    assert reader.read_scalars()["learning_rate"][1] == 0.01


@pytest.mark.parametrize("lr", [1e-3, 3e-4, 0.1, 1.0, 1e-30, 6.02e23])
def test_the_optimizers_own_double_comes_back(
    tmp_path: Path, tensors: dict[str, torch.Tensor], lr: float
) -> None:
    tensors["learning_rate"] = torch.tensor(lr, dtype=torch.float32)
    file = save(tmp_path / "run.safetensors", tensors)
    scalars = open_file_alone(file).read_scalars()
    assert np.isnan(scalars["learning_rate"][0])
    assert scalars["learning_rate"][1:].tolist() == N_STEPS * [lr]
    assert scalars["beta2"][1:].tolist() == N_STEPS * [0.999]
    assert scalars["optimizer_step"].tolist() == list(range(N_ROWS))


def test_other_dtypes_of_a_scalar_are_taken_as_they_are(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    tensors["learning_rate"] = torch.tensor(float(np.float32(0.1)), dtype=torch.float64)
    tensors["adam_beta1"] = torch.tensor(0.9, dtype=torch.bfloat16)
    tensors["weight_decay"] = torch.tensor(0.1, dtype=torch.float16)
    scalars = open_file_alone(save(tmp_path / "x.safetensors", tensors)).read_scalars()
    assert scalars["learning_rate"][1] == float(np.float32(0.1))
    assert scalars["beta1"][1] == 0.8984375
    assert scalars["weight_decay"][1] == 0.1


def test_settings_are_taken_over(file: Path) -> None:
    schema = open_file_alone(file).schema
    expected = {
        "vocab_size": N_TOKENS, "hidden_dim": N_DIMS, "layers": 2, "heads": 2, "steps": N_STEPS,
        "batch_size": 128, "lr": 0.01, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999,
        "eps": 1e-8, "init_scale": 0.02, "seed": 42,
    }  # fmt: skip
    assert schema.attrs["config"] == expected
    assert (schema.optimizer.name, schema.optimizer.decoupled_weight_decay) == ("AdamW", True)
    assert (schema.software, schema.device, schema.parameter) == ({}, "unknown", None)


def test_a_store_whose_attribute_was_changed_is_not_exported(tmp_path: Path, file: Path) -> None:
    reader = import_notebook(file, tmp_path / "run.zarr")
    attrs = reader.schema.attrs
    for broken in (
        {},
        "nothing",
        {"tensors": {}, "metadata": None},
        attrs["notebook_file"] | {"tensors": {"W": {"dtype": "BF16", "shape": [1]}}},
    ):
        schema = replace(reader.schema, attrs=attrs | {"notebook_file": broken})
        with pytest.raises(DamagedStoreError, match="notebook_file"):
            export_notebook(replace(reader, schema=schema), tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
