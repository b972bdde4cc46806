"""The notebook's file, written by the library the notebook wrote it with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support import runs
from tests.support.runs import N_DIMS, N_LIVE, N_TOKENS, History
from thimble_zarr.errors import ThimbleError
from thimble_zarr.format.labels import TokenLabels
from thimble_zarr.sources.importing import import_file
from thimble_zarr.sources.open import open_file_alone
from thimble_zarr.store.contents import check_vacant
from thimble_zarr.store.reader import StoreReader


def notebook_tensors(history: History) -> dict[str, torch.Tensor]:
    """Return what the notebook's last cell saves, built from clones taken by hand."""
    n_rows = len(history.tensors["W"])
    grad = torch.stack(history.tensors["grad"])
    grad[0] = 0
    return {
        "W": torch.stack(history.tensors["W"]),
        "grad_W": grad,
        "momentum_W": torch.stack(history.tensors["exp_avg"]).float(),
        "variance_W": torch.stack(history.tensors["exp_avg_sq"]).float(),
        "losses": torch.tensor([float("nan"), *history.losses], dtype=torch.float32),
        "vocab_size": torch.tensor(N_TOKENS, dtype=torch.long),
        "hidden_dim": torch.tensor(N_DIMS, dtype=torch.long),
        "n_layers": torch.tensor(2, dtype=torch.long),
        "n_heads": torch.tensor(2, dtype=torch.long),
        "num_steps": torch.tensor(n_rows - 1, dtype=torch.long),
        "batch_size": torch.tensor(128, dtype=torch.long),
        "learning_rate": torch.tensor(1e-2, dtype=torch.float32),
        "weight_decay": torch.tensor(0.01, dtype=torch.float32),
        "adam_beta1": torch.tensor(0.9, dtype=torch.float32),
        "adam_beta2": torch.tensor(0.999, dtype=torch.float32),
        "adam_epsilon": torch.tensor(1e-8, dtype=torch.float32),
        "init_scale": torch.tensor(0.02, dtype=torch.float32),
        "seed": torch.tensor(42, dtype=torch.long),
        "n_live": torch.tensor(N_LIVE, dtype=torch.long),
        "n_dead": torch.tensor(N_TOKENS - N_LIVE, dtype=torch.long),
    }


def save(file: Path, tensors: Mapping[str, torch.Tensor], **options: dict[str, str]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, **options)
    return file


def import_notebook(
    file: Path, path: Path, *, labels: TokenLabels | None = None, **options: Any
) -> StoreReader:
    """Import a file as the command does."""
    check_vacant(path, overwrite=options.get("overwrite", False))
    reader = open_file_alone(file)
    return import_file(reader if labels is None else reader.labelled(labels), path, **options)


def live_mask() -> torch.Tensor:
    return torch.from_numpy(runs.live_mask())


def float32_states(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give the moments digits that bfloat16 does not have."""
    generator = torch.Generator().manual_seed(3)
    return tensors | {
        name: tensors[name] * (1 + 1e-4 * torch.rand(tensors[name].shape, generator=generator))
        for name in ("momentum_W", "variance_W")
    }


def refused(file: Path, error: type[ThimbleError], message: str) -> None:
    """Expect an error, in place and from an import, that names the file and leaves nothing."""
    before = sorted(file.parent.iterdir())
    for attempt in (open_file_alone, lambda f: import_notebook(f, f.with_suffix(".zarr"))):
        with pytest.raises(error, match=message) as raised:
            attempt(file)
        assert type(raised.value) is error
        assert str(file) in str(raised.value)
    assert sorted(file.parent.iterdir()) == before
