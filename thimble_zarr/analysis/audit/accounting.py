"""The accounting of a dataset: do formula and replay explain, step by step, what the weights did?

One fused pass, computed by Dask: each task reads some tokens of a few blocks, evaluates the formula
and replays the optimizer window by window, and keeps a few numbers a step (`analysis.audit`).
"""

from collections.abc import Mapping

import numpy as np
import xarray as xr

from thimble_zarr.analysis.audit.audit import Audit
from thimble_zarr.analysis.audit.table import DIMS, tabulated
from thimble_zarr.analysis.compute.source import Selected
from thimble_zarr.analysis.dataset.lazy import LazyArray, as_dask
from thimble_zarr.errors import SelectionError


def selected(ds: xr.Dataset) -> Selected:
    """Return what a dataset selects, and of which recording.

    Raises SelectionError if it is no longer lazy, or is of several runs.
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
        steps whose row before was not recorded. Columns named `n_...`, `first_...` and `skipped`
        are int64, all others float64. Several runs are gone through one after the other and have a
        dim `run` before the others; counts then are float64 with NaN where a run is shorter than
        another, and attributes that differ between the runs are left out.

        ``norm_predicted``, ``norm_observed``, ``norm_difference``
            With the formula: L2 norms over the selected elements of predicted and observed change
            and of their difference.
        ``cosine_similarity``, ``ratio``
            With the formula: of predicted and observed change, NaN where one of them is zero; and
            `norm_predicted / norm_observed`, infinite where nothing moved.
        ``n_not_finite``
            Elements whose residual, or without the formula whose weight, is NaN or infinite,
            because the run diverged or a value is missing.
        ``skipped``
            1 where the optimizer skipped the step, as with a `GradScaler` that found an infinity,
            or for want of a gradient; else 0.
        ``share_moved``, ``share_stalled``, ``mean_displacement_ulp``
            Extended: share of elements that moved, and of those that did not although the formula
            moves them; mean distance an element moved, in units of the spacing of the dtype at the
            weight before the step.
        ``n_beyond_rounding``, ``n_unbounded_rounding``
            Without the replay: elements whose residual is larger than rounding can make it
            (`Formula.rounding`), or is not finite, 0 in a sound record; those that are not judged,
            as that bound is infinite.
        ``norm_unexplained``
            With the replay: the norm of observed minus replayed weights.
        ``n_different``, ``n_beyond``, ``n_unbounded``, ``max_ulp``
            With the replay, and one more dim `recurrence`, for `W` and each state of the optimizer:
            elements whose bits are not those of the replay, 0 in a sound record; those that differ
            by more than they may, which is all if the replay is exact, else those beyond what
            rounding allows two programs (`Formula.bounds`); those that differ and are not judged,
            as that bound is infinite; the largest distance from the replay.
        ``first_token``, ``first_dim``
            Likewise: the first element that differs beyond that, or else at all; -1 where none
            does. A token is a position along the first axis of the parameter, a dim one along all
            others, flattened.
        ``n_elements``
            Elements of a step, dims `()` or `(subset,)`.

        The attribute `not_exact_because` says why the replay need not give the recorded bits, and
        is empty where it must.

    Raises
    ------
    ConfigError
        If both `formula` and `replay` are False, or `extended` is True without the formula.
    SelectionError
        If no token or no step is selected that can be checked, a variable that is needed was not
        recorded, `ds` is no longer lazy, or the device is not there.

    Examples
    --------
    >>> import thimble_zarr
    >>> ds = thimble_zarr.open_dataset("run.zarr")
    >>> table = thimble_zarr.accounting(ds.sel(token=[3, 5]))
    >>> int(table.n_different.sum())
    0
    """
    if "run" in ds.dims and ds.sizes["run"]:
        options = {"formula": formula, "replay": replay, "extended": extended}
        runs = (ds.isel(run=run) for run in range(ds.sizes["run"]))
        tables = [accounting(run, **options, subsets=subsets, device=device) for run in runs]
        return xr.concat(tables, ds.run, join="outer", combine_attrs="drop_conflicts")
    at = selected(ds).on_device(device)
    positions = subsets and {name: _positions(at, name, ids) for name, ids in subsets.items()}
    audit = Audit.of(at, formula=formula, replay=replay, extended=extended, subsets=positions)
    tables = []
    for table in tabulated(audit, as_dask(audit.reduction).compute()):
        columns = {
            name: ((name,) if name in DIMS else DIMS[: values.ndim], values)
            for name, values in table.items()
        }
        tables.append(xr.Dataset(columns, attrs=table.attrs))
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
