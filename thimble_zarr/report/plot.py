"""Panels of the report, one by one, as matplotlib figures: `thimble_zarr.plot`.

There is a function for each panel, and `compare` for several runs; `dir(thimble_zarr.plot)` lists
them. A notebook shows what it returns, and `savefig` writes it.

>>> import thimble_zarr
>>> figure = thimble_zarr.plot.regimes("run.zarr")
>>> figure.savefig("regimes.png")
>>> ds = thimble_zarr.open_dataset("run.zarr")
>>> figure = thimble_zarr.plot.step_size(ds.sel(step=slice(0, 5)), group="live")
"""

import os
from collections.abc import Callable, Sequence
from functools import cache

import xarray as xr
from matplotlib.figure import Figure

from thimble_zarr.analysis.dataset.open import open_dataset
from thimble_zarr.analysis.summary.summary import summary as summary_of
from thimble_zarr.errors import ConfigError, SelectionError, listed
from thimble_zarr.report.figure import Panel
from thimble_zarr.report.panels import comparison
from thimble_zarr.report.panels.registry import PANELS
from thimble_zarr.report.pyplot import draw
from thimble_zarr.report.run import Run

RunLike = str | os.PathLike[str] | xr.Dataset
"""A store's path, or what `open_dataset` returns, selected or not."""

__all__ = [*(panel.__name__ for panel in PANELS), "compare"]


def __dir__() -> list[str]:
    return __all__


@cache
def __getattr__(name: str) -> Callable[..., Figure]:
    for panel in PANELS:
        if panel.__name__ == name:
            return _drawing(panel)
    raise AttributeError(f"thimble_zarr.plot has no {name}; it has {listed(__all__)}")


def compare(runs: RunLike | Sequence[RunLike], *, group: str | None = None) -> Figure:
    """Draw key numbers of several runs, a line a run.

    Parameters
    ----------
    runs
        The paths of stores, or what `open_dataset` returns, selected or not.
    group
        The group of tokens that is shown. By default the dead where they are known of the first
        run, else all.

    Returns
    -------
    matplotlib.figure.Figure
        The drawing; pyplot does not know it, so nothing has to be closed.

    Raises
    ------
    StoreError
        If a store cannot be read.
    SelectionError
        If the first run has no such group.
    ConfigError
        If there are no runs.

    Examples
    --------
    >>> import thimble_zarr
    >>> figure = thimble_zarr.plot.compare(["seed0.zarr", "seed1.zarr"])
    """
    if isinstance(runs, str | os.PathLike | xr.Dataset):
        runs = [runs]
    if not runs:
        raise ConfigError("there is nothing to compare; name at least one run")
    every = [_run(run, None, None) for run in runs]
    return draw(comparison.compare(every), group=_group(every[0], group))


def _drawing(panel: Callable[[Run], Panel]) -> Callable[..., Figure]:
    """Return the function that draws a panel."""

    def plot(
        run: RunLike,
        *,
        group: str | None = None,
        parameter: str | None = None,
        summary: xr.Dataset | None = None,
    ) -> Figure:
        of = _run(run, parameter, summary)
        return draw(panel(of), group=_group(of, group))

    plot.__name__ = plot.__qualname__ = panel.__name__
    plot.__doc__ = _DOC.format(shown=_what(panel), name=panel.__name__)
    return plot


_DOC = """Draw {shown}

Parameters
----------
run
    The path of a store, or what `open_dataset` returns, selected or not.
group
    The group of tokens that is shown: "dead", "live", "all", or one of the summary. By default
    the dead where they are known, else all.
parameter
    Which parameter of a store of several, by name.
summary
    What `thimble_zarr.summary` returns of it: for groups of your own. By default it is made, which
    takes a while the first time that a store is summed up.

Returns
-------
matplotlib.figure.Figure
    The drawing; pyplot does not know it, so nothing has to be closed.

Raises
------
StoreError
    If the store cannot be read.
SelectionError
    If there is no such group.

Examples
--------
>>> import thimble_zarr
>>> figure = thimble_zarr.plot.{name}("run.zarr")
"""


def _what(panel: Callable[[Run], Panel]) -> str:
    """Return the first line of what is said of a panel, without its verb."""
    return (panel.__doc__ or "").strip().splitlines()[0].removeprefix("Return ")


def _run(of: RunLike, parameter: str | None, summary: xr.Dataset | None) -> Run:
    if isinstance(of, xr.Dataset):
        found = summary_of(of) if summary is None else summary
        return Run(store="run.zarr", ds=of, summary=found)
    found = summary_of(of, parameter=parameter) if summary is None else summary
    return Run(store=os.fspath(of), ds=open_dataset(of, parameter), summary=found)


def _group(run: Run, group: str | None) -> str:
    if group is None:
        return "dead" if "dead" in run.groups else "all"
    if group not in run.groups:
        raise SelectionError(
            f"there is no group {group!r}; the summary has {listed(run.groups)}. To have others, "
            "pass `summary=thimble_zarr.summary(..., groups={name: ids})`"
        )
    return group
