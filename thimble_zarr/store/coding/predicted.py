"""Coding `predicted`: a block as its first row, its gradients, and what no program predicts.

A row is predicted from the row before it by a portable program (`optim.programs`), where the
optimizer took one step between them; else it is predicted to be as the row before. What is stored
of it is the recorded bits XOR the predicted ones: the *residual*, normally nothing but zeros. So
whatever a run was, no bit is lost, and a program that computes something else than it did when the
block was written gives other values, which their checksums tell.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from thimble_zarr.bits import patterns
from thimble_zarr.format.schema import Schema
from thimble_zarr.optim.base import COUNT
from thimble_zarr.optim.programs.kernel import StepNumbers, differences
from thimble_zarr.optim.programs.program import PortableProgram
from thimble_zarr.optim.programs.registry import program_named
from thimble_zarr.store.coding.shard_codec import CHUNK_ORDER, values_checksum

Bits = Mapping[str, np.ndarray]
"""Stored bits by variable, the shape `(step, token, dim)` if nothing else is said."""


@dataclass(frozen=True)
class Prediction:
    """Predicts the rows of a block.

    Attributes
    ----------
    program
        What predicts a row that is one step after the row before; None if nothing does.
    numbers
        What it computes with in each row, besides arrays; None likewise.
    n_rows
        How many rows there are.
    """

    program: PortableProgram | None
    numbers: StepNumbers | None
    n_rows: int

    @classmethod
    def of(cls, schema: Schema, scalars: Mapping[str, np.ndarray], steps: np.ndarray) -> Self:
        """Return what predicts rows, given their per-step values.

        Raises UnsupportedFormatError if this release does not know the program.
        """
        name, optimizer = schema.coding.program, schema.optimizer
        program = None if name is None else program_named(name, optimizer, schema.dtypes)
        derived = (of.name for of in optimizer.DERIVED)
        numbers = {name: scalars[name] for name in (*optimizer.scalars, *derived, COUNT)}
        counts = scalars[COUNT]
        one = (np.diff(counts, prepend=np.nan) == 1) & (np.diff(steps, prepend=steps[:1]) == 1)
        known = np.isfinite([*numbers.values()]).all(axis=0)
        of_steps = None if program is None else program.numbers(numbers, one & known)
        return cls(program, of_steps, len(steps))

    def at(self, rows: slice) -> "Prediction":
        """Return what predicts some of the rows, the first of which is a block's."""
        numbers = None if self.numbers is None else self.numbers[rows]
        return replace(self, numbers=numbers, n_rows=rows.stop - rows.start)

    def residuals(self, rows: Bits, grads: np.ndarray | None) -> dict[str, np.ndarray]:
        """Return the residual of each row, the first one's zero: unsigned integers.

        Variables that have none but zeros are left out.
        """
        left = {name: np.empty_like(bits) for name, bits in rows.items()}
        before, after, rest = (
            {name: bits[steps] for name, bits in of.items()}
            for of, steps in ((rows, slice(-1)), (rows, slice(1, None)), (left, slice(1, None)))
        )
        if self.program is not None and self.numbers is not None and grads is not None:
            found = self.program.differs(before, grads[1:], self.numbers[1:], after, left=rest)
        else:
            found = differences(before, after, rest)
        residuals = {name: patterns(left[name]) for name in rows if found[name].any()}
        for of in residuals.values():
            of[0] = 0
        return residuals

    def restore(self, rows: Bits, grads: np.ndarray | None, residuals: Bits) -> None:
        """Compute, in place, all rows from the first.

        Parameters
        ----------
        rows
            The rows of each variable, of which the first is known.
        grads
            The gradients, None where they are not recorded.
        residuals
            Those of each row, of the variables that have any that is not zero.
        """
        before, after, left = (
            {name: bits[steps] for name, bits in of.items()}
            for of, steps in (
                (rows, slice(-1)),
                (rows, slice(1, None)),
                (residuals, slice(1, None)),
            )
        )
        if self.program is not None and self.numbers is not None and grads is not None:
            self.program.predict(before, grads[1:], self.numbers[1:], out=after, left=left)
            return
        for name, bits in after.items():
            bits[...] = rows[name][:1]
            if name in left:
                patterns(bits)[...] ^= np.bitwise_xor.accumulate(left[name], axis=0)

    def takes(self, steps: slice, program: PortableProgram, numbers: StepNumbers) -> np.ndarray:
        """Return which of some rows it predicts as a program does with some numbers, bool."""
        if self.program != program or self.numbers is None:
            return np.zeros(len(numbers.taken), bool)
        ours = self.numbers[steps]
        same: np.ndarray = (ours.table == numbers.table).all(axis=1)
        same &= (ours.ways == numbers.ways) & ours.taken & numbers.taken
        return same


def derive(schema: Schema, numbers: Mapping[str, np.ndarray]) -> None:
    """Note what torch derives from the scalars of rows, `(step,)`, where that is missing.

    What was noted before stays: another machine may have computed it.
    """
    names = [name for name in schema.numbers if name not in schema.scalars]
    missing = np.any([np.isnan(numbers[name]) for name in names], axis=0) if names else []
    for row in np.flatnonzero(missing).tolist():
        scalars = {name: float(numbers[name][row]) for name in schema.scalars}
        for name, value in schema.optimizer.derived(scalars).items():
            numbers[name][row] = value


def decoded_checksum(
    bits: np.ndarray,
    shape: tuple[int, int, int],
    fill: float,
    memory: dict[np.dtype, np.ndarray] | None = None,
) -> int:
    """Return the checksum of the values of a chunk, as it would be stored plain.

    `bits` are those that there are, `(step, token, dim)`; the shape is `(token, step, dim)`.
    `memory` keeps what it is put in, for the next of that dtype: fresh memory is slow.
    """
    memory, dtype = {} if memory is None else memory, bits.dtype.newbyteorder("<")
    chunk = memory.get(dtype)
    if chunk is None or chunk.shape != shape:
        chunk = memory[dtype] = np.empty(shape, dtype)
    chunk[: bits.shape[1], : len(bits)] = bits.transpose(CHUNK_ORDER)
    chunk[bits.shape[1] :] = fill
    chunk[:, len(bits) :] = fill
    return values_checksum(chunk)
