"""Crucible 1 to 4: as Thimble 8, with states of the first steps only, and what was derived live.

`m` and `v` have a row for the initial state and for each of the first steps, `g` one less: `g[k]`
is the gradient of step k+1. `h_mean`, `centroid`, `delta_W_prime` and `last_motion_step` are not
taken: the last three follow from `W`.
"""

from thimble_zarr.sources.containers.array import FileContents
from thimble_zarr.sources.layouts import thimble_8
from thimble_zarr.sources.recorded import Layout
from thimble_zarr.sources.rules import single_run

_LIVE = ("h_mean", "centroid", "delta_W_prime", "last_motion_step")


def _recognises(contents: FileContents) -> bool:
    return thimble_8.LAYOUT.recognises(contents) and any(name in contents.arrays for name in _LIVE)


LAYOUT = Layout("a Crucible file", _recognises, single_run)
