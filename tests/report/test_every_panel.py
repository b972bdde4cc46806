"""Every panel of runs that are unlike the usual one: it has figures, or says why it has none."""

from pathlib import Path

import pytest

import thimble_zarr
from tests.support.unusual import RUNS
from tests.support.zoo import Recorded
from thimble_zarr.analysis.summary.summary import summary
from thimble_zarr.report.figure import Band, Bars, Image, Layer, Line, Panel, Points, Stack
from thimble_zarr.report.panels.comparison import compare
from thimble_zarr.report.panels.registry import PANELS
from thimble_zarr.report.run import Run


def run_of(path: Path, n_rows: int | None = None, parameter: str | None = None) -> Run:
    ds = thimble_zarr.open_dataset(path, parameter).isel(step=slice(n_rows))
    return Run(store=str(path), ds=ds, summary=summary(ds), n_columns=5, n_rows=4)


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
