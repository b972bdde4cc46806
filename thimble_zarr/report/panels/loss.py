"""The loss, and the learning rate that it was trained with."""

import numpy as np

from thimble_zarr.report.downsample import columns
from thimble_zarr.report.figure import BLUE, GRAY, Axis, Figure, Line, Panel
from thimble_zarr.report.run import Run


def loss(run: Run) -> Panel:
    """Return the loss and the learning rate, by step."""
    lines = [
        _line(run, "learning_rate", GRAY, on_right=LOSS in run.ds),
        _line(run, LOSS, BLUE, on_right=False),
    ]
    rate = Axis(label="learning rate", can_switch=True)
    has_loss = LOSS in run.ds
    figure = Figure(
        y=Axis(label="loss", can_switch=True) if has_loss else rate,
        right=rate if has_loss else None,
        layers=[line for line in lines if line is not None],
    )
    return Panel(
        name="loss",
        title="Loss and learning rate" if has_loss else "Learning rate",
        code=run.code("loss"),
        figures=[figure] if figure.layers else [],
        note="" if has_loss else "No loss was logged; `recorder.log(loss=...)` keeps it.",
    )


LOSS = "loss"
"""What people call it when they log it."""


def _line(run: Run, name: str, color: str, *, on_right: bool) -> Line | None:
    """Return a number of each step; row 0 and what was not logged have none."""
    if name not in run.ds:
        return None
    values = np.asarray(run.ds[name].values, np.float64)
    there = ~np.isnan(values)
    of = columns(run.ds.step.values[there], values[there], run.n_columns)
    return Line(
        label=name.replace("_", " "),
        color=color,
        x=of.x,
        y=of.median,
        low=None if of.is_exact else of.low,
        high=None if of.is_exact else of.high,
        on_right=on_right,
    )
