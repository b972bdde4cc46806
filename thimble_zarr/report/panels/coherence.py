"""Whether the tokens of a group move together."""

from thimble_zarr.report.figure import BLUE, Axis, Figure, Panel, Rule
from thimble_zarr.report.layers import quantile_layers
from thimble_zarr.report.panels.step_size import NO_CHANGE
from thimble_zarr.report.run import Run


def coherence(run: Run) -> Panel:
    """Return the cosines of the tokens' changes with the mean change of their group."""
    layers = quantile_layers(run, "cosine_to_mean", BLUE, (0.0, 0.5, 0.9, 1.0))
    figure = Figure(
        y=Axis(label="cosine with the mean change"),
        layers=[Rule(y=0.0), *layers],
    )
    return Panel(
        name="coherence",
        title=f"Coherence: do the {run.row_name}s of a group move in the same direction?",
        code=run.code("coherence"),
        figures=[figure] if layers else [],
        note=(
            f"1: along the mean change of the group, 0: at right angles to it. Quantiles over the "
            f"{run.row_name}s that moved at the step; the others have no direction."
            if layers
            else NO_CHANGE
        ),
    )
