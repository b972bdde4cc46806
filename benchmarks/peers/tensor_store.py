"""TensorStore on our store, by hand: reads that are aligned to chunks and overlap."""

from collections.abc import Sequence

import numpy as np
import tensorstore

from benchmarks.peers.by_hand import Rows, reading
from benchmarks.peers.inputs import VARIABLES, Inputs


class TensorStoreRows:
    """The arrays of the store."""

    def __init__(self, inputs: Inputs) -> None:
        opening = {
            name: tensorstore.open(
                {
                    "driver": "zarr3",
                    "kvstore": {"driver": "file", "path": f"{inputs.store}/{name}"},
                },
                read=True,
            )
            for name in (*VARIABLES, "token")
        }
        self._arrays = {name: opened.result() for name, opened in opening.items()}
        n_steps, n_tokens, _ = np.array(self._arrays["W"].chunk_layout.read_chunk.shape).tolist()
        self.piece: tuple[int, int] = n_steps, n_tokens
        self.places: np.ndarray | None = np.argsort(self._arrays["token"].read().result())

    def read(
        self, names: Sequence[str], rows: tuple[int, int], tokens: tuple[int, int]
    ) -> list[np.ndarray]:
        """Return new arrays, of all variables at once."""
        futures = [self._arrays[name][slice(*rows), slice(*tokens)].read() for name in names]
        return [np.asarray(future.result()) for future in futures]


def open_rows(inputs: Inputs) -> Rows:
    return TensorStoreRows(inputs)


READING = reading(open_rows)

if __name__ == "__main__":
    from benchmarks.peers.child import main

    main(READING)
