"""What a lazy array can be of, and how it is computed at a selection.

`StepVariable` is a variable of one run, `FreezeStep` a number for each of its tokens, and
`RunsVariable` either of them in several runs. A task is a block of steps or a few, and reads only
the chunks it needs.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from typing import Any

import dask.array as da
import numpy as np
from dask._task_spec import Task, TaskRef
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph, Layer

from thimble_zarr import tuning
from thimble_zarr.analysis.compute.reduction import (
    reduction_steps,
    task_steps,
)
from thimble_zarr.analysis.compute.source import Source
from thimble_zarr.analysis.compute.variables import evaluate, freeze_step, inputs
from thimble_zarr.analysis.compute.windows import iter_windows, row_groups
from thimble_zarr.bits import difference_dtype, encode, ordered
from thimble_zarr.format.indexing import Indices, as_range, rows_and_dims

Selection = tuple[Indices | int, ...]
"""Positions along each axis; an axis that was indexed by a number is that number, no dimension."""

Chunks = tuple[tuple[int, ...], ...]
Tasks = dict[tuple[Any, ...], Task]
Graph = tuple[HighLevelGraph, str, Chunks, type[np.generic]]
"""What a Dask array is made of: graph, name, chunks and dtype."""

_CHUNK_BYTES = 96 * 2**20
"""A chunk of a lazy variable is at most so large, if it is more than one block."""

_SMALL_BYTES = 2**20

_one_at_a_time = threading.Lock()
"""Held for small results. Reading a few tokens takes thousands of short calls, and threads would
hand Python's lock to and fro between them, which takes longer than what they do."""


