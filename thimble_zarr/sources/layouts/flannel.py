"""Flannel 1 to 7: a safetensors file of several runs, which are a leading axis of its arrays.

`W` of shape (R, N+1, V, D), and in some files `grad_W`, `momentum_W` and `variance_W`; `losses` of
shape (R, N+1), bfloat16; `W_initial`, which row 0 of `W` has, too. Each run is opened as one of
several parameters, `run_0`, `run_1` and so on.
"""

from collections.abc import Sequence

from thimble_zarr.errors import NotAStoreError
from thimble_zarr.sources.containers.array import FileArray, FileContents, RawArray
from thimble_zarr.sources.recorded import Layout, RecordedRun
from thimble_zarr.sources.rules import LOSSES, VARIABLES, WEIGHTS, run_of

_OF_RUNS = frozenset(name for names in VARIABLES.values() for name in names) | {*LOSSES}


def _recognises(contents: FileContents) -> bool:
    _, W = contents.named(WEIGHTS)
    return contents.container == "safetensors" and W is not None and len(W.shape) == 4


def _runs(contents: FileContents) -> Sequence[RecordedRun]:
    name, W = contents.named(WEIGHTS)
    assert W is not None
    n_runs = W.shape[0]
    if not n_runs:
        raise NotAStoreError(f"{name} has shape {W.shape}: there is no run in it")
    several = {of: array for of, array in contents.arrays.items() if of in _OF_RUNS}
    for other, array in several.items():
        if array.shape[0] != n_runs:
            raise NotAStoreError(
                f"{other} has shape {array.shape}, and {name} has {n_runs} runs, expected as many"
            )
    found = []
    for run in range(n_runs):
        parts = {of: _part(array, run) for of, array in several.items()}
        found.append(run_of(contents, {**contents.arrays, **parts}, parameter=f"run_{run}"))
    return found


def _part(array: FileArray, run: int) -> FileArray:
    assert isinstance(array, RawArray)  # a file that is recognised is safetensors
    return array.part(run)


LAYOUT = Layout("a file of several runs", _recognises, _runs)
