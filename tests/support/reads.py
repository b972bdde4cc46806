"""What a lazy array reads and computes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import dask
import numpy as np
import pytest
from hypothesis import strategies as st

from thimble_zarr.store.coding.shard_codec import ShardFile
from thimble_zarr.store.rows import OpenedRows

VARIABLES = (
    "W",
    "grad",
    "exp_avg",
    "exp_avg_sq",
    "delta_W",
    "update",
    "decay",
    "residual",
    "adam_update",
    "adam_decay",
    "adam_residual",
    "m_hat",
    "v_hat",
    "rounding",
    "unexplained",
    "moved",
    "ulp",
    "displacement_ulp",
    "stalled",
)


@contextmanager
def no_computing() -> Iterator[None]:
    def scheduler(*args: object, **kwargs: object) -> None:
        raise AssertionError("Dask was asked to compute")

    with dask.config.set(scheduler=scheduler):
        yield


def axis_keys(length: int) -> st.SearchStrategy[object]:
    positions = st.integers(-length, length - 1)
    return st.one_of(
        st.slices(length),
        positions,
        st.lists(positions, max_size=2 * length),
        st.lists(st.booleans(), min_size=length, max_size=length).map(np.array),
    )


class Reads:
    """Counts what is read from a store."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, tuple[int, int], list[int]]] = []
        self.chunks: list[tuple[str, int]] = []
        real, real_decode = OpenedRows.read_together, ShardFile.decode

        def read_together(
            opened: OpenedRows, outs: Mapping[str, np.ndarray], rows: tuple[int, int], *tokens: Any
        ) -> Mapping[str, np.ndarray]:
            self.calls.extend((name, rows, np.asarray(*tokens).tolist()) for name in outs)
            return real(opened, outs, rows, *tokens)

        def decode(shard: ShardFile, chunk: int, *options: object) -> np.ndarray:
            self.chunks.append(("/".join(shard.key.split("/")[-2:]), chunk))
            return real_decode(shard, chunk, *options)

        monkeypatch.setattr(OpenedRows, "read_together", read_together)
        monkeypatch.setattr(ShardFile, "decode", decode)

    @property
    def elements(self) -> int:
        return sum((rows[1] - rows[0]) * len(tokens) for _, rows, tokens in self.calls)
