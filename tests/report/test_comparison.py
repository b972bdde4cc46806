"""Several runs side by side: whose lines are whose, and what they differ in."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.panels import figure_of, layer_of, toy
from tests.support.runs import History, live_mask, record
from thimble_zarr.report.figure import Line, Panel
from thimble_zarr.report.panels.comparison import compare
from thimble_zarr.report.run import Run


@pytest.fixture
def other(tmp_path: Path) -> tuple[Run, History]:
    import torch

    history = record(tmp_path / "other.zarr", dtype=torch.float32, n_steps=7)
    return replace(toy(tmp_path / "other.zarr"), store="runs/other.zarr"), history


def line(panel: Panel, title: str, store: str, group: str | None) -> np.ndarray:
    found = layer_of(figure_of(panel, title), Line, group=group, label=store)
    return found.y


def test_each_run_has_a_line_of_its_own(
    toy_path: Path, toy_history: History, other: tuple[Run, History]
) -> None:
    panel = compare([toy(toy_path), other[0]])
    assert panel.code == "thimble_zarr.plot.compare(['runs/toy.zarr', 'runs/other.zarr'])"
    for store, history in (("toy.zarr", toy_history), ("other.zarr", other[1])):
        np.testing.assert_allclose(line(panel, "Loss", store, None), history.losses)
        W = history["W"][:, ~live_mask()]
        norms = np.linalg.norm(W.mean(1), axis=1)
        np.testing.assert_allclose(line(panel, "Norm of the centroid", store, "dead"), norms)
        moved = 100 * (np.diff(W, axis=0) != 0).mean((1, 2))
        np.testing.assert_allclose(line(panel, "Weights that moved", store, "dead"), moved)
    assert panel.note.startswith("They differ in dtype and last step.")
    assert "other.zarr: float32, 7. An ULP is not the same" in panel.note


def test_a_token_is_frozen_after_its_freeze_step_unless_it_still_moves(toy_path: Path) -> None:
    run = toy(toy_path)
    freeze_step = run.summary.freeze_step.copy(data=[0, 3, 3, 5, 13, 12, 1, 1, 1, 1, 1])
    panel = compare([replace(run, summary=run.summary.assign(freeze_step=freeze_step))])
    for group, mask in (("all", live_mask() | True), ("dead", ~live_mask())):
        ends = freeze_step.values[mask]
        expected = [100 * sum(t > of for of in ends) / len(ends) for t in range(14)]
        np.testing.assert_allclose(line(panel, "At rest to the end", "toy.zarr", group), expected)
    assert line(panel, "At rest to the end", "toy.zarr", "all")[-1] == pytest.approx(1000 / 11)


def test_stores_of_one_name_are_told_apart(toy_path: Path) -> None:
    runs = [replace(toy(toy_path, 3), store=f"{folder}/run.zarr") for folder in "ab"]
    labels = {layer.label for figure in compare(runs).figures for layer in figure.layers}
    assert labels == {"a/run.zarr", "b/run.zarr"}
    labels = {layer.label for figure in compare(runs[:1] * 2).figures for layer in figure.layers}
    assert labels == {"1: a/run.zarr", "2: a/run.zarr"}
    assert compare(runs).note.startswith("All have the same")


def test_a_run_without_a_loss_has_no_line_of_it(toy_path: Path) -> None:
    run = toy(toy_path, 3)
    panel = compare([replace(run, ds=run.ds.drop_vars("loss"))])
    assert "Loss" not in {figure.title for figure in panel.figures}
