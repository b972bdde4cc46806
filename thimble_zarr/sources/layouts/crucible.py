"""Crucible 1 to 4: as Thimble 8, with states of the first steps only, and what was derived live.

`m` and `v` have a row for the initial state and for each of the first steps, `g` one less: `g[k]`
is the gradient of step k+1. `h_mean`, the mean hidden state, is (N, D), row k of step k+1.
`centroid`, `delta_W_prime` and `last_motion_step` are not taken: they follow from `W`.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from thimble_zarr.bits import decode
from thimble_zarr.errors import NotAStoreError
from thimble_zarr.sources.containers.array import FileArray, FileContents, whole
from thimble_zarr.sources.layouts import thimble_8
from thimble_zarr.sources.recorded import Layout, RecordedRun
from thimble_zarr.sources.rules import run_of

_LIVE = ("h_mean", "centroid", "delta_W_prime", "last_motion_step")

_LOGGED = "h_mean"


def _recognises(contents: FileContents) -> bool:
    return thimble_8.LAYOUT.recognises(contents) and any(name in contents.arrays for name in _LIVE)


def _runs(contents: FileContents) -> Sequence[RecordedRun]:
    run = run_of(contents)
    if (array := contents.arrays.get(_LOGGED)) is None:
        return [run]
    not_taken = [name for name in run.not_taken if name != _LOGGED]
    return [replace(run, logged={_LOGGED: _logged(array, run.n_rows)}, not_taken=not_taken)]


def _logged(array: FileArray, n_rows: int) -> np.ndarray:
    """Return the rows of each step, float32, NaN of the initial state."""
    if array.native is None or array.shape[:1] not in ((n_rows,), (n_rows - 1,)):
        raise NotAStoreError(
            f"{_LOGGED} has shape {array.shape} and dtype {array.dtype}, expected floating-point "
            f"numbers of {n_rows - 1} steps"
        )
    values = decode(whole(array), array.native, np.float64)
    dtype = np.float64 if array.native == "float64" else np.float32
    found = np.full((n_rows, *array.shape[1:]), np.nan, dtype)
    found[n_rows - array.shape[0] :] = values
    return found


LAYOUT = Layout("a Crucible file", _recognises, _runs)
