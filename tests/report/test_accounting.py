"""The formula's account of the steps, against the notebook's columns in float64."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.support.oracles import in_float64
from tests.support.panels import figure_of, layer_of, toy
from tests.support.runs import History, live_mask, record
from tests.support.summary_oracle import spacing_of
from thimble_zarr.report.figure import Band, Line
from thimble_zarr.report.panels.accounting import accounting


def test_ratio_and_cosine_are_the_notebooks(toy_path: Path, toy_history: History) -> None:
    panel = accounting(toy(toy_path))
    arrays = (toy_history[name][:, ~live_mask()] for name in ("W", "exp_avg", "exp_avg_sq"))
    expected = in_float64(*arrays, lr=1e-2, weight_decay=1e-2)
    for title, label, name in (
        ("Size", "ratio", "ratio"),
        ("Direction", "cosine", "cosine_similarity"),
    ):
        line = layer_of(figure_of(panel, title), Line, group="dead", label=label)
        np.testing.assert_array_equal(line.x, range(1, 14))
        np.testing.assert_allclose(line.y, expected[name], rtol=0, atol=5.1e-5)


def test_shares_count_weights(tmp_path: Path) -> None:
    history = record(tmp_path / "run.zarr", lr=1e-4)
    figure = accounting(toy(tmp_path / "run.zarr")).figures[2]
    W = history["W"][:, live_mask()]
    t = np.arange(1, 14)[:, None, None]
    first, second = (history[name][1:, live_mask()] for name in ("exp_avg", "exp_avg_sq"))
    update = 1e-4 * first / (1 - 0.9**t) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
    predicted = -update - 1e-6 * W[:-1]
    moved = np.diff(W, axis=0) != 0
    shares = {
        "moved": moved,
        "stalled": ~moved & (predicted != 0),
        "update below half an ULP": abs(predicted) < spacing_of(W[:-1], "bfloat16") / 2,
    }
    assert shares["stalled"].any()
    for label, holds in shares.items():
        kind = Band if "update" in label else Line
        layer = layer_of(figure, kind, group="live", label=label)
        y = layer.high if isinstance(layer, Band) else layer.y
        np.testing.assert_allclose(y, 100 * holds.mean((1, 2)))


def test_a_step_that_moved_nothing_has_no_ratio(toy_path: Path) -> None:
    run = toy(toy_path)
    observed = run.summary.norm_observed.copy()
    observed[:, 5] = 0
    panel = accounting(replace(run, summary=run.summary.assign(norm_observed=observed)))
    line = layer_of(figure_of(panel, "Size"), Line, group="dead", label="ratio")
    assert np.flatnonzero(np.isnan(line.y)).tolist() == [4]


def test_without_a_formula_only_what_moved_is_shown(toy_path: Path) -> None:
    run = toy(toy_path)
    gone = ["norm_predicted", "cosine_predicted", "share_stalled", "share_below_half_ulp"]
    panel = accounting(replace(run, summary=run.summary.drop_vars(gone)))
    assert {layer.label for figure in panel.figures for layer in figure.layers} == {"moved"}
    assert "no step can be predicted" in panel.note
