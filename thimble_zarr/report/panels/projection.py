"""Where tokens are in the plane in which their centroid moves most."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from thimble_zarr.report.downsample import (
    evenly,
    few_steps,
    sample_note,
    sampled,
    token_ids,
    values_of,
)
from thimble_zarr.report.figure import (
    BLACK,
    BLUE,
    GRAY,
    ORANGE,
    Axis,
    Figure,
    Layer,
    Line,
    Panel,
    Points,
)
from thimble_zarr.report.run import Run

N_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Plane:
    """The plane of the first two principal components of a path.

    Attributes
    ----------
    origin
        The mean of the path, float64, shape `(dim,)`.
    axes
        Unit vectors, shape `(2, dim)`: along both the path ends further than it began.
    shares
        How much of the path's variance is along each, 0 to 1.
    """

    origin: np.ndarray
    axes: np.ndarray
    shares: tuple[float, float]

    @classmethod
    def of(cls, path: np.ndarray) -> "Plane":
        """Return that of a path of finite points, shape `(step, dim)`, of two dims at least."""
        origin = path.mean(0)
        # Rows of 0 change nothing, but give two directions even where the path has none.
        centered = np.vstack([path - origin, np.zeros((2, path.shape[1]))])
        _, sizes, axes = np.linalg.svd(centered, full_matrices=False)
        axes = axes[:2] * np.where(axes[:2] @ (path[-1] - path[0]) < 0, -1, 1)[:, np.newaxis]
        variances = sizes**2
        shares = variances / variances.sum() if variances.any() else variances
        return cls(origin=origin, axes=axes, shares=(float(shares[0]), float(shares[1])))

    def coordinates(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the coordinates along both axes of vectors, shape `(vector, dim)`."""
        with np.errstate(invalid="ignore"):  # infinite weights have no place in it
            along = (vectors - self.origin) @ self.axes.T
        return along[:, 0], along[:, 1]


def projection(run: Run) -> Panel:
    """Return tokens in the plane of the path of their group's centroid, at four steps."""
    shown = [int(run.steps[0]), *few_steps(run.steps[1:], N_STEPS)[1 - N_STEPS :]]
    steps = np.union1d(run.steps[evenly(len(run.steps), run.n_columns)], shown)
    paths = _paths(run, steps) if run.summary.sizes["dim"] > 1 else {}
    planes = {group: Plane.of(path[np.isfinite(path).all(1)]) for group, path in paths.items()}
    tokens = {group: of for group, of in sampled(run).items() if group in paths}
    layers: dict[int, list[Layer]] = {}
    for step in shown if planes else ():
        layers[step] = []
        for group, W in values_of(run.ds["W"], step, tokens).items():
            layers[step] += [
                _points(run, group, planes[group].coordinates(W), tokens[group]),
                *_trace(group, planes[group], paths[group], int(np.searchsorted(steps, step))),
            ]
    x, y = (Axis(label=f"{which} component of the centroid's path") for which in ("1st", "2nd"))
    figures = [
        Figure(title=f"step {step:,}", x=x, y=y, layers=of_step, is_equal=True)
        for step, of_step in layers.items()
    ]
    return Panel(
        name="projection",
        title=f"Projection: {run.row_name}s along the path of their centroid",
        code=run.code("projection"),
        figures=figures,
        note=_note(run, planes),
        has_same_axes=True,
    )


def _paths(run: Run, steps: np.ndarray) -> dict[str, np.ndarray]:
    """Return the centroid of each group at some steps, `(step, dim)`, if any of them is finite."""
    paths = {}
    for group in run.groups:
        path = run.summary["centroid"].sel(group=group, step=steps).transpose("step", "dim").values
        if np.isfinite(path).all(1).any():
            paths[group] = path
    return paths


def _points(run: Run, group: str, at: tuple[np.ndarray, np.ndarray], tokens: np.ndarray) -> Points:
    ids = token_ids(run, tokens)
    return Points(label=run.row_name, group=group, color=BLUE, x=at[0], y=at[1], tokens=ids)


def _trace(group: str, plane: Plane, path: np.ndarray, at: int) -> list[Layer]:
    """Return the path after a position along it, up to it, and the centroid there."""
    x, y = plane.coordinates(path)
    past, later = slice(at + 1), slice(at, None)
    return [
        Line(label="path, later", group=group, color=GRAY, x=x[later], y=y[later], is_dashed=True),
        Line(label="path so far", group=group, color=ORANGE, x=x[past], y=y[past]),
        Points(label="centroid", group=group, color=BLACK, x=x[at : at + 1], y=y[at : at + 1]),
    ]


def _note(run: Run, planes: Mapping[str, Plane]) -> str:
    if not planes:
        return "There is no such plane: a token has one weight, or none of them are finite."
    shares = (f"{of.shares[0]:.1%} + {of.shares[1]:.1%} ({group})" for group, of in planes.items())
    return (
        "W in the plane of the first two principal components of the path of the group's own "
        f"centroid. They hold {', '.join(shares)} of the path's variance. The origin is "
        "the mean of the path. "
        f"{sample_note(run)}"
    ).strip()
