"""A Dask array whose indexing reaches the disk.

Dask cannot push a selection of tokens through a graph into the read. `LazyArray` can: it knows that
it is a variable of a store at some selection, and `__getitem__` returns the same variable at the
narrower selection, with a fresh graph of one task per block of steps. Each task reads only the
chunks it needs. For everything else, and once pickled, it is an ordinary Dask array.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import dask.array as da
import numpy as np
from dask._task_spec import Task, TaskRef
from dask.base import tokenize

from thimble_zarr.analysis.variables import evaluate
from thimble_zarr.analysis.windows import Indices, Source, Window, iter_windows

Selection = tuple[Indices | int, Indices | int, Indices | int]
"""Rows, tokens and dims; an axis that was indexed by a number is a number and has no dimension."""


_TASK_BLOCKS = 4
"""Blocks a task of a reduction. Each decodes one block more, for the rows before its first step."""

_NEUTRAL: dict[np.ufunc, float] = {np.add: 0.0, np.maximum: -np.inf, np.minimum: np.inf}


@dataclass(frozen=True)
class Statistics:
    """A few numbers a step, and how those of two windows become those of both.

    Attributes
    ----------
    compute
        From a window to one array a number, float64, shape `(step,)`. It must pickle.
    combine
        For each number `np.add`, `np.maximum` or `np.minimum`.
    """

    compute: Callable[[Window], Sequence[np.ndarray]]
    combine: tuple[np.ufunc, ...]


@dataclass(frozen=True)
class TokenNumbers:
    """A number a token, and how those of two spans of steps become that of both.

    Attributes
    ----------
    compute
        From a window to its tokens' numbers, int64, shape `(token,)`. It must pickle.
    combine
        `np.add`, or `np.maximum` for numbers that are not negative.
    """

    compute: Callable[[Window], np.ndarray]
    combine: np.ufunc


class _AsDask(type):
    """Makes a subclass of Dask's array count as the same type.

    xarray computes the variables of a dataset together only if the type of all is one, and what
    arithmetic makes of ours is Dask's own.
    """

    def __eq__(cls, other: object) -> bool:
        return other is da.Array or type(other) is _AsDask

    def __hash__(cls) -> int:
        return hash(da.Array)


class LazyArray(da.Array, metaclass=_AsDask):  # type: ignore[misc]  # Dask has no types
    """One variable of a store, float32, at a selection.

    Make it with `LazyArray.of`; index it, compute it, or use it as any Dask array.
    """

    __slots__ = ("_selection", "_source", "_variable")

    @classmethod
    def of(cls, source: Source, variable: str, selection: Selection | None = None) -> Self:
        """Return a variable of a store as a lazy array.

        Parameters
        ----------
        source
            The store.
        variable
            A stored or derived variable.
        selection
            Rows, tokens and dims; everything committed by default.

        Returns
        -------
        LazyArray
            float32, with one dimension for each axis of the selection that is not a number. Chunks
            follow the blocks of the store along steps and are whole along tokens and dims.
        """
        schema = source.reader.schema
        selection = selection or (
            range(source.reader.n_rows),
            range(schema.n_tokens),
            range(schema.n_dims),
        )
        rows, tokens, dims = selection
        groups = _row_groups(rows, schema.layout.block_steps)
        shape = tuple(len(axis) for axis in selection if not isinstance(axis, int))
        name = f"{variable}-{_token(source, selection)}"
        zeros = (0,) * (len(shape) - (not isinstance(rows, int)))
        graph = {}
        for index, group in enumerate(groups):
            key = (name, *zeros) if isinstance(rows, int) else (name, index, *zeros)
            output_shape = shape if isinstance(rows, int) else (len(group), *shape[1:])
            graph[key] = Task(
                key, _compute_block, source, variable, group, tokens, dims, output_shape
            )
        chunks: tuple[tuple[int, ...], ...] = tuple((length,) for length in shape)
        if not isinstance(rows, int):
            chunks = (tuple(map(len, groups)), *chunks[1:])
        array: Self = super().__new__(cls, graph, name, chunks, dtype=np.float32)
        array._source, array._variable, array._selection = source, variable, selection
        return array

    def __getitem__(self, key: Any) -> da.Array:
        keys = key if isinstance(key, tuple) else (key,)
        if all(isinstance(part, slice) and part == slice(None) for part in keys):
            return self
        selection = _compose(self._selection, keys)
        if selection is None:
            return super().__getitem__(key)
        return LazyArray.of(self._source, self._variable, selection)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("a recorded variable is read-only; assign to a computed copy of it")

    def on_device(self, device: str | None) -> Self:
        """Return the same variable, with replays on `device`."""
        return type(self).of(replace(self._source, device=device), self._variable, self._selection)

    @property
    def source(self) -> Source:
        """The recording."""
        source: Source = self._source
        return source

    @property
    def selection(self) -> Selection:
        """Rows, tokens and dims."""
        selection: Selection = self._selection
        return selection

    def reduce_rows(self, statistics: Statistics) -> da.Array:
        """Reduce every row of the selection to a few numbers, in one pass, without an intermediate.

        Parameters
        ----------
        statistics
            The numbers.

        Returns
        -------
        dask.array.Array
            float64, shape `(step, column)`.
        """
        rows, tokens, dims = self._selection
        task_rows = _TASK_BLOCKS * self._source.reader.schema.layout.block_steps
        groups = _row_groups(rows, task_rows)
        token = _token(self._source, self._selection, task_rows, statistics)
        name = f"statistics-{token}"
        graph = {}
        for index, group in enumerate(groups):
            key = (name, index, 0)
            graph[key] = Task(key, _reduce_block, self._source, statistics, group, tokens, dims)
        chunks = tuple(map(len, groups)), (len(statistics.combine),)
        return da.Array(graph, name, chunks, dtype=np.float64)


class LazyTokens(da.Array, metaclass=_AsDask):  # type: ignore[misc]  # Dask has no types
    """One number a token, reduced over all steps and dims.

    Like that of `LazyArray` its indexing reaches the disk. Make it with `LazyTokens.of`.
    """

    __slots__ = ("_numbers", "_source", "_tokens")

    @classmethod
    def of(cls, source: Source, numbers: TokenNumbers, tokens: Indices | None = None) -> Self:
        """Return the numbers of some tokens, all by default, as a lazy int64 array."""
        schema = source.reader.schema
        tokens = range(schema.n_tokens) if tokens is None else tokens
        name = f"{numbers.compute.__name__}-{_token(source, tokens)}"
        groups = _row_groups(range(source.reader.n_rows), _TASK_BLOCKS * schema.layout.block_steps)
        parts = [(f"{name}-part", index) for index in range(len(groups))]
        graph = {
            key: Task(key, _reduce_tokens, source, numbers, rows, tokens)
            for key, rows in zip(parts, groups, strict=True)
        }
        graph[name, 0] = Task((name, 0), _combine, numbers.combine, *map(TaskRef, parts))
        array: Self = super().__new__(cls, graph, name, ((len(tokens),),), dtype=np.int64)
        array._source, array._numbers, array._tokens = source, numbers, tokens
        return array

    def __getitem__(self, key: Any) -> da.Array:
        (part,) = key if isinstance(key, tuple) and len(key) == 1 else (key,)
        tokens = _index(self._tokens, part)
        if tokens is None or isinstance(tokens, int):
            return super().__getitem__(key)
        return LazyTokens.of(self._source, self._numbers, tokens)


def _token(source: Source, *parts: object) -> str:
    """Return a name for a graph that is the same only for the same rows of the same store."""
    reader = source.reader
    token: str = tokenize(str(reader.path), reader.schema.created, reader.n_rows, parts)
    return token


def _row_groups(rows: Indices | int, length: int) -> list[Indices]:
    """Cut rows, in their order, into runs that lie in one block of `length` rows."""
    if isinstance(rows, int):
        return [range(rows, rows + 1)]
    ids = np.asarray(rows)
    starts = [0, *(np.flatnonzero(np.diff(ids // length)) + 1).tolist(), len(ids)]
    return [rows[start:stop] for start, stop in itertools.pairwise(starts)]


def _as_indices(axis: Indices | int) -> Indices:
    return range(axis, axis + 1) if isinstance(axis, int) else axis


def _compute_block(
    source: Source,
    variable: str,
    rows: Indices,
    tokens: Indices | int,
    dims: Indices | int,
    shape: tuple[int, ...],
) -> np.ndarray:
    tokens, dims = _as_indices(tokens), _as_indices(dims)
    values = np.empty((len(rows), len(tokens), len(dims)), dtype=np.float32)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for where, window in iter_windows(source, rows, tokens, dims):
            values[where] = evaluate(variable, window)
    return values.reshape(shape)


def _reduce_block(
    source: Source,
    statistics: Statistics,
    rows: Indices,
    tokens: Indices | int,
    dims: Indices | int,
) -> np.ndarray:
    initial = [_NEUTRAL[ufunc] for ufunc in statistics.combine]
    numbers = np.tile(np.array(initial), (len(rows), 1))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for (where, _), window in iter_windows(
            source, rows, _as_indices(tokens), _as_indices(dims)
        ):
            for index, values in enumerate(statistics.compute(window)):
                combine = statistics.combine[index]
                numbers[where, index] = combine(numbers[where, index], values)
    return numbers


def _reduce_tokens(
    source: Source, numbers: TokenNumbers, rows: Indices, tokens: Indices
) -> np.ndarray:
    reduced = np.zeros(len(tokens), dtype=np.int64)
    dims = range(source.reader.schema.n_dims)
    with np.errstate(invalid="ignore"):
        for (_, where), window in iter_windows(source, rows, tokens, dims):
            reduced[where] = numbers.combine(reduced[where], numbers.compute(window))
    return reduced


def _combine(combine: np.ufunc, *parts: np.ndarray) -> np.ndarray:
    return functools.reduce(combine, parts)


def _compose(selection: Selection, key: tuple[Any, ...]) -> Selection | None:
    """Apply an index to a selection; None where only Dask can answer it."""
    keys = list(key)
    open_axes = [index for index, axis in enumerate(selection) if not isinstance(axis, int)]
    if any(part is Ellipsis for part in keys):
        at = next(index for index, part in enumerate(keys) if part is Ellipsis)
        keys[at : at + 1] = [slice(None)] * (len(open_axes) - len(keys) + 1)
    if len(keys) > len(open_axes):
        return None
    composed: list[Indices | int] = list(selection)
    n_fancy = 0
    for index, part in zip(open_axes, keys, strict=False):
        axis = selection[index]
        assert not isinstance(axis, int)
        narrowed = _index(axis, part)
        if narrowed is None:
            return None
        n_fancy += not isinstance(part, slice | int | np.integer)
        composed[index] = narrowed
    if n_fancy > 1:
        return None  # NumPy and Dask disagree on what this means; Dask decides
    return composed[0], composed[1], composed[2]


def _index(axis: Indices, part: Any) -> Indices | int | None:
    """Index one axis; None where the index is nothing this class knows."""
    if isinstance(part, slice):
        return axis[part]
    if isinstance(part, bool | np.bool_):
        return None
    if isinstance(part, int | np.integer):
        return int(axis[int(part)])
    if not isinstance(part, list | np.ndarray):
        return None
    positions = np.asarray(part)
    if positions.ndim != 1:
        return None
    if positions.dtype == bool:
        if len(positions) != len(axis):
            raise IndexError(f"a mask of {len(positions)} values for an axis of {len(axis)}")
        positions = np.flatnonzero(positions)
    elif len(positions) == 0:
        positions = positions.astype(np.intp)
    elif not np.issubdtype(positions.dtype, np.integer):
        return None
    indices: np.ndarray = np.asarray(axis)[positions]
    return indices
