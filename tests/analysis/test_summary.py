"""The numbers of a summary, against those computed in the plainest way (`summary_oracle`)."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import thimble_zarr
from tests.support.runs import N_TOKENS, record
from tests.support.summary_oracle import reference_summary
from tests.support.tuned import tuned
from thimble_zarr import every, open_dataset, summary
from thimble_zarr.errors import ConfigError, SelectionError


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tasks, windows and parts of a toy run."""
    tuned(monkeypatch, summary_elements=4 * N_TOKENS, cached_elements=40, part_bytes=240)


def groups_of(ds: xr.Dataset, **named: list[int]) -> dict[str, np.ndarray]:
    groups = {name: ds[name].values for name in ("dead", "live") if name in ds.coords}
    groups["all"] = np.ones(ds.W.shape[1], bool)
    return groups | {name: np.isin(np.arange(ds.W.shape[1]), ids) for name, ids in named.items()}


def assert_same(found: xr.Dataset, expected: xr.Dataset) -> None:
    """Compare numbers to 1e-6, counts and steps exactly."""
    assert {*found.data_vars} == {*expected.data_vars}
    for name, reference in expected.data_vars.items():
        assert found[name].dims == reference.dims
        tolerance = 0 if reference.dtype.kind in "biu" or name.startswith("n_") else 1e-6
        np.testing.assert_allclose(
            found[name].values.astype(float),
            reference.values.astype(float),
            rtol=tolerance,
            atol=1e-6 if name.startswith("cosine") else 0,
            err_msg=name,
        )
    for name in expected.coords:
        np.testing.assert_array_equal(found[name], expected[name])


def expected_of(
    path: Path, native: str | None = None, **named: list[int]
) -> tuple[xr.Dataset, xr.Dataset]:
    ds = open_dataset(path)
    return ds, reference_summary(ds, native or ds.attrs["dtype"], groups_of(ds, **named))


DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_is_that_of_the_plain_computation(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    record(path, dtype=dtype, weight_decay=0.1)
    _, expected = expected_of(path, mine=[2, 3, 7])
    assert_same(summary(path, groups={"mine": [2, 3, 7]}), expected)


def test_numbers_do_not_depend_on_how_the_run_is_cut(
    toy_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = summary(toy_path, place=tmp_path / "cut.zarr", workers=2)
    assert len(cut.norm_W.chunks[0]) > 2
    tuned(monkeypatch, summary_elements=2**20)
    whole = summary(toy_path, place=tmp_path / "whole.zarr", workers=1)
    assert_same(cut, whole)
    assert_same(whole, expected_of(toy_path)[1])


def test_steps_are_measured_in_the_lattice_of_another_dtype(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    record(path, dtype=torch.float32)
    found = summary(path, dtype="bfloat16")
    assert_same(found, expected_of(path, "bfloat16")[1])
    assert float(found.max_ulp.max()) < float(summary(path).max_ulp.max()) / 1000
    with pytest.raises(ConfigError, match="no dtype int8"):
        summary(path, dtype="int8")
