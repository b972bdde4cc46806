"""What serves the files of a store, by where it lies."""

import os

from thimble_zarr.format.location import Url, located
from thimble_zarr.store.files.base import Files
from thimble_zarr.store.files.local import LocalFiles


def files_at(path: str | os.PathLike[str]) -> Files:
    """Return the files of the store at a path or an address.

    Raises ConfigError if it is an address that nothing is read from, or what reads it is missing.
    """
    location = located(path)
    if isinstance(location, Url):
        from thimble_zarr.store.files.objects import ObjectFiles

        return ObjectFiles(location)
    return LocalFiles(location.absolute())  # the process may change its directory
