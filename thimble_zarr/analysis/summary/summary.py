"""`summary`: what a run did, as a dozen numbers for each step and token."""

import errno
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from thimble_zarr.analysis.compute.run import Progress, Resources
from thimble_zarr.analysis.compute.source import Selected, Source
from thimble_zarr.analysis.summary.computation import bring_up_to_date
from thimble_zarr.analysis.summary.groups import Groups, Members
from thimble_zarr.analysis.summary.kept import Kept
from thimble_zarr.analysis.summary.place import beside, in_cache
from thimble_zarr.bits import NATIVE_DTYPES
from thimble_zarr.errors import ConfigError, SelectionError, listed
from thimble_zarr.format.indexing import as_range
from thimble_zarr.format.reader import Reader
from thimble_zarr.sources.open import open_recording

if TYPE_CHECKING:  # imported while others compute
    import xarray as xr

_Path = str | os.PathLike[str]

_Bring = Callable[[Kept], "xr.Dataset"]


def summary(
    path_or_ds: "_Path | xr.Dataset",
    *,
    groups: Mapping[str, Members] | None = None,
    parameter: str | None = None,
    dtype: str | None = None,
    place: _Path | None = None,
    memory_bytes: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> "xr.Dataset":
    """Sum up a run: a dozen numbers for each step and token, and for each group of tokens.

    It is computed in one pass over the store and kept beside it, as an ordinary Zarr:
    `run.summary.zarr` beside `run.zarr`. The next call opens that, and of a run that grew it
    computes the new steps only. Where nothing can be written beside the store, it is kept in the
    user's cache, and a warning says where; that of a store on a server always is.
    `ds.encoding["source"]` is where it lies.

    Parameters
    ----------
    path_or_ds
        A store, a file of the original notebook, or a dataset of `open_dataset`. Where steps,
        tokens or dims were selected of that, the selection is summed up, in memory, and not kept.
    groups
        Groups of tokens besides dead and live, where it is known which tokens are, and all: by
        name ids, a mask of all tokens, or what `--tokens` takes, such as `@ids.txt`. What is kept
        has the groups of former calls, too.
    parameter
        Which parameter of a store of several, by name.
    dtype
        The dtype in whose ULP steps are measured: by default the recorded one. `"bfloat16"` tells
        of float32 weights how they would move, were they rounded.
    place
        Where to keep it instead.
    memory_bytes, workers
        What it may use, as `check` does.
    progress
        Called with how many parts are done, and how many there are.

    Returns
    -------
    xarray.Dataset
        Lazy, with dims `step`, `token`, `dim`, `group` and `quantile`, and with the coordinates of
        the tokens as `open_dataset` has them. Rows of a parameter that is no embedding are called
        tokens here, too. What needs a variable that was not recorded is left out.

        Per step and token, float32: ``norm_W``, ``norm_delta_W``, ``l1_ulp``, ``l2_ulp`` and
        ``max_ulp`` (norms of the step in ULP at `W[t-1]`), ``n_moved`` (dims), ``norm_grad``,
        ``norm_m_hat`` and ``norm_sqrt_v_hat`` of the Adam family, ``norm_momentum_buffer`` of SGD,
        ``norm_residual``; and relative to a group, NaN for tokens that are not in it,
        ``cosine_to_mean`` of the step with the mean step and ``centroid_distance``.
        Per group and step: ``centroid``, ``mean_delta_W`` and ``mean_grad``, by dim;
        ``n_identical`` tokens whose weights are those of another, bit for bit, and
        ``largest_identical``, the most that are alike; ``norm_predicted``, ``norm_observed`` and
        ``cosine_predicted`` as in the table of `check`; ``share_moved``, ``share_stalled`` and
        ``share_below_half_ulp``, of weights; and of each number of a token its quantiles over the
        group, as ``norm_W_quantiles``.
        Per token, steps: ``freeze_step``, the last at which it moved, and with D dims
        ``last_early``, the last at which its step had an L2 above sqrt(D) ULP, ``last_midlife``,
        at which it moved by more than 1 ULP in a dim, and ``last_late``, at which it moved by less;
        0 where there is none. ``is_member`` says which tokens are in a group.
        Changes are NaN at steps whose row before was not recorded.

    Raises
    ------
    StoreError
        If the store cannot be read or the summary not be written.
    SelectionError
        If a group is empty or has other tokens, nothing is selected, or one of several parameters
        must be chosen.
    ConfigError
        If the memory is too small, or there is no such dtype.

    Examples
    --------
    >>> import thimble_zarr
    >>> run = thimble_zarr.summary("run.zarr", groups={"mine": [3, 5]})
    >>> run.norm_delta_W.dims
    ('step', 'token')
    >>> largest = run.l2_ulp_quantiles.sel(group="mine", quantile=1.0)
    """
    selected = _selected(path_or_ds, parameter)
    reader = selected.source.reader
    if 0 in map(len, (selected.rows, selected.tokens, selected.dims)):
        raise SelectionError("nothing is selected that could be summed up: an axis is empty")
    recorded = reader.schema.dtypes["W"]
    native = dtype or recorded
    if native not in NATIVE_DTYPES:
        raise ConfigError(f"there is no dtype {native}; choose {listed(NATIVE_DTYPES)}")
    chosen = Groups.of(selected, groups or {})
    resources = Resources(memory_bytes=memory_bytes, workers=workers)
    bring = partial(
        bring_up_to_date,
        selected=selected,
        groups=chosen,
        native=native,
        resources=resources,
        progress=progress,
    )
    if not _is_whole(selected):
        return _in_memory(selected, bring)
    ds = _kept(reader, None if native == recorded else native, place, bring)
    if len(ds.step) > len(selected.rows) and not isinstance(path_or_ds, str | os.PathLike):
        return _in_memory(selected, bring)  # the run has grown, and somebody summed up more of it
    return _labelled(ds, selected).assign_attrs(parameter=reader.schema.parameter or "")


def _kept(reader: Reader, lattice: str | None, place: _Path | None, bring: _Bring) -> "xr.Dataset":
    """Bring the summary up to date where it lies, and where nothing can be written the cache's."""
    kept = Kept(Path(place or beside(reader.path, lattice)).absolute(), reader.group)
    try:
        return bring(kept)
    except OSError as error:
        if place is not None or error.errno not in _NOT_WRITABLE:
            raise
        kept = Kept(in_cache(reader.path, lattice), reader.group)
        warnings.warn(
            f"nothing can be written beside {reader.path} ({error.strerror}): its summary is kept "
            f"at {kept.path}",
            stacklevel=3,
        )
        return bring(kept)


_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}


