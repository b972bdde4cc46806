"""Open a store as an `xarray.Dataset`: coordinates in memory, everything else lazy."""

import json
import os
from collections.abc import Sequence

import numpy as np
import xarray as xr

from thimble_zarr.analysis.compute.source import Source
from thimble_zarr.analysis.compute.variables import (
    derived_names,
    how_to_record,
    long_name,
)
from thimble_zarr.analysis.dataset.lazy import LazyArray
from thimble_zarr.analysis.dataset.variables import FreezeStep, StepVariable
from thimble_zarr.errors import ThimbleError
from thimble_zarr.format.labels import printable
from thimble_zarr.format.reader import Reader
from thimble_zarr.format.schema import LABELS, ROW_LABEL, Schema
from thimble_zarr.sources.open import open_one, open_recording
from thimble_zarr.store.reader import StorePath, StoreReader


def open_dataset(path: StorePath, parameter: str | None = None) -> xr.Dataset:
    """Open a recorded parameter. Nothing big is read before it is asked for.

    A store that is still being written opens too; the dataset has the steps that were committed at
    that moment.

    Parameters
    ----------
    path
        The store: a path, or an address such as `s3://bucket/run.zarr` (docs/remote.md). Or a file
        that is read in place: safetensors or HDF5, of a layout that is known.
    parameter
        Which of its parameters or runs, by name. None where it has only one.

    Returns
    -------
    xarray.Dataset
        Dask-backed float32 variables with dims `(step, token, dim)` of an embedding, `(step, row,
        col)` of another matrix, `(step, dim)` of a vector, `(step,)` of a scalar and `(step, dim_0,
        dim_1, ...)` of more axes: the stored `W`, `grad`, `exp_avg`, `exp_avg_sq` (and
        `max_exp_avg_sq` with amsgrad) and the derived `delta_W`, `adam_update`, `adam_decay`,
        `adam_residual` and its parts `rounding` and `unexplained` (which replay the optimizer and
        need torch), `m_hat` and `v_hat` (the moments, corrected for their bias), `moved` and
        `stalled` (1 or 0), `ulp` (the spacing of the dtype at `W[t]`) and `displacement_ulp`
        (`delta_W` in units of the spacing at `W[t-1]`; of another dtype see `lattice`).
        Lazy too, int64, with the first of these dims after `step`: `freeze_step`, 0 for a token or
        row that never moved, and over the whole run whatever steps are selected. What a row does
        not have (the gradient or change of the initial state, the change at a step whose row before
        was not recorded) is NaN. What would need a variable that was not recorded is left out, and
        the attribute `not_recorded` says how to record it.
        Per-step scalars, float64, dims `(step,)`, and what else was logged, dims `(step, ...)`, NaN
        of steps without any. Coordinates `step`, which is the optimizer's, and
        `token` or `row`, which are ids where not all rows were recorded, and where known
        `n_occurrences` (in the corpus), `live`, `dead` and `text`, where control characters are
        bytes in brackets: `<0x00>`. The attribute `thimble` is all that is known of the run, as
        JSON.
        Selecting steps or tokens, by label or position and in any order, narrows what is read from
        disk.

    Raises
    ------
    StoreError
        If the store cannot be read (`NotAStoreError`, `UnsupportedFormatError`,
        `DamagedStoreError`), or no row was committed yet.
    SelectionError
        If it holds several parameters and none was chosen, or not the one that was.

    Examples
    --------
    >>> import thimble_zarr
    >>> ds = thimble_zarr.open_dataset("run.zarr")
    >>> ds.W.dims
    ('step', 'token', 'dim')
    >>> moved = ds.delta_W.sel(token=[3, 5]).compute()  # reads these tokens only
    """
    return dataset_of(open_one(path, parameter))


def open_datatree(path: StorePath) -> xr.DataTree:
    """Open all parameters of a recorded run, at the same steps.

    Parameters
    ----------
    path
        The store.

    Returns
    -------
    xarray.DataTree
        A child for each parameter, by name, of what `open_dataset` returns: `tree["wte.weight"]`.
        A run of a single one, recorded with `parameter=`, has it at the root.

    Raises
    ------
    StoreError
        As `open_dataset` does.

    Examples
    --------
    >>> import thimble_zarr
    >>> tree = thimble_zarr.open_datatree("run.zarr")
    >>> every = [node.ds for node in tree.subtree if node.has_data]  # a dataset a parameter
    """
    readers = open_recording(path)
    return xr.DataTree.from_dict({f"/{reader.group}": dataset_of(reader) for reader in readers})


