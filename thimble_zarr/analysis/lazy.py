"""A Dask array whose indexing reaches the disk.

Dask cannot push a selection of tokens through a graph into the read. `LazyArray` can: it knows that
it is a variable of a store at some selection, and `__getitem__` returns the same variable at the
narrower selection, with a fresh graph of one task for a block of steps or a few. Each task reads
only the chunks it needs. For everything else it is an ordinary Dask array.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Self

import dask.array as da
import numpy as np
from dask._task_spec import Task, TaskRef
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph, Layer

from thimble_zarr.analysis.variables import evaluate
from thimble_zarr.analysis.windows import (
    Source,
    Window,
    iter_windows,
    row_groups,
    token_groups,
)
from thimble_zarr.format.indexing import Indices
from thimble_zarr.format.schema import Schema

Selection = tuple[Indices | int, Indices | int, Indices | int]
"""Rows, tokens and dims; an axis that was indexed by a number is a number and has no dimension."""


_CHUNK_BYTES = 96 * 2**20
"""A chunk of a lazy variable is at most so large, if it is more than one block."""

_TASK_STEPS = 256
"""Steps a task, in whole blocks. Each reads the row before its first step, and so a block more."""

FAN_IN = 16
"""Parts of a reduction that are combined at once."""

_NEUTRAL: dict[np.ufunc, float] = {np.add: 0.0, np.maximum: -np.inf, np.minimum: np.inf}


@dataclass(frozen=True)
class Statistics:
    """A few numbers a step, and how those of two parts of a selection become those of both.

    Attributes
    ----------
    compute
        From a part of a window to one array a number, float64, shape `(step,)`. It must pickle.
    combine
        For each number `np.add`, `np.maximum` or `np.minimum`.
    dtype
        Of the part's numbers.
    """

    compute: Callable[[Window], Iterable[np.ndarray]]
    combine: tuple[np.ufunc, ...]
    dtype: type[np.floating] = np.float64

    def neutral(self, n_classes: int, n_rows: int) -> np.ndarray:
        """Return what combines with numbers to the same numbers."""
        column = np.array([_NEUTRAL[ufunc] for ufunc in self.combine])[:, np.newaxis]
        return np.tile(column, (n_classes, 1, n_rows))

    def merge(self, *parts: np.ndarray) -> np.ndarray:
        """Return the numbers of several parts together, in their order."""
        if len(parts) == 1:
            return parts[0]
        merged = parts[0].copy()
        for part in parts[1:]:
            for index, ufunc in enumerate(self.combine):
                ufunc(merged[:, index], part[:, index], out=merged[:, index])
        return merged


@dataclass(frozen=True)
class TokenNumbers:
    """A number a token, and how those of two spans of steps become that of both.

    Attributes
    ----------
    compute
        From a part of a window to its tokens' numbers, int64, shape `(token,)`. It must pickle.
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
            are one or more blocks of the store along steps and whole along tokens and dims.
        """
        schema = source.reader.schema
        selection = selection or (
            range(source.reader.n_rows),
            range(schema.n_tokens),
            range(schema.n_dims),
        )
        rows, tokens, dims = selection
        shape = tuple(len(axis) for axis in selection if not isinstance(axis, int))
        row_bytes = 4 * len(_as_indices(tokens)) * len(_as_indices(dims))
        length = _task_steps(schema, _CHUNK_BYTES // max(1, row_bytes))
        groups = row_groups(_as_indices(rows), length)
        chunks: tuple[tuple[int, ...], ...] = tuple((length,) for length in shape)
        if not isinstance(rows, int):
            chunks = (tuple(map(len, groups)) or (0,), *chunks[1:])
        name = f"{variable}-{_token(source, selection)}"
        tasks = functools.partial(_block_tasks, name, source, variable, selection, groups)
        array: Self = super().__new__(cls, _graph(name, tasks), name, chunks, dtype=np.float32)
        array._source, array._variable, array._selection = source, variable, selection
        return array

    def __reduce__(self) -> tuple[Callable[..., da.Array], tuple[object, ...]]:
        return type(self).of, (self._source, self._variable, self._selection)

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

    def reduce_rows(self, statistics: Statistics, classes: np.ndarray | None = None) -> da.Array:
        """Reduce every row of the selection to a few numbers, in one pass, without an intermediate.

        Parameters
        ----------
        statistics
            The numbers.
        classes
            Which class each selected token is of, int, counted from zero; the numbers are of each
            class alone. One class by default.

        Returns
        -------
        dask.array.Array
            float64, shape `(class, number, step)`.
        """
        rows, tokens, dims = (_as_indices(axis) for axis in self._selection)
        n_classes = 1 if classes is None else int(classes.max(initial=0)) + 1
        groups = row_groups(rows, reduction_steps(self._source.reader.schema))
        name = f"statistics-{_token(self._source, self._selection, statistics, classes)}"
        # What tasks have in common is one object for all of them, so that the graph pickles small.
        pieces = [
            (ids, None if n_classes == 1 or classes is None else _narrow(classes[where], n_classes))
            for ids, where in token_groups(self._source, tokens)
        ]
        graph = {}
        for index, group in enumerate(groups):
            parts = []
            for part, (ids, classes_of) in enumerate(pieces):
                key = (f"{name}-part", index, part)
                arguments = (self._source, statistics, group, ids, dims, classes_of, n_classes)
                graph[key] = Task(key, _reduce_part, *arguments)
                parts.append(key)
            graph |= _merge_tasks((name, 0, 0, index), statistics.merge, parts)
        chunks = (n_classes,), (len(statistics.combine),), tuple(map(len, groups))
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
        tasks = functools.partial(_token_tasks, name, source, numbers, tokens)
        chunks = ((len(tokens),),)
        array: Self = super().__new__(cls, _graph(name, tasks), name, chunks, dtype=np.int64)
        array._source, array._numbers, array._tokens = source, numbers, tokens
        return array

    def __reduce__(self) -> tuple[Callable[..., da.Array], tuple[object, ...]]:
        return type(self).of, (self._source, self._numbers, self._tokens)

    def __getitem__(self, key: Any) -> da.Array:
        (part,) = key if isinstance(key, tuple) and len(key) == 1 else (key,)
        tokens = _index(self._tokens, part)
        if tokens is None or isinstance(tokens, int):
            return super().__getitem__(key)
        return LazyTokens.of(self._source, self._numbers, tokens)


class _Tasks(Layer):  # type: ignore[misc]  # Dask has no types
    """The tasks of an array, made when Dask asks for them: a dataset has many arrays.

    Parameters
    ----------
    make
        Returns the tasks. It must pickle.
    """

    def __init__(self, make: Callable[[], dict[Any, Task]]) -> None:
        super().__init__()
        self._make = make

    @functools.cached_property
    def _made(self) -> dict[Any, Task]:
        return self._make()

    def is_materialized(self) -> bool:
        return "_made" in self.__dict__

    def get_output_keys(self) -> Set[Any]:
        return self._made.keys()

    def __getitem__(self, key: Any) -> Task:
        return self._made[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)

    def __reduce__(self) -> tuple[type[Self], tuple[Callable[[], dict[Any, Task]]]]:
        return type(self), (self._make,)


def _graph(name: str, make: Callable[[], dict[Any, Task]]) -> HighLevelGraph:
    return HighLevelGraph({name: _Tasks(make)}, {name: set()})


def _block_tasks(
    name: str, source: Source, variable: str, selection: Selection, groups: Sequence[Indices]
) -> dict[Any, Task]:
    rows, tokens, dims = selection
    rest = tuple(len(axis) for axis in (tokens, dims) if not isinstance(axis, int))
    zeros = (0,) * len(rest)
    tasks = {}
    for index, group in enumerate(groups):
        whole = isinstance(rows, int)
        key = (name, *zeros) if whole else (name, index, *zeros)
        shape = rest if whole else (len(group), *rest)
        tasks[key] = Task(key, _compute_block, source, variable, group, tokens, dims, shape)
    return tasks


def _token_tasks(
    name: str, source: Source, numbers: TokenNumbers, tokens: Indices
) -> dict[Any, Task]:
    rows = range(source.reader.n_rows)
    tasks: dict[Any, Task] = {}
    for index, group in enumerate(row_groups(rows, _task_steps(source.reader.schema, _TASK_STEPS))):
        key = (f"{name}-part", index)
        tasks[key] = Task(key, _reduce_tokens, source, numbers, group, tokens)
    combine = functools.partial(_combine, numbers.combine)
    return tasks | _merge_tasks((name, 0), combine, list(tasks))


def _merge_tasks(
    key: tuple[Any, ...], merge: Callable[..., np.ndarray], parts: list[Any]
) -> dict[Any, Task]:
    """Return tasks that combine parts, in their order, a few at a time."""
    tasks = {}
    for level in itertools.count():
        if len(parts) <= FAN_IN:
            break
        groups = [parts[start : start + FAN_IN] for start in range(0, len(parts), FAN_IN)]
        parts = [(f"{key[0]}-merge", *key[1:], level, index) for index in range(len(groups))]
        for part, group in zip(parts, groups, strict=True):
            tasks[part] = Task(part, merge, *map(TaskRef, group))
    return tasks | {key: Task(key, merge, *map(TaskRef, parts))}


def _token(source: Source, *parts: object) -> str:
    """Return a name for a graph that is the same only for the same rows of the same store."""
    reader = source.reader
    token: str = tokenize(str(reader.path), reader.schema.created, reader.n_rows, parts)
    return token


def _task_steps(schema: Schema, n_steps: int) -> int:
    """Return at most so many steps, but at least one block of them, in whole blocks."""
    block_steps = schema.layout.block_steps
    return max(1, min(n_steps, _TASK_STEPS) // block_steps) * block_steps


def reduction_steps(schema: Schema) -> int:
    """Return the steps that a task of `LazyArray.reduce_rows` goes through at most."""
    return _task_steps(schema, _TASK_STEPS)


def _narrow(classes: np.ndarray, n_classes: int) -> np.ndarray:
    """Return classes in the smallest signed integers that hold them."""
    return classes.astype(np.min_scalar_type(-n_classes))


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
        for (steps, where), window in iter_windows(source, rows, tokens, dims):
            for (part_rows, part_tokens), part in window.parts():
                numbers = evaluate(variable, part)
                if isinstance(where, slice):
                    values[steps, where][part_rows, part_tokens] = numbers
                else:
                    values[steps][part_rows, where[part_tokens]] = numbers
    return values.reshape(shape)


def _reduce_part(
    source: Source,
    statistics: Statistics,
    rows: Indices,
    tokens: Indices,
    dims: Indices,
    classes: np.ndarray | None,
    n_classes: int,
) -> np.ndarray:
    """Reduce a group of tokens (`token_groups`), those of a class after those of another."""
    numbers = statistics.neutral(n_classes, len(rows))
    classes = np.zeros(len(tokens), np.int8) if classes is None else classes
    if (np.diff(classes) < 0).any():
        order = np.argsort(classes, kind="stable")
        tokens, classes = np.asarray(tokens)[order], classes[order]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for (steps, _), window in iter_windows(source, rows, tokens, dims):
            of_window = numbers[..., steps]
            for (part_rows, part_tokens), part in window.parts(classes, statistics.dtype):
                of_part = of_window[classes[part_tokens.start], :, part_rows]
                for index, values in enumerate(statistics.compute(part)):
                    statistics.combine[index](of_part[index], values, out=of_part[index])
    return numbers


def _reduce_tokens(
    source: Source, numbers: TokenNumbers, rows: Indices, tokens: Indices
) -> np.ndarray:
    reduced = np.zeros(len(tokens), dtype=np.int64)
    dims = range(source.reader.schema.n_dims)
    with np.errstate(invalid="ignore"):
        for (_, where), window in iter_windows(source, rows, tokens, dims):
            ids = np.arange(len(tokens))[where]
            for (_, part_tokens), part in window.parts():
                at = ids[part_tokens]
                reduced[at] = numbers.combine(reduced[at], numbers.compute(part))
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
