"""The real model at its real size, on real text: 10,000 x 64 bfloat16, a few steps."""

from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import xarray as xr

from tests.support import oracles
from tests.support.runs import threads
from tests.support.summary_oracle import assert_same_summary, reference_summary
from thimble_zarr import Recorder, accounting, open_dataset, summary
from thimble_zarr.analysis.verdict import verdict
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.experiment.trainer import Training, TrainingData
from thimble_zarr.store.reader import StoreReader

N_STEPS = 17

MEMORY_BYTES = 100_000_000
"""Bound that makes it three blocks."""

History = dict[str, list[torch.Tensor]]


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, default_data: TrainingData
) -> tuple[xr.Dataset, History, Path]:
    """A recorded run, and clones kept by hand as the first notebook keeps them."""
    training = Training(TrainingConfig(batch_size=4), default_data)
    weight = training.embedding
    zeros = torch.zeros_like(weight)
    history: History = {"W": [weight.detach().clone()], "exp_avg": [zeros], "exp_avg_sq": [zeros]}
    path = tmp_path_factory.mktemp("real") / "run.zarr"
    options = {"labels": default_data.labels, "memory_bytes": MEMORY_BYTES}
    with threads(2), Recorder(path, training.optimizer, parameter=weight, **options) as recorder:
        for _ in range(N_STEPS):
            training.step()
            state = training.optimizer.state[weight]
            history["W"].append(weight.detach().clone())
            for name in ("exp_avg", "exp_avg_sq"):
                history[name].append(state[name].clone())
    assert 2 < (N_STEPS + 1) / recorder.schemas[""].layout.block_steps <= 3
    return open_dataset(path), history, path


def subset(ds: xr.Dataset, name: str) -> np.ndarray:
    ids = ds.token.values
    return {
        "dead": ids[ds.dead.values],
        "live": ids[ds.live.values],
        "all": ids,
        "37 ids": np.random.default_rng(0).permutation(ids)[:37],
    }[name]


@pytest.mark.parametrize("name", ["dead", "live", "all", "37 ids"])
def test_the_table_is_the_independent_one(run: tuple[xr.Dataset, History, Path], name: str) -> None:
    ds, history, _ = run
    token = subset(ds, name).copy()
    arrays = [
        torch.stack(history[variable])[:, token].float().numpy()
        for variable in ("W", "exp_avg", "exp_avg_sq")
    ]
    table = accounting(ds.sel(token=token))
    oracles.assert_same_table(table, oracles.in_float64(*arrays))
    assert verdict(table).holds


def test_the_table_is_the_notebooks_up_to_its_rounding(
    run: tuple[xr.Dataset, History, Path],
) -> None:
    ds, history, _ = run
    expected = oracles.notebook_2(
        torch.stack(history["W"]),
        torch.stack(history["exp_avg"]).float(),
        torch.stack(history["exp_avg_sq"]).float(),
        torch.from_numpy(ds.dead.values),
    )
    table = accounting(ds.sel(token=ds.dead))
    for column in ("norm_predicted", "cosine_similarity"):
        np.testing.assert_allclose(table[column], expected[column], rtol=2e-3, err_msg=column)
    # The notebook subtracts in bfloat16, which rounds each change to 8 bits.
    for column in ("norm_observed", "ratio"):
        np.testing.assert_allclose(table[column], expected[column], rtol=5e-3, err_msg=column)


def test_the_first_step_is_the_original_one(run: tuple[xr.Dataset, History, Path]) -> None:
    """Dead tokens, step 1; the original run printed ratio 1.011954 and cosine 0.999925."""
    ds, _, _ = run
    first = accounting(ds.sel(token=ds.dead, step=[1])).isel(step=0)
    assert float(first.ratio) == pytest.approx(1.011954, abs=1e-3)
    assert float(first.cosine_similarity) == pytest.approx(0.999925, abs=1e-4)


def test_every_gradient_row_moves_and_dead_means_never_seen(
    run: tuple[xr.Dataset, History, Path], default_data: TrainingData
) -> None:
    ds, _, _ = run
    np.testing.assert_array_equal(ds.n_occurrences, np.bincount(default_data.ids, minlength=10_000))
    assert 500 < int(ds.dead.sum()) < 5000
    assert (abs(ds.grad.sel(step=1, token=ds.dead)).max("dim") > 0).all()


def test_tensorstore_and_plain_xarray_read_the_same_bits(
    run: tuple[xr.Dataset, History, Path],
) -> None:
    _, history, path = run
    reader, plain = StoreReader.open(path), xr.open_zarr(path)
    order = plain.token.values  # as they lie on disk
    np.testing.assert_array_equal(np.sort(order), np.arange(10_000))
    for name in reader.schema.dtypes:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / name)}}
        bits = tensorstore.open(spec, read=True).result().read().result()
        np.testing.assert_array_equal(bits, plain[name].values)
        if name in history:
            expected = torch.stack(history[name]).view(torch.uint16).numpy()
            np.testing.assert_array_equal(bits, expected[:, order])


def test_residuals_of_any_tokens_are_the_formulas(run: tuple[xr.Dataset, History, Path]) -> None:
    ds, history, _ = run
    token = subset(ds, "37 ids")
    W = torch.stack(history["W"])[:, token].double().numpy()
    selected = ds.sel(token=token)
    update = selected.adam_update.values[1:].astype(np.float64)
    residual = np.diff(W, axis=0) - update
    np.testing.assert_allclose(selected.adam_residual.values[1:], residual, atol=1e-9)


@pytest.mark.parametrize("name", ["dead", "live", "all", "37 ids"])
def test_every_bit_is_replayed(run: tuple[xr.Dataset, History, Path], name: str) -> None:
    ds, _, _ = run
    table = accounting(ds.sel(token=subset(ds, name)))
    assert table.attrs["not_exact_because"] == ""
    assert int(table.n_different.sum()) == 0
    assert not table.norm_unexplained.any()
    assert verdict(table).text.startswith("HOLDS to the bit: ")


def test_the_residual_is_its_two_parts_bit_by_bit(run: tuple[xr.Dataset, History, Path]) -> None:
    ds, _, _ = run
    for part in (
        ds.sel(token=ds.dead, step=slice(12, 17)),
        ds.sel(token=ds.live, step=[1, 2, 16]),
        ds.sel(token=subset(ds, "37 ids")),
        ds.isel(token=slice(9000, 100, -7), dim=slice(3, 60, 5), step=slice(1, 17, 3)),
        ds.sel(token=42),
        ds.sel(step=8),
    ):
        rounding, unexplained, residual = (
            part.sel(step=part.step[part.step > 0])[name].values
            if "step" in part.dims
            else part[name].values
            for name in ("rounding", "unexplained", "adam_residual")
        )
        assert not unexplained.any()
        np.testing.assert_array_equal(
            (rounding + unexplained).view(np.uint32), residual.view(np.uint32)
        )
        assert residual.any()


def test_the_summary_is_the_plain_one(
    run: tuple[xr.Dataset, History, Path], tmp_path: Path
) -> None:
    ds, _, path = run
    groups = {"dead": ds.dead.values, "live": ds.live.values, "all": np.ones(10_000, bool)}
    expected = reference_summary(ds, "bfloat16", groups)
    assert_same_summary(summary(path, place=tmp_path / "summary.zarr"), expected)
