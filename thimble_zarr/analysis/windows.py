"""From stored bits to numbers: a selection of a store, cut into pieces that fit the cache.

Everything that is computed from a store goes through here. `iter_windows` walks the chunks that a
selection touches, reads each variable once per chunk when a formula first asks for it, and hands
out windows: a few steps of a few tokens, in float64, with the weights before each step at hand. No
array of the size of a run exists at any time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from thimble_zarr.format.bits import decode
from thimble_zarr.format.layout import split_range
from thimble_zarr.format.reader import Reader

Indices = range | np.ndarray
"""Positions along one axis of a store, in the order they were asked for."""

_WINDOW_ELEMENTS = 2**17
"""Elements a window: 1 MiB of float64, so that a formula's temporaries stay in the cache."""


@dataclass(frozen=True)
class Source:
    """A recording as formulas see it: variables by name, rows by step.

    Attributes
    ----------
    reader
        The recording.
    device
        Where the optimizer is replayed, as torch names it; where it was recorded, if None, or on
        the CPU where there is no such device.
    """

    reader: Reader
    device: str | None = None

    @cached_property
    def recorded(self) -> dict[str, np.ndarray]:
        """Per-step scalars as recorded, float64, shape `(n_rows,)`."""
        return self.reader.read_scalars()

    @cached_property
    def skipped(self) -> np.ndarray:
        """Steps that the optimizer skipped: its count did not move, and nothing was updated."""
        skipped: np.ndarray = np.diff(self.recorded["optimizer_step"], prepend=-1.0) == 0
        return skipped

    @cached_property
    def scalars(self) -> dict[str, np.ndarray]:
        """Per-step scalars as the formula takes them, float64, shape `(n_rows,)`.

        The learning rate is 0 where the step was skipped. A count of 0 after a skipped first step
        is 1, for which the formula is defined.
        """
        count = self.recorded["optimizer_step"]
        return self.recorded | {
            "learning_rate": np.where(self.skipped, 0.0, self.recorded["learning_rate"]),
            "optimizer_step": np.where(self.skipped, np.maximum(count, 1), count),
        }

    @property
    def second_moment(self) -> str:
        """The variable in the denominator."""
        return "max_exp_avg_sq" if self.reader.schema.optimizer.amsgrad else "exp_avg_sq"


class _Piece:
    """The selected tokens of one chunk, over a range of rows; reads a variable when asked."""

    def __init__(
        self, source: Source, rows: tuple[int, int], tokens: tuple[int, int], take: Indices | slice
    ) -> None:
        self.source = source
        self.first_row, self.end_row = rows
        self._tokens = tokens
        self._take = take
        self.tokens = np.arange(*tokens)[take]
        self._bits: dict[str, tuple[int, np.ndarray]] = {}

    def bits(self, name: str, first_row: int) -> tuple[int, np.ndarray]:
        """Return the variable's bits from a row not after `first_row`, and which row that is."""
        if name not in self._bits or self._bits[name][0] > first_row:
            stored = self.source.reader.read(name, (first_row, self.end_row), self._tokens)
            self._bits[name] = first_row, stored[:, self._take]
        return self._bits[name]


