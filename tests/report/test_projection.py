"""The plane of the centroid's path, against the eigenvectors of its covariance."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.panels import layer_of, summed, toy
from tests.support.runs import History, live_mask
from thimble_zarr.report.figure import Line, Points
from thimble_zarr.report.panels.projection import Plane, projection

SHOWN = [0, 3, 4, 13]


def eigenvectors(path: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both axes, each with the sign in which the path ends further, and their shares."""
    values, vectors = np.linalg.eigh(np.cov(path.T))
    axes = vectors[:, [-1, -2]].T
    signs = np.sign(axes @ (path[-1] - path[0]))
    return axes * signs[:, None], values[[-1, -2]] / values.sum()


@pytest.mark.parametrize(("group", "mask"), [("dead", ~live_mask()), ("live", live_mask())])
def test_tokens_and_path_lie_in_the_plane_of_the_first_two_components(
    toy_path: Path, toy_history: History, group: str, mask: np.ndarray
) -> None:
    W = toy_history["W"]
    path = W[:, mask].mean(1)
    axes, shares = eigenvectors(path)
    panel = projection(toy(toy_path))
    assert panel.has_same_axes
    assert f"{shares[0]:.1%} + {shares[1]:.1%} ({group})" in panel.note
    for step, figure in zip(SHOWN, panel.figures, strict=True):
        assert figure.title == f"step {step}"
        points = layer_of(figure, Points, group=group, label="token")
        along = (W[step][mask] - path.mean(0)) @ axes.T
        np.testing.assert_allclose(np.stack([points.x, points.y], 1), along, atol=1e-9)
        np.testing.assert_array_equal(points.tokens, np.flatnonzero(mask))
        trace = (path - path.mean(0)) @ axes.T
        for label, part in (
            ("path so far", trace[: step + 1]),
            ("path, later", trace[step:]),
        ):
            line = layer_of(figure, Line, group=group, label=label)
            np.testing.assert_allclose(np.stack([line.x, line.y], 1), part, atol=1e-9)
        centroid = layer_of(figure, Points, group=group, label="centroid")
        np.testing.assert_allclose([centroid.x[0], centroid.y[0]], trace[step], atol=1e-9)


def test_a_long_path_is_thinned_but_passes_through_what_is_shown(toy_path: Path) -> None:
    run = toy(toy_path)
    steps = [0, 3, 4, 6, 13]
    for thinned, whole in zip(
        projection(replace(run, n_columns=3)).figures, projection(run).figures, strict=True
    ):
        W = layer_of(thinned, Points, group="dead", label="token")
        of_all = layer_of(whole, Points, group="dead", label="token")
        np.testing.assert_array_equal(W.tokens, of_all.tokens)
        step = int(thinned.title.removeprefix("step "))
        for label, n in (
            ("path so far", sum(of <= step for of in steps)),
            ("path, later", sum(of >= step for of in steps)),
        ):
            assert len(layer_of(thinned, Line, group="dead", label=label).x) == n


@pytest.mark.parametrize("path", [np.ones((1, 3)), np.ones((4, 2)), np.outer([1, 2, 4], [3, 4])])
def test_a_path_that_does_not_leave_a_line_has_a_plane(path: np.ndarray) -> None:
    plane = Plane.of(path)
    np.testing.assert_allclose(plane.axes @ plane.axes.T, np.eye(2), atol=1e-12)
    assert plane.shares == pytest.approx((1, 0) if len(path) == 3 else (0, 0))
    x, y = plane.coordinates(path)
    np.testing.assert_allclose(x, (path - path.mean(0)) @ [0.6, 0.8] if len(path) == 3 else 0)
    np.testing.assert_allclose(y, 0, atol=1e-12)


def test_weights_that_are_not_finite_leave_the_path_before_them(toy_path: Path) -> None:
    ds = toy(toy_path).ds
    W = ds.W.copy()
    W[9:] = np.nan
    with np.errstate(invalid="ignore"):
        panel = projection(summed(ds.assign(W=W)))
    until = projection(toy(toy_path, 9))
    for figure, sound in zip(panel.figures[:2], (until.figures[0], None), strict=True):
        points = layer_of(figure, Points, group="live", label="token")
        assert np.isfinite(points.x).all()
        if sound is not None:
            expected = layer_of(sound, Points, group="live", label="token")
            np.testing.assert_allclose(points.x, expected.x, atol=1e-12)
    run = toy(toy_path)
    lost = replace(run, summary=run.summary.assign(centroid=np.nan * run.summary.centroid))
    assert not projection(lost).figures
