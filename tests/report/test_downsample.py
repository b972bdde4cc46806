"""Many steps and tokens as few columns and rows, against loops over them."""

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from thimble_zarr.report import downsample
from thimble_zarr.report.downsample import (
    blocks,
    columns,
    evenly,
    mostly_early,
    pixels,
    sample_note,
    sampled,
    values_of,
)
from thimble_zarr.report.run import Run

N_STEPS, N_TOKENS = 37, 23


def numbers() -> np.ndarray:
    """Return numbers, shape `(step, token)`; NaN are a step, a token and some others."""
    rng = np.random.default_rng(0)
    found = rng.normal(size=(N_STEPS, N_TOKENS)).astype(np.float32)
    found[rng.random(found.shape) < 0.1] = np.nan
    found[0], found[:, 4] = np.nan, np.nan
    return found


def spread(values: np.ndarray) -> tuple[float, float, float]:
    there = values[~np.isnan(values)]
    return (there.min(), np.median(there), there.max()) if there.size else (np.nan,) * 3


@pytest.mark.parametrize("n_columns", [1, 5, 36])
def test_each_column_is_of_consecutive_steps_and_none_is_left_out(n_columns: int) -> None:
    values, steps = numbers()[:, :3], np.arange(100, 100 + N_STEPS)
    found = columns(steps, values, n_columns)
    parts = np.split(np.arange(N_STEPS), [N_STEPS * at // n_columns for at in range(1, n_columns)])
    assert len(found.x) == n_columns
    assert not found.is_exact
    for at, part in enumerate(parts):
        assert found.x[at] == 100 + part[(len(part) - 1) // 2]
        for series in range(3):
            expected = spread(values[part, series])
            got = found.low[at, series], found.median[at, series], found.high[at, series]
            np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_as_many_columns_as_steps_are_exact() -> None:
    steps = np.array([3, 5, 8])
    found = columns(steps, np.array([1.0, np.nan, np.inf]), 3)
    assert found.is_exact
    np.testing.assert_array_equal(found.x, steps)
    np.testing.assert_array_equal(found.median, [1, np.nan, np.inf])


def test_infinities_are_not_hidden() -> None:
    found = columns(np.arange(4), np.array([-np.inf, np.inf, 1.0, np.inf]), 2)
    np.testing.assert_array_equal(found.low, [-np.inf, 1])
    np.testing.assert_array_equal(found.median, [np.nan, np.inf])  # of both there is none
    np.testing.assert_array_equal(found.high, [np.inf, np.inf])


@pytest.mark.parametrize(("n", "n_most"), [(5, 5), (5, 9), (1000, 400), (401, 400), (7, 1), (0, 3)])
def test_even_choices_have_both_ends(n: int, n_most: int) -> None:
    found = evenly(n, n_most)
    assert len(found) == min(n, n_most)
    assert len({*found.tolist()}) == len(found)
    if n and n_most > 1:
        assert found[[0, -1]].tolist() == [0, n - 1]


@pytest.mark.parametrize(("n_columns", "n_rows"), [(400, 300), (5, 300), (400, 4), (7, 3), (1, 1)])
@pytest.mark.parametrize("block_bytes", [1, 2**24])
def test_a_pixel_is_of_all_that_it_covers(
    monkeypatch: pytest.MonkeyPatch, n_columns: int, n_rows: int, block_bytes: int
) -> None:
    monkeypatch.setattr(downsample, "BLOCK_BYTES", block_bytes)
    values, rng = numbers(), np.random.default_rng(1)
    order = rng.permutation(N_TOKENS)
    orders = {"all": order, "some": order[:11], "one": order[:1], "none": order[:0]}
    steps = np.arange(100, 100 + N_STEPS)
    variable = xr.DataArray(values, dims=("step", "token"), coords={"step": steps})
    found = pixels(variable, orders, n_columns, n_rows)
    for group, of in found.items():
        tokens = orders[group]
        n = min(n_rows, len(tokens)), min(n_columns, N_STEPS)
        assert of.median.shape == of.low.shape == of.high.shape == n
        assert of.median.dtype == np.float32
        for row in range(n[0]):
            there = tokens[row * len(tokens) // n[0] : (row + 1) * len(tokens) // n[0]]
            for column in range(n[1]):
                at = [step for step in range(N_STEPS) if step * n[1] // N_STEPS == column]
                got = [part[row, column] for part in (of.low, of.median, of.high)]
                np.testing.assert_allclose(got, spread(values[np.ix_(at, there)]), rtol=1e-6)


def test_columns_are_equally_wide_where_steps_are_missing() -> None:
    steps = np.array([10, 11, 19])
    variable = xr.DataArray(
        np.array([[1.0], [2.0], [3.0]]), dims=("step", "token"), coords={"step": steps}
    )
    found = pixels(variable, {"all": np.array([0])}, 5, 5)["all"]
    np.testing.assert_array_equal(found.median, [[1.5, np.nan, np.nan, np.nan, 3]])


def test_each_chunk_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[slice] = []

    class Spy(xr.DataArray):
        __slots__ = ()

        def isel(self, **at: slice) -> xr.DataArray:  # type: ignore[override]
            read.append(at["step"])
            return super().isel(**at)

    monkeypatch.setattr(downsample, "BLOCK_BYTES", 5 * 4 * N_TOKENS)
    variable = Spy(numbers(), dims=("step", "token"), coords={"step": np.arange(N_STEPS)})
    variable.encoding["chunks"] = (4, N_TOKENS)
    pixels(variable, {"all": np.arange(N_TOKENS)}, 9, 5)
    assert [(part.start, part.stop) for part in read] == [(at, at + 4) for at in range(0, 37, 4)]


def test_blocks_are_small_and_leave_no_step_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downsample, "BLOCK_BYTES", 100)
    assert [*blocks(7, 30)] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert [*blocks(2, 1000)] == [slice(0, 1), slice(1, 2)]
    assert [*blocks(0, 0)] == []


@pytest.mark.parametrize("n_steps", [1, 2, 3, 4, 5, 6, 7, 13, 1001])
@pytest.mark.parametrize("n_most", [4, 6])
def test_steps_are_as_many_as_there_may_be_with_both_ends(n_steps: int, n_most: int) -> None:
    steps = 3 + 2 * np.arange(n_steps)
    chosen = mostly_early(steps, n_most)
    assert len({*chosen}) == len(chosen) == min(n_steps, n_most)
    assert (chosen[0], chosen[-1]) == (steps[0], steps[-1])
    assert {*chosen} <= {*steps.tolist()}
    gaps = np.diff(chosen)
    assert (np.diff(gaps) >= 0).all()


def test_of_no_steps_none_is_chosen() -> None:
    assert mostly_early(np.arange(0), 4) == []


def large() -> Run:
    masks = np.arange(5000) < np.array([[1000], [1001], [5000]])
    coords = {"group": ["few", "one more", "all"], "token": np.arange(5000)}
    summary = xr.Dataset({"is_member": (("group", "token"), masks)}, coords=coords)
    values = np.arange(5000.0)[:, None] + np.array([0, 0.5])
    ds = xr.Dataset({"W": (("step", "token", "dim"), values[None])}, coords={"step": [7]})
    return Run(store="run.zarr", ds=ds, summary=summary)


def test_a_sample_is_of_members_and_the_same_at_every_call() -> None:
    run = large()
    tokens = sampled(run)
    assert {group: len({*of}) for group, of in tokens.items()} == dict.fromkeys(run.groups, 1000)
    assert tokens["few"].tolist() == list(range(1000))
    assert tokens["one more"].max() <= 1000
    assert abs(tokens["all"].mean() - 2500) < 5 * 5000 / np.sqrt(12 * 1000)
    for group, of in sampled(run).items():
        np.testing.assert_array_equal(of, tokens[group])
    assert {len(of) for of in sampled(replace(run, n_points=7)).values()} == {7}
    assert sample_note(run) == (
        "Up to 1,000 tokens of a group are shown, drawn at random from 1,001 one more, 5,000 all."
    )


def test_values_are_those_of_each_groups_tokens() -> None:
    run = large()
    tokens = {"a": np.array([4, 2, 4000]), "b": np.array([2])}
    found = values_of(run.ds["W"], 7, tokens)
    assert found["a"].tolist() == [[4, 4.5], [2, 2.5], [4000, 4000.5]]
    assert found["b"].tolist() == [[2, 2.5]]
