"""torch's replay of recorded steps: any step of some elements again, with other inputs if need be.

torch is imported when it takes the first step.
"""

import contextlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from thimble_zarr.bits import fill_value, unit_roundoff
from thimble_zarr.causes.recorded_rows import RecordedRows
from thimble_zarr.errors import SelectionError
from thimble_zarr.format.schema import Schema
from thimble_zarr.optim.base import COUNT
from thimble_zarr.optim.formula import Precision
from thimble_zarr.optim.whole import Elements, Whole

if TYPE_CHECKING:
    from thimble_zarr.optim.lanes import Piece
    from thimble_zarr.optim.replay import Program


def recurrences(schema: Schema) -> tuple[str, ...]:
    """Return the variables that a step changes: all that are recorded but the gradient."""
    return tuple(name for name in schema.dtypes if name != "grad")


def replayed_names(schema: Schema, positions: np.ndarray) -> tuple[str, ...]:
    """Return those of the recurrences that can be taken again of some elements of a parameter.

    All of them, unless a step needs the whole parameter and these are a part of it.
    """
    names = recurrences(schema)
    if (
        schema.optimizer.ELEMENTWISE
        or _n_distinct(positions) == positions.size == schema.n_elements
    ):
        return names
    return tuple(name for name in names if name in schema.optimizer.elementwise(schema.dtypes))


def _n_distinct(positions: np.ndarray) -> int:
    return len(np.unique(positions))


def why_in_part(schema: Schema, positions: np.ndarray) -> str:
    """Return why not all can be taken again of some elements of a parameter; empty if it can."""
    if replayed_names(schema, positions) == recurrences(schema):
        return ""
    how = "selected: select all of it (--tokens all, or beside a part: --tokens dead,all)"
    if schema.whole_tokens not in (None, schema.n_tokens):
        how = "recorded: record all of it (without tokens=)"
    return (
        f"a step of {schema.optimizer.name} needs the whole parameter, and only "
        f"{_n_distinct(positions):,} of {schema.n_elements:,} elements are {how}"
    )


class Replay:
    """torch's program of a run, ready to take any step of some of its elements again.

    `positions` are those of the elements in the flattened parameter, in the shape of the rows. It
    takes the steps of `names` (`replayed_names`).
    """

    def __init__(self, source: RecordedRows, positions: np.ndarray) -> None:
        self._source, self._positions = source, positions.ravel()
        self.names = replayed_names(source.reader.schema, positions)

    @cached_property
    def _program(self) -> "tuple[Program, list[Piece]]":
        from thimble_zarr.optim.lanes import Lanes, Piece
        from thimble_zarr.optim.replay import Program

        schema, device = self._source.reader.schema, replay_device(self._source)
        optimizer, dtypes = schema.optimizer, schema.dtypes
        is_whole = not optimizer.ELEMENTWISE and self.names == recurrences(schema)
        how: dict[str, Any] = {"are_copies": schema.is_imported}
        if is_whole:
            how |= {"shape": schema.shape, "n_threads": schema.n_threads}
            return Program(optimizer, dtypes, device, **how), [Piece.of_whole(self._positions)]
        if not optimizer.ELEMENTWISE:
            optimizer = Elements(
                name=optimizer.name,
                implementation=optimizer.implementation,
                whole=optimizer,
                names=self.names,
            )
        lanes = Lanes.of(
            optimizer.implementation, n_elements=schema.n_elements, n_threads=schema.n_threads
        )
        return Program(optimizer, dtypes, device, **how), lanes.split(self._positions)

    def step(
        self, row: int, inputs: Mapping[str, np.ndarray], scalars: dict[str, float] | None = None
    ) -> dict[str, np.ndarray]:
        """Take the step to a row, with other hyper-parameters (or count) where some are given.

        From the stored bits of `grad` and of the states of the row before it makes those of the
        states after the step: the same where the optimizer skipped it, missing where the row
        follows none, or no optimizer can take the step.
        """
        source, other = self._source, scalars or {}
        states = {name: inputs[name] for name in self.names}
        if source.skipped[row] and COUNT not in other:
            return states
        recorded = {name: float(values[row]) for name, values in source.recorded.items()}
        with contextlib.suppress(ArithmeticError):  # beta of 1, or a step 0
            if source.follows[row]:
                program, pieces = self._program
                after = program.step(inputs, pieces, recorded | other)
                return {name: after[name] for name in self.names}
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

    Without a formula the bound is 0, or infinite where none is known. `ours` is the relative error
    of what is compared, besides torch's own.
    """
    optimizer, formula = schema.optimizer, schema.optimizer.formula
    known = formula or (optimizer if isinstance(optimizer, Whole) else None)
    if known is None:
        return {name: np.zeros_like(values) for name, values in before.items()}
    coarsest = max(schema.dtypes.values(), key=unit_roundoff)
    precision = Precision.of(coarsest, scalars="float32", ours=ours)
    unknown = {name: np.full_like(before[name], np.inf) for name in without_bound(schema, before)}
    return known.bounds(before, grad, scalars, precision) | unknown


def without_bound(schema: Schema, names: Iterable[str]) -> tuple[str, ...]:
    """Return the variables for which no bound is known that keeps two programs together."""
    optimizer = schema.optimizer
    if not isinstance(optimizer, Whole):
        return ()
    return tuple(name for name in names if name not in optimizer.elementwise(schema.dtypes))
