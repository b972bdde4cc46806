"""Thimble 6: an HDF5 file of float16 numbers, compressed, a chunk a step.

Datasets are called as in the first notebook; attributes of the root are the hyper-parameters. The
run was trained in bfloat16: what is smaller than float16 has was rounded, or became 0.
"""

from collections.abc import Sequence
from dataclasses import replace

from thimble_zarr.sources.containers.array import FileContents
from thimble_zarr.sources.recorded import Layout, RecordedRun
from thimble_zarr.sources.rules import VARIABLES, WEIGHTS, run_of


def _recognises(contents: FileContents) -> bool:
    _, W = contents.named(WEIGHTS)
    return contents.container == "HDF5" and W is not None and W.native == "float16"


def _runs(contents: FileContents) -> Sequence[RecordedRun]:
    run = run_of(contents)
    names = [of.name for ours, of in run.series.items() if ours in VARIABLES]
    caveat = (
        f"the file keeps {', '.join(names)} as float16, which lost bits of the bfloat16 numbers "
        "that the run had: it has no exponents below -24, and small numbers became 0"
    )
    return [replace(run, caveat=caveat)]


LAYOUT = Layout("an HDF5 file of float16", _recognises, _runs)
