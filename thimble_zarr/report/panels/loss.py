"""The loss, and the learning rate that it was trained with."""

import numpy as np

from thimble_zarr.report.figure import BLUE, GRAY, Axis, Figure, Line, Panel
from thimble_zarr.report.layers import step_line
from thimble_zarr.report.run import Run


def loss(run: Run) -> Panel:
    """Return the loss and the learning rate, by step."""
    has_loss = LOSS in run.ds and bool(run.ds[LOSS].notnull().any())
    lines = [_line(run, "learning_rate", GRAY, on_right=has_loss), _line(run, LOSS, BLUE)]
    rate = Axis(label="learning rate", can_switch=True)
    figure = Figure(
        y=Axis(label="loss", can_switch=True) if has_loss else rate,
        right=rate if has_loss and lines[0] is not None else None,
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


def _line(run: Run, name: str, color: str, *, on_right: bool = False) -> Line | None:
    """Return a number of each step; None if there is none."""
    if name not in run.ds:
        return None
    values = run.ds[name].values.astype(np.float64)
    there = ~np.isnan(values)  # row 0 has none, nor has a step of which it was not logged
    if not there.any():
        return None
    return step_line(
        run.ds.step.values[there],
        values[there],
        run.n_columns,
        label=name.replace("_", " "),
        color=color,
        on_right=on_right,
    )
