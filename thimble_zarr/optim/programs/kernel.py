"""What a program is made of: its arithmetic for one element, and the numbers of a step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from thimble_zarr.optim.programs.arithmetic import arithmetic_of

Numbers = Mapping[str, Any]
"""Numbers to compute with, by name: arrays, or those of one step."""


@dataclass(frozen=True)
class Rounder:
    """How scalars of a step become numbers of the arithmetic: arrays of shape `(step,)`."""

    native: str

    def plain(self, scalars: np.ndarray) -> np.ndarray:
        """Return them in the dtype that is computed in."""
        with np.errstate(over="ignore"):
            numbers: np.ndarray = np.asarray(scalars).astype(arithmetic_of(self.native).dtype)
        return numbers

    def narrow(self, scalars: np.ndarray) -> np.ndarray:
        """Return them rounded to the dtype of the arrays: in 16 bits by way of float32."""
        with np.errstate(over="ignore"):
            numbers: np.ndarray = arithmetic_of(self.native).rounded(self.plain(scalars))
        return numbers


@dataclass(frozen=True)
class Kernel:
    """The arithmetic of a program.

    Attributes
    ----------
    name
        Of the program, with its version. Whatever it computes otherwise needs another version.
    ways
        From an optimizer and the scalars of steps, which branches of the code each takes, bool.
    coefficients
        From an optimizer and the scalars of steps, the numbers that are the same for all elements
        of an array.
    compute
        From arithmetic, optimizer, numbers before (with the gradient), coefficients and names of
        branches, the numbers after: rounded to the dtype of the arrays.
    """

    name: str
    ways: Callable[[Any, Mapping[str, np.ndarray]], dict[str, np.ndarray]]
    coefficients: Callable[[Any, Mapping[str, np.ndarray], Rounder], dict[str, np.ndarray]]
    compute: Callable[[Any, Any, Numbers, Numbers, frozenset[str]], dict[str, Any]]
