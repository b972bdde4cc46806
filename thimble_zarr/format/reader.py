"""What the analysis asks of a recording, wherever it lies: a store of ours or another's file."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from thimble_zarr.format.indexing import Indices
from thimble_zarr.format.schema import Schema, TokenLabels
from thimble_zarr.store.shard import Checksums


@dataclass(frozen=True)
class AlteredChunk:
    """A chunk whose values are not those that were committed.

    Attributes
    ----------
    variable
        Whose chunk it is.
    file
        The file it lies in, as a path in the store.
    n_chunks
        Chunks of that file.
    recorded_as
        The file that was recorded with the contents that this one has now, None if none was.
    first_row
        Where it begins; 0 of labels.
    chunk, tokens
        Which chunk it is of the rows there, and the tokens in it; None of scalars.
    committed
        The checksums it had, if it is of a `(step, token, dim)` array.
    """

    variable: str
    file: str
    n_chunks: int
    recorded_as: str | None
    first_row: int
    chunk: int | None
    tokens: Indices | None
    committed: Checksums | None


class Rows(Protocol):
    """The rows of a recorded run while one thread reads them."""

    def read(
        self,
        name: str,
        rows: tuple[int, int],
        tokens: Indices,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return stored bits as `Reader.read` does."""

    def will_read(self, names: Sequence[str], rows: tuple[int, int], tokens: Indices) -> None:
        """Say that `read` will be asked for these, so that the disk may begin.

        At most an index is read for it. What is wrong with a file is told when that is read.
        """


class Reader(Protocol):
    """The rows of a recorded run. Small to pickle, safe to share by threads."""

    @property
    def path(self) -> Path:
        """Where the recording lies."""

    @property
    def schema(self) -> Schema:
        """What was recorded, and by what."""

    @property
    def n_rows(self) -> int:
        """Rows that can be read: the initial state and each step, as far as they are recorded."""

    def read(
        self,
        name: str,
        rows: tuple[int, int],
        tokens: Indices | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return stored bits of a variable, of a range of rows and of tokens in any order.

        The dtype is `storage_dtype(schema.dtypes[name])`, the shape `(step, token, dim)`; the array
        is the caller's. It may be `out`, an array of that shape and dtype.
        """

    def opened(self) -> AbstractContextManager[Rows]:
        """Return the same rows for one thread, which has files kept open while it reads a few."""

    def read_scalars(self) -> dict[str, np.ndarray]:
        """Return every per-step scalar: float64, shape `(n_rows,)`, NaN where missing."""

    def read_steps(self) -> np.ndarray:
        """Return the step of each row, ascending: int64, shape `(n_rows,)`."""

    def read_token_ids(self) -> np.ndarray:
        """Return which row of the parameter each token is, ascending: int64, shape `(token,)`."""

    def read_labels(self) -> TokenLabels:
        """Return what is known of the tokens."""

    def disk_bytes(self) -> int:
        """Return the size of the recording where it lies."""

    def altered_chunks(
        self, rows: tuple[int, int], *, before_block: Callable[[int], object] | None = None
    ) -> Iterator[AlteredChunk]:
        """Find chunks whose values are not those that were recorded, as far as that is known.

        Before each block `before_block` is called with the row it ends before, and may wait.
        """

    def flipped_bit(self, altered: AlteredChunk) -> tuple[int, int, int, int] | None:
        """Return row, token, dim and bit, if one flipped bit is all that altered a chunk."""
