"""Layers that many panels draw: lines by step, and quantiles of tokens."""

from collections.abc import Sequence

import numpy as np

from thimble_zarr.report.downsample import columns
from thimble_zarr.report.figure import Band, Layer, Line, shade
from thimble_zarr.report.run import Run


def step_line(
    steps: np.ndarray,
    values: np.ndarray,
    n_columns: int,
    *,
    label: str = "",
    group: str | None = None,
    color: str | None = None,
    on_right: bool = False,
) -> Line:
    """Return numbers of steps as a line of at most `n_columns` points."""
    of = columns(steps, values, n_columns)
    low, high = (None, None) if of.is_exact else (of.low, of.high)
    return Line(
        label=label,
        group=group,
        color=color,
        x=of.x,
        y=of.median,
        low=low,
        high=high,
        on_right=on_right,
    )


def is_drawn(run: Run, values: np.ndarray) -> np.ndarray:
    """Return which steps belong to a line, of numbers of shape `(step, ...)`; none if all are NaN.

    A change is missing, and not NaN, where the row before was not recorded: the line goes on.
    """
    missing = np.isnan(values).reshape(len(values), -1).all(-1)
    drawn: np.ndarray = ~missing | (run.follows & ~missing.all())
    return drawn


def run_line(
    run: Run, values: np.ndarray, *, label: str, group: str | None, color: str | None = None
) -> list[Line]:
    """Return numbers of all steps as a line; none if all are NaN."""
    there = is_drawn(run, values)
    if not there.any():
        return []
    points = run.steps[there], values[there], run.n_columns
    return [step_line(*points, label=label, group=group, color=color)]


def group_lines(run: Run, values: np.ndarray, *, label: str, color: str) -> list[Line]:
    """Return numbers of each group and step, shape `(group, step)`, as a line a group."""
    return [
        line
        for group, of in zip(run.groups, values, strict=True)
        for line in run_line(run, of, label=label, group=group, color=color)
    ]


QUANTILES = {0.0: "min", 0.5: "median", 0.9: "90 %", 0.99: "99 %", 1.0: "max"}
"""What quantiles are called, by the share of tokens that are below."""

SHADES = {0.0: 0.65, 0.5: 0.0, 0.9: 0.3, 0.99: 0.5, 1.0: 0.7}
"""How much white there is in their colors."""


def quantile_layers(
    run: Run, name: str, color: str, of: Sequence[float] = (0.5, 0.9, 0.99, 1.0)
) -> list[Layer]:
    """Return quantiles of a variable over the tokens of each group, and a band of its quartiles.

    Parameters
    ----------
    run
        The run.
    name
        The variable of the summary; nothing is drawn if it has none of that name.
    color
        What all are shades of.
    of
        The quantiles that are drawn as lines.
    """
    if f"{name}_quantiles" not in run.summary:
        return []
    found = run.summary[f"{name}_quantiles"].transpose("group", "step", "quantile")
    shares = found["quantile"].values.tolist()
    values = dict(zip(shares, np.moveaxis(found.values, -1, 0), strict=True))
    layers: list[Layer] = []
    for index, group in enumerate(run.groups):
        there = is_drawn(run, values[0.5][index])
        if there.any():
            low, high = (
                columns(run.steps[there], values[share][index, there], run.n_columns)
                for share in (0.25, 0.75)
            )
            style = {"label": "quartiles", "group": group, "color": color}
            layers.append(Band(x=low.x, low=low.median, high=high.median, **style))
    for share in of:
        layers += group_lines(
            run, values[share], label=QUANTILES[share], color=shade(color, SHADES[share])
        )
    return layers
