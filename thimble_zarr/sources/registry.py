"""Every layout of files that is read. A new one is a module in `layouts`, and a line in here."""

from collections.abc import Sequence
from pathlib import Path

from thimble_zarr.errors import NotAStoreError, listed
from thimble_zarr.sources.containers.array import FileContents
from thimble_zarr.sources.containers.hdf5 import is_hdf5, read_hdf5
from thimble_zarr.sources.containers.safetensors import read_safetensors
from thimble_zarr.sources.layouts import (
    box,
    crucible,
    flannel,
    movie,
    notebook,
    thimble_6,
    thimble_7,
    thimble_8,
)
from thimble_zarr.sources.recorded import Layout
from thimble_zarr.sources.rules import WEIGHTS

LAYOUTS: Sequence[Layout] = (
    notebook.LAYOUT,
    flannel.LAYOUT,
    thimble_6.LAYOUT,
    thimble_7.LAYOUT,
    crucible.LAYOUT,
    thimble_8.LAYOUT,
    box.LAYOUT,
    movie.LAYOUT,
)
"""The first that recognises a file reads it, so those that say more come first."""


def contents_of(path: Path) -> FileContents:
    """Return what a file has, whichever kind of container it is.

    Raises NotAStoreError if it is none, DamagedStoreError if it was cut off, ConfigError if a
    package is missing that reads it, and OSError if it cannot be read.
    """
    return read_hdf5(path) if is_hdf5(path) else read_safetensors(path)


def layout_of(contents: FileContents) -> Layout:
    """Return the layout of a file; raise NotAStoreError if it is none that is known."""
    found = next((layout for layout in LAYOUTS if layout.recognises(contents)), None)
    if found is None:
        raise NotAStoreError(
            f"it has no recording: no {' or '.join(WEIGHTS)}, only "
            f"{listed(contents.arrays, most=20) or 'nothing'}; docs/adding-a-source.md tells which "
            "layouts are read"
        )
    return found
