"""Rows of a block in memory, as a reader has those of a store, for what looks for causes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from thimble_zarr.format.indexing import Indices
from thimble_zarr.format.reader import History
from thimble_zarr.format.schema import Schema


@dataclass(frozen=True)
class HeldRows:
    """The row before a block, if there is one, and the block's rows behind it.

    Attributes
    ----------
    schema
        The parameter's.
    ids
        Which row of the whole parameter each token is; None where they are all.
    steps, scalars
        The step of each row, and its per-step scalars, missing where they are not known.
    missing
        Rows of which only the gradient is recorded, as a `History` has them.
    before, bits
        Stored bits by variable: of the row before, `(token, dim)`; and of the block, `(step, token,
        dim)`, which may have more rows than there are.
    """

    schema: Schema
    ids: np.ndarray | None
    steps: np.ndarray
    scalars: Mapping[str, np.ndarray]
    missing: Sequence[tuple[int, int]]
    before: Mapping[str, np.ndarray]
    bits: Mapping[str, np.ndarray]

    @property
    def n_rows(self) -> int:
        """Rows there are."""
        return len(self.steps)

    @property
    def n_before(self) -> int:
        """How many of them lie before the block."""
        return int(bool(self.before))

    def read(
        self,
        name: str,
        rows: tuple[int, int],
        tokens: Indices | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return stored bits of a variable as `Reader.read` does."""
        some = slice(None) if tokens is None else tokens
        return np.stack([self._row(name, row)[some] for row in range(*rows)], out=out)

    def _row(self, name: str, row: int) -> np.ndarray:
        bits = self.bits[name]
        if row >= self.n_before:
            of_block: np.ndarray = bits[row - self.n_before]
            return of_block
        return self.before[name]

    def read_scalars(self) -> dict[str, np.ndarray]:
        """Return every per-step scalar of each row."""
        return dict(self.scalars)

    def read_steps(self) -> np.ndarray:
        """Return the step of each row."""
        return self.steps

    def read_history(self) -> History:
        """Return which rows are missing."""
        return History(missing=self.missing)

    def read_token_ids(self) -> np.ndarray:
        """Return which row of the whole parameter each token is."""
        return np.arange(self.schema.n_tokens) if self.ids is None else self.ids
