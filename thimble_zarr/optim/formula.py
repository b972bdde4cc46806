"""What a step should do, in real numbers, and how far rounding can carry it from that."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from thimble_zarr.bits import largest, least_positive, unit_roundoff

Arrays = Mapping[str, np.ndarray]
"""Variables of a parameter, by name."""

Scalars = Mapping[str, Any]
"""Numbers of steps, by name, with the count of steps: of shape `(step, 1, 1)`, or plain."""


W_BEFORE = "W_before"
"""Among what a formula is computed from: the weight before the step."""


@dataclass(frozen=True)
class Precision:
    """How precise arithmetic is.

    Attributes
    ----------
    unit_roundoff
        Relative error of one rounding.
    scalar_roundoff
        Relative error of a scalar that is computed beforehand.
    least
        The least positive number, by which a rounding errs where numbers underflow.
    largest
        The largest number; a rounding makes infinity of what is larger.
    """

    unit_roundoff: float
    scalar_roundoff: float
    least: float
    largest: float

    @classmethod
    def of(cls, native: str, *, scalars: str, ours: float = 0.0) -> Self:
        """Return that of torch's arithmetic in dtype `native`, with scalars computed in another.

        `ours` is the relative error of what it is compared with.
        """
        return cls(
            unit_roundoff(native) + ours,
            4 * unit_roundoff(scalars),
            least_positive(native),
            largest(native),
        )

    def gamma(self, n: int) -> float:
        """Return the relative error of n roundings (Higham, lemma 3.1)."""
        return n * self.unit_roundoff / (1 - n * self.unit_roundoff)


@dataclass(frozen=True)
class Rounding:
    """How far rounding can carry a step from the formula; each broadcasts to the weights.

    Attributes
    ----------
    update, after, before
        By so much of the formula's update, of the weight after and of that before the step.
    least
        And by this.
    """

    update: Any
    after: Any
    before: Any
    least: Any

    def bound(
        self,
        update: np.ndarray,
        W: np.ndarray,
        W_previous: np.ndarray,
        out: tuple[np.ndarray, np.ndarray] | tuple[None, None] = (None, None),
    ) -> np.ndarray:
        """Return how far rounding alone can carry a step from the formula: safe, not tight.

        It is computed in the arrays `out`, if they are given, and is in the first, which may be
        `update`, the formula's.
        """
        into, term_in = out
        bound: np.ndarray = np.abs(update, out=into)
        bound *= like(update, self.update)
        term: Any = np.abs(W, out=term_in)
        term *= like(W, self.after)
        bound += term
        if np.any(self.before):
            term = np.abs(W_previous, out=term_in)
            term *= like(W, self.before)
            bound += term
        bound += like(W, self.least)
        return bound


@dataclass(frozen=True)
class Consumed:
    """The gradient that explains what a step did to a variable.

    Attributes
    ----------
    gradient
        As the optimizer was given it, float64.
    variable
        What it was computed from.
    per_error
        By how much it is wrong, for each unit by which the variable is.
    """

    gradient: np.ndarray
    variable: str
    per_error: np.ndarray


class Formula(ABC):
    """What a step does, in real numbers. All functions broadcast."""

    @property
    @abstractmethod
    def update_inputs(self) -> tuple[str, ...]:
        """The variables after the step that `update` is computed from, or `W_BEFORE`."""

    @property
    def scalar_dtype(self) -> str:
        """The dtype that torch computes scalars in."""
        return "float64"

    @property
    def cancels(self) -> bool:
        """Whether terms of the update may cancel, so that it is less precise than they are."""
        return False

    @abstractmethod
    def coefficients(self, scalars: Scalars) -> Sequence[Any]:
        """Return what `update` multiplies and adds, from the scalars of a step."""

    @abstractmethod
    def update(
        self, arrays: Arrays, coefficients: Sequence[Any], out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the change of the weights, without what weight decay does to them directly.

        `arrays` are the `update_inputs`, and it is as precise as they are. It is computed in `out`,
        if that is given; this may be the first of the arrays.
        """

    @abstractmethod
    def decay_factor(self, scalars: Scalars) -> Any:
        """Return what weight decay multiplies `W` before the step with to change it; 0 for none."""

    @abstractmethod
    def rounding(
        self, scalars: Scalars, precision: Precision, arrays: Arrays | None = None
    ) -> Rounding | None:
        """Return how far rounding can carry a step from the formula.

        None where that depends on the elements: then `arrays`, the `update_inputs`, are needed.
        """

    @abstractmethod
    def advance(self, before: Arrays, grad: np.ndarray, scalars: Scalars) -> dict[str, np.ndarray]:
        """Return the states (not `W`) after a step, from those before and the gradient."""

    @abstractmethod
    def bounds(
        self, before: Arrays, grad: np.ndarray, scalars: Scalars, precision: Precision
    ) -> dict[str, np.ndarray]:
        """Return how far two programs, given the same row and gradient, can end apart.

        `before` has `W` and the states, float64; what is returned has the largest distance of each.
        """

    @abstractmethod
    def consumed(self, before: Arrays, after: Arrays, scalars: Scalars) -> Consumed:
        """Return the gradient that led from one row to the next, up to rounding."""


def like(array: np.ndarray, scalar: Any) -> Any:
    """Return a scalar of a step in the array's precision, in which the arithmetic then is."""
    return scalar.astype(array.dtype, copy=False) if hasattr(scalar, "astype") else scalar


def coupled(
    grad: np.ndarray, W: np.ndarray, *, decay: Any, maximize: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradient with weight decay added, and a bound on the sizes of both together."""
    return (-grad if maximize else grad) + decay * W, abs(grad) + decay * abs(W)
