"""How far tokens move in a step, and how far they have come."""

import numpy as np

from thimble_zarr.report.figure import BLUE, GREEN, ORANGE, PINK, Axis, Figure, Panel, Rule
from thimble_zarr.report.layers import quantile_layers
from thimble_zarr.report.run import Run


def step_size(run: Run) -> Panel:
    """Return how far tokens move in a step, in weights and in units in the last place."""
    n_dims = run.summary.sizes["dim"]
    weights = quantile_layers(run, "norm_delta_W", BLUE)
    ulps = quantile_layers(run, "l2_ulp", ORANGE, (0.5, 0.9, 0.99))
    early = Rule(label=f"sqrt({n_dims}) = {np.sqrt(n_dims):.3g} ULP", y=float(np.sqrt(n_dims)))
    dtype = run.summary.attrs["ulp_dtype"]
    figures = [
        Figure(
            title="In weights",
            y=Axis(label="|delta W| (L2)", is_log=True, can_switch=True),
            layers=weights,
        ),
        Figure(
            title=f"In ULP of {dtype}",
            y=Axis(label="|delta W| / ULP (L2)", is_log=True, can_switch=True),
            layers=[*ulps, early],
        ),
    ]
    return Panel(
        name="step_size",
        title=f"Step size: how far a {run.row_name} moves in a step",
        code=run.code("step_size"),
        figures=figures if weights else [],
        note=(
            f"Quantiles over the {run.row_name}s of the group. On the dashed line a "
            f"{run.row_name} moves as far as if each of its {n_dims} dims moved by one ULP of the "
            "weight before the step. The largest steps in ULP are left out: they are of weights "
            "near 0, where an ULP is tiny. On a logarithmic axis a line has gaps, and the "
            f"quartiles are left out, where so many {run.row_name}s did not move at all."
            if weights
            else NO_CHANGE
        ),
    )


def radius(run: Run) -> Panel:
    """Return how far tokens are from the origin, and from the centroid of their group."""
    of = (0.0, 0.5, 0.9, 1.0)
    figures = [
        Figure(title=title, y=Axis(label=label, can_switch=True), layers=layers)
        for title, label, layers in (
            ("From the origin", "|W| (L2)", quantile_layers(run, "norm_W", GREEN, of)),
            (
                "From the centroid of the group",
                "|W - centroid| (L2)",
                quantile_layers(run, "centroid_distance", PINK, of),
            ),
        )
        if layers
    ]
    return Panel(
        name="radius",
        title=f"Radius: how far {run.row_name}s are from the origin and from the centroid",
        code=run.code("radius"),
        figures=figures,
        note=f"Quantiles over the {run.row_name}s of the group.",
    )


NO_CHANGE = "No step was recorded together with the one before, so that no change is known."
"""Why panels of changes have no figures."""
