"""Box 1: `embedding_history` of shape (N+1, V, D), bfloat16, alone in a safetensors file."""

from thimble_zarr.sources.containers.array import FileContents
from thimble_zarr.sources.recorded import Layout
from thimble_zarr.sources.rules import single_run


def _recognises(contents: FileContents) -> bool:
    return "embedding_history" in contents.arrays


LAYOUT = Layout("an embedding history", _recognises, single_run)
