"""The bound on the memory of a check: what a task takes, and so how many run side by side.

Integer arithmetic in bytes, from shapes alone. A task holds a window (`windows`), what the
replay of one of its rows takes, temporaries of one part, and the few numbers a step that are its
result. None of it grows with the steps of a run; its table does.
"""

import warnings
from dataclasses import dataclass

from thimble_zarr import tuning
from thimble_zarr.analysis.compute.reduction import Reduction, reduction_steps
from thimble_zarr.analysis.compute.served import held_bytes
from thimble_zarr.analysis.compute.windows import window_rows, window_tokens
from thimble_zarr.bits import storage_dtype
from thimble_zarr.errors import ConfigError
from thimble_zarr.format.layout import human_bytes
from thimble_zarr.format.schema import Schema

STEP_BYTES = 768
"""What the table takes a step while it is made; about 250 of them are the table itself."""

_PART_ARRAYS = 32
"""Arrays of a part that exist at once: inputs, both sides of each comparison, temporaries."""

_STEP_TENSORS = 8
"""Tensors of a row, in the dtype of the weights, that torch's program makes for itself."""

_TORCH_BYTES = 250 * 10**6
"""What torch takes in each process that imports it."""

_WAITING = 17
"""Results that wait to be merged."""

_STEP_NUMBERS = 32
"""Numbers a step that a task returns for each class of tokens."""


_FREE_SHARE = 4, 5
"""Of the free memory a check takes four fifths at most, unless it is told how much."""

_FIRST_USE_BYTES = 32 * 10**6
"""What libraries still take when they are first used, measured on Linux."""


@dataclass(frozen=True)
class Needs:
    """What a pass over a recording takes, in bytes.

    Attributes
    ----------
    task_bytes
        A task while it runs, and results that wait to be combined.
    table_bytes
        Its result, with all it is made of, and what else grows with steps.
    n_tasks
        Tasks there are.
    what
        What takes it, in words.
    """

    task_bytes: int
    table_bytes: int
    n_tasks: int = 1
    what: str = "the check"

    @classmethod
    def of(cls, reduction: Reduction, *, replay: bool) -> "Needs":
        """Return what the reduction of an audit takes."""
        rows, tokens = reduction.selected.rows, reduction.selected.tokens
        schema, n_classes = reduction.selected.source.reader.schema, reduction.n_classes
        table_bytes = STEP_BYTES * len(rows) * n_classes
        if replay:  # the checksums of the chunks, which are looked through
            layout = schema.layout
            n_chunks = layout.shard_tokens(schema.n_tokens) // layout.chunk_tokens
            table_bytes += 8 * len(schema.dtypes) * n_chunks * len(rows) // layout.block_steps
        of_task = task_bytes(
            schema, n_rows=len(rows), n_tokens=len(tokens), n_classes=n_classes, replay=replay
        )
        of_task += held_bytes(reduction.selected.source.reader, tokens, window_tokens(schema))
        if replay and reduction.selected.source.program is not None:
            of_task += _TORCH_BYTES  # which each process imports when it meets a difference
        return cls(
            of_task,
            table_bytes,
            n_tasks=reduction.n_parts,
        )

    def n_at_once(self, memory_bytes: int, held_bytes: int, most: int) -> int:
        """Return how many tasks may run at once, in so many bytes for the process in all.

        `held_bytes` are those that it takes already. At most `most` are returned.

        Raises
        ------
        ConfigError
            If not even one task fits.
        """
        least = held_bytes + self.table_bytes + self.task_bytes
        if memory_bytes < least:
            raise ConfigError(
                f"{self.what} needs at least {human_bytes(least)} of memory and may use only "
                f"{human_bytes(memory_bytes)}: Python and its libraries take "
                f"{human_bytes(held_bytes)}, the table {human_bytes(self.table_bytes)}, and "
                f"computing it {human_bytes(self.task_bytes)}"
            )
        room = memory_bytes - held_bytes - self.table_bytes
        return min(most, room // self.task_bytes)


def task_bytes(
    schema: Schema, *, n_rows: int, n_tokens: int, n_classes: int = 1, replay: bool = True
) -> int:
    """Return what one running task of an accounting takes at most.

    That is the bits of a window of all variables, and its row before; a chunk stored and decoded;
    with the replay the states after each step, and inputs, outputs and temporaries of one step; one
    part's arrays; the results that wait to be merged, for each class of tokens. And half as much
    again, which the allocator keeps between arrays.
    """
    n_tokens = min(n_tokens, window_tokens(schema))
    steps = min(window_rows(schema, n_tokens), n_rows)
    row_elements = n_tokens * schema.n_dims
    itemsizes = {name: storage_dtype(native).itemsize for name, native in schema.dtypes.items()}
    item_bytes, weight_bytes = sum(itemsizes.values()), itemsizes["W"]
    layout = schema.layout
    chunk_bytes = layout.block_steps * layout.chunk_tokens * schema.n_dims * max(itemsizes.values())
    # A row before the first of a block is of another block.
    taken = (steps + 1) * row_elements * item_bytes + 2 * chunk_bytes
    if replay:
        taken += steps * row_elements * (item_bytes - itemsizes["grad"])
        taken += row_elements * (2 * item_bytes + _STEP_TENSORS * weight_bytes)
    taken += _PART_ARRAYS * max(tuning.TUNING.part_bytes * 5 // 4, 8 * schema.n_dims)
    n_results = min(reduction_steps(schema), n_rows) * n_classes * _STEP_NUMBERS
    taken += _WAITING * 8 * n_results
    return taken * 3 // 2


def tasks_at_once(needs: Needs, memory_bytes: int | None, most: int, *, needs_torch: bool) -> int:
    """Return how many tasks fit into memory, or into what is free if no bound is given.

    Memory that is only short just now is worth a warning. `needs_torch`: all do.
    """
    import psutil

    if needs_torch:
        import torch  # noqa: F401  # what it takes counts
    held_bytes = psutil.Process().memory_info().rss + _FIRST_USE_BYTES
    if memory_bytes is not None:
        return needs.n_at_once(memory_bytes, held_bytes, most)
    share, whole = _FREE_SHARE
    free_bytes = psutil.virtual_memory().available * share // whole
    try:
        return needs.n_at_once(held_bytes + free_bytes, held_bytes, most)
    except ConfigError as error:
        warnings.warn(f"memory is short: {error}", stacklevel=2)
        return 1
