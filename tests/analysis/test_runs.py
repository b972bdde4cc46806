"""Several runs as one dataset, against the datasets of each."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from tests.support.reads import VARIABLES, Reads, axis_keys, no_computing
from tests.support.runs import N_DIMS, N_STEPS, N_TOKENS, record, token_labels
from thimble_zarr import TokenLabels, accounting, open_dataset, open_datasets
from thimble_zarr.analysis.audit.accounting import selected
from thimble_zarr.analysis.dataset.lazy import LazyArray
from thimble_zarr.analysis.findings import find_causes
from thimble_zarr.analysis.selection import stores_at
from thimble_zarr.analysis.verdict import verdict
from thimble_zarr.errors import ConfigError, NotAStoreError, SelectionError, StoreError

N_SHORT = 6
"""Steps of the second run, which ends within a block."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: one is shorter, and one has blocks of two steps, not of four."""
    directory = tmp_path_factory.mktemp("runs")
    record(directory / "a" / "run.zarr")
    record(directory / "b" / "run.zarr", lr=3e-2, n_steps=N_SHORT)
    record(directory / "c" / "run.zarr", dtype=torch.float32)
    return directory


@pytest.fixture(scope="module")
def stores(directory: Path) -> list[str]:
    return [str(directory / seed / "run.zarr") for seed in "abc"]


@pytest.fixture(scope="module")
def ds(directory: Path) -> xr.Dataset:
    return open_datasets(directory / "*" / "run.zarr")


@pytest.fixture(scope="module")
def loaded(ds: xr.Dataset) -> xr.Dataset:
    return ds.compute()


# --- what is opened ------------------------------------------------------------------------------


def test_each_run_of_the_dataset_is_that_run(ds: xr.Dataset, stores: list[str]) -> None:
    assert ds.run.values.tolist() == stores
    assert ds.W.dims == ("run", "step", "token", "dim")
    assert ds.freeze_step.dims == ("run", "token")
    assert ds.loss.dims == ("run", "step")
    assert ds.step.values.tolist() == list(range(N_STEPS + 1))
    for store in stores:
        alone = open_dataset(store)
        of_run = ds.sel(run=store)
        assert set(of_run.data_vars) == set(alone.data_vars)
        for name in alone.data_vars:
            found = of_run[name].isel(step=slice(alone.sizes["step"]), missing_dims="ignore")
            np.testing.assert_array_equal(found.values, alone[name].values, err_msg=name)


def test_steps_that_a_run_does_not_have_are_missing(loaded: xr.Dataset, stores: list[str]) -> None:
    beyond = loaded.sel(run=stores[1], step=slice(N_SHORT + 1, None))
    for name in (*VARIABLES, "loss", "learning_rate"):
        assert beyond[name].size
        assert np.isnan(beyond[name]).all()


def test_attributes_that_are_the_same_stay(ds: xr.Dataset) -> None:
    assert ds.attrs["optimizer"] == "AdamW"
    assert not {"dtype", "thimble", "block_steps"} & set(ds.attrs)


def test_coordinates_that_are_the_same_are_of_the_tokens(ds: xr.Dataset) -> None:
    for name in ("token", "n_occurrences", "live", "dead", "text"):
        assert ds[name].dims == ("token",)


def test_coordinates_that_differ_are_of_the_runs(tmp_path: Path, toy_path: Path) -> None:
    labels = token_labels(n_live=5)
    record(tmp_path / "a.zarr", n_steps=1, recorder_options={"labels": labels})
    ds = open_datasets([toy_path, tmp_path / "a.zarr"])
    for name in ("n_occurrences", "live", "dead"):
        assert ds[name].dims == ("run", "token")
    assert ds.text.dims == ("token",)
    of_run = ds.sel(run=str(tmp_path / "a.zarr"))
    assert of_run.sel(token=of_run.dead).token.values.tolist() == labels.dead.nonzero()[0].tolist()


def test_what_some_run_lacks_is_left_out(tmp_path: Path, toy_path: Path) -> None:
    labels = TokenLabels(live=token_labels().live)
    options = {"labels": labels}
    record(tmp_path / "a.zarr", n_steps=1, amsgrad=True, recorder_options=options)
    ds = open_datasets([toy_path, tmp_path / "a.zarr"])
    assert "max_exp_avg_sq" not in ds
    assert set(ds.coords) == {"run", "step", "token", "live"}


def test_one_run_may_be_opened(toy_path: Path) -> None:
    for paths in (toy_path, str(toy_path), [toy_path, str(toy_path)]):
        ds = open_datasets(paths)
        assert ds.run.values.tolist() == [str(toy_path)]
        assert ds.sizes["step"] == N_STEPS + 1


# --- selecting -----------------------------------------------------------------------------------


