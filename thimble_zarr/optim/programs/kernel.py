"""What a program is made of: its arithmetic for one element, and the numbers of a step."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np

from thimble_zarr.bits import patterns, storage_dtype
from thimble_zarr.optim.programs.arithmetic import arithmetic_of, narrowed, widened

Bits = Mapping[str, np.ndarray]
"""Stored bits, by variable."""

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
    apart_in
        Native dtypes in which torch gets other bits, if few.
    """

    name: str
    ways: Callable[[Any, Mapping[str, np.ndarray]], dict[str, np.ndarray]]
    coefficients: Callable[[Any, Mapping[str, np.ndarray], Rounder], dict[str, np.ndarray]]
    compute: Callable[[Any, Any, Numbers, Numbers, frozenset[str]], dict[str, Any]]
    apart_in: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepNumbers:
    """What steps compute with besides arrays.

    Attributes
    ----------
    ways
        The branches that each step takes, an array of sets of names.
    names, table
        Numbers of each step, in the dtype that is computed in: their names, and shape
        `(step, name)`, without gaps.
    taken
        Which steps are taken, bool.
    """

    ways: np.ndarray
    names: tuple[str, ...]
    table: np.ndarray
    taken: np.ndarray

    def __getitem__(self, steps: slice | np.ndarray) -> "StepNumbers":
        return replace(
            self, ways=self.ways[steps], table=self.table[steps], taken=self.taken[steps]
        )

    def alike(self) -> Iterator[slice]:
        """Yield consecutive steps that are taken by the same branches, or are not taken."""
        kinds = [(ways, bool(of)) for ways, of in zip(self.ways, self.taken, strict=True)]
        first = 0
        for _, group in itertools.groupby(kinds):
            last = first + len([*group])
            yield slice(first, last)
            first = last


class Engine(Protocol):
    """What runs a kernel.

    Arrays have the shape `(step, group, element)`, where elements have no gaps between them: of a
    whole row, which is one group, or of a token.
    """

    @property
    def piece_elements(self) -> int:
        """How many elements are best taken at once."""

    def run(
        self,
        before: Bits,
        grads: np.ndarray,
        after: Bits,
        numbers: StepNumbers,
        left: Bits | None = None,
    ) -> None:
        """Take steps, each from its own row, all by the same branches, one after the other.

        Of variables in `left` each row then gets the bits that are set there the other way round.
        """

    def differs(
        self,
        before: Bits,
        grads: np.ndarray,
        after: Bits,
        numbers: StepNumbers,
        left: Bits | None = None,
    ) -> dict[str, np.ndarray]:
        """Return for each variable at which steps a bit is not that of the row after it.

        `left` gets the bits that differ, if it is given.
        """


@dataclass(frozen=True)
class NumpyEngine:
    """Runs a kernel with NumPy."""

    piece_elements: ClassVar[int] = 2**13

    kernel: Kernel
    optimizer: Any
    native: str

    def run(
        self,
        before: Bits,
        grads: np.ndarray,
        after: Bits,
        numbers: StepNumbers,
        left: Bits | None = None,
    ) -> None:
        """Take steps, each from its own row, all by the same branches, one after the other."""
        arithmetic = arithmetic_of(self.native)
        with np.errstate(all="ignore"):
            for index, grad in enumerate(grads):
                x = {name: widened(rows[index], self.native) for name, rows in before.items()}
                x["grad"] = widened(grad, self.native)
                c = dict(zip(numbers.names, numbers.table[index], strict=True))
                found = self.kernel.compute(arithmetic, self.optimizer, x, c, numbers.ways[index])
                for name, values in found.items():
                    narrowed(values, self.native, after[name][index])
                for name, bits in (left or {}).items():
                    patterns(after[name][index])[...] ^= patterns(bits[index])

    def differs(
        self,
        before: Bits,
        grads: np.ndarray,
        after: Bits,
        numbers: StepNumbers,
        left: Bits | None = None,
    ) -> dict[str, np.ndarray]:
        """Return for each variable at which steps a bit is not that of the row after it."""
        dtype = storage_dtype(self.native)
        found = {name: np.empty(grads.shape, dtype) for name in before} if left is None else left
        self.run(before, grads, found, numbers)
        return differences(found, after, found)


def differences(a: Bits, b: Bits, left: Bits) -> dict[str, np.ndarray]:
    """Return for each variable in which rows `a` and `b` differ, and put the bits in `left`."""
    found = dict[str, np.ndarray]()
    for name, bits in a.items():
        bits_left = patterns(left[name])
        np.bitwise_xor(patterns(bits), patterns(b[name]), out=bits_left)
        found[name] = np.any(bits_left, axis=(1, 2))
    return found
