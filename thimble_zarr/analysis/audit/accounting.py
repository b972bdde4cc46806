"""The accounting of a dataset: do formula and replay explain, step by step, what the weights did?

One fused pass, computed by Dask: each task reads some tokens of a few blocks, evaluates the formula
and replays the optimizer window by window, and keeps a few numbers a step (`analysis.audit`).
"""

from collections.abc import Mapping

import numpy as np
import xarray as xr

from thimble_zarr.analysis.audit.audit import Audit
from thimble_zarr.analysis.audit.table import DIMS, Table, tabulated
from thimble_zarr.analysis.compute.source import Selected
from thimble_zarr.analysis.dataset.lazy import LazyArray, as_dask
from thimble_zarr.errors import SelectionError


def selected(ds: xr.Dataset) -> Selected:
    """Return what a dataset that is still lazy selects, and of which recording.

    Raises
    ------
    SelectionError
        If `ds` is no longer lazy, or is of several runs.
    """
    if "run" in ds.dims:
        raise SelectionError("this is of one run; select it with `ds.sel(run=...)`")
    if "W" not in ds or not isinstance(ds.W.data, LazyArray):
        raise SelectionError(
            "this needs the lazy variables of `open_dataset`; select steps and tokens with "
            "`ds.sel`, and do not load or compute the dataset first"
        )
    return ds.W.data.selected


def accounting(
    ds: xr.Dataset,
    *,
    formula: bool = True,
    replay: bool = True,
    extended: bool = False,
    subsets: Mapping[str, np.ndarray] | None = None,
    device: str | None = None,
) -> xr.Dataset:
    """Compare recorded rows, step by step, with the optimizer's formula and torch's own program.

    Parameters
    ----------
    ds
        A dataset from `open_dataset` or `open_datasets`, of a parameter of any rank, whole or with
        anything selected. It must still be lazy: not loaded, and not changed by arithmetic.
    formula
        Whether to compare with the formula. The replay alone takes less time.
    replay
        Whether to take every step again with torch and compare bits. Without it a bound on rounding
        judges the formula.
    extended
        Whether to add the columns `table.EXTENDED`.
    subsets
        By name, ids of tokens of `ds`, or of rows of another parameter. All subsets are
        compared in one pass over the store.
    device
        Where to replay, as torch names it. Where the run was recorded, if None, or on the CPU
        where there is no such device.

    Returns
    -------
    xarray.Dataset
        In memory, dims `(step,)`, or `(subset, step)` with subsets, without the initial state and
        steps whose row before was not recorded, float64 but for the counts.

        With the formula:
        ``norm_predicted``, ``norm_observed``, ``norm_difference``
            L2 norms over the selected elements of predicted and observed change and of their
            difference.
        ``cosine_similarity``
            Of predicted and observed change; NaN where one of them is zero.
        ``ratio``
            `norm_predicted / norm_observed`; infinite where nothing moved.

        Always:
        ``n_not_finite``
            Elements whose residual, or without the formula whose weight, is NaN or infinite,
            because the run diverged or a value is missing. int64.
        ``skipped``
            1 where the optimizer skipped the step, as with a `GradScaler` that found an infinity,
            or for want of a gradient; else 0. int64.

        Extended:
        ``share_moved``, ``share_stalled``
            Share of elements that moved, and of those that did not although the formula moves them.
        ``mean_displacement_ulp``
            Mean distance an element moved, in units of the spacing of the dtype at the weight.

        Without the replay:
        ``n_beyond_rounding``
            Elements whose residual is larger than rounding can make it (`Formula.rounding`), or
            is not finite. int64; 0 in a sound record.

        With the replay ``norm_unexplained``, the norm of observed minus replayed weights, and, with
        one more dim `recurrence`, for `W` and each state of the optimizer:
        ``n_different``
            Elements whose bits are not those of the replay. int64; 0 in a sound record.
        ``n_beyond``
            Those that differ by more than they may: all, if the replay is exact; else those beyond
            what rounding allows two programs (`Formula.bounds`). int64.
        ``max_ulp``
            The largest distance from the replay.
        ``first_token``, ``first_dim``
            The first element that differs beyond that, or else at all; -1 where none does. int64.
            A token is a position along the first axis of the parameter, a dim one along all others,
            flattened.

        ``n_elements`` counts the elements of a step, dims `()` or `(subset,)`. The attribute
        `not_exact_because` says why the replay need not give the recorded bits, and is empty where
        it must.

        Runs are gone through one after the other and have a dim `run` before the others. Counts
        are float64 with NaN where a run is shorter than another, and attributes that differ between
        the runs are left out.

    Raises
    ------
    ConfigError
        If both `formula` and `replay` are False, or `extended` is True without the formula.
    SelectionError
        If no token or no step is selected that can be checked, a variable that is needed was not
        recorded, `ds` is no longer lazy, or the device is not there.
    """
    if "run" in ds.dims and ds.sizes["run"]:
        tables = [
            accounting(
                ds.isel(run=run),
                formula=formula,
                replay=replay,
                extended=extended,
                subsets=subsets,
                device=device,
            )
            for run in range(ds.sizes["run"])
        ]
        return xr.concat(tables, ds.run, join="outer", combine_attrs="drop_conflicts")
    at = selected(ds).on_device(device)
    positions = subsets and {name: _positions(at, name, ids) for name, ids in subsets.items()}
    audit = Audit.of(at, formula=formula, replay=replay, extended=extended, subsets=positions)
    tables = [*map(_as_dataset, tabulated(audit, as_dask(audit.reduction).compute()))]
    if subsets is None:
        return tables[0]
    return xr.concat(tables, dim="subset").assign_coords(subset=list(subsets))


def _positions(at: Selected, subset: str, ids: np.ndarray) -> np.ndarray:
    """Return where the tokens of a subset are among the recorded ones."""
    if len(unknown := np.setdiff1d(ids, at.ids)):
        raise SelectionError(f"subset {subset} has tokens that are not selected: {unknown[0]}")
    if len(ids) == 0:
        raise SelectionError(f"subset {subset} is empty")
    return np.searchsorted(at.source.token_ids, ids)


def _as_dataset(table: Table) -> xr.Dataset:
    columns = {
        name: ((name,) if name in DIMS else DIMS[: values.ndim], values)
        for name, values in table.items()
    }
    return xr.Dataset(columns, attrs=table.attrs)
