"""How numbers are distributed over tokens, at a few steps."""

import numpy as np

from thimble_zarr.report.downsample import few_steps
from thimble_zarr.report.figure import Axis, Figure, Layer, Line, Panel, Rule
from thimble_zarr.report.panels.step_size import NO_CHANGE
from thimble_zarr.report.run import Run

N_STEPS = 4
N_BINS = 60

_COLORS = ("#f0b429", "#e0603f", "#a12a7a", "#3b0f70")
"""Of the outlines, the latest the darkest."""


def histograms(run: Run) -> Panel:
    """Return the distributions over tokens of weights, changes and gradients at a few steps."""
    chosen = few_steps(run.steps[run.follows], N_STEPS)
    n_dims, dtype = run.summary.sizes["dim"], run.summary.attrs["ulp_dtype"]
    root = float(np.sqrt(n_dims))
    early = Rule(label=f"sqrt({n_dims}) = {root:.3g} ULP", x=root)
    figures = []
    for name, title, label, rules in (
        ("norm_W", "Weights", "|W| (L2)", ()),
        ("l2_ulp", f"Changes, in ULP of {dtype}", "|delta W| / ULP (L2)", (early,)),
        ("norm_grad", "Gradients", "|grad| (L2)", ()),
    ):
        layers = _outlines(run, name, chosen) if name in run.summary else []
        if layers:
            x = Axis(label=label, is_log=True, can_switch=True)
            y = Axis(label=f"share of {run.row_name}s, %")
            figures.append(Figure(title=title, x=x, y=y, layers=[*layers, *rules]))
    return Panel(
        name="histograms",
        title=f"How weights, changes and gradients are distributed over {run.row_name}s",
        code=run.code("histograms"),
        figures=figures,
        note=(
            f"{N_BINS} bins, equally wide on a logarithmic axis, which has no place for 0: "
            f"{run.row_name}s that did not move, or have no gradient, are left out, so that an "
            "outline may enclose less than 100 %."
            if figures
            else NO_CHANGE
        ),
    )


def _outlines(run: Run, name: str, steps: list[int]) -> list[Layer]:
    """Return the histogram of a variable at each step, of a group with the same bins."""
    rows = [run.summary[name].sel(step=step).values.astype(np.float64) for step in steps]
    layers: list[Layer] = []
    for group, is_member in run.members.items():
        counted = [row[is_member & (row > 0) & np.isfinite(row)] for row in rows]
        if not any(map(len, counted)):
            continue
        every = np.concatenate(counted)
        # A little further, as rounding must not leave out the ends.
        edges = np.geomspace(every.min() * (1 - 1e-6), every.max() * (1 + 1e-6), N_BINS + 1)
        for step, of, color in zip(steps, counted, _COLORS[-len(steps) :], strict=True):
            heights = 100 * np.histogram(of, edges)[0] / is_member.sum()
            layers.append(
                Line(
                    label=f"step {step:,}",
                    group=group,
                    color=color,
                    x=np.repeat(edges, 2),
                    y=np.pad(np.repeat(heights, 2), 1),
                )
            )
    return layers
