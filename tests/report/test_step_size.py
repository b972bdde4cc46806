"""Step sizes and radii, computed again from what a loop saw."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.support.panels import figure_of, layer_of, summed, toy
from tests.support.resting import moves, resting
from tests.support.runs import N_DIMS, N_STEPS, N_TOKENS, History, live_mask
from thimble_zarr.report.figure import Band, Figure, Line, Rule
from thimble_zarr.report.panels.step_size import radius, step_size

LABELS = {"min": 0.0, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "max": 1.0}


def assert_quantiles(figure: Figure, group: str, values: np.ndarray, first: int) -> None:
    """Compare with numbers of shape `(step, token)`."""
    lines = [layer for layer in figure.layers if isinstance(layer, Line) and layer.group == group]
    assert lines
    for line in lines:
        np.testing.assert_array_equal(line.x, range(first, N_STEPS + 1))
        expected = np.quantile(values, LABELS[line.label], axis=1)
        np.testing.assert_allclose(line.y, expected, rtol=1e-6, atol=1e-12)
        assert line.low is line.high is None
    band = layer_of(figure, Band, group=group, label="quartiles")
    np.testing.assert_allclose(band.low, np.quantile(values, 0.25, axis=1), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(band.high, np.quantile(values, 0.75, axis=1), rtol=1e-6, atol=1e-12)


def test_step_sizes_are_those_of_the_loop(toy_path: Path, toy_history: History) -> None:
    sizes = np.linalg.norm(np.diff(toy_history["W"], axis=0), axis=2)
    figure = figure_of(step_size(toy(toy_path)), "In weights")
    for group, mask in (("dead", ~live_mask()), ("live", live_mask())):
        assert_quantiles(figure, group, sizes[:, mask], 1)


def test_ulps_are_those_that_weights_were_moved_by(toy_path: Path) -> None:
    figure = figure_of(step_size(resting(toy_path)), "In ULP of bfloat16")
    assert_quantiles(figure, "all", np.linalg.norm(moves(), axis=2)[1:], 1)
    (rule,) = (layer for layer in figure.layers if isinstance(layer, Rule))
    assert rule.y == np.sqrt(N_DIMS)
    assert rule.group is None


def test_radii_are_those_of_the_loop(toy_path: Path, toy_history: History) -> None:
    W, panel = toy_history["W"], radius(toy(toy_path))
    origin = figure_of(panel, "From the origin")
    centroid = figure_of(panel, "From the centroid of the group")
    for group, mask in (("dead", ~live_mask()), ("all", np.ones(N_TOKENS, bool))):
        of = W[:, mask]
        assert_quantiles(origin, group, np.linalg.norm(of, axis=2), 0)
        assert_quantiles(centroid, group, np.linalg.norm(of - of.mean(1)[:, None], axis=2), 0)


def test_a_point_of_several_steps_has_their_least_and_greatest(toy_path: Path) -> None:
    run = toy(toy_path)
    (whole, few) = (
        layer_of(figure_of(radius(of), "From the origin"), Line, group="live", label="max")
        for of in (run, replace(run, n_columns=3))
    )
    parts = np.split(whole.y, [14 // 3, 28 // 3])
    np.testing.assert_array_equal(few.low, [*map(np.min, parts)])
    np.testing.assert_array_equal(few.y, [*map(np.median, parts)])
    np.testing.assert_array_equal(few.high, [*map(np.max, parts)])


def test_a_run_of_one_step_has_a_point(toy_path: Path) -> None:
    figure = figure_of(step_size(toy(toy_path, n_rows=2)), "In weights")
    assert layer_of(figure, Line, group="all", label="max").x.tolist() == [1]


def test_weights_that_are_lost_end_the_lines(toy_path: Path) -> None:
    ds = toy(toy_path).ds.load()
    W = ds.W.values.copy()
    W[5:] = np.nan
    with np.errstate(invalid="ignore"):
        run = summed(ds.assign(W=(ds.W.dims, W)))
    line = layer_of(figure_of(radius(run), "From the origin"), Line, group="all", label="max")
    assert np.isnan(line.y).tolist() == [False] * 5 + [True] * 9


def test_without_changes_nothing_is_drawn_and_the_note_says_why(toy_path: Path) -> None:
    run = toy(toy_path)
    names = ("norm_delta_W_quantiles", "l2_ulp_quantiles")
    empty = {name: run.summary[name] * np.nan for name in names}
    panel = step_size(replace(run, summary=run.summary.assign(empty)))
    assert panel.figures == []
    assert "no change is known" in panel.note


def test_a_change_that_is_not_known_does_not_interrupt_a_line(toy_path: Path) -> None:
    run = summed(toy(toy_path).ds.load().sel(step=[0, 1, 4, 5, 9, 10]))
    line = layer_of(figure_of(step_size(run), "In weights"), Line, group="all", label="max")
    assert line.x.tolist() == [1, 5, 10]
    assert not np.isnan(line.y).any()
