"""Which steps and tokens stand for all."""

import numpy as np
import pytest
import xarray as xr

from thimble_zarr.report.run import Run
from thimble_zarr.report.sample import N_POINTS, sample_note, sampled, spread, values_of


@pytest.mark.parametrize("n_steps", [1, 2, 3, 4, 5, 6, 7, 13, 1001])
@pytest.mark.parametrize("n_most", [4, 6])
def test_steps_are_as_many_as_there_may_be_with_both_ends(n_steps: int, n_most: int) -> None:
    steps = 3 + 2 * np.arange(n_steps)
    chosen = spread(steps, n_most)
    assert len({*chosen}) == len(chosen) == min(n_steps, n_most)
    assert (chosen[0], chosen[-1]) == (steps[0], steps[-1])
    assert {*chosen} <= {*steps.tolist()}
    gaps = np.diff(chosen)
    assert (np.diff(gaps) >= 0).all()


def test_of_no_steps_none_is_chosen() -> None:
    assert spread(np.arange(0), 4) == []


def large() -> Run:
    masks = np.arange(5000) < np.array([[N_POINTS], [N_POINTS + 1], [5000]])
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
    assert sample_note(run) == (
        "Shown are 1,000 tokens drawn at random from 1,001 one more, from 5,000 all."
    )


def test_values_are_those_of_each_groups_tokens() -> None:
    run = large()
    tokens = {"a": np.array([4, 2, 4000]), "b": np.array([2])}
    found = values_of(run.ds["W"], 7, tokens)
    assert found["a"].tolist() == [[4, 4.5], [2, 2.5], [4000, 4000.5]]
    assert found["b"].tolist() == [[2, 2.5]]
