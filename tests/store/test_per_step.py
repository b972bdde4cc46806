"""Per-step values of several parameters: each has its own, and what is the same is kept once."""

import gc
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from tests.support import stores
from tests.support.stores import BLOCK_STEPS
from thimble_zarr.format import layout
from thimble_zarr.format.layout import SCALAR_CHUNK_STEPS
from thimble_zarr.format.schema import array_path
from thimble_zarr.store import writer as writer_module
from thimble_zarr.store.integrity.verify import verify
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.writer import StoreWriter

SCHEMA = replace(stores.SCHEMA, shape=(2, 1), layout=replace(stores.SCHEMA.layout, chunk_tokens=2))

N_ROWS = 29

FORMAT = str(Path(writer_module.__file__).parent / "*.py")


def commit(writer: StoreWriter, n_rows: int, truth: dict[str, np.ndarray]) -> None:
    """Commit the block that ends with the row before `n_rows`."""
    first_row = (n_rows - 1) // BLOCK_STEPS * BLOCK_STEPS
    bits = {
        array_path(group, name): np.zeros((BLOCK_STEPS, 2, 1), dtype)
        for group in writer.schemas
        for name, dtype in (("W", np.uint16), ("grad", np.float32))
    }
    scalars = {path: values[first_row : first_row + BLOCK_STEPS] for path, values in truth.items()}
    writer.commit_block(first_row, n_rows - first_row, bits, scalars)


def test_each_parameter_has_its_own_values_however_alike_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is the same may part and meet again, in any block, between commits and resumptions."""
    monkeypatch.setattr(layout, "SCALAR_CHUNK_STEPS", 4 * BLOCK_STEPS)
    random, groups = np.random.default_rng(0), ("a", "b", "c")
    few = random.normal(size=(2, N_ROWS + BLOCK_STEPS))
    few[1, ::3] = np.nan
    truth = {}
    for path in [array_path(group, name) for group in groups for name in SCHEMA.scalars]:
        which = random.random(few.shape[1]) < 0.1  # where it changes from one to the other
        truth[path] = np.where(np.cumsum(which) % 2, *few)
    writer = StoreWriter.create(tmp_path / "run.zarr", dict.fromkeys(groups, SCHEMA))
    for n_rows in range(1, N_ROWS + 1):
        if n_rows % BLOCK_STEPS == 0 or random.random() < 0.2 or n_rows == N_ROWS:
            commit(writer, n_rows, truth)
        if n_rows in (9, 16, 22):
            writer.release()
            writer = StoreWriter.resume(writer.path, dict.fromkeys(groups, SCHEMA))
    writer.close()
    assert verify(writer.path).holds
    for reader in StoreReader.open_each(writer.path):
        for name, values in reader.read_scalars().items():
            path = array_path(reader.group, name)
            np.testing.assert_array_equal(values, truth[path][:N_ROWS])
            array = zarr.open_array(writer.path / path, mode="r")
            np.testing.assert_array_equal(array[...], truth[path][:N_ROWS])
        steps = zarr.open_array(writer.path / reader.group / "step", mode="r")
        assert steps[...].tolist() == list(range(N_ROWS))


@contextmanager
def kept() -> Iterator[list[int]]:
    """Measure how much memory the package takes and does not give back, in bytes.

    Threads of other tests, and imports, take some too.
    """
    tracemalloc.start(3)  # NumPy's functions are between
    found: list[int] = []
    try:
        yield found
        gc.collect()  # what was made on the way and is in cycles is not kept
        taken = tracemalloc.take_snapshot().filter_traces(
            [tracemalloc.Filter(inclusive=True, filename_pattern=FORMAT, all_frames=True)]
        )
        found.append(sum(trace.size for trace in taken.traces))
    finally:
        tracemalloc.stop()


def test_many_parameters_keep_no_values_each(tmp_path: Path) -> None:
    """Those of one group of the optimizer, whose values are the same."""
    schemas = {f"p{index}": SCHEMA for index in range(11)}
    of_their_own = len(schemas) * 8 * SCALAR_CHUNK_STEPS * len(SCHEMA.scalars)
    values = np.random.default_rng(0).normal(size=(len(SCHEMA.scalars), 2 * BLOCK_STEPS))
    truth = {
        array_path(group, name): values[index]
        for group in schemas
        for index, name in enumerate(SCHEMA.scalars)
    }
    writer = StoreWriter.create(tmp_path / "run.zarr", schemas)
    with kept() as by_commits:
        commit(writer, 4, truth)
    writer.release()
    with kept() as by_resuming:
        writer = StoreWriter.resume(tmp_path / "run.zarr", schemas)
    writer.release()
    assert by_commits[0] < of_their_own / 2
    assert by_resuming[0] < of_their_own / 2
