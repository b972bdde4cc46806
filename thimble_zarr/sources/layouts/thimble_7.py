"""Thimble 7: an HDF5 file of the bits of bfloat16 numbers, in 16-bit integers.

Datasets are called as in the first notebook, with chunks of (1600, V, D) that are not compressed,
of which the last has room for rows beyond the last step. Attributes of the root are the
hyper-parameters. Other HDF5 files whose datasets have those names are read alike.
"""

from thimble_zarr.sources.containers.array import FileContents
from thimble_zarr.sources.recorded import Layout
from thimble_zarr.sources.rules import has_weights, single_run


def _recognises(contents: FileContents) -> bool:
    return contents.container == "HDF5" and has_weights(contents)


LAYOUT = Layout("an HDF5 file", _recognises, single_run)
