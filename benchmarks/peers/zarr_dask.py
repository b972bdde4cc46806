"""Plain `xr.open_zarr` on our store and Dask arithmetic, as one would write it without us."""

from collections.abc import Iterator

import dask
import dask.array as da
import numpy as np
import xarray as xr

from benchmarks.peers.by_hand import MOMENTS, Answer, Task
from benchmarks.peers.inputs import TASKS, VARIABLES, Inputs, columns

ELEMENTS = ("token", "dim")


def decode(bits: xr.DataArray) -> xr.DataArray:
    """Return the numbers, by the recipe that stands beside the array."""

    def numbers(block: np.ndarray) -> np.ndarray:
        return (block.astype("uint32") << 16).view("float32")

    values: xr.DataArray = xr.apply_ufunc(
        numbers, bits, dask="parallelized", output_dtypes=[np.float32]
    )
    return values


def changes(ds: xr.Dataset) -> Iterator[xr.DataArray]:
    """Yield predicted and observed change, from step 1 on."""
    W, m, v = (decode(ds[name]) for name in MOMENTS)
    correction = (1 - ds.beta2**ds.optimizer_step) ** 0.5
    scale = ds.learning_rate * correction / (1 - ds.beta1**ds.optimizer_step)
    eps, decay = ds.eps * correction, ds.learning_rate * ds.weight_decay
    scale, eps, decay = (scalar[1:].astype("float32") for scalar in (scale, eps, decay))
    yield -scale * m[1:] / (v[1:] ** 0.5 + eps) - decay * W.shift(step=1)[1:]
    yield W.diff("step")


def formula(ds: xr.Dataset) -> Answer:
    predicted, observed = changes(ds)
    difference = observed - predicted
    products = (predicted**2, observed**2, difference**2, predicted * observed)
    sums = dask.compute(*(product.sum(ELEMENTS, dtype=np.float64) for product in products))
    return columns(np.column_stack(sums))


def formula_dead(inputs: Inputs) -> Answer:
    ds = xr.open_zarr(inputs.store)
    return formula(ds.isel(token=np.flatnonzero(ds.dead)))


def formula_all(inputs: Inputs) -> Answer:
    return formula(xr.open_zarr(inputs.store))


def exact(inputs: Inputs) -> Answer:
    """Replay block by block; each overlaps the one before by a row."""
    import torch

    from benchmarks.peers.replay import Replay, from_bits

    def count(*blocks: np.ndarray) -> np.ndarray:
        *variables, rows = blocks
        replay = Replay(inputs, first_row=int(rows[0, 0, 0]))
        for bits in zip(*variables, strict=True):
            replay.compare(*from_bits(*bits))
        return replay.n_different.reshape(1, 1, 3)

    ds = xr.open_zarr(inputs.store)
    arrays = [ds[name].data.rechunk({1: -1, 2: -1}) for name in (*MOMENTS, "grad")]
    steps = arrays[0].chunks[0]
    rows = da.arange(len(ds.step), chunks=(steps,))[:, None, None]
    counts = da.map_overlap(
        count,
        *arrays,
        rows,
        depth={0: (1, 0)},
        boundary="none",
        trim=False,
        align_arrays=False,
        chunks=((1,) * len(steps), (1,), (3,)),
        dtype=np.int64,
        meta=np.empty((0, 0, 0), np.int64),
    )
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Dask's threads share the cores already
    try:
        return np.asarray(counts.sum((0, 1)).compute())
    finally:
        torch.set_num_threads(n_threads)


def history(inputs: Inputs) -> Answer:
    ds = xr.open_zarr(inputs.store)[list(VARIABLES)].sel(token=inputs.token)
    return decode(ds.to_dataarray()).values


def residual(inputs: Inputs) -> Answer:
    ds = xr.open_zarr(inputs.store)
    predicted, observed = changes(ds.sel(token=inputs.random))
    return (observed - predicted).reindex(step=ds.step).values


def row(inputs: Inputs) -> Answer:
    ds = xr.open_zarr(inputs.store)[list(VARIABLES)].sel(step=inputs.row)
    return decode(ds.sortby("token").to_dataarray()).values


SOLVED = (formula_dead, formula_all, exact, history, residual, row)
READING: dict[str, Task] = dict(zip(TASKS, SOLVED, strict=True))

if __name__ == "__main__":
    from benchmarks.peers.child import main

    main(READING)
