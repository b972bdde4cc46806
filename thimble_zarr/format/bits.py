"""Bit patterns and the numbers they stand for.

Arrays are stored as torch held them. NumPy and Zarr have no bfloat16, so its 16 bits are kept as
`uint16` (never a cast); every other dtype is kept as itself. This module is the only place that
knows the difference. It sits at the bottom of the flow: the recorder hands over bits, the reader
turns them into numbers.
"""

import numpy as np

_STORAGE_DTYPES: dict[str, np.dtype] = {
    "bfloat16": np.dtype("uint16"),
    "float16": np.dtype("float16"),
    "float32": np.dtype("float32"),
    "float64": np.dtype("float64"),
}

NATIVE_DTYPES = tuple(_STORAGE_DTYPES)
"""Names of the floating-point dtypes a store can hold, as torch spells them."""

_BFLOAT16_NAN = 0x7FC0

_UNIT_ROUNDOFF = {
    "bfloat16": 2.0**-8,
    "float16": 2.0**-11,
    "float32": 2.0**-24,
    "float64": 2.0**-53,
}

BFLOAT16_RECIPE = "bfloat16 bit patterns; values = (bits.astype('uint32') << 16).view('float32')"
"""How to decode a bfloat16 array without this package; stored beside every such array."""


def storage_dtype(native: str) -> np.dtype:
    """Return the dtype that holds `native` on disk: `uint16` for bfloat16, itself otherwise."""
    return _STORAGE_DTYPES[native]


def fill_value(native: str) -> int | float:
    """Return what stands for *missing* on disk: NaN, or the bit pattern of a bfloat16 NaN."""
    return _BFLOAT16_NAN if native == "bfloat16" else float("nan")


def unit_roundoff(native: str) -> float:
    """Return half the spacing of `native` numbers at 1: the relative error of one rounding."""
    return _UNIT_ROUNDOFF[native]


def decode(stored: np.ndarray, native: str, dtype: type[np.floating] = np.float32) -> np.ndarray:
    """Turn stored bits into numbers.

    Parameters
    ----------
    stored
        Array of `storage_dtype(native)`, any shape.
    native
        The dtype torch held.
    dtype
        The floating dtype to return. Exact for bfloat16, float16 and float32; float64 values are
        rounded when float32 is asked for.

    Returns
    -------
    numpy.ndarray
        Same shape, dtype `dtype`; a new array unless `stored` already has that dtype.
    """
    if native == "bfloat16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(dtype, copy=False)
