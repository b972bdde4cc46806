"""Small stores written block by block, whose truth is a function of the row."""

from pathlib import Path

import numpy as np

from tests.support.runs import token_labels
from thimble_zarr.format.layout import Layout
from thimble_zarr.format.schema import (
    Schema,
)
from thimble_zarr.optim.adam import Adam
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.writer import StoreWriter

OPTIMIZER = Adam(name="AdamW", implementation="single", decoupled_weight_decay=True)

SCHEMA = Schema(
    shape=(11, 5),
    dims=("token", "dim"),
    dtypes={"W": "bfloat16", "grad": "float32"},
    layout=Layout(block_steps=4, chunk_tokens=3),
    optimizer=OPTIMIZER,
    parameter="wte.weight",
    software={"torch": "2.13.0"},
    created="2026-01-01T00:00:00+00:00",
    attrs={"config": {"lr": 1e-3, "corpus": None}},
)

BLOCK_STEPS = SCHEMA.layout.block_steps

COMMITS = (1, 3, 4, 8, 10)
"""Rows after each commit of `write_run`: some blocks are committed short, and again with more."""

N_ROWS = COMMITS[-1]


def block(index: int) -> dict[str, np.ndarray]:
    """Return the bits of a block, the same at every call."""
    rng = np.random.default_rng(index)
    shape = (BLOCK_STEPS, SCHEMA.n_tokens, SCHEMA.n_dims)
    return {
        "W": rng.integers(0, 2**16, shape).astype(np.uint16),
        "grad": rng.normal(size=shape).astype(np.float32),
    }


def scalars(first_row: int) -> dict[str, np.ndarray]:
    return {
        name: np.arange(first_row, first_row + BLOCK_STEPS, dtype=float) for name in SCHEMA.scalars
    }


def create(path: Path) -> StoreWriter:
    return StoreWriter.create(path, SCHEMA, labels=token_labels(), n_rows=6)


def commit(writer: StoreWriter, n_rows: int) -> None:
    """Commit the block that ends with the row before `n_rows`."""
    first_row = (n_rows - 1) // BLOCK_STEPS * BLOCK_STEPS
    bits = block(first_row // BLOCK_STEPS)
    writer.commit_block(first_row, n_rows - first_row, bits, scalars(first_row))


def write_run(path: Path) -> None:
    """Write a whole store and close it."""
    writer = create(path)
    for n_rows in COMMITS:
        commit(writer, n_rows)
    writer.close()


def check_rows(path: Path) -> int:
    """Compare every row that can be read with the truth; return how many there are."""
    reader = StoreReader.open(path)
    n_rows = reader.n_rows
    for name in SCHEMA.dtypes:
        truth = np.concatenate([block(index)[name] for index in range(-(-N_ROWS // BLOCK_STEPS))])
        np.testing.assert_array_equal(reader.read(name, (0, n_rows)), truth[:n_rows])
    if n_rows:
        for values in reader.read_scalars().values():
            np.testing.assert_array_equal(values, np.arange(n_rows))
        assert list(reader.integrity.altered_chunks((0, n_rows))) == []
        labels, expected = reader.read_labels(), token_labels()
        assert labels.text == expected.text
        np.testing.assert_array_equal(labels.count, expected.count)
    return n_rows


OPTIMIZER = Adam(name="AdamW", implementation="single", decoupled_weight_decay=True)
