"""The same variable of several runs as one Dask array whose indexing reaches the disk.

`LazyRuns` has one more axis, of runs, before those of a lazy variable. An index picks runs with its
first part and narrows each of them with the others, so that nothing of other runs is read.
"""

import functools
from collections.abc import Sequence
from typing import Any, Self

import dask.array as da
import numpy as np
from dask._task_spec import Task, TaskRef
from dask.base import tokenize

from thimble_zarr.analysis.dataset.lazy import (
    Lazy,
    LazyArray,
    LazyTokens,
    graph_of,
    index_axis,
    is_fancy,
)
from thimble_zarr.format.indexing import Indices


class LazyRuns(Lazy):
    """One variable of several runs, at selections of one shape.

    Make it with `LazyRuns.of`. A single run of it is that run's own lazy array.
    """

    __slots__ = ("_runs",)

    @classmethod
    def of(cls, runs: Sequence[LazyArray | LazyTokens]) -> Self:
        """Stack the variable of each run, one at least, all of the same shape.

        Chunks are those of the first run.
        """
        first = runs[0]
        parts = [run if run.chunks == first.chunks else run.rechunk(first.chunks) for run in runs]
        names = [part.name for part in parts]
        name = f"runs-{tokenize(names)}"
        tasks = functools.partial(_run_tasks, name, names, first.numblocks)
        chunks = ((1,) * len(runs), *first.chunks)
        array: Self = super().__new__(
            cls, graph_of(name, tasks, parts), name, chunks, dtype=first.dtype
        )
        array._runs = tuple(runs)
        return array

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).of, (self._runs,)

    def narrowed(self, keys: tuple[Any, ...]) -> tuple[Indices | int, list[Any]] | None:
        """Return the runs that an index leaves, and the selection it leaves of each of them."""
        if sum(map(is_fancy, keys)) > 1:
            return None  # Dask decides what this means
        runs = index_axis(range(len(self._runs)), keys[0])
        if runs is None or (not isinstance(runs, int) and len(runs) == 0):
            return None
        chosen = [runs] if isinstance(runs, int) else runs
        selections = [self._runs[run].narrowed(keys[1:]) for run in chosen]
        return None if any(of is None for of in selections) else (runs, selections)

    def at(self, selection: tuple[Indices | int, list[Any]]) -> da.Array:
        """Return some of the runs at other selections, or a single one as its own array."""
        runs, selections = selection
        if isinstance(runs, int):
            return self._runs[runs].at(selections[0])
        pairs = zip(runs, selections, strict=True)
        return type(self).of([self._runs[run].at(of_run) for run, of_run in pairs])


def _run_tasks(name: str, runs: Sequence[str], n_blocks: tuple[int, ...]) -> dict[Any, Task]:
    return {
        (name, index, *block): Task((name, index, *block), _with_run_axis, TaskRef((run, *block)))
        for index, run in enumerate(runs)
        for block in np.ndindex(*n_blocks)
    }


def _with_run_axis(block: np.ndarray) -> np.ndarray:
    return block[np.newaxis]
