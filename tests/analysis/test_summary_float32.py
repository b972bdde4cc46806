"""Where float32 has not the bits for a number of a summary, it is computed otherwise."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from tests.support.runs import Loop, live_mask, token_labels
from tests.support.summary_oracle import assert_same_summary, reference_summary
from tests.support.tuned import tuned
from thimble_zarr import Recorder, open_dataset, summary
from thimble_zarr.analysis.summary import formula, numbers

DEAD = np.flatnonzero(~live_mask())

HALF = 2.0**-8
"""Half an ULP of bfloat16 from 1 to 2."""

Change = Callable[[torch.Tensor, int], None]
"""Sets the weights before a step."""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token for each part, so that none is computed otherwise for the sake of another."""
    tuned(monkeypatch, summary_part_bytes=40)


def record_with(path: Path, change: Change, **options: object) -> None:
    """Record four steps of a run whose weights are set before each of them."""
    loop = Loop(**options)
    with Recorder(path, loop.optimizer, parameter=loop.weight, labels=token_labels()):
        for step in range(4):
            with torch.no_grad():
                change(loop.weight, step)
            loop.step()
            loop.optimizer.zero_grad()


def expected_of(path: Path) -> xr.Dataset:
    ds = open_dataset(path)
    groups = {name: ds[name].values for name in ("dead", "live")}
    groups["all"] = np.ones(ds.W.shape[1], bool)
    with np.errstate(over="ignore", invalid="ignore"):
        return reference_summary(ds, ds.attrs["dtype"], groups)


def assert_right(path: Path, *names: str) -> None:
    """Compare numbers with those of the plain computation; all of them, if none is named."""
    found, expected = summary(path), expected_of(path)
    assert_same_summary(found[[*(names or found.data_vars)]], expected[[*(names or found)]])


def test_distances_whose_squares_are_no_float32_numbers(tmp_path: Path) -> None:
    def alike_but_for_a_dim(W: torch.Tensor, step: int) -> None:
        W[:] = 0.5
        W[:, 0] = 0.25 if step % 2 else 0.5  # all move
        W[:, 2] = torch.logspace(-30, -23, len(W))

    record_with(tmp_path / "run.zarr", alike_but_for_a_dim, lr=1e-30, weight_decay=0.0)
    assert_right(tmp_path / "run.zarr")


def test_a_token_that_diverged_leaves_the_distances_of_others(tmp_path: Path) -> None:
    def one_diverges(W: torch.Tensor, step: int) -> None:
        W[DEAD[0]] = 1e38 * (-1) ** step
        W[DEAD[1:]] = 500.0 * (-1) ** step

    record_with(tmp_path / "run.zarr", one_diverges)
    assert_right(tmp_path / "run.zarr", "centroid_distance", "cosine_to_mean", "centroid")


@pytest.mark.parametrize("few", [1, 1e9], ids=["tokens", "parts"])
def test_what_is_left_of_a_step_from_close_to_zero(
    few: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formula, "_FEW", few)

    def close_to_zero(W: torch.Tensor, step: int) -> None:
        W[:] = torch.linspace(1e-10, 9e-10, W.numel()).reshape(W.shape)

    record_with(tmp_path / "run.zarr", close_to_zero, lr=1e-3)
    assert_right(tmp_path / "run.zarr")


@pytest.mark.parametrize("trusting", [False, True])
def test_a_distance_that_is_small_beside_those_of_centroids(
    trusting: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def close_to_that_of_all(W: torch.Tensor, step: int) -> None:
        W[:] = -3 / 7
        W[DEAD] = 1.0
        W[DEAD[0]] = 0.01

    record_with(tmp_path / "run.zarr", close_to_that_of_all, lr=1e-4)
    if trusting:
        monkeypatch.setattr(numbers, "_CANCELLED", -np.inf)
    with pytest.raises(AssertionError) if trusting else nullcontext():
        assert_right(tmp_path / "run.zarr")


@pytest.mark.parametrize(
    ("weight", "decay", "rate", "share", "fault"),
    [
        (1.0, 0.0, HALF * (1 - 1e-9), 1.0, 0.0),
        (1.796875, 0.5521739130434783, 0.49999996031609617, 0.2, 2.0**-28),
    ],
    ids=["rounded", "cancelled"],
)
@pytest.mark.parametrize("trusting", [False, True])
def test_a_move_of_almost_half_an_ulp_is_below_it(
    trusting: bool,
    weight: float,
    decay: float,
    rate: float,
    share: float,
    fault: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The update is the learning rate, upwards; what decay leaves of it is just below half."""
    W = torch.nn.Parameter(torch.empty(11, 5, dtype=torch.bfloat16))
    options = {"lr": rate, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": decay}
    optimizer = torch.optim.AdamW([W], **options)  # type: ignore[arg-type]
    with Recorder(tmp_path / "run.zarr", optimizer, parameter=W, labels=token_labels()):
        for _ in range(2):
            with torch.no_grad():
                W[:] = -weight  # where decay adds to the update
                W[:, 0] = weight
            W.grad = torch.full_like(W, -1.0)
            optimizer.step()
    expected = expected_of(tmp_path / "run.zarr").share_below_half_ulp[:, 1]
    np.testing.assert_allclose(expected, share)
    if trusting:
        monkeypatch.setattr(formula, "_ROUNDING", fault)
    with pytest.raises(AssertionError) if trusting else nullcontext():
        assert_right(tmp_path / "run.zarr", "share_below_half_ulp")
