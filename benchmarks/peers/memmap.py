"""NumPy's memory map of raw files, one a variable: the floor, nothing is decoded or checked."""

from collections.abc import Sequence

import numpy as np

from benchmarks.peers.by_hand import MOMENTS, Rows, reading
from benchmarks.peers.inputs import EXACT, SMALL, TABLES, VARIABLES, Inputs

PIECE_TOKENS = 1000
"""Found by trying."""

PAGE_BYTES = 4096


class MappedRows:
    """Views of the files; nothing is read before it is used."""

    def __init__(self, inputs: Inputs) -> None:
        self.piece = inputs.shape[0], PIECE_TOKENS
        self._maps = {
            # Copy on write, so that torch takes it; nothing writes.
            name: np.memmap(inputs.raw_file(name), np.uint16, "c", shape=inputs.shape)
            for name in VARIABLES
        }

    def read(
        self, names: Sequence[str], rows: tuple[int, int], tokens: tuple[int, int]
    ) -> list[np.ndarray]:
        """Return views."""
        return [np.asarray(self._maps[name])[slice(*rows), slice(*tokens)] for name in names]


def open_rows(inputs: Inputs) -> Rows:
    return MappedRows(inputs)


READING = reading(open_rows)


def mapped_bytes(task: str, inputs: Inputs) -> int:
    """Return the bytes of the pages that a task touches."""
    n_rows, n_tokens, n_dims = inputs.shape
    row_bytes = n_tokens * n_dims * 2
    ids = {TABLES[0]: inputs.dead, SMALL[0]: inputs.random[:1], SMALL[1]: inputs.random}.get(task)
    n_variables = len(VARIABLES if task in (EXACT, SMALL[0], SMALL[2]) else MOMENTS)
    if ids is None:
        return n_variables * row_bytes * (1 if task == SMALL[2] else n_rows)
    starts = ids * (n_dims * 2)
    pages = sum(len(np.unique((row * row_bytes + starts) // PAGE_BYTES)) for row in range(n_rows))
    return n_variables * pages * PAGE_BYTES


if __name__ == "__main__":
    from benchmarks.peers.child import main

    main(READING, mapped_bytes)
