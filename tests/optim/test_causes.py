"""Faults planted in a run of every optimizer, and called by their names.

`python -m benchmarks.faults` plants every one in each. Here each is planted in every fifth of them.
"""

import zlib
from pathlib import Path

import numpy as np
import pytest

from tests.support.drawn_runs import elementwise, record
from tests.support.faults import rewrite
from tests.support.planted import planted_in
from thimble_zarr import check
from thimble_zarr.optim.base import COUNT
from thimble_zarr.store.reader import StoreReader

N_STEPS, STEP, EVERY = 13, 6, 5

NAMES = sorted(elementwise())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_planted_in_its_run_is_called_by_its_name(name: str, tmp_path: Path) -> None:
    path = record(tmp_path / "run.zarr", name, "float32", n_steps=N_STEPS, shape=(37, 5))
    result = check(path, workers=1)
    assert result.holds
    assert result.findings == ()
    planted = planted_in(StoreReader.open(path).schema.optimizer)
    chosen = [of for of in planted if (zlib.crc32(of.encode()) + NAMES.index(name)) % EVERY == 0]
    assert chosen
    for what in chosen:
        store, random = tmp_path / f"{what}.zarr", np.random.default_rng(0)
        rewrite(path, store, lambda *held: planted[what].plant(*held, STEP, random))  # noqa: B023
        found = check(store, workers=1)
        assert not found.holds
        assert [one.code for one in found.findings] == [planted[what].code], what


def test_a_step_that_is_counted_at_the_next_one_is_no_wrong_gradient(tmp_path: Path) -> None:
    """Where nothing depends on the count. A wrong count at one step is another fault."""
    path = record(tmp_path / "run.zarr", "Adadelta", "float32", n_steps=N_STEPS, shape=(11, 5))
    codes = []
    for last in (STEP, None):

        def late(bits, scalars, last=last):
            scalars[COUNT][STEP : None if last is None else last + 1] -= 1

        store = tmp_path / f"{last}.zarr"
        rewrite(path, store, late)
        codes.append([one.code for one in check(store, workers=1).findings])
    assert "shifted-hyperparameters" not in codes[0]
    assert codes[1] == ["shifted-hyperparameters"]
