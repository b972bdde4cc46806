"""Quantiles over the tokens of a group."""

import numpy as np

from thimble_zarr.analysis.summary.contents import QUANTILES


def quantiles(values: np.ndarray) -> np.ndarray:
    """Return `QUANTILES` of each row, without its NaN: float64, shape `(step, quantile)`.

    They are interpolated as `np.nanquantile` does, and NaN where a row has nothing else.
    """
    ordered = np.sort(values, axis=1)  # NaN last
    n_known = np.full(len(ordered), ordered.shape[1])
    if np.isnan(ordered[:, -1]).any():
        n_known -= np.isnan(ordered).sum(axis=1)
    places = np.maximum(n_known - 1, 0)[:, np.newaxis] * np.array(QUANTILES)
    below = np.floor(places).astype(np.intp)
    above = np.ceil(places).astype(np.intp)
    low = np.take_along_axis(ordered, below, axis=1).astype(np.float64)
    high = np.take_along_axis(ordered, above, axis=1).astype(np.float64)
    share = places - below
    found: np.ndarray = np.where(low == high, low, low + (high - low) * share)
    return found
