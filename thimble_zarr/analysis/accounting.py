"""The per-step table: does the formula explain what the weights did?

One fused pass: each task reads a few blocks, evaluates the formula window by window and keeps five
sums a step. The sums are float64, so cosines stay within [-1, 1].
"""

import numpy as np
import xarray as xr

from thimble_zarr.analysis.lazy import LazyArray
from thimble_zarr.analysis.variables import adam_decay, adam_update, rounding_bound
from thimble_zarr.analysis.windows import Window
from thimble_zarr.errors import SelectionError

COLUMNS = ("norm_predicted", "norm_observed", "norm_difference", "cosine_similarity", "ratio")

_TASK_BLOCKS = 4
"""Blocks a task. Each task decodes one block more, for the weights before its first step."""

_N_SUMS = 6


def accounting(ds: xr.Dataset) -> xr.Dataset:
    """Compare, step by step, the observed weight changes with what AdamW's formula predicts.

    Parameters
    ----------
    ds
        A dataset from `open_dataset`, whole or with any steps, tokens or dims selected. It must
        still be lazy: not loaded, and not changed by arithmetic.

    Returns
    -------
    xarray.Dataset
        In memory, dims `(step,)`, without the initial state, float64 but for the counts:
        ``norm_predicted``, ``norm_observed``, ``norm_difference``
            L2 norms over the selected elements of predicted and observed change and of their
            difference.
        ``cosine_similarity``
            Of predicted and observed change; NaN where one of them is zero.
        ``ratio``
            `norm_predicted / norm_observed`; infinite where nothing moved.
        ``n_unexplained``
            Elements whose residual is larger than rounding can make it
            (`optim.adamw.rounding_bound`), or is not finite. int64; 0 in a sound record.
        ``n_not_finite``
            Elements whose residual is NaN or infinite, because the run diverged or a value is
            missing. int64.

    Raises
    ------
    SelectionError
        If no token or no step is selected, or `ds` is no longer lazy.
    """
    if "adam_residual" not in ds or not isinstance(ds.adam_residual.data, LazyArray):
        raise SelectionError(
            "accounting needs the lazy variables of `open_dataset`; select steps and tokens with "
            "`ds.sel`, and do not load or compute the dataset first"
        )
    if "step" in ds.dims:
        ds = ds.sel(step=ds.step > 0)
    residual, steps = ds.adam_residual, np.atleast_1d(ds.step.values)
    if residual.size == 0 or steps[0] == 0:
        raise SelectionError(
            "nothing is selected: an accounting needs at least one token and one step after the "
            f"initial state, and this selection has {dict(residual.sizes)}"
        )
    sums = residual.data.reduce_rows(_sums, n_outputs=_N_SUMS, task_blocks=_TASK_BLOCKS).compute()
    predicted, observed, difference, product, n_unexplained, n_not_finite = sums.T
    norm_predicted, norm_observed = np.sqrt(predicted), np.sqrt(observed)
    with np.errstate(divide="ignore", invalid="ignore"):
        columns = (
            norm_predicted,
            norm_observed,
            np.sqrt(difference),
            product / (norm_predicted * norm_observed),
            norm_predicted / norm_observed,
        )
    table = {name: ("step", values) for name, values in zip(COLUMNS, columns, strict=True)}
    table["n_unexplained"] = ("step", n_unexplained.astype(np.int64))
    table["n_not_finite"] = ("step", n_not_finite.astype(np.int64))
    return xr.Dataset(
        table,
        coords={"step": steps},
        attrs={
            "n_elements": residual.size // len(steps),
            "dtype": ds.attrs["dtype"],
        },
    )


def _sums(window: Window) -> np.ndarray:
    """Return predicted², observed², difference², product, unexplained and not finite, by row."""
    previous, current = window.previous("W"), window.current("W")
    update = adam_update(window)
    predicted = update + adam_decay(window)
    observed = current - previous
    difference = observed - predicted
    explained = np.abs(difference) <= rounding_bound(window, update)  # NaN is not explained
    return np.stack(
        [
            np.einsum("std,std->s", predicted, predicted),
            np.einsum("std,std->s", observed, observed),
            np.einsum("std,std->s", difference, difference),
            np.einsum("std,std->s", predicted, observed),
            np.count_nonzero(~explained, axis=(1, 2)),
            np.count_nonzero(~np.isfinite(difference), axis=(1, 2)),
        ],
        axis=1,
    )
