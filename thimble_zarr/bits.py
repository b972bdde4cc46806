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

_LEAST_EXPONENT = {"bfloat16": -126, "float16": -14, "float32": -126, "float64": -1022}

_LARGEST = {"bfloat16": 2.0**128 - 2.0**120} | {
    native: float(np.finfo(native).max) for native in ("float16", "float32", "float64")
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


def least_positive(native: str) -> float:
    """Return the least positive number of `native`, a subnormal one."""
    return float(np.ldexp(2 * unit_roundoff(native), _LEAST_EXPONENT[native]))


def largest(native: str) -> float:
    """Return the largest finite number of `native`."""
    return _LARGEST[native]


def decode(
    stored: np.ndarray,
    native: str,
    dtype: type[np.floating] = np.float32,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Turn stored bits, of what torch held as `native`, into numbers of a floating dtype.

    That is exact for bfloat16, float16 and float32; float64 is rounded when float32 is asked for.
    The numbers go to `out` if it is given, an array of their shape and dtype; else to a new array,
    unless `stored` has that dtype already.
    """
    if out is None and native != "bfloat16":
        return stored.astype(dtype, copy=False)
    if out is None:
        out = np.empty(stored.shape, dtype)
    if native != "bfloat16":
        out[...] = stored
    elif out.dtype == np.float32:
        wide = out.view(np.uint32)
        wide[...] = stored  # a shift that casts goes through buffers
        wide <<= 16
    else:
        out[...] = np.left_shift(stored, 16, dtype=np.uint32).view(np.float32)
    return out


def encode(values: np.ndarray, native: str) -> np.ndarray:
    """Round floating-point numbers to `native`, ties to even, and return its stored bits.

    What is too large becomes infinite; NaN stays NaN.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if native != "bfloat16":
            return values.astype(storage_dtype(native))
        narrow = values.astype(np.float32)
        if values.dtype == np.float64:
            # Rounded twice, a number could end on the wrong side. So the first time it is cut off,
            # and its last bit says that something was.
            inexact = narrow != values
            narrow = np.where(np.abs(narrow) > np.abs(values), np.nextafter(narrow, 0), narrow)
            bits = narrow.view(np.uint32) | inexact
        else:
            bits = narrow.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(_BFLOAT16_NAN), rounded)


def patterns(stored: np.ndarray) -> np.ndarray:
    """Return stored bits as unsigned integers, a view: equal where every bit is, also the sign."""
    return stored.view(f"u{stored.dtype.itemsize}")


def same_bits(stored: np.ndarray, other: np.ndarray) -> bool:
    """Return whether every bit of two arrays of one shape and dtype is the same."""
    flat = [np.ascontiguousarray(array).reshape(-1) for array in (stored, other)]
    if flat[0].nbytes % 8 == 0:  # as many at once as there are
        flat = [array.view(np.uint64) for array in flat]
    return bool((patterns(flat[0]) == patterns(flat[1])).all())


def ordered(stored: np.ndarray) -> np.ndarray:
    """Return the place of each number among all of its dtype, counted from zero: int64.

    Neighbouring numbers differ by 1, so that a difference counts the steps between two numbers on
    the lattice of the dtype: their distance in ULP. Both zeros are 0. Infinity comes after the
    largest number, and NaN beyond infinity.
    """
    width = 8 * stored.dtype.itemsize
    bits = stored.view(f"i{stored.dtype.itemsize}").astype(np.int64)
    magnitude = bits & (2 ** (width - 1) - 1)
    numbers: np.ndarray = np.where(bits < 0, -magnitude, magnitude)
    return numbers


def is_nan(stored: np.ndarray) -> np.ndarray:
    """Return where stored numbers are NaN: bool, same shape. `uint16` is bfloat16."""
    nan: np.ndarray = (stored & 0x7FFF) > 0x7F80 if stored.dtype == np.uint16 else np.isnan(stored)
    return nan


def all_finite(stored: np.ndarray) -> bool:
    """Return whether no stored number is infinite or NaN. `uint16` is bfloat16."""
    if stored.dtype != np.uint16:
        return bool(np.isfinite(stored).all())
    # Of either sign they are the largest patterns.
    return bool(stored.view(np.int16).max() < 0x7F80 and stored.max() < 0xFF80)


def difference_dtype(native: str) -> np.dtype:
    """Return the integers that hold all differences of the places of a dtype's numbers.

    Of float64 there are none: int64 holds those between numbers of one sign, and between any two
    that are less than 2 in size.
    """
    return np.dtype(np.int32 if storage_dtype(native).itemsize == 2 else np.int64)


def ulp_distance(stored: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return how many steps on the lattice of their dtype lie between numbers: float64.

    It is 0 between the two zeros and between NaNs, and infinite between a number and NaN.
    """
    left, right = ordered(stored), ordered(other)
    # Across zero the difference of 64-bit numbers does not fit.
    across = np.abs(left).astype(np.float64) + np.abs(right)
    distance = np.where((left < 0) == (right < 0), np.abs(left - right), across)
    left_nan, right_nan = is_nan(stored), is_nan(other)
    return np.where(left_nan | right_nan, np.where(left_nan & right_nan, 0.0, np.inf), distance)


def spacing(stored: np.ndarray, native: str, of: str | None = None) -> np.ndarray:
    """Return the distance from each number to the next of its dtype, away from zero: one ULP.

    The distances are float64, and NaN where the number is not finite. `of` is another dtype: then
    it is the distance between those of its numbers between which each number lies, and NaN where it
    is larger than all of them.
    """
    if of not in (None, native):
        wide = decode(stored, native, np.float64)
        return np.where(np.abs(wide) > _LARGEST[of], np.nan, _spaced(wide, "float64", of))
    return _spaced(stored, native, native)


def _spaced(stored: np.ndarray, native: str, of: str) -> np.ndarray:
    mantissa_bits = -int(np.log2(2 * unit_roundoff(native)))
    n_exponents = 2 ** (8 * stored.dtype.itemsize - 1 - mantissa_bits)
    # The numbers of an exponent are evenly spaced, subnormal ones as the least normal ones.
    exponents = np.maximum(np.arange(n_exponents), 1) - 1 + _LEAST_EXPONENT[native]
    spacings = np.ldexp(2 * unit_roundoff(of), np.maximum(exponents, _LEAST_EXPONENT[of]))
    spacings[-1] = np.nan
    bits = stored.view(f"u{stored.dtype.itemsize}")
    spaced: np.ndarray = spacings[(bits >> mantissa_bits) & (n_exponents - 1)]
    return spaced
