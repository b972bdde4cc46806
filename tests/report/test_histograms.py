"""Outlines of histograms, against tokens counted bin by bin."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.support.panels import layer_of, toy
from tests.support.runs import History, live_mask
from thimble_zarr.report.figure import Line
from thimble_zarr.report.panels.histograms import N_BINS, histograms

SHOWN = [1, 3, 4, 13]


def test_a_bin_is_as_high_as_the_share_of_tokens_in_it(
    toy_path: Path, toy_history: History
) -> None:
    panel, live = histograms(toy(toy_path)), live_mask()
    for name, figure in (("W", panel.figures[0]), ("grad", panel.figures[2])):
        for step in SHOWN:
            norms = np.sqrt((toy_history[name][step][live] ** 2).sum(1))
            outline = layer_of(figure, Line, group="live", label=f"step {step}")
            lows, highs = outline.x[1:-1:2], outline.x[2::2]
            assert len(lows) == N_BINS
            assert (lows[1:] == highs[:-1]).all()
            np.testing.assert_allclose(highs / lows, highs[0] / lows[0])
            within = (lows[:, None] < norms) & (norms < highs[:, None])
            assert (outline.y[1:-1:2] == outline.y[2::2]).all()
            np.testing.assert_allclose(outline.y[1:-1:2], 100 * within.sum(1) / live.sum())
            assert outline.y[0] == outline.y[-1] == 0
            np.testing.assert_allclose(outline.y[1:-1:2].sum(), 100)


def test_tokens_that_did_not_move_are_in_no_bin_but_count(toy_path: Path) -> None:
    run = toy(toy_path)
    still = run.summary.l2_ulp.copy()
    still[13, :4], still[13, 4], still[13, 5] = 0, np.nan, np.inf
    panel = histograms(replace(run, summary=run.summary.assign(l2_ulp=still)))
    outline = layer_of(panel.figures[1], Line, group="all", label="step 13")
    np.testing.assert_allclose(outline.y[1:-1:2].sum(), 100 * 5 / 11)
    assert np.isfinite(outline.x).all()


def test_a_run_in_which_nothing_moved_has_no_histogram_of_changes(toy_path: Path) -> None:
    run = toy(toy_path)
    panel = histograms(replace(run, summary=run.summary.assign(l2_ulp=0 * run.summary.l2_ulp)))
    assert [figure.title for figure in panel.figures] == ["Weights", "Gradients"]
