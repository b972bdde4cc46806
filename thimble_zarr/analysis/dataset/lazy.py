"""A Dask array whose indexing reaches the disk.

Dask cannot push a selection of tokens through a graph into the read. `LazyArray` can: it knows that
it is a variable of a store at some selection, and `__getitem__` returns the same variable at the
narrower selection, with a fresh graph of one task for a block of steps or a few. Each task reads
only the chunks it needs. For everything else it is an ordinary Dask array.
"""

import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Self

import dask.array as da
import numpy as np
from dask._task_spec import Task, TaskRef
from dask.base import tokenize
from dask.core import flatten
from dask.highlevelgraph import HighLevelGraph, Layer

from thimble_zarr.analysis.compute.reduction import (
    FAN_IN,
    TASK_STEPS,
    Reduction,
    by_fan_in,
    reduction_steps,
    task_steps,
)
from thimble_zarr.analysis.compute.source import Selected, Source
from thimble_zarr.analysis.compute.variables import evaluate, inputs
from thimble_zarr.analysis.compute.windows import Window, iter_windows, row_groups
from thimble_zarr.format.indexing import Indices, rows_and_dims

Selection = tuple[Indices | int, ...]
"""Along steps, and then along each axis of the parameter; an axis that was indexed by a number is a
number and has no dimension."""


_CHUNK_BYTES = 96 * 2**20
"""A chunk of a lazy variable is at most so large, if it is more than one block."""


@dataclass(frozen=True)
class TokenNumbers:
    """A number a token, and how those of two spans of steps become that of both.

    Attributes
    ----------
    compute
        From a part of a window to its tokens' numbers, int64, shape `(token,)`. It must pickle.
    combine
        `np.add`, or `np.maximum` for numbers that are not negative.
    inputs
        The stored variables that they are computed from; those that are named are read ahead.
    """

    compute: Callable[[Window], np.ndarray]
    combine: np.ufunc
    inputs: tuple[str, ...] = ()


class _AsDask(type):
    """Makes a subclass of Dask's array count as the same type.

    xarray computes the variables of a dataset together only if the type of all is one, and what
    arithmetic makes of ours is Dask's own.
    """

    def __eq__(cls, other: object) -> bool:
        return other is da.Array or type(other) is _AsDask

    def __hash__(cls) -> int:
        return hash(da.Array)


class Lazy(da.Array, metaclass=_AsDask):  # type: ignore[misc]  # Dask has no types
    """A Dask array that knows what it is a selection of, and is read-only."""

    __slots__ = ()

    def narrowed(self, keys: tuple[Any, ...]) -> Any:
        """Return the selection that an index, at most a part an axis, leaves of this one.

        None where only Dask can answer it.
        """
        raise NotImplementedError

    def at(self, selection: Any) -> da.Array:
        """Return the same at another selection."""
        raise NotImplementedError

    def __getitem__(self, key: Any) -> da.Array:
        keys = _expanded(key if isinstance(key, tuple) else (key,), self.ndim)
        if all(isinstance(part, slice) and part == slice(None) for part in keys):
            return self
        selection = self.narrowed(keys)
        return super().__getitem__(key) if selection is None else self.at(selection)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("a recorded variable is read-only; assign to a computed copy of it")


