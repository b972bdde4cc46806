"""What a mapped file costs to read: the kernel counts no bytes, so its pages are counted here."""

from collections.abc import Mapping

import numpy as np

from benchmarks.peers.inputs import SMALL, TABLES, VARIABLES, Inputs

PAGE_BYTES = 4096


def touched_bytes(task: str, inputs: Inputs, itemsizes: Mapping[str, int]) -> int:
    """Return the bytes of the pages that a task must touch of `(step, token, dim)` files.

    Parameters
    ----------
    task
        One of `TASKS`.
    inputs
        The run.
    itemsizes
        Bytes an element, by variable.
    """
    ids = {TABLES[0]: inputs.dead, SMALL[0]: inputs.random[:1], SMALL[1]: inputs.random}.get(task)
    names = set(VARIABLES) - ({"grad"} if task in (*TABLES, SMALL[1]) else set())
    n_rows = 1 if task == SMALL[2] else inputs.shape[0]
    return sum(_of_variable(inputs, n_rows, ids, itemsizes[name]) for name in names)


def _of_variable(inputs: Inputs, n_rows: int, ids: np.ndarray | None, itemsize: int) -> int:
    _, n_tokens, n_dims = inputs.shape
    token_bytes = n_dims * itemsize
    if ids is None:
        return n_rows * n_tokens * token_bytes
    places = ids * token_bytes
    row_bytes = n_tokens * token_bytes
    pages = sum(len(np.unique((row * row_bytes + places) // PAGE_BYTES)) for row in range(n_rows))
    return pages * PAGE_BYTES
