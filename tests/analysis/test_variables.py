"""Derived variables that rest on the replay and on the lattice of the dtype."""

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from tests.support.faults import Arrays, rewrite
from tests.support.runs import N_STEPS, History, record
from thimble_zarr import Recorder, accounting, every, open_dataset

NATIVE = {"bfloat16": 1e-8, "float16": 1e-4, "float32": 1e-8, "float64": 1e-8}
"""Dtypes, each with an epsilon that does not underflow in it."""

SUBSETS = {
    "all": {},
    "steps": {"step": slice(3, 8)},
    "one step": {"step": [5]},
    "dead": {"token": slice(7, 11)},
    "ids": {"token": [9, 0, 4]},
    "one token": {"token": [10]},
    "reversed": {"token": slice(None, None, -1)},
    "dims": {"dim": [4, 1]},
    "mixed": {"step": [11, 2, 7], "token": [10, 1], "dim": [3]},
}


@pytest.fixture(scope="module", params=NATIVE)
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[xr.Dataset, History, Path]:
    native = request.param
    path = tmp_path_factory.mktemp("variables") / "run.zarr"
    history = record(path, dtype=getattr(torch, native), eps=NATIVE[native], weight_decay=0.1)
    return open_dataset(path), history, path


def bits(values: np.ndarray) -> np.ndarray:
    assert values.dtype == np.float32
    return values.view(np.uint32)


@pytest.mark.parametrize("subset", SUBSETS)
def test_the_residual_is_rounding_and_nothing_unexplained(
    run: tuple[xr.Dataset, History, Path], subset: str
) -> None:
    ds = run[0].isel(step=slice(1, None)).isel(**SUBSETS[subset])
    parts = ds.rounding.values + ds.unexplained.values
    np.testing.assert_array_equal(bits(parts), bits(ds.adam_residual.values))
    np.testing.assert_array_equal(bits(ds.unexplained.values), 0)
    assert np.abs(ds.rounding.values).max() > 0


def test_a_selection_is_replayed_as_the_whole(run: tuple[xr.Dataset, History, Path]) -> None:
    for name in ("rounding", "unexplained"):
        whole = run[0][name].values
        for subset in ({"token": [10, 3]}, {"dim": [4]}, {"step": [13, 2]}):
            selected = run[0][name].isel(**subset).values
            axis, keys = next((run[0][name].dims.index(dim), keys) for dim, keys in subset.items())
            np.testing.assert_array_equal(selected, whole.take(keys, axis=axis))


@pytest.mark.parametrize("row", [1, 6, N_STEPS])
def test_what_an_external_change_did_is_unexplained(
    run: tuple[xr.Dataset, History, Path], tmp_path: Path, row: int
) -> None:
    ds, history, path = run

    def external_change(stored: Arrays, scalars: Arrays) -> None:
        stored["W"][row, [2, 9], 3] = stored["W"][row, [9, 2], 4]

    rewrite(path, tmp_path / "faulty.zarr", external_change)
    faulty = open_dataset(tmp_path / "faulty.zarr")
    there = faulty.sel(step=row)
    moved = np.zeros((11, 5), dtype=bool)
    moved[[2, 9], 3] = True
    unexplained = there.unexplained.values
    np.testing.assert_array_equal(unexplained != 0, moved)
    expected = history["W"][row][[9, 2], 4] - history["W"][row][[2, 9], 3]
    np.testing.assert_array_equal(unexplained[[2, 9], 3], expected.astype(np.float32))
    parts, residual = there.rounding.values + unexplained, there.adam_residual.values
    np.testing.assert_array_equal(bits(parts)[~moved], bits(residual)[~moved])
    np.testing.assert_allclose(parts, residual, rtol=2e-7)
    # What rounding did is what it did in the sound record, up to the float32 of the difference.
    sound = ds.sel(step=row).rounding.values
    np.testing.assert_allclose(there.rounding.values, sound, atol=1e-7 * np.abs(residual).max())
    norm = accounting(faulty).norm_unexplained.sel(step=row)
    np.testing.assert_allclose(norm, np.linalg.norm(expected), rtol=1e-12)


def native_of(run: tuple[xr.Dataset, History, Path]) -> str:
    return str(run[0].attrs["dtype"])


def spacings(history: History, native: str) -> np.ndarray:
    """The way from each weight to the next number of its dtype, as torch steps there."""
    weights = torch.stack(history.tensors["W"]).abs()
    if native == "bfloat16":
        after = (weights.view(torch.int16) + 1).view(torch.bfloat16)
    else:
        after = torch.nextafter(weights, torch.full_like(weights, torch.inf))
    return (after.double() - weights.double()).numpy()


def test_displacement_is_in_units_of_the_spacing_before(
    run: tuple[xr.Dataset, History, Path],
) -> None:
    ds, history, _ = run
    spaced = spacings(history, native_of(run))
    assert (spaced[1:] != spaced[:-1]).any()
    expected = np.diff(history["W"], axis=0) / spaced[:-1]
    np.testing.assert_array_equal(ds.displacement_ulp.values[1:], expected.astype(np.float32))
    assert np.isnan(ds.displacement_ulp.values[0]).all()
    assert (expected != 0).any()


def test_what_moved_is_another_number(run: tuple[xr.Dataset, History, Path]) -> None:
    ds, history, _ = run
    expected = np.diff(history["W"], axis=0) != 0
    np.testing.assert_array_equal(ds.moved.values[1:], expected.astype(np.float32))
    assert np.isnan(ds.moved.values[0]).all()
    assert expected.mean() > 0