class LazyArray(Lazy):
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
            Steps and axes of the parameter; everything committed by default. Rows beyond that are
            NaN.

        Returns
        -------
        LazyArray
            float32, with one dimension for each axis of the selection that is not a number. Chunks
            are one or more blocks of the store along steps and whole along the others.
        """
        schema = source.reader.schema
        selection = selection or (range(source.reader.n_rows), *map(range, schema.shape))
        rows = selection[0]
        shape = _shape(selection)
        row_bytes = max(1, 4 * math.prod(_shape(selection[1:])))
        most = max(TASK_STEPS, _SMALL_BYTES // row_bytes)
        length = task_steps(schema, min(most, _CHUNK_BYTES // row_bytes))
        groups = row_groups(_as_indices(rows), length)
        chunks: tuple[tuple[int, ...], ...] = tuple((length,) for length in shape)
        if not isinstance(rows, int):
            chunks = (tuple(map(len, groups)) or (0,), *chunks[1:])
        name = f"{variable}-{_token(source, selection)}"
        tasks = functools.partial(_block_tasks, name, source, variable, selection, groups)
        array: Self = super().__new__(cls, graph_of(name, tasks), name, chunks, dtype=np.float32)
        array._source, array._variable, array._selection = source, variable, selection
        return array

    def __reduce__(self) -> tuple[Callable[..., da.Array], tuple[object, ...]]:
        return type(self).of, (self._source, self._variable, self._selection)

    def narrowed(self, keys: tuple[Any, ...]) -> Selection | None:
        """Return what an index leaves of the selection."""
        return _compose(self._selection, keys)

    def at(self, selection: Selection) -> Self:
        """Return the same variable at another selection."""
        return type(self).of(self._source, self._variable, selection)

    def __dask_postcompute__(self) -> tuple[Callable[..., np.ndarray], tuple[object, ...]]:
        return _assemble, (self.shape,)

    @staticmethod
    def __dask_optimize__(graph: Any, keys: Any, **options: Any) -> dict[Any, Any]:
        return _into_place(dict(da.Array.__dask_optimize__(graph, keys, **options)))

    @property
    def source(self) -> Source:
        """The recording."""
        source: Source = self._source
        return source

    @property
    def selection(self) -> Selection:
        """Steps, and then along each axis of the parameter."""
        selection: Selection = self._selection
        return selection

    @property
    def selected(self) -> Selected:
        """What is selected of the recording."""
        rows, *axes = map(_as_indices, self._selection)
        return Selected(self._source, rows, *rows_and_dims(axes, self._source.reader.schema.shape))


class LazyTokens(Lazy):
    """One number a token, reduced over all steps and dims; a single token has no dimension.

    Like that of `LazyArray` its indexing reaches the disk. Make it with `LazyTokens.of`.
    """

    __slots__ = ("_numbers", "_source", "_tokens")

    @classmethod
    def of(cls, source: Source, numbers: TokenNumbers, tokens: Indices | int | None = None) -> Self:
        """Return the numbers of some tokens, all by default, as a lazy int64 array."""
        schema = source.reader.schema
        if tokens is None:
            tokens = range(schema.n_tokens) if schema.shape else 0
        name = f"{numbers.compute.__name__}-{_token(source, tokens)}"
        tasks = functools.partial(_token_tasks, name, source, numbers, tokens)
        chunks = tuple((length,) for length in _shape((tokens,)))
        array: Self = super().__new__(cls, graph_of(name, tasks), name, chunks, dtype=np.int64)
        array._source, array._numbers, array._tokens = source, numbers, tokens
        return array

    def __reduce__(self) -> tuple[Callable[..., da.Array], tuple[object, ...]]:
        return type(self).of, (self._source, self._numbers, self._tokens)

    def narrowed(self, keys: tuple[Any, ...]) -> Indices | int | None:
        """Return the tokens that an index leaves."""
        composed = _compose((self._tokens,), keys)
        return None if composed is None else composed[0]

    def at(self, tokens: Indices | int) -> Self:
        """Return the numbers of other tokens."""
        return type(self).of(self._source, self._numbers, tokens)


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


def as_dask(reduction: Reduction) -> da.Array:
    """Return a reduction as a Dask array.

    Returns
    -------
    dask.array.Array
        float64, shape `(class, number, step)`.
    """
    at, statistics = reduction.selected, reduction.statistics
    what = at.rows, at.tokens, at.dims, statistics, reduction.classes
    name = f"statistics-{_token(at.source, *what)}"
    graph: dict[Any, Task] = {}
    for index, parts in enumerate(reduction.parts()):
        keys = [(f"{name}-part", index, part) for part in range(len(parts))]
        graph |= {
            key: Task(key, part.func, *part.args) for key, part in zip(keys, parts, strict=True)
        }
        graph |= _merge_tasks((name, 0, 0, index), statistics.merge, keys)
    lengths = tuple(map(len, reduction.of_rows))
    chunks = (reduction.n_classes,), (len(statistics.combine),), lengths
    return da.Array(graph, name, chunks, dtype=np.float64)


def graph_of(
    name: str, make: Callable[[], dict[Any, Task]], depends: Sequence[da.Array] = ()
) -> HighLevelGraph:
    """Return the graph of an array whose tasks `make` returns, when Dask asks for them.

    They may refer to those of the arrays it depends on.
    """
    return HighLevelGraph.from_collections(name, _Tasks(make), depends)


def _block_tasks(
    name: str, source: Source, variable: str, selection: Selection, groups: Sequence[Indices]
) -> dict[Any, Task]:
    rows, *axes = selection
    rest = _shape(axes)
    tokens, dims = rows_and_dims([*map(_as_indices, axes)], source.reader.schema.shape)
    zeros = (0,) * len(rest)
    tasks = {}
    start = 0
    for index, group in enumerate(groups):
        whole = isinstance(rows, int)
        key = (name, *zeros) if whole else (name, index, *zeros)
        shape = rest if whole else (len(group), *rest)
        arguments = (source, variable, group, tokens, dims, shape, start)
        tasks[key] = Task(key, _compute_block, *arguments)
        start += len(group)
    return tasks


class _Memory:
    """The memory of a whole array, which threads compute its blocks into.

    Dask would put blocks together when all of them are there, and so hold the array twice.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._array: np.ndarray | None = None

    def flat(self) -> np.ndarray:
        with self._lock:
            if self._array is None:
                self._array = np.empty(self._size, np.float32)
            return self._array

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _elsewhere, ()


