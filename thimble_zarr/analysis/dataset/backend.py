"""The same dataset through xarray's own door: `xr.open_dataset(path, engine="thimble")`."""

from collections.abc import Iterable
from typing import Any

import xarray as xr
from xarray.backends import BackendEntrypoint
from xarray.core.indexing import ExplicitlyIndexed

from thimble_zarr.analysis.dataset.open import is_store, open_dataset


class _DaskVariable(xr.Variable):
    """A variable that stays what it is: backed by Dask.

    xarray wraps the arrays of a backend, as if they were those of a file, to protect them from
    being written to. Wrapped, a Dask array would no longer be known as one, nor be computed.
    """

    __slots__ = ()

    @property
    def data(self) -> Any:
        return super().data

    @data.setter
    def data(self, data: Any) -> None:
        if not isinstance(data, ExplicitlyIndexed):
            xr.Variable.data.fset(self, data)  # type: ignore[attr-defined]


class ThimbleBackend(BackendEntrypoint):
    """Opens stores of thimble-zarr with all their derived variables."""

    description = "Training runs recorded by thimble-zarr"
    open_dataset_parameters = ("filename_or_obj", "drop_variables", "parameter")

    def open_dataset(
        self,
        filename_or_obj: Any,
        *,
        drop_variables: str | Iterable[str] | None = None,
        parameter: str | None = None,
    ) -> xr.Dataset:
        """Open a parameter of a store; see `thimble_zarr.open_dataset`."""
        ds = open_dataset(filename_or_obj, parameter)
        ds = ds.drop_vars(drop_variables or [], errors="ignore")
        return ds.assign(
            {
                name: _DaskVariable(variable.dims, variable.data, variable.attrs)
                for name, variable in ds.variables.items()
                if variable.chunks is not None
            }
        )

    def guess_can_open(self, filename_or_obj: Any) -> bool:
        """Return whether `filename_or_obj` is the path of a store."""
        return is_store(filename_or_obj)
