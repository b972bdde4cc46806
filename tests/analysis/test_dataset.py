"""The opened dataset against what the recorded loop saw."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from tests.support.runs import (
    N_DIMS,
    N_STEPS,
    N_TOKENS,
    TINY_MEMORY,
    History,
    Loop,
    live_mask,
    record,
)
from thimble_zarr import Recorder, TokenLabels, accounting, open_dataset, open_datasets
from thimble_zarr.errors import NotAStoreError, StoreError

DTYPES = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_variables_are_the_recorded_values(tmp_path: Path, dtype: torch.dtype) -> None:
    history = record(tmp_path / "run.zarr", dtype=dtype, eps=1e-3)
    ds = open_dataset(tmp_path / "run.zarr")
    for name in ("W", "grad", "exp_avg", "exp_avg_sq"):
        assert ds[name].dtype == np.float32
        assert ds[name].dims == ("step", "token", "dim")
        np.testing.assert_array_equal(ds[name].values, history[name], err_msg=name)


def test_derived_variables_are_the_formula(tmp_path: Path) -> None:
    history = record(tmp_path / "run.zarr", weight_decay=0.5)
    ds = open_dataset(tmp_path / "run.zarr")
    t = np.arange(1, N_STEPS + 1)[:, None, None]
    m_hat = history["exp_avg"][1:] / (1 - 0.9**t)
    v_hat = history["exp_avg_sq"][1:] / (1 - 0.999**t)
    update = -1e-2 * m_hat / (np.sqrt(v_hat) + 1e-8)
    decay = -1e-2 * 0.5 * history["W"][:-1]
    observed = np.diff(history["W"], axis=0)
    for name, expected in {
        "delta_W": observed,
        "adam_update": update,
        "adam_decay": decay,
        "adam_residual": observed - update - decay,
    }.items():
        # one rounding to float32, and what is left of float64 after cancellation
        np.testing.assert_allclose(ds[name].values[1:], expected, rtol=1e-7, atol=1e-16)
        assert np.isnan(ds[name].values[0]).all()


def test_these_are_the_variables(tmp_path: Path, toy_path: Path) -> None:
    stored = ["W", "grad", "exp_avg", "exp_avg_sq"]
    derived = ["delta_W", "update", "decay", "residual"]
    derived += ["adam_update", "adam_decay", "adam_residual"]
    derived += ["m_hat", "v_hat"]
    derived += ["rounding", "unexplained", "moved", "ulp", "displacement_ulp", "stalled"]
    scalars = ["loss", "learning_rate", "beta1", "beta2", "eps", "weight_decay", "optimizer_step"]
    ds = open_dataset(toy_path)
    assert list(ds.data_vars) == [*stored, *derived, "freeze_step", *scalars]
    assert all(ds[name].attrs["long_name"] for name in ds.data_vars)
    record(tmp_path / "run.zarr", amsgrad=True, n_steps=1)
    with_maximum = open_dataset(tmp_path / "run.zarr")
    expected = [*stored, "max_exp_avg_sq", *derived, "freeze_step", *scalars]
    assert list(with_maximum.data_vars) == expected


def test_the_initial_state_has_a_spacing_and_nothing_that_changed(toy_path: Path) -> None:
    first = open_dataset(toy_path).sel(step=0)
    assert np.isfinite(first.ulp).all()
    for name in (
        "rounding",
        "unexplained",
        "moved",
        "displacement_ulp",
        "stalled",
        "m_hat",
        "v_hat",
    ):
        assert np.isnan(first[name]).all()


def test_delta_is_the_difference_of_labels(toy_path: Path) -> None:
    ds = open_dataset(toy_path)
    observed = ds.W.diff("step")
    xr.testing.assert_equal(observed.compute(), ds.delta_W.sel(step=observed.step).compute())


def test_l2_decay_is_in_the_moments_already(tmp_path: Path) -> None:
    record(tmp_path / "run.zarr", optimizer=torch.optim.Adam, weight_decay=0.5)
    assert (open_dataset(tmp_path / "run.zarr").adam_decay[1:] == 0).all()


def test_amsgrad_divides_by_the_maximum(tmp_path: Path) -> None:
    record(tmp_path / "a.zarr", amsgrad=True, betas=(0.9, 0.5), dtype=torch.float64)
    ds = open_dataset(tmp_path / "a.zarr")
    assert float(abs(ds.adam_residual).max()) < 1e-9
    assert float(abs(ds.max_exp_avg_sq - ds.exp_avg_sq).max()) > 0


def test_a_skipped_step_predicts_no_change(tmp_path: Path) -> None:
    loop = Loop()
    with Recorder(tmp_path / "run.zarr", loop.optimizer, parameter=loop.weight):
        loop.step()
        loop.weight.grad = None
        with pytest.warns(UserWarning, match="no gradient at step 2"):
            loop.optimizer.step()
    ds = open_dataset(tmp_path / "run.zarr")
    for name in ("delta_W", "adam_update", "adam_decay", "adam_residual", "rounding"):
        assert (ds[name].sel(step=2) == 0).all()
    for name in ("unexplained", "moved", "displacement_ulp", "stalled"):
        assert (ds[name].sel(step=2) == 0).all()
    assert int(accounting(ds).n_different.sum()) == 0


def test_a_skipped_first_step_too(tmp_path: Path) -> None:
    """The usual case of mixed precision: the first scaled step overflows."""
    loop = Loop()
    with Recorder(tmp_path / "run.zarr", loop.optimizer, parameter=loop.weight):
        with pytest.warns(UserWarning, match="no gradient at step 1"):
            loop.optimizer.step()
        loop.step()
    ds = open_dataset(tmp_path / "run.zarr")
    assert (ds.adam_residual.sel(step=1) == 0).all()
    table = accounting(ds, replay=False)
    assert int(table.n_beyond_rounding.sum()) == 0
    assert int(accounting(ds).n_different.sum()) == 0


def test_variables_are_read_only(toy_path: Path) -> None:
    ds = open_dataset(toy_path)
    with pytest.raises(TypeError, match="read-only"):
        ds.W[{"step": 1}] = 7.0


def test_coordinates(toy_path: Path, toy_history: History) -> None:
    ds = open_dataset(toy_path)
    assert ds.step.values.tolist() == list(range(N_STEPS + 1))
    assert ds.token.values.tolist() == list(range(N_TOKENS))
    np.testing.assert_array_equal(ds.n_occurrences, np.where(live_mask(), 3, 0))
    np.testing.assert_array_equal(ds.dead, ds.n_occurrences == 0)
    np.testing.assert_array_equal(ds.live, ~ds.dead)
    assert ds.sel(token=ds.text == " t3").token.values.tolist() == [3]
    np.testing.assert_array_equal(ds.loss[1:], toy_history.losses)
    assert np.isnan(ds.learning_rate[0])


TEXTS = ["\0", "a\0", "\x1b[31m", "\x7f", "\u0085", "ä", " the", "\n", "", "数字", "\t"]
SHOWN = ["<0x00>", "a<0x00>", "<0x1B>[31m", "<0x7F>", "<0xC2><0x85>", *TEXTS[5:]]


@pytest.fixture
def with_controls(tmp_path: Path) -> Path:
    """A run with tokens whose texts some file formats refuse."""
    labels = TokenLabels.from_counts(np.arange(N_TOKENS), TEXTS)
    record(tmp_path / "run.zarr", n_steps=2, recorder_options={"labels": labels})
    return tmp_path / "run.zarr"


def test_texts_are_shown_without_control_characters(with_controls: Path) -> None:
    ds = open_dataset(with_controls)
    assert ds.text.values.tolist() == SHOWN
    for text in (" the", "<0x00>", "数字"):
        assert ds.sel(token=ds.text == text).token.values.tolist() == [SHOWN.index(text)]


def test_a_dataset_can_be_written_as_netcdf(with_controls: Path, tmp_path: Path) -> None:
    pytest.importorskip("h5netcdf")
    ds = open_dataset(with_controls)[["W", "adam_residual"]]
    ds.to_netcdf(tmp_path / "run.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "run.nc", engine="h5netcdf") as written:
        xr.testing.assert_equal(written, ds.compute())
        assert written.text.values.tolist() == SHOWN


@pytest.mark.parametrize("n_runs", [1, 2])
def test_a_dataset_can_be_written_as_zarr(
    with_controls: Path, toy_path: Path, tmp_path: Path, n_runs: int
) -> None:
    ds = open_datasets([with_controls, toy_path]) if n_runs > 1 else open_dataset(with_controls)
    ds[["W"]].drop_vars("run", errors="ignore").to_zarr(tmp_path / "out.zarr", consolidated=False)
    written = xr.open_zarr(tmp_path / "out.zarr", consolidated=False)
    np.testing.assert_array_equal(written.W, ds.W)
    assert written.text.values.tolist() == ds.text.values.tolist()


@pytest.mark.parametrize("chunks", ["auto", {"token": 5}])
def test_the_xarray_engine_chunks_as_it_is_told(with_controls: Path, chunks: object) -> None:
    ds = xr.open_dataset(with_controls, engine="thimble", chunks=chunks)
    assert ds.text.values.tolist() == SHOWN
    assert ds.sel(token=(ds.text == " the").compute()).token.values.tolist() == [6]
    np.testing.assert_array_equal(ds.W, open_dataset(with_controls).W)


def test_a_very_long_text_is_not_paid_for_by_every_token(tmp_path: Path) -> None:
    texts = [*map(str, range(N_TOKENS - 1)), "x" * 4_000_000]
    labels = TokenLabels.from_counts(np.arange(N_TOKENS), texts)
    record(tmp_path / "run.zarr", n_steps=1, recorder_options={"labels": labels})
    text = open_dataset(tmp_path / "run.zarr").text
    assert text.nbytes < 4_000_000  # and not 176 MB
    assert text.values.tolist() == texts


def test_the_coordinate_of_occurrences_is_no_method(toy_path: Path) -> None:
    """As `count` was, which is what a store calls it."""
    ds = open_dataset(toy_path)
    assert (toy_path / "count").is_dir()
    assert "count" not in ds.coords
    assert ds.n_occurrences.dtype == np.int64


def test_attributes_are_what_any_file_format_can_keep(toy_path: Path) -> None:
    attrs = open_dataset(toy_path).attrs
    assert all(isinstance(value, str | int) for value in attrs.values())
    assert (attrs["dtype"], attrs["optimizer"], attrs["block_steps"]) == ("bfloat16", "AdamW", 4)
    assert json.loads(attrs["thimble"])["shape"] == [N_TOKENS, N_DIMS]


def test_labels_select_as_in_the_readme(toy_path: Path, toy_history: History) -> None:
    ds = open_dataset(toy_path)
    weights = toy_history["W"]
    dead = ds.dead
    np.testing.assert_array_equal(ds.sel(token=dead).W, weights[:, dead.values])
    np.testing.assert_array_equal(ds.sel(token=[7, 2]).W, weights[:, [7, 2]])
    selected = ds.sel(step=slice(5, 9), token=dead).W
    np.testing.assert_array_equal(selected, weights[5:10][:, dead.values])
    assert selected.step.values.tolist() == [5, 6, 7, 8, 9]


def test_a_run_without_labels_has_no_label_coordinates(tmp_path: Path) -> None:
    record(tmp_path / "run.zarr", recorder_options={"labels": None})
    assert set(open_dataset(tmp_path / "run.zarr").coords) == {"step", "token"}


def test_it_opens_while_it_is_recorded(tmp_path: Path) -> None:
    loop = Loop()
    with Recorder(
        tmp_path / "run.zarr", loop.optimizer, parameter=loop.weight, memory_bytes=TINY_MEMORY
    ) as recorder:
        with pytest.raises(StoreError, match="no committed step yet"):
            open_dataset(tmp_path / "run.zarr")
        for _ in range(6):
            loop.step()
        recorder.flush()
        ds = open_dataset(tmp_path / "run.zarr")
        assert ds.sizes["step"] == 7
        loop.step()
        assert not np.isnan(ds.adam_residual.values[1:]).any()


def test_what_is_no_store_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotAStoreError):
        open_dataset(tmp_path)


def test_the_xarray_engine_gives_the_same(toy_path: Path) -> None:
    expected = open_dataset(toy_path).compute()
    for options in ({"engine": "thimble"}, {}, {"engine": "thimble", "chunks": {}}):
        ds = xr.open_dataset(toy_path, **options)
        assert ds.adam_residual.chunks is not None
        selected = ds.sel(token=ds.dead).sel(step=[9, 2])
        xr.testing.assert_identical(
            selected.compute(), expected.sel(token=expected.dead).sel(step=[9, 2])
        )


def test_the_xarray_engine_pushes_selections_down(
    toy_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support.reads import Reads

    ds = xr.open_dataset(toy_path, engine="thimble")
    reads = Reads(monkeypatch)
    ds.sel(token=ds.dead, step=[6]).grad.compute()
    assert reads.calls == [("grad", (5, 7), np.flatnonzero(~live_mask()).tolist())]


def test_the_xarray_engine_drops_variables(toy_path: Path) -> None:
    ds = xr.open_dataset(toy_path, engine="thimble", drop_variables=["W", "unknown"])
    assert "W" not in ds
    assert "grad" in ds
    assert "loss" not in xr.open_dataset(toy_path, engine="thimble", drop_variables="loss")
