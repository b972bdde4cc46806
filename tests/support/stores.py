"""Small stores written block by block, whose truth is a function of the row.

They are plain, or within `coded` of the coding `predicted`, of which most rows follow from the ones
before and some do not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.support.runs import token_labels
from thimble_zarr.format.layout import Layout
from thimble_zarr.format.schema import (
    Schema,
)
from thimble_zarr.format.stored_array import coding_of
from thimble_zarr.optim.base import COUNT
from thimble_zarr.optim.programs.registry import program_of
from thimble_zarr.optim.specs.adam import Adam
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

PLAIN = SCHEMA

_DTYPES = dict.fromkeys(OPTIMIZER.variables, "bfloat16")

PREDICTED = replace(SCHEMA, dtypes=_DTYPES, coding=coding_of("predicted", OPTIMIZER, _DTYPES))

CODINGS = {"plain": PLAIN, "predicted": PREDICTED}

both_codings = pytest.mark.parametrize("coding", CODINGS, indirect=True)
"""Runs a test on stores of each coding."""

BLOCK_STEPS = SCHEMA.layout.block_steps

COMMITS = (1, 3, 4, 8, 10)
"""Rows after each commit of `write_run`: some blocks are committed short, and again with more."""

N_ROWS = COMMITS[-1]

OFF = (2, 7, 3)
"""Row of a block, token and dim of a weight that somebody else had a hand on."""


@contextmanager
def coded(coding: str) -> Iterator[None]:
    """Write stores of a coding."""
    global SCHEMA
    before, SCHEMA = SCHEMA, CODINGS[coding]
    try:
        yield
    finally:
        SCHEMA = before


def block(index: int) -> dict[str, np.ndarray]:
    """Return the bits of a block, the same at every call."""
    if SCHEMA is not PLAIN:
        return {name: bits.copy() for name, bits in _steps(index).items()}
    rng = np.random.default_rng(index)
    shape = (BLOCK_STEPS, SCHEMA.n_tokens, SCHEMA.n_dims)
    return {
        "W": rng.integers(0, 2**16, shape).astype(np.uint16),
        "grad": rng.normal(size=shape).astype(np.float32),
    }


@cache
def _steps(index: int) -> dict[str, np.ndarray]:
    """Return a block of which the optimizer took every step, and somebody changed a weight."""
    rng, shape = np.random.default_rng(index), (BLOCK_STEPS, SCHEMA.n_tokens, SCHEMA.n_dims)
    drawn = {
        name: rng.normal(size=shape).astype(np.float32).view(np.uint32) >> 16
        for name in OPTIMIZER.variables
    }
    rows = {name: bits.astype(np.uint16) for name, bits in drawn.items()}
    rows["exp_avg_sq"] &= 0x7FFF
    program, grads = program_of(OPTIMIZER, _DTYPES), rows["grad"]
    numbers = scalars(index * BLOCK_STEPS)
    for row in range(1, BLOCK_STEPS):
        before = {name: rows[name][row - 1] for name in program.variables}
        step = {name: float(values[row]) for name, values in numbers.items()}
        for name, bits in program.step(before, grads[row], step).items():
            rows[name][row] = bits
        if row == OFF[0]:
            rows["W"][OFF] ^= 1
    return rows


def scalars(first_row: int, n_rows: int = BLOCK_STEPS) -> dict[str, np.ndarray]:
    """Return the per-step values of rows."""
    rows = np.arange(first_row, first_row + n_rows, dtype=float)
    if SCHEMA is PLAIN:
        return {name: rows.copy() for name in SCHEMA.scalars}
    constant = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    values = {name: np.full(n_rows, value) for name, value in constant.items()}
    values |= {"loss": rows, COUNT: rows, "learning_rate": 1e-3 * rows}
    steps = [{name: float(of[row]) for name, of in values.items()} for row in range(n_rows)]
    derived = [OPTIMIZER.derived(step) for step in steps]
    for name in SCHEMA.numbers.keys() - values.keys():
        values[name] = np.array([of[name] for of in derived])
    return {name: values[name].copy() for name in SCHEMA.numbers}


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
        truth_of = scalars(0, n_rows)
        for name, values in reader.read_numbers().items():
            np.testing.assert_array_equal(values, truth_of[name])
        assert list(reader.integrity.altered_chunks((0, n_rows))) == []
        labels, expected = reader.read_labels(), token_labels()
        assert labels.text == expected.text
        np.testing.assert_array_equal(labels.count, expected.count)
    return n_rows