@given(
    st.sampled_from(VARIABLES),
    axis_keys(3),
    axis_keys(N_STEPS + 1),
    axis_keys(N_TOKENS),
    axis_keys(N_DIMS),
)
def test_any_selection_is_that_of_the_loaded_array(
    ds: xr.Dataset,
    loaded: xr.Dataset,
    name: str,
    run: object,
    step: object,
    token: object,
    dim: object,
) -> None:
    selected = ds[name].isel(run=run, step=step, token=token, dim=dim)
    expected = loaded[name].isel(run=run, step=step, token=token, dim=dim)
    if expected.sizes.get("run", 1):
        assert type(selected.data) is LazyArray
    assert selected.dtype == np.float32
    assert selected.data.shape == expected.shape
    np.testing.assert_array_equal(selected.values, expected.values)


@given(axis_keys(3), axis_keys(N_TOKENS))
def test_numbers_of_the_tokens_are_selected_too(
    ds: xr.Dataset, loaded: xr.Dataset, run: object, token: object
) -> None:
    selected = ds.freeze_step.isel(run=run, token=token)
    np.testing.assert_array_equal(selected, loaded.freeze_step.isel(run=run, token=token))


def test_numpy_style_indexing_of_the_bare_array(ds: xr.Dataset, loaded: xr.Dataset) -> None:
    lazy, array = ds.delta_W.data, loaded.delta_W.values
    for key in (1, ..., (..., 2), (slice(2), 3, ..., 1), (-1, -1, -1, -1), (slice(None), [4, 1])):
        np.testing.assert_array_equal(lazy[key].compute(), array[key])
    for key in (99, (0, 99), (0, 0, 0, 0, 0)):
        with pytest.raises(IndexError):
            lazy[key].compute()
    assert lazy[:, :, :] is lazy
    with pytest.raises(TypeError, match="read-only"):
        lazy[0] = 1.0


def test_everything_else_is_plain_dask(ds: xr.Dataset, loaded: xr.Dataset) -> None:
    for compute in (
        lambda d: d.W * 2 + d.grad,
        lambda d: d.W.max("run"),
        lambda d: d.W.std(["run", "dim"]),
        lambda d: d.W.isel(run=0) - d.W.isel(run=[2, 1]),
        lambda d: d.W.where(d.live),
        lambda d: d.W.transpose("token", ...),
    ):
        np.testing.assert_allclose(compute(ds), compute(loaded), rtol=1e-5)


def test_a_single_run_is_its_own_lazy_array(ds: xr.Dataset) -> None:
    of_run = ds.isel(run=2)
    assert of_run.W.data.variable == ds.W.data.variable.runs[2]
    assert of_run.freeze_step.data.variable == ds.freeze_step.data.variable.runs[2]
    assert ds.isel(run=[2]).W.data.variable is ds.W.data.variable


def test_selecting_computes_nothing(directory: Path) -> None:
    with no_computing():
        ds = open_datasets(directory / "*" / "run.zarr")
        selected = ds.sel(token=ds.dead).sel(step=slice(3, 9)).isel(dim=[0, 2], run=slice(1, None))
        assert selected.adam_residual.shape == (2, 7, 4, 2)
        with pytest.raises(AssertionError, match="asked to compute"):
            selected.adam_residual.compute()


def test_only_chunks_of_the_selected_runs_tokens_and_steps_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"memory_bytes": 32 * 2**20}
    record(
        tmp_path / "a.zarr",
        n_steps=70,
        n_tokens=1999,
        n_dims=11,
        n_live=1500,
        recorder_options=options,
    )
    for name in "bc":
        shutil.copytree(tmp_path / "a.zarr", tmp_path / f"{name}.zarr")
    ds = open_datasets(tmp_path / "*.zarr")
    reads = Reads(monkeypatch)
    stores = [str(tmp_path / "a.zarr"), str(tmp_path / "c.zarr")]
    selected = ds.sel(run=stores).sel(token=[1500], step=slice(66, 70)).adam_residual
    selected.compute()
    names = ("W", "exp_avg", "exp_avg_sq")
    assert sorted(reads.calls) == sorted(2 * [(name, (65, 71), [1500]) for name in names])
    assert sorted(reads.chunks) == sorted(2 * [(f"{name}/c.1.0.0", 11) for name in names])
    reads.chunks.clear()
    ds.sel(run=stores[0], token=[5, 700, 3]).sel(step=[10]).W.compute()
    assert sorted(reads.chunks) == [("W/c.0.0.0", 0), ("W/c.0.0.0", 5)]
    reads.chunks.clear()
    ds.freeze_step.sel(run=stores[1:], token=[5]).compute()
    assert sorted(reads.chunks) == [("W/c.0.0.0", 0), ("W/c.1.0.0", 0)]


