"""Sums over tokens, dims and classes, and quantiles over tokens.

Of sums: NumPy's own `sum`, `max` and `count_nonzero` along an axis take three times as long.
"""

import numpy as np

from thimble_zarr.analysis.compute.sums import LEAST_SQUARE
from thimble_zarr.analysis.summary.contents import QUANTILES


def sums_of_groups(of_class: np.ndarray, has_class: np.ndarray) -> np.ndarray:
    """Return sums over the tokens of each group, from those of each class."""
    # Not by a product of matrices: what is NaN in another class is no matter of a group.
    return np.stack([of_class[classes].sum(axis=0) for classes in has_class])


def vector_norm(values: np.ndarray) -> np.ndarray:
    """Return the lengths of vectors along the last axis."""
    norms: np.ndarray = np.sqrt(np.vecdot(values, values))
    return norms


def over_tokens(values: np.ndarray) -> np.ndarray:
    """Return the sums over tokens, of shape `(step, dim)`."""
    sums: np.ndarray = np.matmul(np.ones((1, values.shape[1])), values)[:, 0]
    return sums


def over_dims(values: np.ndarray) -> np.ndarray:
    """Return the sums over dims, of shape `(step, token)`."""
    sums: np.ndarray = np.matmul(values, np.ones(values.shape[2], values.dtype))
    return sums


def largest_of(values: np.ndarray) -> np.ndarray:
    """Return the largest over dims, of shape `(step, token)`."""
    at = values.argmax(axis=-1)[..., np.newaxis]
    found: np.ndarray = np.take_along_axis(values, at, axis=-1)[..., 0]
    return found


def count_of_steps(flags: np.ndarray) -> np.ndarray:
    """Return how many flags of each step are set."""
    return np.array([np.count_nonzero(of_step) for of_step in flags])


def count_of_tokens(flags: np.ndarray) -> np.ndarray:
    """Return how many flags of each token are set."""
    return over_dims(flags.astype(np.float32))


def beyond_float32(sums: np.ndarray, values: np.ndarray) -> bool:
    """Return whether sums over dims of float32 numbers overflowed, or may have underflowed."""
    suspect = ~((sums > LEAST_SQUARE) & (sums < np.inf))
    return bool(suspect.any() and (values[suspect] != 0).any())


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
