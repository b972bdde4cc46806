"""`summary`: what a run did, as a dozen numbers for each step and token."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import xarray as xr

from thimble_zarr.analysis.audit.accounting import selected as selected_of
from thimble_zarr.analysis.compute.run import Progress
from thimble_zarr.analysis.compute.source import Selected, Source
from thimble_zarr.analysis.dataset.open import dataset_of
from thimble_zarr.analysis.summary.contents import QUANTILES, Contents
from thimble_zarr.analysis.summary.groups import Groups, Members
from thimble_zarr.analysis.summary.numbers import numbers_of
from thimble_zarr.sources.open import open_recording


def summary(
    path_or_ds: str | os.PathLike[str] | xr.Dataset,
    *,
    groups: Mapping[str, Members] | None = None,
    parameter: str | None = None,
    dtype: str | None = None,
    place: str | os.PathLike[str] | None = None,
    memory_bytes: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Sum up a run.

    Examples
    --------
    >>> import thimble_zarr
    >>> run = thimble_zarr.summary("run.zarr")
    >>> run.norm_delta_W.dims
    ('step', 'token')
    """
    if isinstance(path_or_ds, xr.Dataset):
        at = selected_of(path_or_ds)
    else:
        (reader,) = open_recording(Path(path_or_ds), parameters=[parameter] if parameter else ())
        schema = reader.schema
        at = Selected(
            Source.of(reader), range(reader.n_rows), range(schema.n_tokens), range(schema.n_dims)
        )
    schema = at.source.reader.schema
    native = dtype or schema.dtypes["W"]
    chosen = Groups.of(at, groups or {})
    parts = []
    for start in range(0, len(at.rows), 64):
        parts.append(numbers_of(replace(at, rows=at.rows[start : start + 64]), chosen, native))
        if progress:
            progress(min(start + 64, len(at.rows)), len(at.rows))
    found = {}
    for name, variable in Contents(schema).variables.items():
        if name == "is_member":
            values = chosen.is_member
        elif "step" in variable.dims:
            axis = variable.dims.index("step")
            values = np.concatenate([part[name] for part in parts], axis=axis)
        else:
            values = np.max([part[name] for part in parts], axis=0)
        found[name] = (
            variable.dims,
            values.astype(variable.dtype, copy=False),
            {"long_name": variable.long_name},
        )
    ds = path_or_ds if isinstance(path_or_ds, xr.Dataset) else dataset_of(at.source.reader)
    row = ds.W.dims[1] if ds.W.ndim > 1 else "dim"
    coords = {"group": [*chosen.names], "quantile": [*QUANTILES], "step": at.steps}
    for label, coord in ds.coords.items():
        name = str(label)
        if coord.dims == (row,):
            coords["token" if name == row else name] = ("token", coord.values)
    return xr.Dataset(found, coords=coords, attrs={"ulp_dtype": native})
