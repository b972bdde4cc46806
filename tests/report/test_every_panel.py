"""Every panel of runs that are unlike the usual one: it has figures, or says why it has none."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import thimble_zarr
from tests.support.runs import Loop, record
from tests.support.zoo import Recorded
from thimble_zarr import Recorder
from thimble_zarr.analysis.summary.summary import summary
from thimble_zarr.record.schedule import every
from thimble_zarr.report.figure import Band, Bars, Image, Layer, Line, Panel, Points, Stack
from thimble_zarr.report.panels.comparison import compare
from thimble_zarr.report.panels.registry import PANELS
from thimble_zarr.report.run import Run


def run_of(path: Path, n_rows: int | None = None, parameter: str | None = None) -> Run:
    ds = thimble_zarr.open_dataset(path, parameter).isel(step=slice(n_rows))
    return Run(store=str(path), ds=ds, summary=summary(ds), n_columns=5, n_rows=4)


def record_sgd(path: Path, **options: float) -> Path:
    loop = Loop(optimizer=torch.optim.SGD, **options)
    with Recorder(path, loop.optimizer, parameter=loop.weight):
        for _ in range(5):
            loop.step()
    return path


def record_diverging(path: Path) -> Path:
    loop = Loop()
    with Recorder(path, loop.optimizer, parameter=loop.weight):
        for step in range(5):
            loop.backward()
            loop.weight.grad[2] = torch.nan if step == 3 else torch.inf if step == 2 else 1.0
            loop.optimizer.step()
            loop.optimizer.zero_grad()
    return path


def record_with(**options: object) -> Callable[[Path], Path]:
    def recorded(path: Path) -> Path:
        record(path, n_steps=5, **options)
        return path

    return recorded


RUNS: dict[str, Callable[[Path], Path]] = {
    "SGD": lambda path: record_sgd(path, momentum=0.9),
    "SGD without a state": record_sgd,
    "not finite": record_diverging,
    "float32": record_with(dtype=torch.float32),
    "every other step": record_with(recorder_options={"schedule": every(2)}),
    "without labels": record_with(recorder_options={"labels": None}),
    "weights alone": record_with(recorder_options={"variables": ["W"]}),
}


def check(panel: Panel, run: Run) -> None:
    assert panel.figures or panel.note
    assert panel.code.startswith(f"thimble_zarr.plot.{panel.name}(")
    for figure in panel.figures:
        assert figure.layers, figure.title
        for layer in figure.layers:
            assert layer.group in (None, *run.groups)
            check_layer(layer)


def check_layer(layer: Layer) -> None:
    match layer:
        case Line(x=x, y=y):
            assert x.shape == y.shape
            assert x.size
        case Band(x=x, low=low, high=high):
            assert x.shape == low.shape == high.shape
        case Points(x=x, y=y, tokens=tokens):
            assert x.shape == y.shape
            assert tokens is None or tokens.shape == x.shape
        case Stack(x=x, heights=heights):
            assert {x.shape} == {of.shape for of in heights.values()}
        case Image(values=values, low=low, high=high, tokens=rows):
            assert low.shape == values.shape == high.shape == (len(rows), values.shape[1])
        case Bars(edges=edges, heights=heights):
            assert edges.shape == (len(heights) + 1,)


def check_every(run: Run) -> dict[str, Panel]:
    panels = {
        panel.name: panel for panel in (of(run) for of in (*PANELS, lambda of: compare([of])))
    }
    assert len(panels) == len(PANELS) + 1
    for panel in panels.values():
        check(panel, run)
    return panels


@pytest.mark.parametrize("kind", RUNS)
def test_an_unusual_run_has_every_panel_or_a_reason(tmp_path: Path, kind: str) -> None:
    check_every(run_of(RUNS[kind](tmp_path / "run.zarr")))


@pytest.mark.parametrize("n_rows", [1, 2, 3])
def test_a_run_of_a_few_rows_has_every_panel_or_a_reason(toy_path: Path, n_rows: int) -> None:
    panels = check_every(run_of(toy_path, n_rows))
    n_steps = {"phase_space": n_rows - 1, "projection": n_rows, "coherence": min(n_rows - 1, 1)}
    assert {name: len(panels[name].figures) for name in n_steps} == n_steps


@pytest.mark.parametrize("parameter", ["scale", "norm", "query", "image"])
def test_a_parameter_of_any_rank_has_every_panel_or_a_reason(zoo: Recorded, parameter: str) -> None:
    check_every(run_of(zoo.path, None, parameter))


def test_selected_tokens_keep_their_ids(toy_path: Path) -> None:
    ds = thimble_zarr.open_dataset(toy_path).isel(token=[2, 5, 9])
    run = Run(store="run.zarr", ds=ds, summary=summary(ds))
    panels = check_every(run)
    for name in ("phase_space", "projection"):
        for figure in panels[name].figures:
            points = [layer for layer in figure.layers if isinstance(layer, Points)]
            ids = [of.tokens for of in points if of.group == "all" and of.tokens is not None]
            assert [of.tolist() for of in ids] == [[2, 5, 9]]
