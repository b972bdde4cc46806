"""Running error analysis: numbers that carry how far rounding may have moved them.

Wilkinson's method (Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, section
3.3): the arithmetic of a program is done once in float64, and with each operation goes a bound on
its error, from those of its operands and the rounding of its own. So a bound is derived from the
very code of a program, for these numbers, also where terms cancel or underflow.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from thimble_zarr.optim.formula import Precision
from thimble_zarr.optim.programs.arithmetic import Arithmetic

_ROOT_ROUNDINGS = 2
"""torch leaves square roots to MKL, whose error is below one ULP: that of two roundings."""


@dataclass(frozen=True, eq=False)
class Inexact:
    """Numbers of which another computation may have others.

    Attributes
    ----------
    value
        The numbers, float64.
    error
        How far apart the others may be, at most.
    unit
        Relative error of a rounding.
    least
        Error of one that underflows.
    largest
        Of a number that may be larger the error is not known.
    floor
        If 0 or more, none of the others is less: a root is not negative, whatever its error is.
    """

    __array_ufunc__ = None  # so that arrays leave operations with it to it

    value: Any
    error: Any
    unit: float
    least: float = 0.0
    largest: float = np.inf
    floor: Any = -np.inf

    @classmethod
    def exact(cls, values: Any, precision: Precision) -> Self:
        """Return numbers that all computations have, to be computed with in a precision."""
        values = np.asarray(values, np.float64)
        unit, least, largest = precision.unit_roundoff, precision.least, precision.largest
        return cls(values, np.zeros_like(values), unit, least, largest)

    @classmethod
    def like(cls, number: Any, values: np.ndarray) -> "Inexact":
        """Return a number, which may be a plain one, as one of the shape of others."""
        if isinstance(number, Inexact):
            return number
        return cls(number + 0.0 * values, 0.0 * values, 0.0)

    def rounded(self, n: int = 1) -> "Inexact":
        """Return the same after so many roundings, of numbers as large as they may be."""
        error = self.error
        for _ in range(n):
            error = error + self.unit * (abs(self.value) + error) + self.least
        overflows = abs(self.value) + error > self.largest
        floor = self.floor
        if np.any(floor >= 0):  # a rounding makes nothing negative of what is not
            lower = np.maximum(floor * (1 - n * self.unit) - n * self.least, 0.0)
            floor = np.where(floor >= 0, lower, -np.inf)
        return self._with(self.value, np.where(overflows, np.inf, error), floor)

    def __getitem__(self, index: Any) -> "Inexact":
        return self._with(self.value[index], self.error[index])

    @staticmethod
    def joined(parts: "Sequence[Inexact]") -> "Inexact":
        """Return numbers one after the other."""
        shape = np.broadcast_shapes(*(part.value.shape for part in parts))
        values, errors = (
            np.concatenate([np.broadcast_to(of, shape) for of in ofs])
            for ofs in zip(*((part.value, part.error) for part in parts), strict=True)
        )
        return parts[0]._with(values, errors)

    def _with(self, value: Any, error: Any, floor: Any = -np.inf) -> "Inexact":
        error = np.where(np.isnan(error), np.inf, error)
        return replace(self, value=value, error=error, floor=floor)

    @property
    def _least(self) -> Any:
        """What none of the others is less than."""
        return np.maximum(self.value - self.error, self.floor)

    def _other(self, other: Any) -> "Inexact":
        return other if isinstance(other, Inexact) else self._with(other, 0.0)

    def __add__(self, other: Any) -> "Inexact":
        other = self._other(other)
        floor = -np.inf
        if np.any(self.floor >= 0) or np.any(other.floor >= 0):
            floor = self._least + other._least
        return self._with(self.value + other.value, self.error + other.error, floor).rounded()

    def __sub__(self, other: Any) -> "Inexact":
        return self + -self._other(other)

    def __rsub__(self, other: Any) -> "Inexact":
        return self._other(other) - self

    def __mul__(self, other: Any) -> "Inexact":
        other = self._other(other)
        error = abs(self.value) * other.error + (abs(other.value) + other.error) * self.error
        return self._with(self.value * other.value, error).rounded()

    def __truediv__(self, other: Any) -> "Inexact":
        other = self._other(other)
        value = self.value / other.value
        least = np.maximum(np.maximum(abs(other.value) - other.error, other.floor), 0.0)
        error = (self.error + abs(value) * other.error) / least
        floor = np.where((self.floor >= 0) & (other._least > 0), 0.0, -np.inf)
        return self._with(value, error, floor).rounded()

    def __rtruediv__(self, other: Any) -> "Inexact":
        return self._other(other) / self

    def __pow__(self, exponent: Any) -> "Inexact":
        """Return a power, of something positive, or of something exact."""
        exponent = self._other(exponent)
        value = self.value**exponent.value
        least = np.maximum(abs(self.value) - self.error, 0.0)
        ends = [abs(value - end**exponent.value) for end in (least, abs(self.value) + self.error)]
        error = np.where(np.asarray(self.error) == 0, 0.0, np.maximum(*ends))
        return self._with(value, error).rounded()

    def __rpow__(self, base: Any) -> "Inexact":
        """Return a power of an exact number, of at most 1."""
        value = base**self.value
        error = base ** (self.value - self.error) - value
        return self._with(value, error).rounded()

    def __gt__(self, other: Any) -> Any:
        return self.value > self._other(other).value

    __radd__ = __add__
    __rmul__ = __mul__

    def __neg__(self) -> "Inexact":
        return self._with(-self.value, self.error)

    def __abs__(self) -> "Inexact":
        return self._with(abs(self.value), self.error)


@dataclass(frozen=True)
class _Condition:
    """Which of two is taken, and where that is in doubt."""

    holds: Any
    doubtful: Any


def _root(number: Inexact) -> Inexact:
    value = np.sqrt(number.value)
    ends = np.maximum(number.value - number.error, 0.0), number.value + number.error
    error = np.maximum(*(abs(value - np.sqrt(end)) for end in ends))
    return number._with(value, error, np.sqrt(ends[0])).rounded(_ROOT_ROUNDINGS)


def _maximum(a: Inexact, b: Inexact) -> Inexact:
    return a._with(np.maximum(a.value, b.value), np.maximum(a.error, b.error))


def _greater(a: Inexact, b: Inexact) -> _Condition:
    b = a._other(b)
    return _Condition(a.value > b.value, abs(a.value - b.value) <= a.error + b.error)


def _select(condition: _Condition, a: Inexact, b: Inexact) -> Inexact:
    a = b._other(a)
    value = np.where(condition.holds, a.value, b.value)
    chosen = np.where(condition.holds, a.error, b.error)
    either = abs(a.value - b.value) + np.maximum(a.error, b.error)
    return b._with(value, np.where(condition.doubtful, either, chosen))


REAL = Arithmetic(
    np.float64,
    rounded=lambda a: a,
    fma=lambda a, b, c: a * b + c,
    maximum=np.maximum,
)
"""The operations of a program, as good as not rounded."""

RUNNING = Arithmetic(
    np.float64,
    rounded=Inexact.rounded,
    fma=lambda a, b, c: a * b + c,
    sqrt=_root,
    maximum=_maximum,
    select=_select,
    is_nan=lambda a: _Condition(np.isnan(a.value), doubtful=np.False_),
    greater=_greater,
    abs=abs,
)
"""The operations of a program, on `Inexact` numbers; a multiply-add may be rounded twice."""
