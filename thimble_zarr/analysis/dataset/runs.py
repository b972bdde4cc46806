"""Open several runs as one `xarray.Dataset`, to be compared."""

import os
from collections.abc import Iterable

import numpy as np
import xarray as xr

from thimble_zarr.analysis.dataset.lazy import LazyArray
from thimble_zarr.analysis.dataset.open import open_dataset
from thimble_zarr.analysis.dataset.variables import RunsVariable, StepVariable
from thimble_zarr.analysis.selection import stores_at
from thimble_zarr.errors import ConfigError
from thimble_zarr.format.indexing import Indices


def open_datasets(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    parameter: str | None = None,
) -> xr.Dataset:
    """Open recorded runs of a parameter of one shape. Nothing big is read before it is asked for.

    Parameters
    ----------
    paths
        Stores and glob patterns such as `seed*/run.zarr`, or a single one.
    parameter
        Which of their parameters, by name. None where each has only one.

    Returns
    -------
    xarray.Dataset
        What `open_dataset` returns of each, for the variables that all have, with one more
        dimension `run` before the others, whose coordinate is the paths, sorted. Steps are those
        that any run has; what another does not have of them is NaN. Coordinates of the tokens
        that differ between runs have dims `(run, token)`, and those that some run lacks are left
        out, as are attributes that differ. Selecting runs, too, narrows what is read from disk.

    Raises
    ------
    StoreError, SelectionError
        As `open_dataset` does of any of them, and if a pattern matches nothing.
    ConfigError
        If no path was given, or the parameter has another shape, or other rows of it were recorded,
        in one of the runs.

    Examples
    --------
    >>> import thimble_zarr
    >>> ds = thimble_zarr.open_datasets("run*.zarr")
    >>> moved = ds.delta_W.sel(token=3).compute()  # of each run, reading this token only
    """
    stores = stores_at(paths)
    runs = [open_dataset(store, parameter) for store in stores]
    _check_shapes(stores, runs)
    shared = [name for name in runs[0].variables if all(name in run.variables for run in runs)]
    lazy = [name for name in shared if isinstance(runs[0][name].data, LazyArray)]
    in_memory = [
        run.drop_vars([name for name in run.variables if name not in shared or name in lazy])
        for run in runs
    ]
    axis = xr.Variable("run", stores, {"long_name": "the run's store"})
    ds = xr.concat(
        in_memory,
        axis,
        data_vars="all",
        coords="different",
        compat="equals",
        join="outer",
        combine_attrs="drop",
    )
    rows = tuple(_rows(run.step.values, ds.step.values) for run in runs)
    ds = ds.assign({name: _stacked([run[name].variable for run in runs], rows) for name in lazy})
    same = {
        name: value
        for name, value in runs[0].attrs.items()
        if all(run.attrs.get(name) == value for run in runs)
    }
    return ds[[name for name in runs[0].data_vars if name in shared]].assign_attrs(same)


def _check_shapes(stores: list[str], runs: list[xr.Dataset]) -> None:
    shapes = [dict(zip(run.W.dims[1:], run.W.shape[1:], strict=True)) for run in runs]
    for store, shape in zip(stores, shapes, strict=True):
        if shape != shapes[0]:
            raise ConfigError(
                "runs in one dataset must have a parameter of one shape, but that of "
                f"{stores[0]} is {shapes[0]}, and that of {store} is {shape}"
            )
    for name in runs[0].indexes:
        for store, run in zip(stores, runs, strict=True):
            if name != "step" and not run.indexes[name].equals(runs[0].indexes[name]):
                raise ConfigError(
                    f"runs of one dataset have the same {name}s, and {stores[0]} and {store} were "
                    f"recorded with others (`tokens=`); open them one by one"
                )


def _rows(own: np.ndarray, steps: np.ndarray) -> Indices:
    """Return the row that a run has of each step, or one beyond its last where it has none."""
    if np.array_equal(own, steps[: len(own)]):
        return range(len(steps))
    rows = np.searchsorted(own, steps)
    there = own[np.minimum(rows, len(own) - 1)] == steps
    return np.where(there, rows, len(own))


def _stacked(runs: list[xr.Variable], rows: tuple[Indices, ...]) -> xr.Variable:
    """Stack a lazy variable of all runs, at these rows of each."""
    variables = tuple(run.data.variable for run in runs)
    of_steps = isinstance(variables[0], StepVariable)
    stacked = LazyArray.of(RunsVariable(variables, rows if of_steps else None))
    return xr.Variable(("run", *runs[0].dims), stacked, runs[0].attrs)
