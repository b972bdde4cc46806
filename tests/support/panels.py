"""Runs as panels read them, with a summary that was computed in the plainest way, and layers."""

from functools import cache
from pathlib import Path

import numpy as np
import xarray as xr

import thimble_zarr
from tests.support.summary_oracle import reference_summary
from thimble_zarr.report.figure import Figure, Layer, Panel
from thimble_zarr.report.run import Run

SCALARS = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "optimizer_step")


def summed(ds: xr.Dataset) -> Run:
    """Return an AdamW run of labelled tokens as panels read it."""
    masks = {"dead": ds.dead.values, "live": ds.live.values, "all": np.ones(len(ds.token), bool)}
    summary = reference_summary(ds, ds.attrs["dtype"], masks)
    return Run(store="runs/toy.zarr", ds=ds, summary=summary)


@cache
def toy(path: Path, n_rows: int | None = None) -> Run:
    """Return the first rows of a toy run, in memory and not to be changed."""
    names = ["W", "grad", "exp_avg", "exp_avg_sq", "ulp", "loss", *SCALARS]
    return summed(thimble_zarr.open_dataset(path)[names].isel(step=slice(n_rows)).compute())


def layers_of(figure: Figure, kind: type[Layer], *, group: str | None, label: str) -> list[Layer]:
    return [
        layer
        for layer in figure.layers
        if isinstance(layer, kind) and layer.group == group and layer.label == label
    ]


def layer_of(figure: Figure, kind: type[Layer], *, group: str | None, label: str) -> Layer:
    (found,) = layers_of(figure, kind, group=group, label=label)
    return found


def figure_of(panel: Panel, title: str) -> Figure:
    (found,) = (figure for figure in panel.figures if figure.title == title)
    return found
