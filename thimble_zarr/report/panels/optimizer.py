"""What the optimizer is given, what it keeps, and the step that it makes of it."""

from dataclasses import replace

import numpy as np
import xarray as xr

from thimble_zarr.report.figure import BLUE, GREEN, ORANGE, PINK, Axis, Figure, Layer, Panel, Rule
from thimble_zarr.report.layers import group_lines, quantile_layers
from thimble_zarr.report.run import Run

_NORM, _ROOT = "norm_", "sqrt_"
_OTHERS = ("norm_W", "norm_delta_W", "norm_grad", "norm_residual")


def estimates(summary: xr.Dataset) -> list[str]:
    """Return the variables of a summary that are sizes of what the optimizer keeps of a token."""
    return [
        str(name)
        for name, variable in summary.data_vars.items()
        if str(name).startswith(_NORM) and name not in _OTHERS and "token" in variable.dims
    ]


def moments(summary: xr.Dataset) -> tuple[str, str] | None:
    """Return the root of a square among the estimates, and the one that a step divides by it.

    None if the optimizer has no such two.
    """
    names = estimates(summary)
    roots = [name for name in names if name.startswith(_NORM + _ROOT)]
    others = [name for name in names if name not in roots]
    return (roots[0], others[0]) if len(roots) == len(others) == 1 else None


def label_of(name: str) -> str:
    """Return how the size of an estimate is written, for example `|m_hat|`."""
    name = name.removeprefix(_NORM)
    return f"|sqrt({name.removeprefix(_ROOT)})|" if name.startswith(_ROOT) else f"|{name}|"


def optimizer(run: Run) -> Panel:
    """Return gradient, estimates and their ratio, and predicted and observed size of the step."""
    shown = ("norm_grad", *estimates(run.summary))
    figures = [
        Figure(
            title="Gradient and estimates",
            y=Axis(label=f"L2 of a {run.row_name}", is_log=True, can_switch=True),
            layers=[
                replace(layer, label=f"{label_of(name)}, {layer.label}")
                for name, color in zip(shown, (GREEN, BLUE, ORANGE, PINK), strict=False)
                for layer in quantile_layers(run, name, color, (0.5,))
            ],
        ),
        Figure(
            title="Ratio of the estimates",
            y=Axis(label="ratio of the medians", is_log=True, can_switch=True),
            layers=_ratio(run),
        ),
        Figure(
            title="Size of the step",
            y=Axis(label="L2 of all weights", is_log=True, can_switch=True),
            layers=_step(run),
        ),
    ]
    return Panel(
        name="optimizer",
        title="Optimizer: what it is given, what it keeps, and the step that it makes",
        code=run.code("optimizer"),
        figures=[figure for figure in figures if figure.layers],
        note=_note(run),
    )


def _ratio(run: Run) -> list[Layer]:
    names = moments(run.summary)
    if names is None:
        return []
    root, first = (run.medians(name) for name in names)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(root > 0, first / root, np.nan)
    label = f"{label_of(names[1])} / {label_of(names[0])}"
    lines = group_lines(run, ratios, label=label, color=BLUE)
    return [Rule(y=1.0), *lines] if lines else []


def _step(run: Run) -> list[Layer]:
    names = {"norm_predicted": ("predicted", ORANGE), "norm_observed": ("observed", BLUE)}
    return [
        layer
        for name, (label, color) in names.items()
        if name in run.summary
        for layer in group_lines(run, run.of_groups(name), label=label, color=color)
    ]


def _note(run: Run) -> str:
    notes = [f"Lines are medians over the {run.row_name}s of the group, bands the quartiles."]
    if names := moments(run.summary):
        notes.append(
            f"With {label_of(names[1])} / {label_of(names[0])} at 1, an update is as large as the "
            "learning rate per dim (RMS); where gradients cancel each other it is smaller. Both "
            "are corrected for their start from 0: the correction alone lets them fall for a "
            "while, even where the recorded states stand still."
        )
    if "norm_predicted" in run.summary:
        notes.append("Predicted is the step that the formula gives from the recorded states.")
    return " ".join(notes)
