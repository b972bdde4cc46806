"""The centroid and identical tokens, computed again from what a loop saw."""

from pathlib import Path

import numpy as np

from tests.support.panels import figure_of, layer_of, summed, toy
from tests.support.runs import History, live_mask
from thimble_zarr.report.figure import Line
from thimble_zarr.report.panels.centroid import centroid, identical


def test_norm_drift_and_steps_are_those_of_the_mean(toy_path: Path, toy_history: History) -> None:
    panel = centroid(toy(toy_path))
    for group, mask in (("dead", ~live_mask()), ("live", live_mask())):
        mean = toy_history["W"][:, mask].mean(1)
        for title, first, expected in (
            ("Norm", 0, np.linalg.norm(mean, axis=1)),
            ("Drift", 0, np.linalg.norm(mean - mean[0], axis=1)),
            ("Still to go", 0, np.linalg.norm(mean - mean[-1], axis=1)),
            ("Step size", 1, np.linalg.norm(np.diff(mean, axis=0), axis=1)),
        ):
            line = layer_of(figure_of(panel, title), Line, group=group, label="")
            np.testing.assert_array_equal(line.x, range(first, 14))
            np.testing.assert_allclose(line.y, expected, rtol=1e-6, atol=1e-12)


def test_the_first_row_alone_has_a_place(toy_path: Path) -> None:
    run = toy(toy_path, n_rows=2)
    titles = [figure.title for figure in centroid(run).figures]
    assert titles == ["Norm", "Drift", "Still to go", "Step size"]


def test_identical_tokens_are_counted(toy_path: Path) -> None:
    ds = toy(toy_path).ds.load()
    none = identical(summed(ds))
    assert none.figures == []
    assert "At no step do two tokens" in none.note
    W = ds.W.values.copy()
    tokens = np.flatnonzero(~live_mask())
    W[3:, tokens[:3]] = W[3:, tokens[:1]]
    (figure,) = identical(summed(ds.assign(W=(ds.W.dims, W)))).figures
    for group, n, largest in (("dead", 3, 3), ("live", 0, 1), ("all", 3, 3)):
        for label, expected, otherwise in (
            ("tokens like another", n, 0),
            ("largest set of equals", largest, 1),
        ):
            line = layer_of(figure, Line, group=group, label=label)
            assert line.y.tolist() == [otherwise] * 3 + [expected] * 11