class Window:
    """A few rows of a few tokens, as float64 arrays of shape `(step, token, dim)`.

    Attributes
    ----------
    source
        The recording the window is of.
    rows
        Its rows.
    """

    def __init__(self, piece: _Piece, rows: np.ndarray, dims: Indices) -> None:
        self.source = piece.source
        self.rows = rows
        self._piece = piece
        self._dims = dims
        self._current: dict[str, np.ndarray] = {}
        self._previous: dict[str, np.ndarray] = {}

    @property
    def positions(self) -> np.ndarray:
        """Index of each element in the flattened parameter, int64, shape `(token, dim)`."""
        starts = self._piece.tokens[:, np.newaxis] * self.source.reader.schema.n_dims
        positions: np.ndarray = starts + np.asarray(self._dims)
        return positions

    def current(self, name: str) -> np.ndarray:
        """Return a variable at the window's rows; do not write to it."""
        if name not in self._current:
            self._current[name] = self._decode(name, self.bits(name))
        return self._current[name]

    def previous(self, name: str) -> np.ndarray:
        """Return a variable at the rows before, NaN before the initial state; do not write to it.

        Ask for it before `current`, so that both come from one read.
        """
        if name not in self._previous:
            values = self._decode(name, self.bits_before(name))
            first = self.rows == 0
            if first.any():
                values = np.where(first[:, np.newaxis, np.newaxis], np.nan, values)
            self._previous[name] = values
        return self._previous[name]

    def scalar(self, name: str) -> np.ndarray:
        """Return a per-step scalar, shape `(step, 1, 1)`."""
        return self.source.scalars[name][self.rows, np.newaxis, np.newaxis]

    def bits(self, name: str) -> np.ndarray:
        """Return a variable's stored bits at the window's rows; do not write to them."""
        return self._select(name, self.rows, self._piece.first_row)

    def bits_before(self, name: str) -> np.ndarray:
        """Return the stored bits at the rows before, those of row 0 before row 0 too."""
        return self._select(name, np.maximum(self.rows - 1, 0), max(self._piece.first_row - 1, 0))

    def _select(self, name: str, rows: np.ndarray, first_row: int) -> np.ndarray:
        first_row, bits = self._piece.bits(name, first_row)
        selected: np.ndarray = bits[_as_slice(rows - first_row)]
        if isinstance(self._dims, np.ndarray) or self._dims != range(bits.shape[-1]):
            selected = selected[..., np.asarray(self._dims)]
        return selected

    def _decode(self, name: str, bits: np.ndarray) -> np.ndarray:
        return decode(bits, self.source.reader.schema.dtypes[name], np.float64)


def iter_windows(
    source: Source, rows: Indices, tokens: Indices, dims: Indices
) -> Iterator[tuple[tuple[slice, Indices | slice], Window]]:
    """Cut a selection into windows, reading each touched chunk of rows once.

    Parameters
    ----------
    source
        The store.
    rows, tokens, dims
        What is selected, along each axis.

    Yields
    ------
    tuple
        Where the window lies in the selection, along rows and tokens, and the window.
    """
    rows = np.asarray(rows)
    if 0 in (len(rows), len(tokens), len(dims)):
        return
    row_range = int(rows.min()), int(rows.max()) + 1
    for chunk, take, where in iter_chunks(source, tokens):
        piece = _Piece(source, row_range, chunk, take)
        n_tokens = (
            len(range(*where.indices(len(tokens)))) if isinstance(where, slice) else len(where)
        )
        n_rows = max(1, _WINDOW_ELEMENTS // (n_tokens * len(dims)))
        for start, stop in split_range(0, len(rows), n_rows):
            yield (slice(start, stop), where), Window(piece, rows[start:stop], dims)


def iter_chunks(
    source: Source, tokens: Indices
) -> Iterator[tuple[tuple[int, int], Indices | slice, Indices | slice]]:
    """Yield the token range of each touched chunk, what to take of it, and where it goes."""
    schema = source.reader.schema
    length = schema.layout.chunk_tokens
    if isinstance(tokens, range) and tokens.step == 1:
        for start, stop in split_range(tokens.start, tokens.stop, length):
            yield (start, stop), slice(None), slice(start - tokens.start, stop - tokens.start)
        return
    ids = np.asarray(tokens)
    for index in np.unique(ids // length).tolist():
        start = index * length
        where = np.flatnonzero(ids // length == index)
        yield (
            (start, min(start + length, schema.n_tokens)),
            ids[where] - start,
            _as_slice(where),
        )


def _as_slice(indices: np.ndarray) -> np.ndarray | slice:
    """Return consecutive indices as a slice, which copies nothing."""
    first, n = int(indices[0]), len(indices)
    consecutive = int(indices[-1]) == first + n - 1 and bool((np.diff(indices) == 1).all())
    return slice(first, first + n) if consecutive else indices
