"""From stored bits to numbers: a selection of a store, cut into pieces that fit the cache.

Everything that is computed from a store goes through here. `iter_windows` goes through a selection
some tokens at a time, block after block of steps, and hands out windows: the steps of a block for
those tokens. `windows_of` goes through all of several such groups of tokens in a block before the
next block, so that they may be few enough for what is read to stay in the cache. A window reads a
variable when it is first asked for, each chunk once; the row before its first step it has from the
window before. Formulas work on its `parts`, which are small enough for their temporaries to stay in
the cache. No array of the size of a run exists at any time.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from thimble_zarr import tuning
from thimble_zarr.analysis.compute.served import windows_ahead
from thimble_zarr.analysis.compute.source import Source
from thimble_zarr.bits import decode, storage_dtype
from thimble_zarr.format import indexing
from thimble_zarr.format.indexing import Indices, TokenGroup, as_slice
from thimble_zarr.format.layout import split_range
from thimble_zarr.format.reader import Rows
from thimble_zarr.format.schema import Schema

T = TypeVar("T")

Floats = npt.NDArray[np.floating]


@dataclass(eq=False)
class _Piece:
    """The bits of some tokens at consecutive rows, read when asked for, each chunk once.

    It is used for one block of rows after the other. `memories` are those of all pieces of a pass,
    and `inputs` variables that are read together.
    """

    source: Source
    tokens: Indices
    opened: Rows
    memories: dict[tuple[str, type[np.generic]], np.ndarray]
    inputs: tuple[str, ...] = ()
    rows: tuple[int, int] = (0, 0)
    shared: dict[Any, Any] = field(default_factory=dict)
    _bits: dict[str, np.ndarray] = field(default_factory=dict)
    _before: dict[str, np.ndarray] = field(default_factory=dict)

    def begin(self, rows: tuple[int, int]) -> None:
        """Go on to rows; what is known of the row before is kept if they follow the last ones."""
        if rows[0] != self.rows[1]:
            self._before.clear()
        self.rows = rows

    def end(self) -> None:
        """Let go of the bits, but for the last row of what has a row before it, too."""
        bits = self._bits
        self._before = {name: bits[name][-1:].copy() for name in self._before if name in bits}
        bits.clear()

    def memory(self, name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
        """Return an array in the memory that all share who ask by one name: fresh one is slow."""
        size = math.prod(shape)
        known = self.memories.get((name, dtype))
        if known is None or known.size < size:
            known = self.memories[name, dtype] = np.empty(size, dtype)
        return known[:size].reshape(shape)

    def bits(self, name: str) -> np.ndarray:
        """Return a variable's bits, shape `(step, token, dim)`."""
        if name not in self._bits:
            rows = self.rows[0] - self._has_row_before, self.rows[1]
            names = self.inputs if name in self.inputs else (name,)
            outs = {name: self._memory_of(name, rows[1] - rows[0]) for name in names}
            if names is self.inputs:
                found = self.opened.read_together(outs, rows, self.tokens)
            else:
                found = {name: self.opened.read(name, rows, self.tokens, outs[name])}
            for one, bits in found.items():
                if self._has_row_before:
                    self._before[one] = bits[:1]
                self._bits[one] = bits[self._has_row_before :]
        return self._bits[name]

    def _memory_of(self, name: str, n_rows: int) -> np.ndarray:
        """Return memory for bits, as chunks have them, which so are decoded where they are needed.

        The shape is `(step, token, dim)`.
        """
        schema = self.source.reader.schema
        shape = len(self.tokens), n_rows, schema.n_dims
        dtype = storage_dtype(schema.dtypes[name]).type
        return self.memory(f"bits of {name}", shape, dtype).transpose(1, 0, 2)

    def before(self, name: str) -> np.ndarray:
        """Return a variable's bits at the row before, shape `(1, token, dim)`.

        Before row 0 that is row 0.
        """
        first = self.rows[0]
        if name not in self._before and (first == 0 or self._has_row_before):
            bits = self.bits(name)
            self._before.setdefault(name, bits[:1])
        if name not in self._before:
            self._before[name] = self.opened.read(name, (first - 1, first), self.tokens)
        return self._before[name]

    @property
    def _has_row_before(self) -> bool:
        """Whether the row before is in the same block, and so comes with the others."""
        return self.rows[0] % self.source.reader.schema.layout.block_steps > 0


