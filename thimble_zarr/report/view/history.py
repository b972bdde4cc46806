"""The whole life of one token: what is read of it, and the figures that show it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from thimble_zarr.report.figure import Axis, Figure, Image, Layer, Line, Panel

N_DIMS_SHOWN = 3
"""Dims whose lines are shown at first."""


@dataclass(frozen=True)
class History:
    """A token's values at every step, read from the store and from no other token's.

    Attributes
    ----------
    token
        Its id.
    dim
        What it is along: `token`, or the first dim of another parameter.
    values
        Variables `(step, dim)`, or of a row that is no vector `(step, number)`: the stored ones,
        and where the run has them `update`, `decay`, `delta_W`, `ulp` and `displacement_ulp`.
    stored
        The names of the stored ones.
    """

    token: int
    dim: str
    values: xr.Dataset
    stored: tuple[str, ...]

    @property
    def steps(self) -> np.ndarray:
        """The step of each row, int64."""
        steps: np.ndarray = self.values["step"].values
        return steps

    @property
    def last_moves(self) -> np.ndarray:
        """The last step at which each dim moved, 0 if it never did; int64, shape `(dim,)`."""
        moved = np.nan_to_num(self.values["delta_W"].values) != 0
        lasts: np.ndarray = (moved * self.steps[:, np.newaxis]).max(axis=0, initial=0)
        return lasts

    @property
    def lively_dims(self) -> list[int]:
        """The dims that moved last, the lowest first of several."""
        order = np.argsort(-self.last_moves, kind="stable")
        return sorted(order[:N_DIMS_SHOWN].tolist())


_DERIVED = ("update", "decay", "delta_W", "ulp", "displacement_ulp")


def history(ds: xr.Dataset, position: int) -> History:
    """Read all that was recorded of one token; of nothing else more than shares its chunks.

    Parameters
    ----------
    ds
        What `open_dataset` returns.
    position
        Which token, row of a matrix, or element of a vector. A scalar is the only one.
    """
    _, *dims = map(str, ds.W.dims)
    dim = dims[0] if dims else "number"
    stored = tuple(json.loads(ds.attrs["thimble"])["dtypes"])
    names = [*stored, *(name for name in _DERIVED if name in ds)]
    values = ds[names].isel({dim: position} if dims else {}).compute(scheduler="threads")
    token = int(values[dim]) if dim in ds.coords else position
    if len(dims) < 2:
        values = values.expand_dims("number", axis=1)
    elif len(dims) > 2:
        values = values.stack(number=dims[1:], create_index=False)
    return History(token, dim, values, stored)


def history_panel(of: History, dims: Sequence[int]) -> Panel:
    """Return the figures of a token's history, with lines for some of its dims."""
    figures = [_values_figure(of, variable, dims) for variable in of.stored]
    if "update" in of.values:
        figures.append(_update_figure(of, dims))
    figures.append(_displacement_figure(of))
    return Panel(
        name="history",
        title=f"History of {of.dim} {of.token}",
        code=f"ds.sel({of.dim}={of.token})[{list(of.stored)}].compute()",
        figures=figures,
        note="Lines are single dims; the grey line is the norm over all dims, on the right axis.",
    )


def _values_figure(of: History, variable: str, dims: Sequence[int]) -> Figure:
    values = of.values[variable].values.astype(np.float64)
    norm = np.sqrt((values**2).sum(axis=1))
    layers: list[Layer] = [
        Line(x=of.steps, y=norm, label="norm", color="#b0b0b0", on_right=True),
        *(Line(x=of.steps, y=values[:, dim], label=f"dim {dim}") for dim in dims),
    ]
    title = of.values[variable].attrs.get("long_name", variable)
    return Figure(
        title=title[:1].upper() + title[1:],
        y=Axis(label=variable),
        right=Axis(label=f"|{variable}|"),
        layers=layers,
    )


def _update_figure(of: History, dims: Sequence[int]) -> Figure:
    """Return the predicted update against half the spacing: below it, the weight stays."""
    parts = [of.values[name].values.astype(np.float64) for name in ("update", "decay")]
    update, half_ulp = np.abs(sum(parts)), of.values["ulp"].values.astype(np.float64) / 2
    layers: list[Layer] = []
    for dim in dims:
        shown = np.where(update[:, dim] > 0, update[:, dim], np.nan)
        layers += [
            Line(x=of.steps, y=shown, label=f"dim {dim}"),
            Line(x=of.steps, y=half_ulp[:, dim], label=f"dim {dim}", is_dashed=True),
        ]
    return Figure(
        title="Predicted update (line) against ½ ULP (dashed): below it, rounding undoes the move",
        y=Axis(label="|update|", is_log=True, can_switch=True),
        layers=layers,
    )


def _displacement_figure(of: History) -> Figure:
    values = of.values["displacement_ulp"].values.astype(np.float32).T
    size = np.where(values == 0, np.nan, np.abs(values))
    first, last = float(of.steps[0]) - 0.5, float(of.steps[-1]) + 0.5
    return Figure(
        title="How far each dim moved, in ULP; blank where it stayed",
        y=Axis(label="dim"),
        layers=[
            Image(values=size, x=(first, last), y=(-0.5, len(size) - 0.5), unit="ULP", is_log=True)
        ],
    )
