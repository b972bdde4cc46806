"""Selections of lazy variables against the same selections of arrays in memory."""

import pickle
from pathlib import Path

import dask
import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from tests.support.reads import VARIABLES, Reads, axis_keys, no_computing
from tests.support.runs import N_DIMS, N_STEPS, N_TOKENS, TINY_MEMORY, record
from thimble_zarr import open_dataset
from thimble_zarr.analysis.dataset.lazy import LazyArray
from thimble_zarr.store.coding.shard_codec import ShardFile
from thimble_zarr.store.reader import StoreReader


@pytest.fixture(scope="module")
def ds(toy_run: tuple[Path, object]) -> xr.Dataset:
    return open_dataset(toy_run[0])


@pytest.fixture(scope="module")
def loaded(ds: xr.Dataset) -> xr.Dataset:
    return ds.compute()


@given(
    st.sampled_from(VARIABLES),
    axis_keys(N_STEPS + 1),
    axis_keys(N_TOKENS),
    axis_keys(N_DIMS),
)
def test_any_selection_is_that_of_the_loaded_array(
    ds: xr.Dataset, loaded: xr.Dataset, name: str, step: object, token: object, dim: object
) -> None:
    selected = ds[name].isel(step=step, token=token, dim=dim)
    expected = loaded[name].isel(step=step, token=token, dim=dim)
    assert type(selected.data) is LazyArray
    assert selected.dtype == np.float32
    assert selected.data.shape == expected.shape
    np.testing.assert_array_equal(selected.values, expected.values)


@given(st.data())
def test_selections_chain(ds: xr.Dataset, loaded: xr.Dataset, data: st.DataObject) -> None:
    selected, expected = ds.adam_residual, loaded.adam_residual
    for _ in range(4):
        dims = [dim for dim in selected.dims if selected.sizes[dim]]
        if not dims:
            break
        dim = data.draw(st.sampled_from(dims))
        key = data.draw(axis_keys(selected.sizes[dim]))
        selected, expected = selected.isel({dim: key}), expected.isel({dim: key})
    assert type(selected.data) is LazyArray
    np.testing.assert_array_equal(selected.values, expected.values)


def test_selecting_computes_nothing(ds: xr.Dataset) -> None:
    with no_computing():
        selected = ds.sel(token=ds.dead).sel(step=slice(3, 9)).isel(dim=[0, 2])
        assert selected.adam_residual.shape == (7, 4, 2)
        with pytest.raises(AssertionError, match="asked to compute"):
            selected.adam_residual.compute()


def test_everything_else_is_plain_dask(ds: xr.Dataset, loaded: xr.Dataset) -> None:
    for compute in (
        lambda d: d.W * 2 + d.grad,
        lambda d: d.W.max("step"),
        lambda d: d.W.isel(token=xr.DataArray([[0, 1], [2, 3]], dims=("a", "b"))),
        lambda d: d.W.isel(
            token=xr.DataArray([0, 1], dims="p"), dim=xr.DataArray([1, 2], dims="p")
        ),
        lambda d: d.W.where(d.live),
        lambda d: d.W.rolling(step=2).mean(),
    ):
        np.testing.assert_allclose(compute(ds), compute(loaded), rtol=1e-6)


def test_numpy_style_indexing_of_the_bare_array(ds: xr.Dataset, loaded: xr.Dataset) -> None:
    lazy, array = ds.delta_W.data, loaded.delta_W.values
    for key in (3, ..., (..., 2), (slice(2, 5), ..., 1), (slice(None), [4, 1]), (-1, -1, -1)):
        np.testing.assert_array_equal(lazy[key].compute(), array[key])
    for key in (99, (slice(None), 11), (slice(None), [0, 11]), (slice(None), [True])):
        with pytest.raises(IndexError):
            lazy[key].compute()
    with pytest.raises(IndexError):
        lazy[0, 0, 0, 0]


def test_a_whole_selection_is_the_array_itself(ds: xr.Dataset) -> None:
    array = ds.W.data
    assert array[:, :, :] is array


def test_it_pickles_as_a_plain_dask_array(ds: xr.Dataset, loaded: xr.Dataset) -> None:
    pickled = pickle.dumps(ds.sel(token=ds.dead).adam_residual)
    assert len(pickled) < 20_000
    selected = loaded.adam_residual.values[:, loaded.dead.values]
    np.testing.assert_array_equal(pickle.loads(pickled).values, selected)


def test_names_tell_selections_and_stores_apart(ds: xr.Dataset, tmp_path: Path) -> None:
    record(tmp_path / "other.zarr")
    other = open_dataset(tmp_path / "other.zarr")
    arrays = [ds.W.data, ds.grad.data, ds.W.data[1:], ds.W.data[:, [1, 2]], other.W.data]
    assert len({array.name for array in arrays}) == len(arrays)
    assert ds.W.data[1:].name == ds.W.data[1:].name


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    """A run whose arrays have several chunks of tokens: 64 steps in a block, 21 chunks."""
    path = tmp_path_factory.mktemp("wide") / "run.zarr"
    options = {"memory_bytes": 32 * 2**20}
    record(path, n_steps=70, n_tokens=1999, n_dims=11, n_live=1500, recorder_options=options)
    ds = open_dataset(path)
    schema = StoreReader.open(path).schema
    assert (schema.layout.block_steps, schema.layout.chunk_tokens) == (64, 96)
    return ds


