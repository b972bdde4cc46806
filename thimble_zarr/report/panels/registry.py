"""The panels, in the order in which they are shown.

A panel that has nothing to show of a run has no figures, and its note says why.
"""

from collections.abc import Callable

from thimble_zarr.report.figure import Panel
from thimble_zarr.report.panels.loss import loss
from thimble_zarr.report.run import Run

PANELS: tuple[Callable[[Run], Panel], ...] = (loss,)
"""Of a single run."""
