"""Programs that take an optimizer's steps, one or many, from stored bits to stored bits.

`PortableProgram` runs a kernel on some elements at a time, so that what it computes stays in the
cache.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from thimble_zarr.bits import patterns, storage_dtype
from thimble_zarr.optim.base import COUNT, Optimizer
from thimble_zarr.optim.programs.arithmetic import arithmetic_of
from thimble_zarr.optim.programs.compiled import CompiledEngine, is_available
from thimble_zarr.optim.programs.environment import ieee_arithmetic
from thimble_zarr.optim.programs.kernel import (
    Bits,
    Engine,
    Kernel,
    NumpyEngine,
    Rounder,
    StepNumbers,
    differences,
)

Taken = dict[str, np.ndarray]


@dataclass(frozen=True)
class PortableProgram:
    """Takes the steps of an optimizer whose arrays are of one dtype, the same on any machine.

    Bits are stored ones: uint16 for bfloat16, arrays of floats else. Arrays may be of any shape;
    each element's step depends on that element alone.

    Attributes
    ----------
    kernel, optimizer, native
        The arithmetic, whose flags it depends on, and the dtype of the arrays, as torch names it.
    compiled
        Whether machine code runs it, where that can be made. The bits are the same.
    """

    kernel: Kernel
    optimizer: Optimizer
    native: str
    compiled: bool = True

    @property
    def name(self) -> str:
        """Name and version, such as `adam-single/1`: what a store keeps."""
        return self.kernel.name

    @cached_property
    def variables(self) -> tuple[str, ...]:
        """What a step changes: `W` and every state."""
        return tuple(name for name in self.optimizer.variables if name != "grad")

    def step(self, before: Bits, grad: np.ndarray, scalars: Mapping[str, float]) -> Taken:
        """Return `W` and every state after a step.

        `scalars` are the recorded numbers of the step, with `COUNT`, the optimizer's count of steps
        after it, and with the `DERIVED` numbers if they were recorded; else those are computed.
        """
        of_steps = {name: np.array([value]) for name, value in scalars.items()}
        after = self.steps(before, grad[np.newaxis], of_steps)
        return {name: bits[0] for name, bits in after.items()}

    def steps(
        self,
        before: Bits,
        grads: np.ndarray,
        scalars: Mapping[str, np.ndarray] | StepNumbers,
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
            The numbers of each step, `(step,)`; or all that follows from them and `taken`.
        taken
            Which steps the optimizer took, bool; where it did not, nothing changes. All if None.
        out
            Arrays for the results, with steps first; new ones if None.
        """
        rows = {name: before[name][np.newaxis] for name in self.variables}
        return self._run(rows, grads, scalars, taken, out, None, own_rows=False)

    def predict(
        self,
        before: Bits,
        grads: np.ndarray,
        scalars: Mapping[str, np.ndarray] | StepNumbers,
        *,
        taken: np.ndarray | None = None,
        out: Bits | None = None,
        left: Bits | None = None,
    ) -> Taken:
        """Return the same as `steps`, but of steps that each begin from a row of their own.

        `before` has these rows, with steps first. A row of `out` may be the next of them. Bits that
        are set in `left`, which may have some of the variables, are those that a row has otherwise
        than predicted.
        """
        rows = {name: before[name] for name in self.variables}
        return self._run(rows, grads, scalars, taken, out, left, own_rows=True)

    @ieee_arithmetic()
    def differs(
        self,
        before: Bits,
        grads: np.ndarray,
        scalars: Mapping[str, np.ndarray] | StepNumbers,
        after: Bits,
        *,
        taken: np.ndarray | None = None,
        left: Bits | None = None,
    ) -> dict[str, np.ndarray]:
        """Return for each variable at which steps `predict` has another bit than the row after.

        `left` gets the bits that differ, if it is given: arrays like `after`, without gaps.
        """
        numbers = self._numbers_of(scalars, len(grads), taken)
        given = (before, after) if left is None else (before, after, left)
        grads, arrays = self._grouped(grads, *given)
        found = {name: np.zeros(len(grads), bool) for name in self.variables}
        for piece in self._pieces(grads):
            for steps in numbers.alike():
                held, others, *of_left = (
                    {name: bits[steps, *piece] for name, bits in of.items()} for of in arrays
                )
                if numbers.taken[steps.start]:
                    differs = self.engine.differs(
                        held, grads[steps, *piece], others, numbers[steps], *of_left
                    )
                else:
                    fresh = {name: np.empty_like(bits) for name, bits in held.items()}
                    differs = differences(held, others, *of_left or [fresh])
                for name, of_steps in differs.items():
                    found[name][steps] |= of_steps
        return found

    @property
    def replaces_torch(self) -> bool:
        """Whether it gives the bits of torch, and sooner than torch does, as machine code."""
        gives_bits = self.native not in self.kernel.apart_in
        return gives_bits and isinstance(self.engine, CompiledEngine)

    @cached_property
    def engine(self) -> Engine:
        """What runs the kernel."""
        chosen = CompiledEngine if self.compiled and is_available() else NumpyEngine
        return chosen(self.kernel, self.optimizer, self.native)

    @ieee_arithmetic()
    def _run(
        self,
        before: Bits,
        grads: np.ndarray,
        scalars: Mapping[str, np.ndarray] | StepNumbers,
        taken: np.ndarray | None,
        out: Bits | None,
        left: Bits | None,
        *,
        own_rows: bool,
    ) -> Taken:
        """Take steps, each from its own row, or all from the one that there is."""
        numbers = self._numbers_of(scalars, len(grads), taken)
        after = dict(out or {})
        for name in self.variables:
            if name not in after:
                after[name] = np.empty(grads.shape, storage_dtype(self.native))
        grads, (rows, into, others) = self._grouped(grads, before, after, left or {})
        for piece in self._pieces(grads):
            for steps in numbers.alike():
                for some in [steps] if own_rows else _first_and_rest(steps):
                    at = some if own_rows else slice(max(some.start - 1, 0), max(some.stop - 1, 1))
                    of = rows if own_rows or some.start == 0 else into
                    held = {name: of[name][at, *piece] for name in self.variables}
                    found = {name: into[name][some, *piece] for name in self.variables}
                    turned = {name: bits[some, *piece] for name, bits in others.items()}
                    self._take(held, grads[some, *piece], found, numbers[some], turned)
        for name, of_steps in into.items():
            if not np.may_share_memory(of_steps, after[name]):
                after[name][...] = of_steps.reshape(after[name].shape)
        return after

    def _grouped(self, grads: np.ndarray, *rows: Bits) -> tuple[np.ndarray, list[Taken]]:
        """Return arrays of the shape `(step, group, element)`: views, where they can be."""
        names = [[name for name in self.variables if name in of] for of in rows]
        given = (of[name] for of, some in zip(rows, names, strict=True) for name in some)
        grads, *arrays = _grouped([grads, *given])
        grouped = iter(arrays)
        return grads, [{name: next(grouped) for name in some} for some in names]

    def _pieces(self, grads: np.ndarray) -> Iterator[tuple[slice, slice]]:
        """Yield which groups, and which of their elements, are best taken at once."""
        (n_groups, n_elements), most = grads.shape[1:], self.engine.piece_elements
        yield from itertools.product(
            _cut(n_groups, max(1, most // max(1, n_elements))), _cut(n_elements, most)
        )

    def _take(
        self, before: Bits, grads: np.ndarray, after: Bits, numbers: StepNumbers, left: Bits
    ) -> None:
        """Take steps that are alike."""
        if numbers.taken[0]:
            self.engine.run(before, grads, after, numbers, left)
            return
        for name, bits in before.items():
            for index, (row, into) in enumerate(zip(bits, after[name], strict=True)):
                into[...] = row  # which may be the next one before
                if name in left:
                    patterns(into)[...] ^= patterns(left[name][index])

    def _numbers_of(
        self,
        scalars: Mapping[str, np.ndarray] | StepNumbers,
        n_steps: int,
        taken: np.ndarray | None,
    ) -> StepNumbers:
        if isinstance(scalars, StepNumbers):
            return scalars
        return self.numbers(scalars, np.ones(n_steps, bool) if taken is None else taken)

    @ieee_arithmetic()
    def numbers(self, scalars: Mapping[str, np.ndarray], taken: np.ndarray) -> StepNumbers:
        """Return what `steps`, `predict` and `differs` compute with besides arrays.

        Given scalars, they call this themselves. For many arrays of the same steps call it once.
        """
        known = {name: np.asarray(values, np.float64) for name, values in scalars.items()}
        if missing := [of.name for of in self.optimizer.DERIVED if of.name not in known]:
            names = (*self.optimizer.scalars, COUNT)
            rows = zip(*(known[name].tolist() for name in names), strict=True)
            derived = [self.optimizer.derived(dict(zip(names, row, strict=True))) for row in rows]
            known |= {name: np.array([of[name] for of in derived]) for name in missing}
        ways = self.kernel.ways(self.optimizer, known)
        names_of = np.empty(len(taken), object)
        names_of[:] = [
            frozenset(name for name, takes in ways.items() if takes[index])
            for index in range(len(taken))
        ]
        coefficients = self.kernel.coefficients(self.optimizer, known, Rounder(self.native))
        table = np.empty((len(taken), len(coefficients)), arithmetic_of(self.native).dtype)
        for index, values in enumerate(coefficients.values()):
            table[:, index] = values
        return StepNumbers(names_of, (*coefficients,), table, taken)


def _grouped(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return arrays of one shape but for steps as `(step, group, element)`: views if they can be.

    Elements have no gaps: of a whole row, or, where one array has its tokens first, of a token.
    """
    if all(array[:1].flags.c_contiguous for array in arrays):
        return [array.reshape(len(array), 1, math.prod(array.shape[1:])) for array in arrays]
    found = []
    for array in arrays:
        without_gaps = array if array[:1, :1].flags.c_contiguous else np.ascontiguousarray(array)
        n_elements = math.prod(array.shape[2:])
        found.append(without_gaps.reshape(*array.shape[:2], n_elements))
    return found


def _cut(length: int, most: int) -> list[slice]:
    return [slice(first, min(first + most, length)) for first in range(0, length, most)]


def _first_and_rest(steps: slice) -> list[slice]:
    """Return the first of steps alone, as only its row before is not among those that are made."""
    first = slice(steps.start, steps.start + 1)
    rest = slice(steps.start + 1, steps.stop)
    return [first, rest] if rest.start < rest.stop else [first]
