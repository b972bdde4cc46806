"""A dataset of a run of which not every variable was recorded: it says why others are not there."""

import json
from typing import Any

import xarray as xr

from thimble_zarr.analysis.compute.variables import DERIVED, how_to_record, missing_inputs
from thimble_zarr.format.schema import VARIABLES, Schema


class PartialDataset(xr.Dataset):  # type: ignore[no-untyped-call]  # of its __init_subclass__
    """An ordinary dataset, but for the error on a variable that could not be computed."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if why := self._why_missing(name):
                raise AttributeError(why) from error
            raise

    def __getitem__(self, key: Any) -> Any:
        try:
            return super().__getitem__(key)
        except KeyError as error:
            if why := self._why_missing(key):
                raise KeyError(why) from error
            raise

    def _why_missing(self, name: object) -> str:
        if not (isinstance(name, str) and name in (*DERIVED, *VARIABLES)):
            return ""
        attribute = self.attrs.get("thimble")
        if attribute is None:
            return ""
        schema = Schema.from_attribute(json.loads(attribute))
        missing = missing_inputs(name, schema)
        if missing == (name,):
            return how_to_record(missing, schema)
        return f"{name} cannot be computed: {how_to_record(missing, schema)}" if missing else ""
