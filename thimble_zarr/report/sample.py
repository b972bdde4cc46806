"""What a panel shows of tokens where it cannot show all: a sample of each group."""

from collections.abc import Mapping

import numpy as np
import xarray as xr

from thimble_zarr.report.run import Run

N_POINTS = 1000
"""Tokens of a group that a figure shows at most."""

_SEED = 0


def sampled(run: Run) -> dict[str, np.ndarray]:
    """Return of each group positions of tokens: all, or a random sample, the same at every call."""
    order = np.random.default_rng(_SEED).permutation(run.summary.sizes["token"])
    return {
        group: np.sort(order[is_member[order]][:N_POINTS])
        for group, is_member in run.members.items()
    }


def sample_note(run: Run) -> str:
    """Return, as a sentence, of what groups only a sample is shown; empty if of none."""
    sizes = {group: int(is_member.sum()) for group, is_member in run.members.items()}
    large = [f"{n:,} {group}" for group, n in sizes.items() if n > N_POINTS]
    if not large:
        return ""
    rows = f"{run.row_name}s"
    return f"Shown are {N_POINTS:,} {rows} drawn at random from {', from '.join(large)}."


def token_ids(run: Run, tokens: np.ndarray) -> np.ndarray:
    """Return the ids of the tokens at some positions."""
    ids: np.ndarray = run.summary["token"].values.astype(np.int64)[tokens]
    return ids


def values_of(
    variable: xr.DataArray, step: int, tokens: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return a variable of the dataset at a step, at each group's positions: `(token, dim)`.

    It is read once, for all groups together, and float64.
    """
    every = np.unique(np.concatenate([*tokens.values()]))
    row = variable.sel(step=step)
    if row.ndim:
        row = row.isel({row.dims[0]: every})
    values = np.asarray(row.values, np.float64).reshape(len(every), -1)
    return {group: values[np.searchsorted(every, of)] for group, of in tokens.items()}