def test_a_row_that_no_run_has_is_not_read(
    ds: xr.Dataset, stores: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(monkeypatch)
    assert np.isnan(ds.sel(run=stores[1], step=[9, 8]).W).all()
    assert reads.calls == []


def test_it_pickles_small(ds: xr.Dataset, loaded: xr.Dataset) -> None:
    selected = ds.sel(token=ds.dead).adam_residual
    pickled = pickle.dumps(selected)
    assert len(pickled) < 30_000
    expected = loaded.adam_residual.sel(token=loaded.dead)
    np.testing.assert_array_equal(pickle.loads(pickled).values, expected.values)


def test_the_dataset_is_computed_as_one(ds: xr.Dataset, loaded: xr.Dataset) -> None:
    mixed = ds[["W", "freeze_step"]].assign(twice=ds.W * 2).compute()
    np.testing.assert_array_equal(mixed.twice, 2 * loaded.W)
    np.testing.assert_array_equal(mixed.freeze_step, loaded.freeze_step)


# --- accounting ----------------------------------------------------------------------------------


def test_the_accounting_of_runs_is_that_of_each(ds: xr.Dataset, stores: list[str]) -> None:
    dead = ds.sel(token=ds.dead)
    together = accounting(dead)
    assert together.ratio.dims == ("run", "step")
    assert together.run.values.tolist() == stores
    for store in stores:
        alone = open_dataset(store)
        expected = accounting(alone.sel(token=alone.dead))
        of_run = dead.sel(run=store)
        found = accounting(of_run)
        xr.testing.assert_identical(found, expected)
        assert verdict(found, find_causes(selected(of_run), found)).holds
        with_gaps = together.sel(run=store)  # NaN where this run is shorter than the other
        by = f" by {expected.attrs['replayed_by']}"  # two runs, of two programs
        assert verdict(with_gaps).text == verdict(expected).text.replace(by, "")
        assert find_causes(selected(of_run), with_gaps) == []
        of_table = together.sel(run=store, step=expected.step, drop=True)
        xr.testing.assert_equal(of_table, expected.astype(of_table.dtypes))
    assert np.isnan(together.n_different.sel(run=stores[1], step=N_SHORT + 1)).all()


def test_the_accounting_of_runs_takes_the_same_options(ds: xr.Dataset) -> None:
    subsets = {"dead": ds.token.values[ds.dead], "one": np.array([3])}
    table = accounting(ds, replay=False, extended=True, subsets=subsets)
    assert table.share_moved.dims == ("run", "subset", "step")
    alone = accounting(ds.isel(run=2), replay=False, extended=True, subsets=subsets)
    np.testing.assert_array_equal(table.ratio.isel(run=2), alone.ratio)


def test_an_accounting_needs_steps_that_the_run_has(ds: xr.Dataset, stores: list[str]) -> None:
    of_run = ds.sel(run=stores[1])
    for step in (N_SHORT + 1, slice(N_SHORT + 1, None)):
        with pytest.raises(SelectionError, match="nothing is selected"):
            accounting(of_run.sel(step=step))
    assert accounting(of_run.sel(step=slice(N_SHORT, None))).step.values.tolist() == [N_SHORT]


def test_what_is_of_one_run_says_so(ds: xr.Dataset) -> None:
    with pytest.raises(SelectionError, match=r"ds\.sel\(run="):
        find_causes(selected(ds), accounting(ds))
    with pytest.raises(SelectionError, match=r"ds\.sel\(run="):
        accounting(ds.isel(run=[]))


# --- paths and errors ----------------------------------------------------------------------------


def test_patterns_are_sorted_and_without_duplicates(tmp_path: Path) -> None:
    for name in ("seed1", "seed0", "other"):
        (tmp_path / name).mkdir()
    found = stores_at([tmp_path / "seed1", f"{tmp_path}/seed*", f"{tmp_path}/./seed0/"])
    assert found == [str(tmp_path / "seed0"), str(tmp_path / "seed1")]
    assert stores_at("nowhere") == ["nowhere"]
    for name in ("seed1.zarr", "seed1.summary.zarr", "seed1.summary.bfloat16.zarr"):
        (tmp_path / name).mkdir()
    assert stores_at(f"{tmp_path}/*.zarr") == [str(tmp_path / "seed1.zarr")]
    assert stores_at(f"{tmp_path}/**/seed0") == [str(tmp_path / "seed0")]


def test_a_name_that_is_there_is_no_pattern(tmp_path: Path) -> None:
    for name in ("run[1]", "run1"):
        (tmp_path / name).mkdir()
    assert stores_at(tmp_path / "run[1]") == [str(tmp_path / "run[1]")]


def test_paths_that_cannot_be_opened(tmp_path: Path, toy_path: Path) -> None:
    with pytest.raises(NotAStoreError, match=r"no path matches .*seed\*"):
        open_datasets([toy_path, tmp_path / "seed*"])
    with pytest.raises(ConfigError, match="no store was named"):
        open_datasets([])
    with pytest.raises(StoreError, match="nowhere"):
        open_datasets([toy_path, tmp_path / "nowhere"])


@pytest.mark.parametrize("shape", [{"n_tokens": N_TOKENS + 1}, {"n_dims": N_DIMS + 1}])
def test_runs_of_other_shapes_are_refused(
    tmp_path: Path, toy_path: Path, shape: dict[str, int]
) -> None:
    record(tmp_path / "other.zarr", n_steps=1, **shape)
    with pytest.raises(ConfigError, match=f"of one shape.*{N_TOKENS}, .*{N_DIMS}}}"):
        open_datasets([toy_path, tmp_path / "other.zarr"])
