"""Write the run into the files of each peer, block by block in bounded memory."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from benchmarks.peers.inputs import VARIABLES, Inputs
from thimble_zarr.format.layout import split_range
from thimble_zarr.sources.exporting import export_notebook
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.token_mask import write_mask

BLOCK_STEPS = 32
HDF5_OPTIONS = {"compression": "lzf", "shuffle": True}


def chunk_shape(n_tokens: int, n_dims: int) -> tuple[int, int, int]:
    """Return what makes a good HDF5 chunk: 2 MB here."""
    return BLOCK_STEPS, min(500, n_tokens), n_dims


def prepare(inputs: Inputs, *, raw_only: bool = False) -> None:
    """Write every peer's files, or those of memmap alone, unless they are there and of this run."""
    reader = StoreReader.open(inputs.store)
    schema, labels = reader.schema, reader.read_labels()
    made = f"{schema.created} {reader.n_rows}"
    needed = [inputs.about_file, *map(inputs.raw_file, VARIABLES)]
    needed += [] if raw_only else [inputs.notebook_file, inputs.mask_file, inputs.hdf5_file]
    if all(file.exists() for file in needed) and str(inputs.known["made"]) == made:
        return
    inputs.directory.mkdir(parents=True, exist_ok=True)
    assert labels.live is not None
    if not raw_only:
        export_notebook(reader, inputs.notebook_file, overwrite=True)
        write_mask(inputs.mask_file, labels)
    with nullcontext() if raw_only else h5py.File(inputs.hdf5_file, "w") as hdf5:
        for name in VARIABLES:
            _write(reader, name, inputs.raw_file(name), hdf5)
    vars(inputs).pop("known", None)
    known: dict[str, Any] = reader.read_scalars() | {
        "dead": ~labels.live,
        "shape": np.array([reader.n_rows, schema.n_tokens, schema.n_dims]),
        "implementation": np.array(schema.optimizer.implementation),
        "made": np.array(made),
    }
    np.savez(inputs.about_file, **known)


def _write(reader: StoreReader, name: str, raw_file: Path, hdf5: h5py.File | None) -> None:
    dataset = None if hdf5 is None else _hdf5_dataset(reader, name, hdf5)
    with raw_file.open("wb") as raw:
        for start, stop in split_range(0, reader.n_rows, BLOCK_STEPS):
            bits = reader.read(name, (start, stop))
            raw.write(bits.tobytes())
            if dataset is not None:
                dataset[start:stop] = bits


def _hdf5_dataset(reader: StoreReader, name: str, file: h5py.File) -> h5py.Dataset:
    n_tokens, n_dims = reader.schema.n_tokens, reader.schema.n_dims
    return file.create_dataset(
        name,
        (reader.n_rows, n_tokens, n_dims),
        np.uint16,
        chunks=(min(BLOCK_STEPS, reader.n_rows), *chunk_shape(n_tokens, n_dims)[1:]),
        **HDF5_OPTIONS,
    )
