"""Whether the optimizer's formula accounts for the steps that were taken."""

from collections.abc import Mapping, Sequence

import numpy as np

from thimble_zarr.report.figure import (
    BLUE,
    GREEN,
    ORANGE,
    PINK,
    Axis,
    Band,
    Figure,
    Layer,
    Line,
    Panel,
    Rule,
)
from thimble_zarr.report.layers import group_lines
from thimble_zarr.report.panels.step_size import NO_CHANGE
from thimble_zarr.report.run import Run


def accounting(run: Run) -> Panel:
    """Return size and direction of predicted against observed steps, and what stood still."""
    figures = [
        Figure(
            title="Size",
            y=Axis(label="|predicted| / |observed|", is_log=True, can_switch=True),
            layers=_on_rule(_ratio(run)),
        ),
        Figure(
            title="Direction",
            y=Axis(label="cosine"),
            layers=_on_rule(_cosine(run)),
        ),
        Figure(
            title="Weights that moved, and that did not",
            y=Axis(label="share of weights, %"),
            layers=[*_below_half(run), *_lines(run, _SHARES, factor=100.0)],
        ),
    ]
    figures = [figure for figure in figures if figure.layers]
    return Panel(
        name="accounting",
        title="Accounting: does the formula explain the steps?",
        code=run.code("accounting"),
        figures=figures,
        note=_note(run) if figures else NO_CHANGE,
    )


_SHARES = {
    "share_moved": ("moved", GREEN),
    "share_stalled": ("stalled", ORANGE),
}


def _below_half(run: Run) -> list[Layer]:
    """Return the share of updates below half an ULP as an area, on which lines can be seen."""
    layers: list[Layer] = []
    for line in _lines(run, {"share_below_half_ulp": ("", PINK)}, factor=100.0):
        label = "update below half an ULP"
        area = Band(
            label=label,
            group=line.group,
            color=line.color,
            x=line.x,
            low=np.zeros_like(line.y),
            high=line.y,
        )
        layers.append(area)
    return layers


def _ratio(run: Run) -> list[Line]:
    if "norm_predicted" not in run.summary:
        return []
    predicted, observed = map(run.of_groups, ("norm_predicted", "norm_observed"))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(observed > 0, predicted / observed, np.nan)
    return group_lines(run, ratios.round(_DECIMALS), label="ratio", color=BLUE)


def _cosine(run: Run) -> list[Line]:
    if "cosine_predicted" not in run.summary:
        return []
    cosines = run.of_groups("cosine_predicted").round(_DECIMALS)
    return group_lines(run, cosines, label="cosine", color=BLUE)


_DECIMALS = 4
"""Of ratio and cosine: more would magnify the rounding of a step that the formula explains."""


def _lines(run: Run, names: Mapping[str, tuple[str, str]], *, factor: float = 1.0) -> list[Line]:
    return [
        layer
        for name, (label, color) in names.items()
        if name in run.summary
        for layer in group_lines(run, factor * run.of_groups(name), label=label, color=color)
    ]


def _on_rule(layers: Sequence[Layer]) -> list[Layer]:
    """Return lines on a rule at 1, which is where they should be; nothing of none."""
    return [Rule(y=1.0), *layers] if layers else []


def _note(run: Run) -> str:
    if "norm_predicted" not in run.summary:
        return "Without a formula of the optimizer, or what it needs, no step can be predicted."
    return (
        "The optimizer's formula in exact arithmetic against the recorded change, of all weights "
        "of the group: 1 where they agree. Unlike the weights the formula is not rounded. The "
        "check's replay rounds as torch does: it can hold to the bit where these do not agree. "
        "Stalled: the formula moves the weight, and it stayed. Rounding mostly loses an update "
        f"below half an ULP ({run.summary.attrs['ulp_dtype']}), the distance to the next number."
    )
