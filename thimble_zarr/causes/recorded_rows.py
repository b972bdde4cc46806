"""Recorded rows, and what they say of the steps between them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from thimble_zarr.format.reader import RowReader
from thimble_zarr.optim.base import COUNT


@dataclass(frozen=True)
class RecordedRows:
    """Rows of a run, by their positions, wherever they are: in a store or still in memory.

    `device` is where the optimizer is replayed, as torch names it; where it was recorded, if None,
    or on the CPU where there is no such device.
    """

    reader: RowReader
    device: str | None = None

    @cached_property
    def recorded(self) -> dict[str, np.ndarray]:
        """Per-step scalars as recorded, float64, shape `(n_rows,)`."""
        return self.reader.read_scalars()

    @cached_property
    def steps(self) -> np.ndarray:
        """The step of each row, int64, shape `(n_rows,)`: the row itself where all are recorded."""
        return self.reader.read_steps()

    @cached_property
    def follows(self) -> np.ndarray:
        """Whether the row before is that of the step before, bool, shape `(n_rows,)`.

        It is not at the first row, and where a schedule left out the steps before. Nor does a row
        follow that is missing, or the one after it.
        """
        follows: np.ndarray = np.diff(self.steps, prepend=-2) == 1
        for first, stop in self.missing:
            follows[first : stop + 1] = False
        return follows

    @cached_property
    def missing(self) -> Sequence[tuple[int, int]]:
        """Rows of which only the gradient is recorded, each as `(first, stop)`."""
        return self.reader.read_history().missing

    @cached_property
    def token_ids(self) -> np.ndarray:
        """Which row of the whole parameter each recorded one is, int64, shape `(token,)`."""
        return self.reader.read_token_ids()

    @cached_property
    def skipped(self) -> np.ndarray:
        """Rows whose step the optimizer skipped: its count did not move, nothing was updated.

        Of a row that follows none this is not known.
        """
        counts = self.recorded[COUNT]
        skipped: np.ndarray = (np.diff(counts, prepend=-1.0) == 0) & self.follows
        return skipped
