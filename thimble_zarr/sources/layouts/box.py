"""Box 1: `embedding_history` of shape (N+1, V, D), bfloat16, alone in a safetensors file."""

from collections.abc import Sequence

from thimble_zarr.sources.containers.array import FileContents
from thimble_zarr.sources.recorded import Layout, RecordedRun
from thimble_zarr.sources.rules import run_of


def _recognises(contents: FileContents) -> bool:
    return "embedding_history" in contents.arrays


def _runs(contents: FileContents) -> Sequence[RecordedRun]:
    return [run_of(contents)]


LAYOUT = Layout("an embedding history", _recognises, _runs)
