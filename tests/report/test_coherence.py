"""Cosines of changes with their mean, computed again from what a loop saw."""

from pathlib import Path

import numpy as np

from tests.support.panels import layer_of, toy
from tests.support.runs import History, live_mask
from thimble_zarr.report.figure import Band, Line
from thimble_zarr.report.panels.coherence import coherence


def test_quantiles_are_of_cosines_with_the_mean_change(
    toy_path: Path, toy_history: History
) -> None:
    delta = np.diff(toy_history["W"], axis=0)[:, ~live_mask()]
    mean = delta.mean(1, keepdims=True)
    sizes = np.linalg.norm(delta, axis=2) * np.linalg.norm(mean, axis=2)
    cosines = (delta * mean).sum(2) / sizes
    (figure,) = coherence(toy(toy_path)).figures
    for label, share in (("min", 0), ("median", 0.5), ("90 %", 0.9), ("max", 1)):
        line = layer_of(figure, Line, group="dead", label=label)
        np.testing.assert_array_equal(line.x, range(1, 14))
        np.testing.assert_allclose(line.y, np.quantile(cosines, share, axis=1), rtol=1e-6)
    band = layer_of(figure, Band, group="dead", label="quartiles")
    np.testing.assert_allclose(band.low, np.quantile(cosines, 0.25, axis=1), rtol=1e-6)
    np.testing.assert_allclose(band.high, np.quantile(cosines, 0.75, axis=1), rtol=1e-6)
