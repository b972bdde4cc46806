"""Thimble 8 and 9: the dead tokens of a run in a safetensors file, with `metadata.json` beside it.

`W` of shape (N+1, n, D) has bits of bfloat16 in 16-bit integers; `m`, `v` and `g` are float32
numbers of bfloat16 values; Thimble 9 has none of them. `loss` has a 0.0 for the initial state.
`dead_mask` is of the whole vocabulary, and `dead_indices` are the ids of the n tokens.
"""

from thimble_zarr.sources.containers.array import FileContents
from thimble_zarr.sources.recorded import Layout
from thimble_zarr.sources.rules import TOKEN_IDS, has_weights, single_run


def _recognises(contents: FileContents) -> bool:
    return has_weights(contents) and any(name in contents.arrays for name in TOKEN_IDS)


LAYOUT = Layout("a file of dead tokens", _recognises, single_run)
