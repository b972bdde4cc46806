"""Thimble 1 to 5: a safetensors file with everything in it, as the first notebook saves it.

`W`, `grad_W`, `momentum_W` and `variance_W` of shape (N+1, V, D), `losses`, and hyper-parameters as
tensors without dimensions; from Thimble 4 on `live_mask`, `dead_mask`, `live_ids`, `dead_ids`. What
else is small in such a file is kept, so that it can be written again byte for byte.
"""

from collections.abc import Sequence
from dataclasses import replace

from thimble_zarr.format.schema import NOTEBOOK_FILE
from thimble_zarr.sources.containers.array import FileContents
from thimble_zarr.sources.containers.safetensors import read_header
from thimble_zarr.sources.layouts.notebook_attribute import NotebookLayout, is_notebook
from thimble_zarr.sources.recorded import Layout, RecordedRun
from thimble_zarr.sources.rules import run_of


def _recognises(contents: FileContents) -> bool:
    return contents.container == "safetensors" and is_notebook(read_header(contents.path)[0])


def _runs(contents: FileContents) -> Sequence[RecordedRun]:
    attribute = NotebookLayout.read(contents.path).to_attribute()
    return [replace(run_of(contents), not_taken=(), attrs={NOTEBOOK_FILE: attribute})]


LAYOUT = Layout("the notebook's file", _recognises, _runs)
