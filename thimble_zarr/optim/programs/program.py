"""Programs that take an optimizer's steps, one or many, from stored bits to stored bits.

`KernelProgram` runs a kernel with NumPy, some elements at a time, so that what it computes stays in
the cache.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from thimble_zarr.optim.base import COUNT, Optimizer
from thimble_zarr.optim.programs.arithmetic import arithmetic_of, narrowed, stored, widened
from thimble_zarr.optim.programs.kernel import Kernel, Rounder

Bits = Mapping[str, np.ndarray]
"""Stored bits, by variable."""

Taken = dict[str, np.ndarray]

_PIECE_ELEMENTS = 2**13


class Program(Protocol):
    """A step of an optimizer, the same on any machine.

    Bits are stored ones: uint16 for bfloat16, arrays of floats else. Arrays may be of any shape;
    each element's step depends on that element alone.
    """

    @property
    def name(self) -> str:
        """Name and version, such as `adam-single/1`: what a store keeps."""

    @property
    def variables(self) -> tuple[str, ...]:
        """What a step changes: `W` and every state."""

    def step(self, before: Bits, grad: np.ndarray, scalars: Mapping[str, float]) -> Taken:
        """Return `W` and every state after a step.

        `scalars` are the recorded numbers of the step, with `COUNT`, the optimizer's count of steps
        after it, and with the `DERIVED` numbers if they were recorded; else those are computed.
        """

    def steps(
        self,
        before: Bits,
        grads: np.ndarray,
        scalars: Mapping[str, np.ndarray],
        *,
        taken: np.ndarray | None = None,
        out: Bits | None = None,
    ) -> Taken:
        """Return `W` and every state after each of consecutive steps.

        Parameters
        ----------
        before
            The row before the first of the steps, of any shape.
        grads
            The gradient of each step: of that shape, with steps first.
        scalars
            The numbers of each step, `(step,)`.
        taken
            Which steps the optimizer took, bool; where it did not, nothing changes. All if None.
        out
            Arrays for the results, with steps first; new ones if None.
        """

    def predict(
        self,
        before: Bits,
        grads: np.ndarray,
        scalars: Mapping[str, np.ndarray],
        *,
        taken: np.ndarray | None = None,
        out: Bits | None = None,
    ) -> Taken:
        """Return the same as `steps`, but of steps that each begin from a row of their own.

        `before` has these rows, with steps first.
        """


@dataclass(frozen=True)
class KernelProgram:
    """A kernel for an optimizer whose arrays are of one dtype."""

    kernel: Kernel
    optimizer: Optimizer
    native: str

    @property
    def name(self) -> str:
        """Name and version."""
        return self.kernel.name

    @cached_property
    def variables(self) -> tuple[str, ...]:
        """What a step changes: `W` and every state."""
        return tuple(name for name in self.optimizer.variables if name != "grad")

    def step(self, before: Bits, grad: np.ndarray, scalars: Mapping[str, float]) -> Taken:
        """Return `W` and every state after a step."""
        of_steps = {name: np.array([value]) for name, value in scalars.items()}
        after = self.steps(before, grad[np.newaxis], of_steps)
        return {name: bits[0] for name, bits in after.items()}

    def steps(
        self,
        before: Bits,
        grads: np.ndarray,
        scalars: Mapping[str, np.ndarray],
        *,
        taken: np.ndarray | None = None,
        out: Bits | None = None,
    ) -> Taken:
        """Return `W` and every state after each of consecutive steps."""
        rows = {name: before[name][np.newaxis] for name in self.variables}
        return self._run(rows, grads, scalars, taken, out)

    def predict(
        self,
        before: Bits,
        grads: np.ndarray,
        scalars: Mapping[str, np.ndarray],
        *,
        taken: np.ndarray | None = None,
        out: Bits | None = None,
    ) -> Taken:
        """Return the same as `steps`, of steps that each begin from a row of their own."""
        rows = {name: before[name] for name in self.variables}
        return self._run(rows, grads, scalars, taken, out)

    def _run(
        self,
        before: Bits,
        grads: np.ndarray,
        scalars: Mapping[str, np.ndarray],
        taken: np.ndarray | None,
        out: Bits | None,
    ) -> Taken:
        """Take steps, each from its own row, or all from the one that there is."""
        numbers = self._numbers(scalars, len(grads), taken)
        after = dict(out or {})
        for name in self.variables:
            after.setdefault(name, np.empty(grads.shape, stored(self.native)))
        into = {name: _rows(after[name]) for name in self.variables}
        rows_before = {name: _rows(bits) for name, bits in before.items()}
        self._compute(rows_before, _rows(grads), into, numbers)
        for name, rows in into.items():
            if not np.may_share_memory(rows, after[name]):
                after[name][...] = rows.reshape(after[name].shape)
        return after

    def _numbers(
        self, scalars: Mapping[str, np.ndarray], n_steps: int, taken: np.ndarray | None
    ) -> "StepNumbers":
        """Return what the steps compute with besides arrays."""
        known = {name: np.asarray(values, np.float64) for name, values in scalars.items()}
        if missing := [of.name for of in self.optimizer.DERIVED if of.name not in known]:
            names = (*self.optimizer.scalars, COUNT)
            rows = zip(*(known[name].tolist() for name in names), strict=True)
            derived = [self.optimizer.derived(dict(zip(names, row, strict=True))) for row in rows]
            known |= {name: np.array([of[name] for of in derived]) for name in missing}
        ways = self.kernel.ways(self.optimizer, known)
        names_of = [
            frozenset(name for name, takes in ways.items() if takes[index])
            for index in range(n_steps)
        ]
        coefficients = self.kernel.coefficients(self.optimizer, known, Rounder(self.native))
        return StepNumbers(
            names_of, coefficients, np.ones(n_steps, bool) if taken is None else taken
        )

    def _compute(self, before: Bits, grads: np.ndarray, into: Bits, numbers: "StepNumbers") -> None:
        """Take steps of arrays that have an axis of steps and one of elements."""
        own_row = len(before["W"]) == len(grads)
        with np.errstate(all="ignore"):
            for piece in _pieces(grads.shape[1]):
                for index in range(len(grads)):
                    of = before if own_row or index == 0 else into
                    row = index if own_row else max(index - 1, 0)
                    held = {name: of[name][row, piece] for name in self.variables}
                    after = {name: into[name][index, piece] for name in self.variables}
                    if numbers.taken[index]:
                        self._step(held, grads[index, piece], numbers.of(index), after)
                    else:
                        for name, bits in held.items():
                            after[name][...] = bits

    def _step(
        self,
        before: Bits,
        grad: np.ndarray,
        numbers: tuple[frozenset[str], Mapping[str, np.floating]],
        into: Bits,
    ) -> None:
        """Take one step of some elements."""
        x = {name: widened(bits, self.native) for name, bits in before.items()}
        x["grad"] = widened(grad, self.native)
        ways, coefficients = numbers
        arithmetic = arithmetic_of(self.native)
        after = self.kernel.compute(arithmetic, self.optimizer, x, coefficients, ways)
        for name, values in after.items():
            narrowed(values, self.native, into[name])


@dataclass(frozen=True)
class StepNumbers:
    """What steps compute with besides arrays.

    Attributes
    ----------
    ways
        The branches that each step takes.
    coefficients
        Numbers of each step, `(step,)`, in the dtype that is computed in.
    taken
        Which steps are taken, bool.
    """

    ways: list[frozenset[str]]
    coefficients: dict[str, np.ndarray]
    taken: np.ndarray

    def of(self, index: int) -> tuple[frozenset[str], dict[str, np.floating]]:
        """Return branches and coefficients of a step."""
        return self.ways[index], {name: of[index] for name, of in self.coefficients.items()}


def _rows(array: np.ndarray) -> np.ndarray:
    """Return an array with an axis of steps and one of elements: a view, if there is one."""
    return array.reshape(len(array), -1)


def _pieces(n_elements: int) -> Iterator[slice]:
    ends = [*range(0, n_elements, _PIECE_ELEMENTS), n_elements]
    return itertools.starmap(slice, itertools.pairwise(ends))