@dataclass(eq=False)
class Window:
    """A few rows of some tokens, as arrays of shape `(step, token, dim)`.

    It can be used until the next window is asked for. `dtype` is that of its numbers, float64
    unless less was asked for (`parts`).
    """

    _piece: _Piece
    rows: np.ndarray
    _dims: Indices
    _of_rows: dict[Any, Any]
    _part_of: "Window | None" = None
    _at: tuple[slice, slice] = (slice(None), slice(None))
    dtype: type[np.floating] = np.float64
    _current: dict[str, Floats] = field(default_factory=dict)
    _previous: dict[str, Floats] = field(default_factory=dict)
    _computed: dict[Any, Any] = field(default_factory=dict)

    @property
    def source(self) -> Source:
        """The recording it is of."""
        return self._piece.source

    @property
    def follows(self) -> np.ndarray:
        """Whether each row follows the one before it, bool, shape `(step,)`."""
        follows: np.ndarray = self.source.follows[self.rows]
        return follows

    @property
    def positions(self) -> np.ndarray:
        """Index of each element in the whole parameter, flattened: int64, shape `(token, dim)`."""
        tokens = self.source.token_ids[np.asarray(self._piece.tokens[self._at[1]])]
        n_dims = self.source.reader.schema.n_dims
        positions: np.ndarray = tokens[:, np.newaxis] * n_dims + np.asarray(self._dims)
        return positions

    def parts(
        self,
        classes: np.ndarray | None = None,
        dtype: type[np.floating] = np.float64,
        n_bytes: int | None = None,
    ) -> "Iterator[tuple[tuple[slice, slice], Window]]":
        """Cut the window into parts, windows too, so that formulas run in the cache.

        With each part comes where it lies in the window, along rows and tokens. `classes` says
        which class each token is of, ascending: no part has tokens of two. `dtype` is that of the
        parts' numbers, and an array of them has about `n_bytes`, `tuning.part_bytes` if None.
        """
        n_rows, n_tokens = len(self.rows), len(self._piece.tokens)
        part_rows, part_tokens = self._part_shape(dtype, n_bytes)
        ends = [] if classes is None else (np.flatnonzero(np.diff(classes)) + 1).tolist()
        for of_class in itertools.pairwise([0, *ends, n_tokens]):
            for tokens in _cut_evenly(*of_class, part_tokens):
                for rows in _cut(0, n_rows, part_rows):
                    at, steps = (rows, tokens), self.rows[rows]
                    of_rows = self._of_rows if part_rows == n_rows else {}
                    yield at, Window(self._piece, steps, self._dims, of_rows, self, at, dtype)

    def _part_shape(self, dtype: type[np.floating], n_bytes: int | None = None) -> tuple[int, int]:
        """Return how many rows and tokens a part has, or up to a quarter more tokens."""
        n_rows, n_dims = len(self.rows), len(self._dims)
        n_elements = (n_bytes or tuning.TUNING.part_bytes) // np.dtype(dtype).itemsize
        part_rows = min(n_rows, max(1, n_elements // n_dims))
        return part_rows, max(1, n_elements // (part_rows * n_dims))

    def tokens_of_parts(self) -> list[slice]:
        """Return the tokens of each part that this one, of tokens of one class, is cut into."""
        n_tokens = len(self._piece.tokens[self._at[1]])
        return _cut_evenly(0, n_tokens, self._part_shape(self.dtype)[1])

    @property
    def is_consecutive(self) -> bool:
        """Whether its rows are one after the other."""
        return isinstance(self.of_rows(_steps), slice)

    def in_float64(self) -> "Window":
        """Return the same part with numbers of float64."""
        return replace(self, dtype=np.float64, _current={}, _previous={})

    def of_whole(
        self, compute: "Callable[[Window], Mapping[str, np.ndarray]]"
    ) -> dict[str, np.ndarray]:
        """Return arrays that are computed once for the whole window, where this part has them."""
        whole = self._part_of or self
        arrays = _once(compute, whole, whole._computed)
        return {name: array[self._at] for name, array in arrays.items()}

    def of_tokens(self, make: "Callable[[Window], T]") -> T:
        """Return what is made once for all windows of the same tokens, one after the other."""
        return _once(make, self, self._piece.shared)

    def of_rows(self, make: "Callable[[Window], T]") -> T:
        """Return what is made once for all that have these rows and numbers of this dtype."""
        return _once(make, self, self._of_rows)

    def memory(self, name: str, n_rows: int | None = None) -> np.ndarray:
        """Return an array for numbers of the window, or so many rows of it, to compute in.

        The next window has the same memory by the same name.
        """
        shape = n_rows or len(self.rows), len(self._piece.tokens[self._at[1]]), len(self._dims)
        return self._piece.memory(name, shape, self.dtype)

    def current(self, name: str) -> Floats:
        """Return a variable at the window's rows; do not write to it."""
        if name not in self._current:
            self._current[name] = self.decoded(name)
        return self._current[name]

    def decoded(self, name: str, out: np.ndarray | None = None) -> Floats:
        """Return what `current` does, in `out` if that is given and it is not there already."""
        if name in self._current:
            return self._current[name]
        native = self.source.reader.schema.dtypes[name]
        if out is None and storage_dtype(native) != self.dtype:
            out = self.memory(name)
        return decode(self.bits(name), native, self.dtype, out)

    def previous(self, name: str) -> Floats:
        """Return a variable at the rows before, NaN where a row follows none; do not write to it.

        Ask for it before `current`, so that both come from one read.
        """
        if name not in self._previous:
            native = self.source.reader.schema.dtypes[name]
            current = self.bits(name)
            if self.is_consecutive:
                both = self.memory(f"{name} and before", len(self.rows) + 1)
                decode(current, native, self.dtype, both[1:])
                decode(next(self.bits_before(name)), native, self.dtype, both[0])
                self._current[name], previous = both[1:], both[:-1]
            else:
                before = np.stack([*self.bits_before(name)])
                previous = decode(before, native, self.dtype, self.memory(f"{name} before"))
            if len(alone := self.of_rows(_alone)):
                previous = previous.copy()
                previous[alone] = np.nan
            self._previous[name] = previous
        return self._previous[name]

    def scalar(self, name: str) -> np.ndarray:
        """Return a per-step scalar, float64, shape `(step, 1, 1)`."""
        return self.source.scalars[name][self.rows, np.newaxis, np.newaxis]

    def bits(self, name: str) -> np.ndarray:
        """Return a variable's stored bits at the window's rows; do not write to them."""
        return self._select(self._piece.bits(name)[self.of_rows(_steps)])

    @property
    def predicted(self) -> np.ndarray:
        """Which rows are read by taking the step that the check would take, bool `(step,)`."""
        program, numbers = self.source.program, self.source.step_numbers
        if program is None or numbers is None:
            return np.zeros(len(self.rows), bool)
        piece = self._piece
        found = piece.opened.predicted(
            piece.rows, piece.tokens, program, numbers[slice(*piece.rows)]
        )
        return found[self.of_rows(_steps)]

    def bits_before(self, name: str) -> Iterator[np.ndarray]:
        """Yield the stored bits at each row before, those of row 0 before row 0 too."""
        bits = self._piece.bits(name)
        for step in (self.rows - self._piece.rows[0]).tolist():
            yield self._select(bits[step - 1] if step else self._piece.before(name)[0])

    def _select(self, bits: np.ndarray) -> np.ndarray:
        """Return this window's tokens and dims of bits of shape `(..., token, dim)`."""
        selected = bits[..., self._at[1], :]
        if isinstance(self._dims, np.ndarray) or self._dims != range(bits.shape[-1]):
            selected = selected[..., np.asarray(self._dims)]
        return selected


def _once(make: Callable[[Window], T], window: Window, made: dict[Any, Any]) -> T:
    """Return what was made when a window with numbers of this dtype asked first."""
    key = make, window.dtype
    if key not in made:
        made[key] = make(window)
    known: T = made[key]
    return known


def _steps(window: Window) -> slice | np.ndarray:
    """Return where the window's rows lie in its piece."""
    return as_slice(window.rows - window._piece.rows[0])


def _alone(window: Window) -> np.ndarray:
    """Return which of the window's rows follow none."""
    return np.flatnonzero(~window.follows)


Windows = Iterator[tuple[tuple[slice, slice | np.ndarray], Window]]
"""Windows, and where each lies in a selection, along rows and tokens."""


def iter_windows(
    source: Source, rows: Indices, tokens: Indices, dims: Indices, inputs: Sequence[str] = ()
) -> Windows:
    """Cut a selection into windows, reading each touched chunk of rows once.

    `inputs` are variables that will be asked of every window. The disk is told of the next window
    of the same tokens while one is used, of the first just before.
    """
    for group in token_groups(source, tokens):
        yield from windows_of(source, rows, [group], dims, inputs)


def windows_of(
    source: Source,
    rows: Indices,
    groups: Sequence[TokenGroup],
    dims: Indices,
    inputs: Sequence[str] = (),
    opened: Rows | None = None,
) -> Windows:
    """Do what `iter_windows` does for tokens that are already cut into groups.

    All groups have their windows of a block of steps, then all of the next block. They are read
    from `opened`, one variable when it is asked for; or, if None, from what is opened for this, all
    of `inputs` together.
    """
    if 0 in (len(rows), len(dims), len(groups)):
        return
    schema = source.reader.schema
    every = groups[0][0] if len(groups) == 1 else np.concatenate([ids for ids, _ in groups])
    consecutive = isinstance(rows, range) and rows.step == 1
    length = window_rows(schema, len(every)) if consecutive else schema.layout.block_steps
    start = 0
    with source.reader.opened() if opened is None else nullcontext(opened) as opened_rows:
        memories = dict[tuple[str, type[np.generic]], np.ndarray]()
        together = tuple(inputs) if opened is None else ()
        pieces = [
            (_Piece(source, ids, opened_rows, memories, together), where) for ids, where in groups
        ]
        n_ahead = windows_ahead(source.reader, every)
        for run in _read_ahead(opened_rows, inputs, row_groups(rows, length), every, n_ahead):
            steps, of_rows = np.asarray(run), dict[Any, Any]()
            at = slice(start, start + len(steps))
            for piece, where in pieces:
                piece.begin(_span(run))
                yield (at, where), Window(piece, steps, dims, of_rows)
                piece.end()
            start = at.stop


def _read_ahead(
    opened: Rows, names: Sequence[str], groups: list[Indices], tokens: Indices, n_ahead: int
) -> Iterator[Indices]:
    """Yield groups of rows, each when the disk was told of it and of `n_ahead` after it."""
    untold = iter(groups)
    for group in itertools.islice(untold, n_ahead):
        if names:
            opened.will_read(names, _span(group), tokens)
    for group in groups:
        if names and (following := next(untold, None)) is not None:
            opened.will_read(names, _span(following), tokens)
        yield group


def _span(rows: Indices) -> tuple[int, int]:
    """Return the consecutive rows that some lie in, as `(start, stop)`."""
    return int(np.min(rows)), int(np.max(rows)) + 1


def row_groups(rows: Indices, length: int) -> list[Indices]:
    """Cut rows, in their order, into runs that lie in one block of `length` rows."""
    if isinstance(rows, range) and rows.step == 1 and rows:
        return [range(*part) for part in split_range(rows.start, rows.stop, length)]
    ids = np.asarray(rows)
    starts = [0, *(np.flatnonzero(np.diff(ids // length)) + 1).tolist(), len(ids)]
    return [rows[start:stop] for start, stop in itertools.pairwise(starts)]


def token_groups(source: Source, tokens: Indices, *, cached: bool = False) -> list[TokenGroup]:
    """Cut tokens into groups that make a window each, and say where each lies among them.

    No chunk is decoded for two of them. With `cached` they are so small that what a window reads
    stays in the cache.
    """
    schema = source.reader.schema
    most, chunk_tokens = window_tokens(schema), schema.layout.chunk_tokens
    if cached:
        chunk_elements = schema.layout.block_steps * chunk_tokens * schema.n_dims
        most = max(1, round(tuning.TUNING.cached_elements / chunk_elements)) * chunk_tokens
    places = schema.places
    return indexing.token_groups(tokens, most, places=places, chunk_tokens=chunk_tokens)


def window_tokens(schema: Schema) -> int:
    """Return how many tokens a window has at most: all where a step needs the whole parameter."""
    layout = schema.layout
    if not schema.optimizer.ELEMENTWISE:
        return -(-schema.n_tokens // layout.chunk_tokens) * layout.chunk_tokens
    row_elements = min(
        tuning.TUNING.window_elements // layout.block_steps, tuning.TUNING.row_elements
    )
    return max(layout.chunk_tokens, row_elements // schema.n_dims)


def window_rows(schema: Schema, n_tokens: int) -> int:
    """Return how many rows a window of so many tokens has at most.

    A block's, or several blocks' if all of it is one part: a window costs some hundred calls.
    """
    block_steps = schema.layout.block_steps
    n_elements = tuning.TUNING.part_bytes // np.dtype(np.float64).itemsize
    return block_steps * max(1, n_elements // max(1, block_steps * n_tokens * schema.n_dims))


def _cut_evenly(start: int, stop: int, length: int) -> list[slice]:
    """Cut a range into parts of one length, of about `length` or at most a quarter more."""
    n_parts = max(1, (4 * (stop - start) + 3 * length) // (4 * length))
    return _cut(start, stop, max(1, -(-(stop - start) // n_parts)))


def _cut(start: int, stop: int, length: int) -> list[slice]:
    return [slice(first, min(first + length, stop)) for first in range(start, stop, length)]
