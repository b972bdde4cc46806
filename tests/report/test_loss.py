"""The loss and the learning rate."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.support.panels import layer_of, toy
from tests.support.runs import N_STEPS, History
from thimble_zarr.report.figure import Line
from thimble_zarr.report.panels.loss import loss


def test_loss_and_learning_rate_are_those_of_the_loop(toy_path: Path, toy_history: History) -> None:
    (figure,) = loss(toy(toy_path)).figures
    line = layer_of(figure, Line, group=None, label="loss")
    rate = layer_of(figure, Line, group=None, label="learning rate")
    for of in (line, rate):
        np.testing.assert_array_equal(of.x, range(1, N_STEPS + 1))
    np.testing.assert_allclose(line.y, toy_history.losses, rtol=1e-6)
    np.testing.assert_allclose(rate.y, toy_history.learning_rates)
    assert rate.on_right
    assert not line.on_right


def test_a_loss_that_was_not_logged_is_told(toy_path: Path) -> None:
    run = toy(toy_path)
    for ds in (run.ds.drop_vars("loss"), run.ds.assign(loss=run.ds.loss * np.nan)):
        panel = loss(replace(run, ds=ds))
        (figure,) = panel.figures
        assert figure.right is None
        assert figure.y.label == "learning rate"
        assert not layer_of(figure, Line, group=None, label="learning rate").on_right
        assert "No loss was logged" in panel.note


def test_a_loss_that_is_logged_now_and_then_is_one_line(toy_path: Path) -> None:
    run = toy(toy_path)
    sparse = run.ds.loss.where(run.ds.step % 5 == 0)
    (figure,) = loss(replace(run, ds=run.ds.assign(loss=sparse))).figures
    assert layer_of(figure, Line, group=None, label="loss").x.tolist() == [5, 10]
