"""NumPy's memory map of raw files, one a variable: the floor, nothing is decoded or checked."""

from collections.abc import Sequence

import numpy as np

from benchmarks.peers.by_hand import Rows, reading
from benchmarks.peers.inputs import VARIABLES, Inputs
from benchmarks.peers.pages import touched_bytes

PIECE_TOKENS = 1000
"""Found by trying."""


class MappedRows:
    """Views of the files; nothing is read before it is used."""

    def __init__(self, inputs: Inputs) -> None:
        self.piece = inputs.shape[0], PIECE_TOKENS
        self.places: np.ndarray | None = None
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
    return touched_bytes(task, inputs, dict.fromkeys(VARIABLES, 2))


if __name__ == "__main__":
    from benchmarks.peers.child import main

    main(READING, mapped_bytes)
