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

    They read one row: the run that they are given has no other step.
    """
    there = replace(run, summary=run.summary.sel(step=[step], group=[group]))
    makers = {make.__name__: make for make in PANELS}
    panels = [makers[name](there) for name in AT_STEPS if name in makers]
    return [panel for panel in panels if panel is not None and panel.figures]
