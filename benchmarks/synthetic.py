"""Stores of any size, made in seconds: nothing is trained, and every step of them is sound."""

from pathlib import Path

import click
import numpy as np
import torch

from thimble_zarr.bits import storage_dtype
from thimble_zarr.format.layout import plan_layout
from thimble_zarr.format.schema import (
    TOKEN_DIMS,
    Schema,
)
from thimble_zarr.optim.specs.adam import Adam
from thimble_zarr.store.reader import StorePath
from thimble_zarr.store.writer import StoreWriter

_OPTIMIZER = Adam(name="AdamW", implementation="single", decoupled_weight_decay=True)
_HYPERPARAMETERS = {
    "loss": 1.0,
    "learning_rate": 1e-3,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
}


def synthetic_run(path: StorePath, *, n_steps: int, n_tokens: int, n_dims: int) -> None:
    """Write a run in bfloat16 whose gradients are zero, so that nothing ever moves.

    Parameters
    ----------
    path
        Where; a store there is replaced.
    n_steps, n_tokens, n_dims
        Its size.
    """
    dtypes = dict.fromkeys(_OPTIMIZER.variables, "bfloat16")
    itemsizes = {name: storage_dtype(native).itemsize for name, native in dtypes.items()}
    schema = Schema(
        shape=(n_tokens, n_dims),
        dims=TOKEN_DIMS,
        dtypes=dtypes,
        layout=plan_layout(n_tokens, n_dims, itemsizes),
        optimizer=_OPTIMIZER,
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        software={"torch": torch.__version__},
        created="2026-01-01T00:00:00+00:00",
    )
    length = schema.layout.block_steps
    arrays = {
        name: np.zeros((length, n_tokens, n_dims), storage_dtype(native))
        for name, native in dtypes.items()
    }
    writer = StoreWriter.create(path, schema, n_rows=n_steps + 1, overwrite=True)
    for first in range(0, n_steps + 1, length):
        n_rows = min(length, n_steps + 1 - first)
        arrays["W"][:] = 0x3C00 + np.arange(n_dims)
        scalars = {name: np.full(length, value) for name, value in _HYPERPARAMETERS.items()}
        scalars["optimizer_step"] = np.arange(first, first + length, dtype=np.float64)
        assert set(scalars) == set(schema.scalars)
        writer.commit_block(first, n_rows, arrays, scalars)
    writer.close()


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--steps", type=int, required=True)
@click.option("--tokens", type=int, required=True)
@click.option("--dims", type=int, required=True)
def main(path: Path, *, steps: int, tokens: int, dims: int) -> None:
    """Write a sound run of any size to PATH."""
    synthetic_run(path, n_steps=steps, n_tokens=tokens, n_dims=dims)


if __name__ == "__main__":
    main()
