"""The estimates of the optimizer against each other, computed again from what a loop saw."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import thimble_zarr
from tests.support.panels import layer_of, layers_of, toy
from tests.support.runs import History, live_mask
from tests.support.summary_oracle import spacing_of
from thimble_zarr.report.figure import Line, Points
from thimble_zarr.report.panels.phase_space import phase_space


@pytest.mark.parametrize(("group", "mask"), [("dead", ~live_mask()), ("live", live_mask())])
def test_points_are_root_mean_squares_over_dims(
    toy_path: Path, toy_history: History, group: str, mask: np.ndarray
) -> None:
    panel = phase_space(toy(toy_path))
    assert panel.has_same_axes
    for step, figure in zip([1, 2, 3, 4, 7, 13], panel.figures, strict=True):
        assert figure.title == f"step {step}, lr 0.01"
        first = toy_history["exp_avg"][step] / (1 - 0.9**step)
        second = toy_history["exp_avg_sq"][step] / (1 - 0.999**step)
        points = layer_of(figure, Points, group=group, label="token")
        np.testing.assert_array_equal(points.tokens, np.flatnonzero(mask))
        np.testing.assert_allclose(points.x, np.sqrt(second.mean(1))[mask], rtol=1e-6)
        np.testing.assert_allclose(points.y, np.sqrt((first**2).mean(1))[mask], rtol=1e-6)


def test_on_the_line_an_update_is_one_ulp(toy_path: Path, toy_history: History) -> None:
    for step, figure in zip([1, 2, 3, 4, 7, 13], phase_space(toy(toy_path)).figures, strict=True):
        line = layer_of(figure, Line, group="dead", label="1 ULP (median)")
        at = toy_history["W"][step - 1][~live_mask()]
        update = 1e-2 * line.y / line.x
        np.testing.assert_allclose(update, np.median(spacing_of(at, "bfloat16")), rtol=1e-12)
        points = layer_of(figure, Points, group="dead", label="token")
        assert (line.x == [points.x.min(), points.x.max()]).all()
        half = layer_of(figure, Line, group="dead", label="1/2 ULP (median)")
        assert (half.y == line.y / 2).all()
        assert line.is_dashed > half.is_dashed


def test_the_ulp_is_of_the_dtype_that_the_summary_measures_in(
    toy_path: Path, toy_history: History
) -> None:
    run = replace(toy(toy_path), ds=thimble_zarr.open_dataset(toy_path))
    of_float16 = replace(run, summary=run.summary.assign_attrs(ulp_dtype="float16"))
    line = layer_of(phase_space(of_float16).figures[0], Line, group="dead", label="1 ULP (median)")
    expected = np.median(spacing_of(toy_history["W"][0][~live_mask()], "float16"))
    np.testing.assert_allclose(1e-2 * line.y / line.x, expected, rtol=1e-6)


def test_without_a_learning_rate_no_update_is_one_ulp(toy_path: Path) -> None:
    run = toy(toy_path)
    still = replace(run, ds=run.ds.assign(learning_rate=0 * run.ds.learning_rate))
    for figure in phase_space(still).figures:
        assert layers_of(figure, Points, group="dead", label="token")
        assert not layers_of(figure, Line, group="dead", label="1 ULP (median)")


def test_what_is_no_point_of_a_logarithmic_axis_is_left_out(toy_path: Path) -> None:
    run = toy(toy_path)
    norms = run.summary.norm_sqrt_v_hat.copy()
    norms[:, 0], norms[:, 1], norms[:, 2] = 0, np.nan, np.inf
    panel = phase_space(replace(run, summary=run.summary.assign(norm_sqrt_v_hat=norms)))
    for figure in panel.figures:
        points = layer_of(figure, Points, group="all", label="token")
        assert points.tokens.tolist() == list(range(3, 11))


def test_an_optimizer_without_such_estimates_has_none(toy_path: Path) -> None:
    run = toy(toy_path)
    other = run.summary.drop_vars("norm_sqrt_v_hat").rename(norm_m_hat="norm_momentum_buffer")
    panel = phase_space(replace(run, summary=other))
    assert not panel.figures
    assert "does not divide" in panel.note
