"""Where the mean of a group's tokens is, and tokens that are where others are."""

import numpy as np
import xarray as xr

from thimble_zarr.report.downsample import blocks
from thimble_zarr.report.figure import BLUE, GREEN, ORANGE, PINK, Axis, Figure, Panel
from thimble_zarr.report.layers import group_lines
from thimble_zarr.report.run import Run


def centroid(run: Run) -> Panel:
    """Return the norm of the centroid, how far it has come and is to go, and its steps."""
    first, last = (f"{step:,}" for step in run.steps[[0, -1]])
    place, moves = run.summary["centroid"], run.summary["mean_delta_W"]
    figures = [
        Figure(
            title=title,
            y=Axis(label=label, is_log=is_log, can_switch=True),
            layers=group_lines(run, values, label="", color=color),
        )
        for title, label, is_log, color, values in (
            ("Norm", "|centroid|", False, GREEN, norms(place)),
            ("Drift", f"|centroid - centroid at step {first}|", False, BLUE, norms(place, of=0)),
            (
                "Still to go",
                f"|centroid - centroid at step {last}|",
                True,
                PINK,
                norms(place, of=-1),
            ),
            ("Step size", "|mean of delta W|", True, ORANGE, norms(moves)),
        )
    ]
    return Panel(
        name="centroid",
        title=f"Centroid: the mean of the group's {run.row_name}s",
        code=run.code("centroid"),
        figures=[figure for figure in figures if figure.layers],
        note=(
            f"Norm: its distance from the origin. Drift: from where it was at step {first}. Still "
            f"to go: from where it is at step {last}. Step size: how far it moves in a step."
        ),
    )


def identical(run: Run) -> Panel:
    """Return how many tokens have the very weights of another, and how many share the same."""
    n, largest = run.of_groups("n_identical"), run.of_groups("largest_identical")
    rows, has_any = f"{run.row_name}s", np.nanmax(n, initial=0) > 0
    figure = Figure(
        y=Axis(label=rows, can_switch=True),
        layers=[
            *group_lines(run, n, label=f"{rows} like another", color=BLUE),
            *group_lines(run, largest, label="largest set of equals", color=PINK),
        ],
    )
    return Panel(
        name="identical",
        title=f"Identical {rows}",
        code=run.code("identical"),
        figures=[figure] if has_any else [],
        note=(
            f"{rows.capitalize()} whose weights are equal: the model cannot tell them apart."
            if has_any
            else f"At no step do two {rows} of a group have the same weights."
        ),
    )


def norms(vectors: xr.DataArray, *, of: int | None = None) -> np.ndarray:
    """Return the norms of vectors, dims `(group, step, dim)`, or their distance from one of them.

    `of` is its position among the steps.
    """
    vectors = vectors.transpose("group", "step", "dim")
    n_groups, n_steps, n_dims = vectors.shape
    norms = np.empty((n_groups, n_steps))
    origin = 0.0 if of is None else vectors[:, [of]].values
    for block in blocks(n_steps, 8 * n_groups * n_dims):
        values = vectors[:, block].values - origin
        norms[:, block] = np.sqrt(np.einsum("gsd,gsd->gs", values, values))
    return norms
