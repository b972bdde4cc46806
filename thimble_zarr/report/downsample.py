"""From steps and tokens to the columns, rows and points that a screen has room for.

What stands for several numbers is their median, and beside it are the least and the greatest.
Numbers that are NaN are left out; of nothing but NaN all three are NaN. Points are of a few steps,
and of a random sample of tokens.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

from thimble_zarr.report.run import Run

BLOCK_BYTES = 2**24
"""How much of a variable is held at a time."""

_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Numbers by step, each of consecutive steps.

    Attributes
    ----------
    x
        The middle one of its steps, float64, shape `(column,)`.
    low, median, high
        Of the numbers of these steps, float64, shape `(column, ...)`.
    """

    x: np.ndarray
    low: np.ndarray
    median: np.ndarray
    high: np.ndarray

    @property
    def is_exact(self) -> bool:
        """Whether each column is of one step."""
        return self.low is self.median


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Numbers by token and step, each of some tokens and consecutive steps.

    Attributes
    ----------
    low, median, high
        Of what a pixel covers, float32, shape `(row, column)`.
    """

    low: np.ndarray
    median: np.ndarray
    high: np.ndarray


def columns(steps: np.ndarray, values: np.ndarray, n_columns: int) -> Columns:
    """Return numbers, shape `(step, ...)`, as at most `n_columns`: exact if there are no more."""
    values, n_steps = np.asarray(values, np.float64), len(steps)
    if n_steps <= n_columns:
        return Columns(x=np.asarray(steps, np.float64), low=values, median=values, high=values)
    members = _members(np.arange(n_steps), n_columns)
    padded = np.concatenate([values, np.full_like(values[:1], np.nan)])
    low, median, high = _spread(np.moveaxis(padded[members], 1, -1))
    middle = ((members >= 0).sum(1) - 1) // 2
    x = np.asarray(steps, np.float64)[members[:, 0] + middle]
    return Columns(x=x, low=low, median=median, high=high)


def evenly(n: int, n_most: int) -> np.ndarray:
    """Return which of `n` to take so that they are at most `n_most`, the first and last included.

    For what grows or falls all along, of which a median would tell no more.
    """
    if n <= n_most:
        return np.arange(n)
    return np.arange(n_most) * (n - 1) // max(1, n_most - 1)


def pixels(
    variable: xr.DataArray, orders: Mapping[str, np.ndarray], n_columns: int, n_rows: int
) -> dict[str, Pixels]:
    """Return a variable, dims `(step, token)`, as a picture of each group, read once in blocks.

    `orders` has of each group positions of tokens in the order of the rows, the lowest first.
    Columns are equally wide between the first and the last step; one without a recorded step is
    NaN. All steps of a column are held at once.
    """
    members = {group: _members(order, n_rows) for group, order in orders.items()}
    edges = _column_edges(variable.step.values.astype(np.int64), n_columns)
    found = {
        group: np.full((3, len(of), len(edges) - 1), np.nan, np.float32)
        for group, of in members.items()
    }
    for column, block in _column_blocks(variable, edges):
        padded = np.full((block.shape[1] + 1, len(block)), np.nan, np.float32)
        padded[:-1] = block.T
        for group, of in members.items():
            if of.size and len(block):
                values = padded[of].reshape(len(of), -1)
                found[group][:, :, column] = _spread(values)
    return {
        group: Pixels(low=low, median=median, high=high)
        for group, (low, median, high) in found.items()
    }


def blocks(n_steps: int, step_bytes: int) -> Iterator[slice]:
    """Yield consecutive steps that together are at most `BLOCK_BYTES`, or one step."""
    n_at_once = max(1, BLOCK_BYTES // max(1, step_bytes))
    for first in range(0, n_steps, n_at_once):
        yield slice(first, min(first + n_at_once, n_steps))


def _column_edges(steps: np.ndarray, n_columns: int) -> np.ndarray:
    """Return before which recorded step each column begins, and last the number of them."""
    n_steps = int(steps[-1] - steps[0]) + 1
    n_columns = min(n_columns, n_steps)
    return np.searchsorted((steps - steps[0]) * n_columns // n_steps, np.arange(n_columns + 1))


def _column_blocks(variable: xr.DataArray, edges: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the steps of each column, shape `(step, token)`. Each chunk is read once."""
    n_tokens = variable.sizes["token"]
    chunk_steps = (variable.encoding.get("chunks") or (1,))[0]
    n_at_once = BLOCK_BYTES // (n_tokens * variable.dtype.itemsize)
    n_at_once = max(1, n_at_once // chunk_steps) * chunk_steps
    held, start = np.empty((0, n_tokens), np.float32), 0
    for column, (first, stop) in enumerate(itertools.pairwise(edges.tolist())):
        while (end := start + len(held)) < stop:
            read = variable.isel(step=slice(end, end + n_at_once)).values
            held, start = np.concatenate([held[first - start :], read], dtype=np.float32), first
        yield column, held[first - start : stop - start]


def _members(order: np.ndarray, n_rows: int) -> np.ndarray:
    """Divide what has an order into rows of as many, shape `(row, member)`, padded with -1."""
    n_rows = min(n_rows, len(order))
    edges = np.arange(n_rows + 1) * len(order) // max(1, n_rows)
    at = edges[:-1, np.newaxis] + np.arange(max(np.diff(edges), default=0))
    padded = np.append(order, -1)
    return padded[np.where(at < edges[1:, np.newaxis], at, -1)]


def _spread(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return least, median and greatest along the last axis, NaN left out."""
    ordered = np.sort(values, axis=-1)  # NaN come last
    n = (~np.isnan(ordered)).sum(-1)[..., np.newaxis]
    last = np.maximum(n - 1, 0)
    lower, upper, high = (
        np.take_along_axis(ordered, at, -1)[..., 0] for at in (last // 2, n // 2, last)
    )
    with np.errstate(invalid="ignore"):  # of both infinities
        median = np.where(lower == upper, lower, lower / 2 + upper / 2)
    return ordered[..., 0], median, high


def mostly_early(steps: np.ndarray, n_most: int) -> list[int]:
    """Return at most so many of the steps: the first, the last, and more of the early ones.

    Early on much happens in a few steps, and towards the end little in many.
    """
    n = min(len(steps), n_most)
    positions = np.rint(np.linspace(0, 1, n) ** 3 * (len(steps) - 1)).astype(np.int64)
    chosen: list[int] = steps[np.maximum(positions, np.arange(n))].tolist()
    return chosen


def few_steps(steps: np.ndarray, n_most: int) -> list[int]:
    """Return at most so many of six of the steps, mostly early ones: those of all such panels."""
    chosen = mostly_early(steps, _N_FEW)
    n = min(len(chosen), n_most)
    return [chosen[at] for at in np.rint(np.linspace(0, len(chosen) - 1, n)).astype(np.int64)]


_N_FEW = 6


def sampled(run: Run) -> dict[str, np.ndarray]:
    """Return of each group positions of tokens: all, or a random sample, the same at every call."""
    order = np.random.default_rng(_SEED).permutation(run.summary.sizes["token"])
    return {
        group: np.sort(order[is_member[order]][: run.n_points])
        for group, is_member in run.members.items()
    }


def sample_note(run: Run) -> str:
    """Return, as a sentence, of what groups only a sample is shown; empty if of none."""
    sizes = {group: int(is_member.sum()) for group, is_member in run.members.items()}
    large = [f"{n:,} {group}" for group, n in sizes.items() if n > run.n_points]
    if not large:
        return ""
    rows = f"{run.row_name}s"
    of = ", ".join(large)
    return f"Up to {run.n_points:,} {rows} of a group are shown, drawn at random from {of}."


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