def dataset_of(reader: Reader) -> xr.Dataset:
    """Return what `open_dataset` returns, for any recording that can be read."""
    source = Source.of(reader)
    dims = reader.schema.dims
    variables = {
        name: (("step", *dims), LazyArray.of(StepVariable(source, name)), _named(long_name(name)))
        for name in (*reader.schema.dtypes, *derived_names(reader.schema))
    }
    moved = _named(f"last step at which a {reader.schema.row_name} moved")
    frozen = {"freeze_step": (dims[:1], LazyArray.of(FreezeStep(source)), moved)}
    scalars = {
        name: ("step", values, _named(reader.schema.scalars[name]))
        for name, values in source.recorded.items()
    }
    data = {**variables, **frozen, **scalars}
    for name, values in reader.read_logged().items():
        logged = reader.schema.logged[name]
        of = (logged.dims(name), values, _named(f"{name}, as logged at each step"))
        data[f"logged_{name}" if name in data else name] = of
    return xr.Dataset(data, coords=coords_of(source), attrs=_attrs(reader.schema))


def _named(long_name: str) -> dict[str, str]:
    return {"long_name": long_name}


def is_store(path: object) -> bool:
    """Return whether something is the path of a store that can be opened."""
    try:
        return isinstance(path, str | os.PathLike) and bool(StoreReader.open_each(path))
    except ThimbleError:
        return False


def _attrs(schema: Schema) -> dict[str, str | int]:
    """Return what is known of the run as strings and numbers, which any file format can keep."""
    missing = [name for name in schema.optimizer.variables if name not in schema.dtypes]
    known = {
        "parameter": schema.parameter,
        "dtype": schema.dtypes["W"],
        "optimizer": schema.optimizer.name,
        "implementation": schema.optimizer.implementation,
        "block_steps": schema.layout.block_steps,
        "created": schema.created,
        "not_recorded": how_to_record(missing, schema) if missing else None,
        "thimble": json.dumps(schema.to_attribute()),
    }
    return {name: value for name, value in known.items() if value is not None}


def coords_of(source: Source) -> dict[str, xr.Variable]:
    """Return the coordinates of a dataset: steps, and what is known of the tokens."""
    schema = source.reader.schema
    coords = {"step": xr.Variable("step", source.steps, _named("optimizer step"))}
    if len(schema.dims) == 2 or schema.whole_tokens is not None:
        first = schema.dims[0]
        named = _named(LABELS.get(first, ROW_LABEL))
        coords[first] = xr.Variable(first, source.token_ids, named)
    if not schema.has_tokens:
        return coords
    labels = source.labels
    # A Dataset has a method `count`.
    for name, stored in {"n_occurrences": "count", "live": "live", "dead": "dead"}.items():
        if (values := getattr(labels, stored)) is not None:
            coords[name] = xr.Variable("token", values, _named(LABELS[stored]))
    if labels.text is not None:
        coords["text"] = _as_variable(labels.text)
    return coords


def _as_variable(texts: Sequence[str]) -> xr.Variable:
    """Return the tokens' texts in a form that Dask can chunk and every file format can store.

    Dask chunks neither objects nor variable-length strings by size, and HDF5 accepts no null
    character. Zarr has no specification of fixed-length strings, so the encoding says to write
    them with variable length, which they have here, too, where a very long text would make
    fixed-length strings too large: these take four bytes a character, each what the longest does.
    """
    shown = [printable(text) for text in texts]
    n_characters = len(shown) * max(map(len, shown), default=0)
    dtype = np.str_ if n_characters <= _MAX_FIXED_CHARACTERS else np.dtypes.StringDType()
    named = _named("the token as text")
    return xr.Variable("token", np.array(shown, dtype=dtype), named, encoding={"dtype": object})


_MAX_FIXED_CHARACTERS = 2**25