@dataclass(frozen=True)
class StepVariable:
    """A stored or derived variable of a run, float32; rows beyond those recorded are NaN.

    A selection is of steps and of each axis of the parameter. With a `lattice`, which is a dtype,
    it is what the weights are among the numbers of that.
    """

    source: Source
    name: str
    lattice: str | None = None

    @property
    def dtype(self) -> type[np.generic]:
        """That of the lazy array: integers of cells."""
        if self.lattice is not None and self.name == "cell":
            return difference_dtype(self.lattice).type
        return np.float32

    @property
    def missing(self) -> float | int:
        """What it is at rows that were not recorded: NaN, or the place of that."""
        if self.lattice is None or self.dtype is np.float32:
            return math.nan
        return int(ordered(encode(np.array([math.nan]), self.lattice))[0])

    @property
    def whole(self) -> Selection:
        """All that was committed."""
        return range(self.source.reader.n_rows), *map(range, self.source.reader.schema.shape)

    def chunks(self, selection: Selection) -> Chunks:
        """Return the lengths of blocks: of one or more of the store's, and whole along the rest."""
        rows, rest = selection[0], shape_of(selection[1:])
        whole = tuple((length,) for length in rest)
        if isinstance(rows, int):
            return whole
        row_bytes = max(1, np.dtype(self.dtype).itemsize * math.prod(rest))
        most = min(
            max(tuning.TUNING.task_steps, _SMALL_BYTES // row_bytes), _CHUNK_BYTES // row_bytes
        )
        groups = row_groups(rows, task_steps(self.source.reader.schema, most))
        return tuple(map(len, groups)) or (0,), *whole

    def graph(self, selection: Selection) -> Graph:
        """Return a selection as what a Dask array is made of."""
        what = self.source.__dask_tokenize__(), self.lattice
        name, chunks = _name_of(self.name, what, selection), self.chunks(selection)
        block = partial(compute_block, self, selection, chunks)
        return _graph(name, partial(_block_tasks, name, block, chunks), chunks, self.dtype)


@dataclass(frozen=True)
class FreezeStep:
    """The last step at which each token moved, over all steps and dims of a run, int64."""

    source: Source

    @property
    def whole(self) -> Selection:
        """All tokens; the one of a scalar parameter is no dimension."""
        schema = self.source.reader.schema
        return (range(schema.n_tokens) if schema.shape else 0,)

    def graph(self, selection: Selection) -> Graph:
        """Return some tokens as what a Dask array is made of."""
        name = _name_of("freeze_step", self.source.__dask_tokenize__(), selection)
        chunks = tuple((length,) for length in shape_of(selection))
        return _graph(name, partial(self._tasks, name, selection), chunks, np.int64)

    def _tasks(self, name: str, selection: Selection) -> Tasks:
        reader, tasks = self.source.reader, {}
        steps = reduction_steps(reader.schema)
        for index, rows in enumerate(row_groups(range(reader.n_rows), steps)):
            part = (f"{name}-part", index)
            tasks[part] = Task(part, _last_moved, self, rows, selection)
        whole = (name, *[0] * len(shape_of(selection)))
        return tasks | {whole: Task(whole, _maximum, *map(TaskRef, tasks))}


@dataclass(frozen=True)
class RunsVariable:
    """The same variable of several runs, with an axis of runs before its own.

    `rows` says which row each of them has of every step, where there is an axis of steps.
    """

    runs: tuple[StepVariable | FreezeStep, ...]
    rows: tuple[Indices, ...] | None

    @property
    def source(self) -> Source:
        """The first run."""
        return self.runs[0].source

    @property
    def whole(self) -> Selection:
        """All runs and steps that there are."""
        steps = () if self.rows is None else (range(len(self.rows[0])),)
        return range(len(self.runs)), *steps, *self.runs[0].whole[len(steps) :]

    def of_run(self, run: int, selection: Selection) -> Selection:
        """Return a selection of the axes after that of the runs as one of a run."""
        if self.rows is None:
            return selection
        rows = np.asarray(self.rows[run])[np.asarray(selection[0], np.int64)]
        return as_range(rows) if rows.ndim else int(rows), *selection[1:]

    def graph(self, selection: Selection) -> Graph:
        """Return some runs, one at least, at a selection, with chunks as the first of them has."""
        runs = map(int, as_indices(selection[0]))
        chosen = [(self.runs[run], self.of_run(run, selection[1:])) for run in runs]
        of_steps = [(run, at) for run, at in chosen if isinstance(run, StepVariable)]
        if not of_steps:
            stack = da.stack([da.Array(*run.graph(at)) for run, at in chosen])
            return stack.dask, stack.name, stack.chunks, stack.dtype
        first, at_first = of_steps[0]
        chunks = first.chunks(at_first)
        blocks = [partial(compute_block, run, at, chunks) for run, at in of_steps]
        name = f"runs-{first.name}-{tokenize(self, selection)}"
        chunks = (1,) * len(blocks), *chunks
        block = partial(_block_of_run, blocks)
        return _graph(name, partial(_block_tasks, name, block, chunks), chunks)


Variable = StepVariable | FreezeStep | RunsVariable


class _Tasks(Layer):  # type: ignore[misc]  # Dask has no types
    """The tasks of an array, made when Dask asks for them: a selection has many arrays.

    `da.map_blocks` has that too, but makes every selection and every small read half as slow again.
    """

    def __init__(self, make: Callable[[], Tasks]) -> None:
        super().__init__()
        self._make = make

    @cached_property
    def _tasks(self) -> Tasks:
        return self._make()

    def is_materialized(self) -> bool:
        return "_tasks" in self.__dict__

    def get_output_keys(self) -> Set[Any]:
        return self._tasks.keys()

    def __getitem__(self, key: Any) -> Task:
        return self._tasks[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)


def _name_of(variable: str, what: tuple[object, ...], selection: Selection) -> str:
    """Return a name that nothing else has but the same selection of the same variable.

    To tell ranges and our classes apart Dask pickles each twice and reads them, which takes longer
    than all else that is done to open a dataset.
    """
    axes = [(of.start, of.stop, of.step) if isinstance(of, range) else of for of in selection]
    return f"{variable}-{tokenize(what, axes)}"


def _graph(
    name: str, make: Callable[[], Tasks], chunks: Chunks, dtype: type[np.generic] = np.float32
) -> Graph:
    return HighLevelGraph.from_collections(name, _Tasks(make)), name, chunks, dtype


def _block_tasks(name: str, block: Callable[..., np.ndarray], chunks: Chunks) -> Tasks:
    keys = [(name, *index) for index in np.ndindex(*map(len, chunks))]
    return {key: Task(key, block, key[1:]) for key in keys}


def shape_of(selection: Sequence[Indices | int]) -> tuple[int, ...]:
    """Return the lengths of the dimensions that a selection has."""
    return tuple(len(axis) for axis in selection if not isinstance(axis, int))


def as_indices(axis: Indices | int) -> Indices:
    """Return the positions along an axis, also where it is a single one."""
    return range(axis, axis + 1) if isinstance(axis, int) else axis


class Memory:
    """The memory of a whole array, which threads compute its blocks into.

    Dask would put blocks together when all of them are there, and so hold the array twice.
    """

    def __init__(self, size: int, dtype: type[np.generic]) -> None:
        self.flat = np.empty(size, dtype)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # another process has not this memory


def compute_block(
    variable: StepVariable,
    selection: Selection,
    chunks: Chunks,
    block_id: tuple[int, ...],
    into: Memory | None = None,
) -> np.ndarray:
    """Return a block of a selection, at its place in `into` if that is given."""
    rows, *axes = map(as_indices, selection)
    tokens, dims = rows_and_dims(axes, variable.source.reader.schema.shape)
    shape, row_size = shape_of(selection[1:]), len(tokens) * len(dims)
    start = 0
    if not isinstance(selection[0], int):
        start = sum(chunks[0][: block_id[0]])
        rows = rows[start : start + chunks[0][block_id[0]]]
        shape = len(rows), *shape
    size = len(rows) * row_size
    flat = np.empty(size, variable.dtype) if into is None else into.flat[start * row_size :][:size]
    values = flat.reshape(len(rows), len(tokens), len(dims))
    with _one_at_a_time if values.nbytes < _SMALL_BYTES else nullcontext():
        there = np.flatnonzero(np.asarray(rows) < variable.source.reader.n_rows)
        if len(there) == len(rows):
            _compute_rows(values, variable, rows, tokens, dims)
        else:
            computed = np.empty((len(there), *values.shape[1:]), variable.dtype)
            _compute_rows(computed, variable, np.asarray(rows)[there], tokens, dims)
            values.fill(variable.missing)
            values[there] = computed
    return values.reshape(shape)


def _block_of_run(
    blocks: Sequence[Callable[..., np.ndarray]], block_id: tuple[int, ...]
) -> np.ndarray:
    return blocks[block_id[0]](block_id[1:])[np.newaxis]


def _compute_rows(
    values: np.ndarray, variable: StepVariable, rows: Indices, tokens: Indices, dims: Indices
) -> None:
    source, name = variable.source, variable.name
    names = inputs(name, source.reader.schema)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for (steps, where), window in iter_windows(source, rows, tokens, dims, names):
            for (part_rows, part_tokens), part in window.parts():
                numbers = evaluate(name, part, variable.lattice)
                if isinstance(where, slice):
                    values[steps, where][part_rows, part_tokens] = numbers
                else:
                    values[steps][part_rows, where[part_tokens]] = numbers


def _last_moved(variable: FreezeStep, rows: Indices, selection: Selection) -> np.ndarray:
    """Return the last of some rows' steps at which tokens moved."""
    source, tokens = variable.source, as_indices(selection[0])
    dims = range(source.reader.schema.n_dims)
    last = np.zeros(len(tokens), dtype=np.int64)
    with np.errstate(invalid="ignore"):
        for (_, where), window in iter_windows(source, rows, tokens, dims, ["W"]):
            ids = np.arange(len(tokens))[where]
            for (_, part_tokens), part in window.parts():
                np.maximum.at(last, ids[part_tokens], freeze_step(part))
    return last.reshape(shape_of(selection))


def _maximum(*steps: np.ndarray) -> np.ndarray:
    return reduce(np.maximum, steps)
