"""The panels, in the order in which they are shown.

A panel that has nothing to show of a run has no figures, and its note says why.
"""

from collections.abc import Callable

from thimble_zarr.report.figure import Panel
from thimble_zarr.report.panels.accounting import accounting
from thimble_zarr.report.panels.centroid import centroid, identical
from thimble_zarr.report.panels.coherence import coherence
from thimble_zarr.report.panels.histograms import histograms
from thimble_zarr.report.panels.loss import loss
from thimble_zarr.report.panels.optimizer import optimizer
from thimble_zarr.report.panels.phase_space import phase_space
from thimble_zarr.report.panels.projection import projection
from thimble_zarr.report.panels.regimes import last_steps, regimes, token_image
from thimble_zarr.report.panels.step_size import radius, step_size
from thimble_zarr.report.run import Run

PANELS: tuple[Callable[[Run], Panel], ...] = (
    loss,
    regimes,
    token_image,
    step_size,
    last_steps,
    centroid,
    radius,
    identical,
    coherence,
    optimizer,
    accounting,
    phase_space,
    histograms,
    projection,
)
"""Of a single run."""
