"""Gradients, estimates and steps, computed again from what a loop saw."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.support.oracles import in_float64
from tests.support.panels import figure_of, layer_of, toy
from tests.support.runs import History, live_mask
from thimble_zarr.report.figure import Band, Line
from thimble_zarr.report.panels.optimizer import optimizer

STEPS = np.arange(1, 14)


def norms(history: History) -> dict[str, np.ndarray]:
    """Return the norms of gradient and estimates of the live tokens, shape (step, token)."""
    t = STEPS[:, None, None]
    arrays = {
        "|grad|": history["grad"][1:],
        "|m_hat|": history["exp_avg"][1:] / (1 - 0.9**t),
        "|sqrt(v_hat)|": np.sqrt(history["exp_avg_sq"][1:] / (1 - 0.999**t)),
    }
    return {name: np.linalg.norm(of[:, live_mask()], axis=2) for name, of in arrays.items()}


def test_medians_and_quartiles_are_over_tokens(toy_path: Path, toy_history: History) -> None:
    figure = figure_of(optimizer(toy(toy_path)), "Gradient and estimates")
    for name, of in norms(toy_history).items():
        line = layer_of(figure, Line, group="live", label=f"{name}, median")
        np.testing.assert_allclose(line.y, np.median(of, axis=1), rtol=1e-6)
        np.testing.assert_array_equal(line.x, STEPS)
        band = layer_of(figure, Band, group="live", label=f"{name}, quartiles")
        np.testing.assert_allclose(band.low, np.quantile(of, 0.25, axis=1), rtol=1e-6)
        np.testing.assert_allclose(band.high, np.quantile(of, 0.75, axis=1), rtol=1e-6)


def test_the_ratio_is_of_first_and_root_of_second(toy_path: Path, toy_history: History) -> None:
    figure = figure_of(optimizer(toy(toy_path)), "Ratio of the estimates")
    medians = {name: np.median(of, axis=1) for name, of in norms(toy_history).items()}
    line = layer_of(figure, Line, group="live", label="|m_hat| / |sqrt(v_hat)|")
    np.testing.assert_allclose(line.y, medians["|m_hat|"] / medians["|sqrt(v_hat)|"], rtol=1e-6)


def test_steps_are_those_of_formula_and_record(toy_path: Path, toy_history: History) -> None:
    figure = figure_of(optimizer(toy(toy_path)), "Size of the step")
    arrays = (toy_history[name][:, live_mask()] for name in ("W", "exp_avg", "exp_avg_sq"))
    expected = in_float64(*arrays, lr=1e-2, weight_decay=1e-2)
    for label in ("predicted", "observed"):
        line = layer_of(figure, Line, group="live", label=label)
        np.testing.assert_allclose(line.y, expected[f"norm_{label}"], rtol=1e-6)


def test_another_optimizer_shows_what_it_keeps(toy_path: Path) -> None:
    run = toy(toy_path)
    names = {f"norm_m_hat{kind}": f"norm_momentum_buffer{kind}" for kind in ("", "_quantiles")}
    dropped = ["norm_sqrt_v_hat", "norm_sqrt_v_hat_quantiles"]
    panel = optimizer(replace(run, summary=run.summary.drop_vars(dropped).rename(names)))
    assert [figure.title for figure in panel.figures] == [
        "Gradient and estimates",
        "Size of the step",
    ]
    layer_of(panel.figures[0], Line, group="dead", label="|momentum_buffer|, median")
    assert "learning rate" not in panel.note
    bare = run.summary.drop_vars([*names, *dropped, "norm_predicted"])
    panel = optimizer(replace(run, summary=bare))
    labels = {layer.label for figure in panel.figures for layer in figure.layers}
    assert labels == {"|grad|, median", "|grad|, quartiles", "observed"}


def test_where_the_second_estimate_is_0_there_is_no_ratio(toy_path: Path) -> None:
    run = toy(toy_path)
    zero = run.summary.assign(norm_sqrt_v_hat_quantiles=0 * run.summary.norm_sqrt_v_hat_quantiles)
    assert "Ratio of the estimates" not in {
        figure.title for figure in optimizer(replace(run, summary=zero)).figures
    }
