"""torch's replay of recorded steps: any step of some elements again, with other inputs if need be.

torch is imported when it takes the first step.
"""

import contextlib
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from thimble_zarr.bits import fill_value, unit_roundoff
from thimble_zarr.causes.recorded_rows import RecordedRows
from thimble_zarr.errors import SelectionError
from thimble_zarr.format.schema import Schema
from thimble_zarr.optim.base import COUNT
from thimble_zarr.optim.formula import Precision

if TYPE_CHECKING:
    from thimble_zarr.optim.lanes import Piece
    from thimble_zarr.optim.replay import Program


def recurrences(schema: Schema) -> tuple[str, ...]:
    """Return the variables that a step changes: all that are recorded but the gradient."""
    return tuple(name for name in schema.dtypes if name != "grad")


class Replay:
    """torch's program of a run, ready to take any step of some of its elements again.

    `positions` are those of the elements in the flattened parameter, in the shape of the rows.
    """

    def __init__(self, source: RecordedRows, positions: np.ndarray) -> None:
        self._source, self._positions = source, positions.ravel()

    @cached_property
    def _program(self) -> "tuple[Program, list[Piece]]":
        from thimble_zarr.optim.lanes import Lanes
        from thimble_zarr.optim.replay import Program

        source, schema = self._source, self._source.reader.schema
        lanes = Lanes.of(
            schema.optimizer.implementation,
            n_elements=schema.n_elements,
            n_threads=schema.n_threads,
        )
        program = Program(
            schema.optimizer,
            schema.dtypes,
            replay_device(source),
            are_copies=schema.is_imported,
        )
        return program, lanes.split(self._positions)

    def step(
        self, row: int, inputs: Mapping[str, np.ndarray], scalars: dict[str, float] | None = None
    ) -> dict[str, np.ndarray]:
        """Take the step to a row, with other hyper-parameters (or count) where some are given.

        From the stored bits of `grad` and of the states of the row before it makes those of the
        states after the step: the same where the optimizer skipped it, missing where the row
        follows none, or no optimizer can take the step.
        """
        source, other = self._source, scalars or {}
        states = {name: bits for name, bits in inputs.items() if name != "grad"}
        if source.skipped[row] and COUNT not in other:
            return states
        recorded = {name: float(values[row]) for name, values in source.recorded.items()}
        with contextlib.suppress(ArithmeticError):  # beta of 1, or a step 0
            if source.follows[row]:
                program, pieces = self._program
                return program.step(inputs, pieces, recorded | other)
        dtypes = source.reader.schema.dtypes
        return {name: np.full_like(bits, fill_value(dtypes[name])) for name, bits in states.items()}

    def swapped(self, row: int, inputs: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """Return the weights before the step to a row as the optimizer itself may have moved them.

        None if it never does (`Optimizer.swapped`).
        """
        program, pieces = self._program
        scalars = {name: float(values[row]) for name, values in self._source.recorded.items()}
        return program.swapped(inputs, pieces, scalars)


def replay_device(source: RecordedRows) -> str:
    """Return where the optimizer is replayed; raise SelectionError if that is not there."""

    def there(device: str) -> bool:
        kind = device.partition(":")[0]
        if kind not in ("cuda", "mps"):
            return kind == "cpu"
        import torch

        return (kind == "cuda" and torch.cuda.is_available()) or (
            kind == "mps" and torch.backends.mps.is_available()
        )

    recorded_on = source.reader.schema.device
    if source.device is None:
        return recorded_on if there(recorded_on) else "cpu"
    if not there(source.device):
        raise SelectionError(f"torch finds no device {source.device} here; replay on the CPU")
    return source.device


def bounds(
    schema: Schema,
    before: Mapping[str, np.ndarray],
    grad: np.ndarray,
    scalars: Mapping[str, np.ndarray],
    *,
    ours: float = 0.0,
) -> dict[str, np.ndarray]:
    """Return how far two programs of a run's optimizer can end apart (`Formula.bounds`).

    Without a formula the bound is 0. `ours` is the relative error of what is compared, besides
    torch's own.
    """
    formula = schema.optimizer.formula
    if formula is None:
        return {name: np.zeros_like(values) for name, values in before.items()}
    coarsest = max(schema.dtypes.values(), key=unit_roundoff)
    precision = Precision.of(coarsest, scalars="float32", ours=ours)
    return formula.bounds(before, grad, scalars, precision)
