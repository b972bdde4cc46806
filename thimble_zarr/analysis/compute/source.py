"""A recording as formulas see it, and a selection of it.

Rows, tokens and dims are positions here and in everything that computes. Steps and ids are labels,
which become positions when something is selected, and are put on again where results are shown.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Self

import numpy as np

from thimble_zarr.causes.recorded_rows import RecordedRows
from thimble_zarr.format.indexing import Indices
from thimble_zarr.format.reader import Reader, not_begun
from thimble_zarr.format.schema import TokenLabels
from thimble_zarr.optim.base import COUNT
from thimble_zarr.optim.programs.kernel import StepNumbers
from thimble_zarr.optim.programs.program import PortableProgram
from thimble_zarr.optim.programs.registry import program_of

PORTABLE, TORCH = "portable", "torch"
"""What takes the steps of a replay: a portable program first, or torch alone."""


@dataclass(frozen=True)
class Source(RecordedRows):
    """A recording as formulas see it: variables by name, rows by step.

    `replay` is what takes the steps: `PORTABLE` or `TORCH`.
    """

    reader: Reader
    replay: str = PORTABLE

    @classmethod
    def of(cls, reader: Reader, device: str | None = None, replay: str = PORTABLE) -> Self:
        """Return a recording that has begun; raise StoreError if no row was committed yet."""
        if reader.n_rows == 0:
            raise not_begun(reader)
        return cls(reader, device, replay)

    @cached_property
    def program(self) -> PortableProgram | None:
        """The portable program that takes the steps, with torch where it differs from the record.

        None where torch takes all of them: because that was asked for, because there is no such
        program, or because it would be slower or is known to differ.
        """
        schema = self.reader.schema
        on_cpu = self.device in (None, "cpu") and schema.device in ("cpu", "unknown")
        # Without vector instructions torch fuses nothing.
        if self.replay != PORTABLE or not on_cpu or schema.cpu_capability == "DEFAULT":
            return None
        program = program_of(schema.optimizer, schema.dtypes)
        return program if program is not None and program.replaces_torch else None

    @cached_property
    def numbers(self) -> dict[str, np.ndarray]:
        """What a program takes: scalars as recorded, and those that follow, `(n_rows,)`."""
        optimizer, names = self.reader.schema.optimizer, [*self.recorded]
        rows = zip(*(values.tolist() for values in self.recorded.values()), strict=True)
        derived = [optimizer.derived(dict(zip(names, row, strict=True))) for row in rows]
        columns = {of.name: np.array([row[of.name] for row in derived]) for of in optimizer.DERIVED}
        return columns | self.recorded

    @cached_property
    def step_numbers(self) -> StepNumbers | None:
        """What `program` computes with in each row besides arrays; None where there is none."""
        if self.program is None:
            return None
        return self.program.numbers(self.numbers, self.follows & ~self.skipped)

    @cached_property
    def scalars(self) -> dict[str, np.ndarray]:
        """Per-step scalars as the formula takes them, float64, shape `(n_rows,)`.

        The learning rate is 0 where the step was skipped. A count of 0 after a skipped first step
        is 1, for which the formula is defined.
        """
        count, rate = self.recorded[COUNT], self.reader.schema.optimizer.RATE
        return self.recorded | {
            rate: np.where(self.skipped, 0.0, self.recorded[rate]),
            COUNT: np.where(self.skipped, np.maximum(count, 1), count),
        }

    @cached_property
    def labels(self) -> TokenLabels:
        """What is known of the tokens."""
        return self.reader.read_labels()

    def __dask_tokenize__(self) -> tuple[object, ...]:
        """Return what is the same only for the same rows of the same store."""
        schema = self.reader.schema
        return str(self.reader.path), schema.parameter, schema.created, self.reader.n_rows

    def __reduce__(self) -> "tuple[Callable[[bytes], Source], tuple[bytes]]":
        """Pickle without the scalars: whoever unpickles it reads them."""
        return _unpickled, (pickle.dumps((self.reader, self.device, self.replay)),)


@lru_cache(maxsize=1)
def _unpickled(content: bytes) -> Source:
    """Return one source for all tasks that a process is sent, so that it reads the scalars once."""
    return Source(*pickle.loads(content))


@dataclass(frozen=True)
class Selected:
    """A selection of a recording, of whatever rank its parameter is, as that of a matrix.

    It has positions along each axis, in the order they were asked for. Rows may be beyond those
    that are recorded.
    """

    source: Source
    rows: Indices
    tokens: Indices
    dims: Indices

    @property
    def steps(self) -> np.ndarray:
        """The step of each row, int64, shape `(step,)`."""
        steps: np.ndarray = self.source.steps[np.asarray(self.rows, np.int64)]
        return steps

    @property
    def ids(self) -> np.ndarray:
        """Which row of the whole parameter each token is, int64, shape `(token,)`."""
        ids: np.ndarray = self.source.token_ids[np.asarray(self.tokens, np.int64)]
        return ids

    @property
    def positions(self) -> np.ndarray:
        """Index of each element in the whole parameter, flattened: int64, `(token, dim)`."""
        n_dims = self.source.reader.schema.n_dims
        positions: np.ndarray = self.ids[:, np.newaxis] * n_dims + np.asarray(self.dims)
        return positions

    def on_device(self, device: str | None) -> "Selected":
        """Return the same, with replays on `device`."""
        if device == self.source.device:
            return self  # whose source has read the scalars
        return replace(self, source=replace(self.source, device=device))
