"""Thimble 8 and 9: the dead tokens of a run in a safetensors file, with `metadata.json` beside it.

`W` of shape (N+1, n, D) has bits of bfloat16 in 16-bit integers; `m`, `v` and `g` are float32
numbers of bfloat16 values; Thimble 9 has none of them. `loss` has a 0.0 for the initial state.
`dead_mask` is of the whole vocabulary, and `dead_indices` are the ids of the n tokens.
"""

from collections.abc import Sequence

from thimble_zarr.sources.containers.array import FileContents
from thimble_zarr.sources.recorded import Layout, RecordedRun
from thimble_zarr.sources.rules import TOKEN_IDS, has_weights, run_of


def _recognises(contents: FileContents) -> bool:
    return has_weights(contents) and any(name in contents.arrays for name in TOKEN_IDS)


def _runs(contents: FileContents) -> Sequence[RecordedRun]:
    return [run_of(contents)]


LAYOUT = Layout("a file of dead tokens", _recognises, _runs)