def test_a_selection_reads_only_its_chunks(
    wide: xr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(monkeypatch)
    wide.sel(token=[5, 700, 3], step=slice(10, 12)).W.compute()
    assert reads.calls == [("W", (9, 13), [5, 700, 3])]
    assert sorted(reads.chunks) == [("W/c.0.0.0", 0), ("W/c.0.0.0", 5)]


def test_the_disk_is_told_what_will_be_read_a_block_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"memory_bytes": 32 * 2**20}
    record(tmp_path / "run.zarr", n_steps=130, n_tokens=1999, n_dims=11, recorder_options=options)
    ds = open_dataset(tmp_path / "run.zarr")
    reads = Reads(monkeypatch)
    told: list[tuple[str, int]] = []
    n_read: list[int] = []

    def will_read(shard: ShardFile, chunks: list[int]) -> None:
        told.extend(("/".join(shard.key.split("/")[-2:]), chunk) for chunk in chunks)
        n_read.append(len(reads.chunks))

    monkeypatch.setattr(ShardFile, "will_read", will_read)
    ds.isel(token=[5, 1000]).adam_residual.compute(scheduler="synchronous")
    assert told == []  # so few are read in the time that it takes
    reads.chunks.clear()
    ds.isel(token=slice(960)).adam_residual.compute(scheduler="synchronous")
    assert sorted(told) == sorted(reads.chunks)
    n_names, n_blocks = 3, 3
    assert n_read == [*[0] * 2 * n_names, *[len(told) // n_blocks] * n_names]


def test_a_residual_reads_each_input_once_and_one_row_more(
    wide: xr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(monkeypatch)
    wide.sel(token=[1500], step=slice(66, 70)).adam_residual.compute()
    names = ("W", "exp_avg", "exp_avg_sq")
    assert sorted(reads.calls) == [(name, (65, 71), [1500]) for name in names]
    assert sorted(reads.chunks) == [(f"{name}/c.1.0.0", 11) for name in names]


def test_a_selection_made_after_another_reads_no_more(
    wide: xr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(monkeypatch)
    wide.adam_residual.sel(step=slice(10, 12))[:, 3:4].compute()
    assert reads.elements == 4 + 4 + 4


def test_little_more_is_read_than_the_chunks_of_the_selected_tokens(
    wide: xr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = [3, 5, 700, 1500, 1501]
    chunks = {
        place // 96 for place in wide.W.data.variable.source.reader.schema.places[tokens].tolist()
    }
    n_wanted = 0
    for name in ("W", "exp_avg", "exp_avg_sq"):
        for block in (0, 1):
            with wide.W.data.variable.source.reader.arrays.block(name, 64 * block) as shard:
                n_wanted += sum(shard._span(chunk)[1] for chunk in chunks)
    n_read = 0
    real = ShardFile._read

    def read(shard: ShardFile, offset: int, n_bytes: int) -> memoryview:
        nonlocal n_read
        n_read += n_bytes
        return real(shard, offset, n_bytes)

    monkeypatch.setattr(ShardFile, "_read", read)
    wide.sel(token=tokens).adam_residual.compute()
    assert n_wanted < n_read < 1.3 * n_wanted


def test_tokens_of_several_chunks_in_any_order(wide: xr.Dataset) -> None:
    whole = wide.adam_residual.values
    tokens = np.random.default_rng(0).permutation(1999)[:200]
    np.testing.assert_array_equal(wide.sel(token=tokens).adam_residual.values, whole[:, tokens])
    steps = [70, 1, 64, 63, 65, 3]
    np.testing.assert_array_equal(wide.sel(step=steps).adam_residual.values, whole[steps])


def test_a_task_is_a_block_or_a_few(wide: xr.Dataset, ds: xr.Dataset) -> None:
    for name in VARIABLES:
        assert len(wide[name].data.__dask_graph__()) == 1
    again = LazyArray.of(ds.W.data.variable)
    assert again.chunks == ds.W.chunks


def test_threads_and_one_thread_agree(wide: xr.Dataset) -> None:
    with dask.config.set(scheduler="synchronous"):
        alone = wide.adam_residual.values
    np.testing.assert_array_equal(wide.adam_residual.values, alone)


def test_tiny_memory_makes_the_blocks_the_tests_rely_on(ds: xr.Dataset) -> None:
    assert TINY_MEMORY
    assert ds.W.data.variable.source.reader.schema.layout.block_steps == 4


def test_a_dataset_computes_ours_and_dasks_arrays_together(ds: xr.Dataset) -> None:
    """xarray takes the arrays of a dataset for one kind only if their type is one."""
    mixed = ds[["W", "freeze_step"]].assign(twice=ds.W * 2, norm=(ds.delta_W**2).sum("dim"))
    loaded = mixed.compute()
    np.testing.assert_array_equal(loaded.twice, 2 * ds.W.values)
    np.testing.assert_array_equal(loaded.freeze_step, ds.freeze_step.values)
    xr.testing.assert_identical(mixed.persist().compute(), loaded)
    both = xr.apply_ufunc(np.add, ds.W, ds.W * 2, dask="parallelized")
    np.testing.assert_array_equal(both, 3 * ds.W.values)
