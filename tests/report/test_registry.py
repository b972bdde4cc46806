"""Every panel, of runs that have little: nothing may fail, and what is drawn must fit together."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from tests.support.panels import summed, toy
from thimble_zarr.report.figure import (
    Band,
    Bars,
    Image,
    Layer,
    Line,
    Panel,
    Points,
    Rule,
    Stack,
)
from thimble_zarr.report.panels.registry import PANELS
from thimble_zarr.report.run import Run

Change = Callable[[xr.Dataset], xr.Dataset]


def lost(ds: xr.Dataset) -> xr.Dataset:
    """Return it with weights that are NaN from some step on."""
    return ds.assign(W=ds.W.where(ds.step < 5))


RUNS: dict[str, Change] = {
    "whole": lambda ds: ds,
    "of one step": lambda ds: ds.isel(step=[0, 1]),
    "of some steps": lambda ds: ds.sel(step=[0, 1, 4, 5, 9, 10]),
    "lost": lost,
    "at rest": lambda ds: ds.assign(W=ds.W.where(ds.step < 5, ds.W.isel(step=5))),
}


def assert_fits(layer: Layer) -> None:
    """Hold the shapes that `figure.py` promises."""
    match layer:
        case Line(x=x, y=y, low=low, high=high):
            assert {of.shape for of in (x, y, low, high) if of is not None} == {(len(x),)}
        case Band(x=x, low=low, high=high):
            assert x.shape == low.shape == high.shape == (len(x),)
        case Stack(x=x, heights=heights):
            assert {of.shape for of in heights.values()} == {(len(x),)}
        case Image(values=values, low=low, high=high):
            assert {of.shape for of in (values, low, high) if of is not None} == {values.shape}
            assert values.ndim == 2
            assert layer.tokens is None or len(layer.tokens) == len(values)
        case Bars(edges=edges, heights=heights):
            assert len(edges) == len(heights) + 1
        case Points(x=x, y=y, tokens=tokens):
            assert {of.shape for of in (x, y, tokens) if of is not None} == {(len(x),)}
        case Rule(x=x, y=y):
            assert (x is None) != (y is None)


def assert_sound(panel: Panel, run: Run) -> None:
    assert panel.title
    assert panel.code == f"thimble_zarr.plot.{panel.name}({run.store!r})"
    assert panel.figures or panel.note, "nothing is shown, and nothing says why"
    for figure in panel.figures:
        assert figure.layers
        for layer in figure.layers:
            assert layer.group is None or layer.group in run.groups
            assert_fits(layer)


@pytest.mark.parametrize("change", RUNS.values(), ids=RUNS)
def test_every_panel_is_sound_of_runs_that_have_little(toy_path: Path, change: Change) -> None:
    with np.errstate(invalid="ignore"):
        run = summed(change(toy(toy_path).ds))
    coarse = replace(run, n_columns=3, n_rows=2)
    alone = replace(run, summary=run.summary.sel(group=["all"]))
    for of in (run, coarse, alone):
        for panel in PANELS:
            assert_sound(panel(of), of)


def test_a_row_without_a_step_has_a_place_but_no_change(toy_path: Path) -> None:
    run = toy(toy_path)
    start = replace(run, ds=run.ds.isel(step=[0]), summary=run.summary.isel(step=[0]))
    for panel in PANELS:
        assert_sound(panel(start), start)


def test_names_are_those_of_the_functions(toy_path: Path) -> None:
    run = toy(toy_path)
    names = [panel.__name__ for panel in PANELS]
    assert len({*names}) == len(names)
    assert [panel(run).name for panel in PANELS] == names