def _selected(path_or_ds: "_Path | xr.Dataset", parameter: str | None) -> Selected:
    """Return all of a recording, or what a dataset selects."""
    if not isinstance(path_or_ds, str | os.PathLike):
        if parameter is not None:
            raise ConfigError("a dataset is of one parameter; leave `parameter` out")
        from thimble_zarr.analysis.audit.accounting import selected

        of = selected(path_or_ds)
        rows = np.asarray(of.rows, np.int64)  # those of longer runs may be among them
        return replace(of, rows=as_range(rows[rows < of.source.reader.n_rows]))
    readers = open_recording(path_or_ds, parameters=() if parameter is None else (parameter,))
    if len(readers) > 1:
        names = listed((reader.schema.parameter for reader in readers), most=24)
        raise SelectionError(
            f"{path_or_ds} holds {len(readers)} parameters, and one must be chosen, by "
            f"`parameter=` in Python or --parameter on the command line: {names}"
        )
    source, schema = Source.of(readers[0]), readers[0].schema
    return Selected(
        source, range(source.reader.n_rows), range(schema.n_tokens), range(schema.n_dims)
    )


def _is_whole(selected: Selected) -> bool:
    schema, n_rows = selected.source.reader.schema, selected.source.reader.n_rows
    axes = (
        (selected.rows, n_rows),
        (selected.tokens, schema.n_tokens),
        (selected.dims, schema.n_dims),
    )
    return all(np.array_equal(axis, range(n)) for axis, n in axes)


def _in_memory(selected: Selected, bring: _Bring) -> "xr.Dataset":
    """Sum up a selection, and keep nothing."""
    with tempfile.TemporaryDirectory(prefix="thimble-zarr-") as directory:
        kept = Kept(Path(directory) / "summary.zarr")
        ds = bring(kept).load()
    del ds.encoding["source"]
    return _labelled(ds, selected)


def _labelled(ds: "xr.Dataset", selected: Selected) -> "xr.Dataset":
    """Return a summary with what is known of its tokens."""
    from thimble_zarr.analysis.dataset.open import coords_of

    schema = selected.source.reader.schema
    coords = {}
    for name, coord in coords_of(selected.source).items():
        if coord.dims == schema.dims[:1]:
            named = "token" if name == schema.dims[0] else name
            coords[named] = ("token", coord.values[np.asarray(selected.tokens)], coord.attrs)
    return ds.assign_coords(coords)
