"""Weights on the lattice of a dtype: which of its numbers they are, and how far apart those lie."""

import xarray as xr

from thimble_zarr.analysis.audit.accounting import selected
from thimble_zarr.analysis.compute.variables import ON_LATTICE
from thimble_zarr.analysis.dataset.variables import StepVariable
from thimble_zarr.bits import NATIVE_DTYPES
from thimble_zarr.errors import ConfigError

_LONG_NAMES = {
    "cell": "place of W among all numbers of {dtype}, counted from zero",
    "ulp": "spacing of {dtype} at W[t]",
    "displacement_ulp": "observed change in units of the spacing of {dtype} at W[t-1]",
}


def lattice(ds: xr.Dataset, dtype: str | None = None) -> xr.Dataset:
    """Measure recorded weights on the lattice of a dtype, their own or another.

    A lattice is all numbers that a dtype has. On that of bfloat16 you see what float32 weights
    would do in bfloat16.

    Parameters
    ----------
    ds
        A dataset from `open_dataset`, whole or with anything selected. It must still be lazy: not
        loaded, and not changed by arithmetic.
    dtype
        `bfloat16`, `float16`, `float32` or `float64`; the recorded one, if None.

    Returns
    -------
    xarray.Dataset
        Lazy variables with the dims and coordinates of `ds.W`. Selecting narrows what is read.

        ``cell``
            The place of `W` among all numbers of the dtype, counted from zero: neighbours differ
            by 1, negative numbers have negative places, and both zeros have 0. So
            `cell.diff("step")` is the exact number of cells that a weight moved, also across powers
            of two and zero. Weights of another dtype are rounded to the nearest number first, ties
            to even. An infinity comes after the largest number, and NaN beyond it. int32 of 16-bit
            dtypes, else int64; no difference overflows, but in float64 between numbers of both
            signs if one of them is 2 or larger in size.
        ``ulp``
            The spacing of the dtype's numbers at `W[t]`, away from zero; float32. `W` itself is not
            rounded for that. NaN where `W` is not finite, or larger than all of them.
        ``displacement_ulp``
            `W[t] - W[t-1]` in units of the spacing at `W[t-1]`; float32. That is `delta_W`, divided
            by the `ulp` of the row before. `W` is not rounded for it: in units of a coarser dtype
            it is a fraction. NaN where the row before was not recorded, and in row 0.

    Raises
    ------
    ConfigError
        If there is no such dtype.
    SelectionError
        If `ds` is no longer lazy, or is of several runs.

    Examples
    --------
    >>> import thimble_zarr
    >>> ds = thimble_zarr.open_dataset("run.zarr")
    >>> cells = thimble_zarr.lattice(ds.sel(token=[3, 5])).cell
    >>> n_crossed = abs(cells.diff("step")).sum("dim").compute()  # by step and token
    """
    if dtype is not None and dtype not in NATIVE_DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(NATIVE_DTYPES)}, and is {dtype!r}")
    source = selected(ds).source
    native = dtype or source.reader.schema.dtypes["W"]
    variables = {
        name: xr.Variable(
            ds.W.dims,
            ds.W.data.with_variable(StepVariable(source, name, native)),
            {"long_name": _LONG_NAMES[name].format(dtype=native)},
        )
        for name in ON_LATTICE
    }
    return xr.Dataset(variables, coords=ds.W.coords, attrs={"dtype": native})