def _elsewhere() -> None:
    """Return what the memory of another process is here."""


def _into_place(graph: dict[Any, Any]) -> dict[Any, Any]:
    """Let the blocks of an array that is put together be computed in their places."""
    for task in list(graph.values()):
        if not (isinstance(task, Task) and task.func is _assemble):
            continue
        memory = _Memory(math.prod(task.args[-1]))
        for key in task.dependencies:
            block = graph[key]
            if isinstance(block, Task) and block.func is _compute_block:
                graph[key] = Task(key, _compute_block, *block.args, into=memory)
    return graph


def _assemble(blocks: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return the array that blocks along its first dimension make up."""
    pieces: list[np.ndarray] = list(flatten([blocks]))
    whole: np.ndarray | None = pieces[0].base
    if len(pieces) == 1:
        return pieces[0]
    if whole is not None and all(piece.base is whole for piece in pieces):
        return whole.reshape(shape)
    return np.concatenate(pieces)


def _token_tasks(
    name: str, source: Source, numbers: TokenNumbers, tokens: Indices | int
) -> dict[Any, Task]:
    rows = range(source.reader.n_rows)
    tasks: dict[Any, Task] = {}
    for index, group in enumerate(row_groups(rows, reduction_steps(source.reader.schema))):
        key = (f"{name}-part", index)
        tasks[key] = Task(key, _reduce_tokens, source, numbers, group, tokens)
    combine = functools.partial(_combine, numbers.combine)
    whole = (name, *(0 for _ in _shape((tokens,))))
    return tasks | _merge_tasks(whole, combine, list(tasks))


def _merge_tasks(
    key: tuple[Any, ...], merge: Callable[..., np.ndarray], parts: list[Any]
) -> dict[Any, Task]:
    """Return tasks that combine parts, in their order, a few at a time."""
    tasks = {}
    for level in itertools.count():
        if len(parts) <= FAN_IN:
            break
        groups = by_fan_in(parts)
        parts = [(f"{key[0]}-merge", *key[1:], level, index) for index in range(len(groups))]
        for part, group in zip(parts, groups, strict=True):
            tasks[part] = Task(part, merge, *map(TaskRef, group))
    return tasks | {key: Task(key, merge, *map(TaskRef, parts))}


def _token(source: Source, *parts: object) -> str:
    """Return a name for a graph that is the same only for the same rows of the same store."""
    reader = source.reader
    schema = reader.schema
    token: str = tokenize(str(reader.path), schema.parameter, schema.created, reader.n_rows, parts)
    return token


def _shape(axes: Sequence[Indices | int]) -> tuple[int, ...]:
    return tuple(len(axis) for axis in axes if not isinstance(axis, int))


def _as_indices(axis: Indices | int) -> Indices:
    return range(axis, axis + 1) if isinstance(axis, int) else axis


def _compute_block(
    source: Source,
    variable: str,
    rows: Indices,
    tokens: Indices,
    dims: Indices,
    shape: tuple[int, ...],
    start: int,
    into: "_Memory | None" = None,
) -> np.ndarray:
    n_elements = len(tokens) * len(dims)
    if into is None:
        flat = np.empty(len(rows) * n_elements, dtype=np.float32)
    else:
        flat = into.flat()[start * n_elements : (start + len(rows)) * n_elements]
    values = flat.reshape(len(rows), len(tokens), len(dims))
    with _one_at_a_time if values.nbytes < _SMALL_BYTES else nullcontext():
        recorded = np.asarray(rows) < source.reader.n_rows
        if recorded.all():
            _compute_rows(values, source, variable, rows, tokens, dims)
        else:
            there = np.flatnonzero(recorded)
            computed = np.empty((len(there), *values.shape[1:]), np.float32)
            _compute_rows(computed, source, variable, np.asarray(rows)[there], tokens, dims)
            values.fill(np.nan)
            values[there] = computed
    return values.reshape(shape)


_SMALL_BYTES = 2**20

_one_at_a_time = threading.Lock()
"""Held for small results. Reading a few tokens takes thousands of short calls, and threads would
hand Python's lock to and fro between them, which takes longer than what they do."""


def _compute_rows(
    values: np.ndarray,
    source: Source,
    variable: str,
    rows: Indices,
    tokens: Indices,
    dims: Indices,
) -> None:
    names = inputs(variable, source.reader.schema)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for (steps, where), window in iter_windows(source, rows, tokens, dims, names):
            for (part_rows, part_tokens), part in window.parts():
                numbers = evaluate(variable, part)
                if isinstance(where, slice):
                    values[steps, where][part_rows, part_tokens] = numbers
                else:
                    values[steps][part_rows, where[part_tokens]] = numbers


def _reduce_tokens(
    source: Source, numbers: TokenNumbers, rows: Indices, tokens: Indices | int
) -> np.ndarray:
    shape, tokens = _shape((tokens,)), _as_indices(tokens)
    reduced = np.zeros(len(tokens), dtype=np.int64)
    dims = range(source.reader.schema.n_dims)
    with np.errstate(invalid="ignore"):
        for (_, where), window in iter_windows(source, rows, tokens, dims, numbers.inputs):
            ids = np.arange(len(tokens))[where]
            for (_, part_tokens), part in window.parts():
                at = ids[part_tokens]
                reduced[at] = numbers.combine(reduced[at], numbers.compute(part))
    return reduced.reshape(shape)


def _combine(combine: np.ufunc, *parts: np.ndarray) -> np.ndarray:
    return functools.reduce(combine, parts)


def _expanded(keys: tuple[Any, ...], n_axes: int) -> tuple[Any, ...]:
    """Return an index with its ellipsis written out."""
    for at, part in enumerate(keys):
        if part is Ellipsis:
            return *keys[:at], *[slice(None)] * (n_axes - len(keys) + 1), *keys[at + 1 :]
    return keys


def is_fancy(part: Any) -> bool:
    """Return whether a part of an index is a list; of two, NumPy and Dask think differently."""
    return not isinstance(part, slice | int | np.integer)


def _compose(selection: Selection, keys: tuple[Any, ...]) -> Selection | None:
    """Apply an index to a selection; None where only Dask can answer it."""
    open_axes = [index for index, axis in enumerate(selection) if not isinstance(axis, int)]
    if len(keys) > len(open_axes):
        return None
    composed: list[Indices | int] = list(selection)
    n_fancy = 0
    for index, part in zip(open_axes, keys, strict=False):
        axis = selection[index]
        assert not isinstance(axis, int)
        narrowed = index_axis(axis, part)
        if narrowed is None:
            return None
        n_fancy += is_fancy(part)
        composed[index] = narrowed
    if n_fancy > 1:
        return None  # Dask decides what this means
    return tuple(composed)


def index_axis(axis: Indices, part: Any) -> Indices | int | None:
    """Index one axis; None where only Dask knows what the index means."""
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