def test_what_has_no_row_before_it_cannot_be_known_to_move(tmp_path: Path) -> None:
    """Nor does a zero move that changes its sign, or what stays infinite."""
    path = tmp_path / "run.zarr"
    record(path, n_steps=8, recorder_options={"schedule": every(3)})

    def stay(stored: Arrays, scalars: Arrays) -> None:
        stored["W"][:, 1] = 0x7F80
        stored["W"][::2, 2], stored["W"][1::2, 2] = 0x0000, 0x8000

    rewrite(path, tmp_path / "f.zarr", stay)
    ds = open_dataset(tmp_path / "f.zarr")
    follows = np.diff(ds.step.values, prepend=-2) == 1
    assert 0 < follows.sum() < len(follows) - 1
    np.testing.assert_array_equal(~np.isnan(ds.moved).any(("token", "dim")), follows)
    np.testing.assert_array_equal(np.isnan(ds.moved).all(("token", "dim")), ~follows)
    assert (ds.moved[follows, 1:3] == 0).all()
    assert (ds.moved[follows, 3:] == 1).any()


def test_ulp_is_the_way_to_the_next_number(run: tuple[xr.Dataset, History, Path]) -> None:
    ds, history, _ = run
    expected = spacings(history, native_of(run)).astype(np.float32)
    np.testing.assert_array_equal(ds.ulp.values, expected)


def test_stalled_elements_are_those_the_formula_moves_and_that_stay(tmp_path: Path) -> None:
    """Large weights in bfloat16, small steps: most stand still."""
    path = tmp_path / "run.zarr"
    weight = torch.nn.Parameter(torch.linspace(1e-3, 2, 55).reshape(11, 5).bfloat16())
    with torch.no_grad():
        weight[2] = 0
    optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.0)
    history = [weight.detach().clone()]
    with Recorder(path, optimizer, parameter=weight):
        for _ in range(6):
            weight.grad = torch.ones(11, 5).bfloat16()
            weight.grad[[2, 5]] = 0
            optimizer.step()
            history.append(weight.detach().clone())
    ds = open_dataset(path)
    W = torch.stack(history).double().numpy()
    wanted = np.ones((6, 11, 5), dtype=bool)
    wanted[:, [2, 5]] = False  # nothing is wanted of a weight that never had a gradient
    expected = wanted & (np.diff(W, axis=0) == 0)
    np.testing.assert_array_equal(ds.stalled.values[1:], expected.astype(np.float32))
    assert np.isnan(ds.stalled.values[0]).all()
    assert 0.2 < expected.mean() < 0.9
    np.testing.assert_allclose(accounting(ds, extended=True).share_stalled, expected.mean((1, 2)))
    moved = (np.diff(W, axis=0) != 0).mean((1, 2))
    np.testing.assert_allclose(accounting(ds, extended=True).share_moved, moved)
    spacing = np.exp2(np.floor(np.log2(np.maximum(np.abs(W), 2.0**-126))) - 7)
    displacement = np.abs(np.diff(W, axis=0) / spacing[:-1]).mean((1, 2))
    np.testing.assert_allclose(accounting(ds, extended=True).mean_displacement_ulp, displacement)


def test_freeze_step_is_the_last_step_at_which_a_token_moved(
    run: tuple[xr.Dataset, History, Path], tmp_path: Path
) -> None:
    ds, history, _ = run
    moved = (np.diff(history["W"], axis=0) != 0).any(axis=2)
    expected = (moved * np.arange(1, len(moved) + 1)[:, np.newaxis]).max(axis=0)
    np.testing.assert_array_equal(ds.freeze_step.values, expected)
    assert ds.freeze_step.dtype == np.int64
    for part in (ds.isel(token=[7, 2, 2]), ds.sel(token=ds.dead), ds.isel(token=slice(9, 2, -3))):
        np.testing.assert_array_equal(part.freeze_step.values, expected[part.token.values])
    assert int(ds.freeze_step.sel(token=4)) == expected[4]


def test_a_frozen_token_is_told_from_one_that_moves(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    record(path, n_steps=9)

    def freeze(stored: Arrays, scalars: Arrays) -> None:
        stored["W"][4:, 3] = stored["W"][3, 3]
        stored["W"][:, 5] = stored["W"][0, 5]

    rewrite(path, tmp_path / "f.zarr", freeze)
    ds = open_dataset(tmp_path / "f.zarr")
    assert ds.freeze_step.isel(token=[3, 5, 6]).values.tolist() == [3, 0, 9]


def test_what_is_not_finite_has_no_spacing(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    record(path, n_steps=3)

    def diverge(stored: Arrays, scalars: Arrays) -> None:
        stored["W"][2, 1] = 0x7F80
        stored["W"][2, 5, 3] = 0x7FC0

    rewrite(path, tmp_path / "d.zarr", diverge)
    ds, after = (open_dataset(tmp_path / "d.zarr").isel(step=step) for step in (2, 3))
    lost, nan = np.zeros((2, 11, 5), dtype=bool)
    lost[1], lost[5, 3], nan[5, 3] = True, True, True
    np.testing.assert_array_equal(np.isnan(ds.ulp), lost)
    np.testing.assert_array_equal(np.isnan(ds.displacement_ulp), nan)
    np.testing.assert_array_equal(np.isinf(ds.displacement_ulp), lost & ~nan)
    np.testing.assert_array_equal(np.isnan(after.displacement_ulp), lost)
    np.testing.assert_array_equal(np.isnan(ds.stalled), nan)
    for row in (ds, after):
        np.testing.assert_array_equal(np.isnan(row.moved), nan)
        assert (row.moved.values[1] == 1).all()
