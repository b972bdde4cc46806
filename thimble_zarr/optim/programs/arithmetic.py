"""Correctly rounded arithmetic on arrays, of which programs are made.

Only operations that IEEE 754 defines to the last bit are used: sum, product, quotient, square root,
multiply-add and rounding between formats. All of them are the same on every machine. What a program
keeps in 16 bits it computes in float32, as torch does, and rounds where torch rounds.

NaN has many bit patterns, and which one an operation gives is up to the processor. So what a
program returns has one of them (`NAN`), that of torch on x86.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from thimble_zarr.bits import decode, is_nan

NAN: dict[str, np.unsignedinteger] = {
    "bfloat16": np.uint16(0xFFFF),
    "float16": np.uint16(0xFE00),
    "float32": np.uint32(0xFFC00000),
    "float64": np.uint64(0xFFF8000000000000),
}
"""The bits of a NaN that a program returns."""


def _maximum(a: Any, b: Any) -> Any:
    """Return the larger one: of zeros the second, which NumPy leaves to the processor."""
    return np.where((a > b) | np.isnan(a), a, b)


@dataclass(frozen=True)
class Arithmetic:
    """The operations of a program whose arrays are of one dtype.

    Programs are written with these and with `+ - * /` and unary minus, on numbers of `dtype`.

    Attributes
    ----------
    dtype
        Of what is computed: float32 for 16 bits.
    rounded
        Rounds to the dtype of the arrays, ties to even.
    fma
        Product of the first two, plus the third, rounded once.
    sqrt, maximum
        Square root; the larger one, or NaN if one is.
    select
        The second where the first is true, else the third.
    is_nan, greater
        Whether a number is NaN; whether the first is greater than the second.
    abs
        Size of a number.
    """

    dtype: type[np.floating]
    rounded: Callable[[Any], Any]
    fma: Callable[[Any, Any, Any], Any]
    sqrt: Callable[[Any], Any] = np.sqrt
    maximum: Callable[[Any, Any], Any] = _maximum
    select: Callable[[Any, Any, Any], Any] = np.where
    is_nan: Callable[[Any], Any] = np.isnan
    greater: Callable[[Any, Any], Any] = np.greater
    abs: Callable[[Any], Any] = np.abs


def arithmetic_of(native: str) -> Arithmetic:
    """Return the operations on arrays of a dtype."""
    if native == "bfloat16":
        return Arithmetic(np.float32, _to_bfloat16, fma32)
    if native == "float16":
        return Arithmetic(np.float32, _to_float16, fma32)
    if native == "float32":
        return Arithmetic(np.float32, _as_it_is, fma32)
    return Arithmetic(np.float64, _as_it_is, fma64)


def widened(stored: np.ndarray, native: str) -> np.ndarray:
    """Return stored bits as numbers to compute with: float32 for 16 bits."""
    return decode(stored, native, np.float64 if native == "float64" else np.float32)


def narrowed(values: np.ndarray, native: str, out: np.ndarray) -> None:
    """Write numbers that are rounded already to `out`, as stored bits."""
    if native == "bfloat16":
        out[...] = values.view(np.uint32) >> 16
    else:
        out[...] = values
    nan = is_nan(out)
    if nan.any():
        out.view(NAN[native].dtype)[nan] = NAN[native]


def _as_it_is(values: Any) -> Any:
    return values


def _to_float16(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float32)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    # Of a NaN the lower half is 0 here: those of the inputs come from 16 bits, and those that
    # operations make are so on every processor. So no carry turns it into a number.
    bits = values.view(np.uint32)
    even = bits >> 16
    even &= 1
    even += 0x7FFF
    even += bits
    even &= 0xFFFF0000
    return even.view(np.float32)


def fma32(a: Any, b: Any, c: Any) -> np.ndarray:
    """Return a * b + c of float32, rounded once.

    In float64 the product is exact, as 24 and 24 bits are fewer than 53. Then the sum is rounded,
    and rounded again to float32: that is wrong only where the first rounding ended halfway between
    two numbers of float32 and was not exact. Such sums are rounded to odd first (Boldo and
    Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to
    odd", 2008), after which a second rounding does no harm. Below the normal numbers halfway is
    elsewhere, and there all are treated so.
    """
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    result: np.ndarray = total.astype(np.float32)
    halfway = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    # Zero becomes the largest one.
    least = (result.view(np.uint32) & 0x7FFFFFFF) - np.uint32(1) < 0x00800000
    halfway |= least
    if halfway.any():
        terms = (np.broadcast_to(term, total.shape)[halfway] for term in (product, c))
        result[halfway] = _odd_sum(*terms).astype(np.float32)
    return result


def _odd_sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a sum of float64 rounded to odd: if it is not exact, its last bit is 1."""
    total = a + b.astype(np.float64)
    error = _error_of_sum(a, b, total)
    bits = total.view(np.int64)
    towards = np.where((error > 0) == (total > 0), 1, -1)
    inexact_even = (error != 0) & (bits & 1 == 0)  # NaN is not different from anything here
    odd: np.ndarray = np.where(inexact_even & np.isfinite(error), bits + towards, bits)
    return odd.view(np.float64)


def _error_of_sum(a: Any, b: Any, total: Any) -> Any:
    """Return what a rounded sum lacks, exactly (Knuth)."""
    of_b = total - a
    of_a = total - of_b
    return (a - of_a) + (b - of_b)


def fma64(a: Any, b: Any, c: Any) -> np.ndarray:
    """Return a * b + c of float64, rounded once.

    The product is divided into two numbers (Dekker), which are exact unless something overflows or
    underflows, and the sum of the three is rounded by way of odd (see `fma32`). Where something
    might, numbers are computed as fractions, one at a time.
    """
    product = np.asarray(a * b)
    naive: np.ndarray = product + c
    a_high, b_high = _high_half(a), _high_half(b)
    a_low, b_low = a - a_high, b - b_high
    rest = a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)
    low = c + rest
    low_error = _error_of_sum(rest, c, low)
    high = product + low
    high_error = _error_of_sum(product, low, high)
    result: np.ndarray = high + _odd_sum(np.asarray(low_error), high_error)
    result = np.where(result == 0, naive, result)  # which has the sign of zero
    size = np.abs(product)
    exact = (size > 2.0**-900) & (size < 2.0**900) & (np.abs(c) < 2.0**900)
    exact &= (np.abs(a) < 2.0**900) & (np.abs(b) < 2.0**900)
    unsure = np.flatnonzero(~exact)
    if len(unsure):
        flat = [np.broadcast_to(of, result.shape).ravel() for of in (a, b, c)]
        result.reshape(-1)[unsure] = _one_at_a_time(*(of[unsure] for of in flat))
    return result


def _high_half(values: Any) -> Any:
    """Return the upper 26 bits of numbers of float64 (Veltkamp)."""
    scaled = values * 134217729.0
    return scaled - (scaled - values)


def _one_at_a_time(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    result: np.ndarray = a * b + c  # right where a factor is 0, or one is not finite
    result = np.where(np.isinf(c) & np.isfinite(a) & np.isfinite(b), c, result)
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c) & (a != 0) & (b != 0)
    for index in np.flatnonzero(finite).tolist():
        exact = Fraction(float(a[index])) * Fraction(float(b[index])) + Fraction(float(c[index]))
        if exact == 0:
            continue
        try:
            result[index] = float(exact)
        except OverflowError:
            result[index] = np.inf if exact > 0 else -np.inf
    return result
