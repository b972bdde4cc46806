"""One step: what the panels that show single steps look like at it."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from thimble_zarr.report.figure import Panel
from thimble_zarr.report.panels.registry import PANELS
from thimble_zarr.report.run import Run

AT_STEPS = ("phase_space", "histograms")
"""Panels that show single steps, whichever a summary has."""


def nearest(run: Run, step: float) -> int:
    """Return the recorded step that is nearest to one."""
    steps = run.summary.step.values
    return int(steps[np.argmin(np.abs(steps - step))])


def panels_at(run: Run, step: int, group: str) -> Sequence[Panel]:
    """Return the panels that show single steps, at one step and of one group.

    They read two rows of the summary: the run that they are given has this step and the recorded
    one before it, after which it is known what the step changed. Their layers are always shown, so
    that another group takes the place of the one before.
    """
    row = int(np.searchsorted(run.steps, step))
    rows = run.summary.isel(step=slice(max(0, row - 1), row + 1)).sel(group=[group])
    there = replace(run, summary=rows)
    makers = {make.__name__: make for make in PANELS}
    return [_ungrouped(makers[name](there)) for name in AT_STEPS if name in makers]


def _ungrouped(panel: Panel) -> Panel:
    figures = [
        replace(figure, layers=[replace(layer, group=None) for layer in figure.layers])
        for figure in panel.figures
    ]
    return replace(panel, figures=figures)
