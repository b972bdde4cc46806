"""Going through the same rows twice, window by window: parts that fit the cache.

Weights are read once, where those of all tokens at a block's rows fit the memory: then both passes
are over a block, and the first leaves its weights to the second. Else both are over all rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from thimble_zarr import tuning
from thimble_zarr.analysis.compute.reduction import by_class
from thimble_zarr.analysis.compute.source import Selected
from thimble_zarr.analysis.compute.windows import Window, row_groups, token_groups, windows_of
from thimble_zarr.bits import storage_dtype
from thimble_zarr.format.indexing import Indices, TokenGroup, as_slice
from thimble_zarr.format.reader import Rows
from thimble_zarr.optim.programs.kernel import StepNumbers
from thimble_zarr.optim.programs.program import PortableProgram

Place = tuple[slice, slice | np.ndarray]
"""Where a part lies: among the rows, and among the selected tokens."""

Parts = Iterator[tuple[Place, int, Window]]
"""Parts, where each lies, and which class its tokens are of."""

_Span = tuple[int, int]


def held_bytes(selected: Selected) -> int:
    """Return what the weights of a block take that are held; 0 if they are read twice."""
    schema = selected.source.reader.schema
    row_bytes = len(selected.tokens) * schema.n_dims * storage_dtype(schema.dtypes["W"]).itemsize
    n_bytes = (schema.layout.block_steps + 2) * row_bytes
    return n_bytes if n_bytes <= tuning.TUNING.summary_held_bytes else 0


@dataclass
class Passes:
    """Goes through a selection; `classes` says which class each token is of."""

    selected: Selected
    classes: np.ndarray
    opened: Rows

    def __post_init__(self) -> None:
        tokens = self.selected.tokens
        self._groups = token_groups(self.selected.source, tokens)
        self._small = [self._cut(*group) for group in self._groups]
        self._holds = held_bytes(self.selected) > 0
        if self._holds:
            self.opened = _Held(self.opened)

    def _cut(self, tokens: Indices, among: slice | np.ndarray) -> list[TokenGroup]:
        classes = self.classes[among]
        small = token_groups(self.selected.source, tokens, cached=True)
        return [by_class(group, classes) for group in small]

    @property
    def turns(self) -> Iterator[slice]:
        """The rows of both passes before those of both passes over the next ones."""
        rows, length = self.selected.rows, self.selected.source.reader.schema.layout.block_steps
        stop = 0
        for group in row_groups(rows, length) if self._holds else [rows]:
            yield slice(stop, stop := stop + len(group))

    def first(self, rows: slice, inputs: Sequence[str]) -> Parts:
        """Yield the parts of some rows for the first time, of weights alone, in float64.

        `inputs` are what will be asked for by the second pass.
        """
        return self._parts(rows, inputs if self._holds else ("W",), np.float64)

    def second(self, rows: slice, inputs: Sequence[str], dtype: type[np.floating]) -> Parts:
        """Yield the parts of some rows again."""
        return self._parts(rows, () if self._holds else inputs, dtype)

    def _parts(self, turn: slice, inputs: Sequence[str], dtype: type[np.floating]) -> Parts:
        """Yield the parts of all windows, none with tokens of two classes."""
        source, rows, dims = self.selected.source, self.selected.rows[turn], self.selected.dims
        for (_, among), groups in zip(self._groups, self._small, strict=True):
            places = np.arange(len(self.classes))[among]
            windows = windows_of(source, rows, groups, dims, inputs, self.opened)
            for (steps, where), window in windows:
                positions = places[where]
                classes, n_bytes = self.classes[positions], tuning.TUNING.summary_part_bytes
                for (part_rows, part_tokens), part in window.parts(classes, dtype, n_bytes):
                    first = turn.start + steps.start + part_rows.start
                    at = slice(first, first + len(part.rows)), as_slice(positions[part_tokens])
                    yield at, int(classes[part_tokens.start]), part


@dataclass
class _Held:
    """Rows whose weights are held until those that follow are read, and the last row after that."""

    rows: Rows
    _held: dict[int, tuple[_Span, np.ndarray]] = field(default_factory=dict)
    _last: dict[int, tuple[_Span, np.ndarray]] = field(default_factory=dict)

    def read(
        self, name: str, rows: _Span, tokens: Indices, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return stored bits, of weights those that are held: they are not to be written to."""
        if name != "W":
            return self.rows.read(name, rows, tokens, out)
        key = id(tokens)  # who goes through them has these tokens as long as this
        for held in (self._held, self._last):
            (start, stop), bits = held.get(key, ((0, 0), _NOTHING))
            if start <= rows[0] and rows[1] <= stop:
                return bits[rows[0] - start : rows[1] - start]
        if key in self._held:  # let go of first, so that both are not there at once
            (_, stop), bits = self._held.pop(key)
            self._last[key] = (stop - 1, stop), bits[-1:].copy()
            del bits
        found = self.rows.read(name, rows, tokens)
        self._held[key] = rows, found
        return found

    def read_together(
        self, outs: Mapping[str, np.ndarray], rows: _Span, tokens: Indices
    ) -> Mapping[str, np.ndarray]:
        """Return stored bits of several variables, of which none is held."""
        return self.rows.read_together(outs, rows, tokens)

    def predicted(
        self, rows: _Span, tokens: Indices, program: PortableProgram, numbers: StepNumbers
    ) -> np.ndarray:
        """Return which rows are read by having a program take the step from the row before."""
        return self.rows.predicted(rows, tokens, program, numbers)

    def will_read(self, names: Sequence[str], rows: _Span, tokens: Indices) -> None:
        """Say that `read` will be asked for these, so that the disk may begin."""
        self.rows.will_read(names, rows, tokens)


_NOTHING = np.empty(0)
