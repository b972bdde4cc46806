"""Where the numbers of a summary are computed: rows after rows, in forked processes.

A task is the rows of a chunk, of all tokens. It writes the numbers of tokens, and returns the few
of groups, which are written for several tasks at once.
"""

import contextlib
from collections import deque
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Self

import numpy as np

from thimble_zarr import tuning
from thimble_zarr.analysis.compute.memory import Needs
from thimble_zarr.analysis.compute.run import Progress, Resources, processes
from thimble_zarr.analysis.compute.source import Selected
from thimble_zarr.analysis.compute.windows import window_tokens
from thimble_zarr.analysis.summary.contents import LAST_STEPS, Contents
from thimble_zarr.analysis.summary.groups import Groups
from thimble_zarr.analysis.summary.kept import BATCH, Kept, Note
from thimble_zarr.analysis.summary.means import Arrays
from thimble_zarr.analysis.summary.numbers import numbers_of
from thimble_zarr.analysis.summary.passes import held_bytes
from thimble_zarr.bits import storage_dtype
from thimble_zarr.format.layout import split_range

if TYPE_CHECKING:
    import xarray as xr

_MAX_CHUNK_ROWS = 512

_PART_ARRAYS = 16
"""Arrays of a part that exist at once."""


def chunk_rows(n_tokens: int) -> int:
    """Return the rows of a task: a power of two, so many that what they give fits the memory."""
    most = min(_MAX_CHUNK_ROWS, tuning.TUNING.summary_elements // n_tokens)
    return 1 << max(0, most.bit_length() - 1)


def bring_up_to_date(
    kept: Kept,
    selected: Selected,
    groups: Groups,
    native: str,
    resources: Resources,
    progress: Progress | None = None,
) -> "xr.Dataset":
    """Have a summary have all selected rows, and these groups besides those that it has already.

    Rows that it has and that are still those of the recording are left as they are. Who comes
    second waits, and then finds less to do. The summary is returned, opened before somebody else
    may change it.
    """
    with kept.locked():
        kept.check_place()
        wanted = _Wanted.of(kept, selected, groups, native)
        if not wanted.tasks:
            return kept.open()
    size = min(wanted.chunk_rows, len(selected.rows))
    plan = needs(selected, wanted.groups, n_rows=size, n_tasks=len(wanted.tasks))
    # Forked first, so that the lock is not theirs, too.
    with processes(plan, resources) as executor, kept.locked(), contextlib.ExitStack() as stack:
        # If one fails, others end before somebody else may write.
        stack.callback(executor.shutdown, cancel_futures=True)
        wanted = _Wanted.of(kept, selected, groups, native)
        if wanted.tasks:
            _write(kept, wanted, executor, progress)
        return kept.open()


def _write(kept: Kept, wanted: "_Wanted", executor: Executor, progress: Progress | None) -> None:
    """Compute the rows that are not there, and write them."""
    selected, tasks = wanted.selected, wanted.tasks
    into = kept.aside if wanted.first_row == 0 else kept
    if wanted.first_row == 0:
        into.begin(selected, wanted.groups, chunk_rows=wanted.chunk_rows)
    else:
        into.extend(selected.steps)
    compute = partial(_compute_rows, selected, wanted.groups, wanted.native, into)
    running = deque((rows, executor.submit(compute, rows)) for rows in tasks)
    import thimble_zarr.analysis.dataset.open  # noqa: F401  # xarray and Dask, while others compute

    last = dict.fromkeys(LAST_STEPS, np.zeros(len(selected.tokens), np.int64))
    while running:
        first, _ = running[0][0]
        batch, of_groups = first // wanted.batch_rows, []
        while running and running[0][0][0] // wanted.batch_rows == batch:
            # Nobody else has a task, so that its result is gone when it is written.
            numbers, steps = running.popleft()[1].result()
            last = {name: np.maximum(of, steps[name]) for name, of in last.items()}
            of_groups.append(numbers)
            if progress is not None:
                progress(len(tasks) - len(running), len(tasks))
        into.write_of_groups(of_groups, first)
    into.write_last_steps(last)
    into.finish(wanted.note)
    if into is not kept:
        kept.become(into)


@dataclass(frozen=True)
class _Wanted:
    """What is to be there: `groups`, and the rows from `first_row` on, which are not."""

    selected: Selected
    groups: Groups
    native: str
    first_row: int
    chunk_rows: int

    @classmethod
    def of(cls, kept: Kept, selected: Selected, groups: Groups, native: str) -> Self:
        """Look at what is there: all of it can be used, or nothing."""
        note, length = kept.note, chunk_rows(len(selected.tokens))
        if note is not None:
            there, n_same = kept.groups(note), selected.source.reader.rows_since(note.identity)
            if n_same:  # those of another run mean other tokens
                groups = groups.joined(there)
            same_rows = n_same >= note.n_rows and not kept.is_ahead(note)
            if same_rows and note.ulp_dtype == native and groups == there:
                return cls(selected, groups, native, note.n_rows, note.chunk_rows)
        return cls(selected, groups, native, 0, length)

    @property
    def tasks(self) -> list[tuple[int, int]]:
        """The rows of each task."""
        return [*split_range(self.first_row, len(self.selected.rows), self.chunk_rows)]

    @property
    def batch_rows(self) -> int:
        """Rows of several tasks, of which the numbers of groups are in one chunk."""
        return BATCH * self.chunk_rows

    @property
    def note(self) -> Note:
        """What will be there."""
        return Note(
            identity=self.selected.source.reader.identity,
            n_rows=len(self.selected.rows),
            ulp_dtype=self.native,
            groups=self.groups.names,
            chunk_rows=self.chunk_rows,
        )


def needs(selected: Selected, groups: Groups, n_rows: int, n_tasks: int) -> Needs:
    """Return what tasks of so many rows take."""
    schema, contents = selected.source.reader.schema, Contents(selected.source.reader.schema)
    n_tokens, layout = len(selected.tokens), schema.layout
    n_numbers = len(contents.of_token) + len(contents.of_member) * len(groups.names)
    taken = n_rows * n_tokens * (4 * n_numbers + 8 + 3 * 4)
    n_at_once = min(n_tokens, window_tokens(schema))
    itemsizes = [storage_dtype(schema.dtypes[name]).itemsize for name in contents.inputs]
    taken += (layout.block_steps + 1) * n_at_once * schema.n_dims * sum(itemsizes)
    taken += 2 * layout.block_steps * layout.chunk_tokens * schema.n_dims * max(itemsizes)
    taken += held_bytes(selected)
    taken += _PART_ARRAYS * max(tuning.TUNING.summary_part_bytes * 5 // 4, 8 * schema.n_dims)
    n_classes = groups.has_class.shape[1]
    taken += 8 * 6 * n_rows * schema.n_dims * (n_classes + len(groups.names))
    return Needs(taken * 5 // 4, 8 * len(LAST_STEPS) * n_tokens * 2, n_tasks, "the summary")


def _compute_rows(
    selected: Selected, groups: Groups, native: str, kept: Kept, rows: tuple[int, int]
) -> tuple[Arrays, Arrays]:
    """Compute rows and write what tokens have; return what groups have, and the last steps."""
    of_rows = replace(selected, rows=selected.rows[slice(*rows)])
    numbers = numbers_of(of_rows, groups, native)
    last = {name: numbers.pop(name) for name in LAST_STEPS}
    contents = Contents(selected.source.reader.schema)
    of_tokens = {name: numbers.pop(name) for name in (*contents.of_token, *contents.of_member)}
    kept.write(of_tokens, slice(*rows))
    return numbers, last
