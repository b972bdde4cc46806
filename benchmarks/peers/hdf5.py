"""h5py: chunked, shuffled and lzf-compressed, read by whole chunks."""

from collections.abc import Sequence

import h5py
import numpy as np

from benchmarks.peers.by_hand import Rows, reading
from benchmarks.peers.inputs import VARIABLES, Inputs


class HDF5Rows:
    """The datasets of one file."""

    def __init__(self, inputs: Inputs) -> None:
        file = h5py.File(inputs.hdf5_file, "r")
        self._datasets = {name: file[name] for name in VARIABLES}
        self.piece = self._datasets["W"].chunks[:2]
        self.places: np.ndarray | None = None

    def read(
        self, names: Sequence[str], rows: tuple[int, int], tokens: tuple[int, int]
    ) -> list[np.ndarray]:
        """Return new arrays."""
        return [self._datasets[name][slice(*rows), slice(*tokens)] for name in names]


def open_rows(inputs: Inputs) -> Rows:
    return HDF5Rows(inputs)


READING = reading(open_rows)

if __name__ == "__main__":
    from benchmarks.peers.child import main

    main(READING)
