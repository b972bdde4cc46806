"""Write the run into the files of each peer, block by block in bounded memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from benchmarks.peers.inputs import VARIABLES, Inputs
from thimble_zarr.format.labels import write_mask
from thimble_zarr.format.layout import split_range
from thimble_zarr.format.store import StoreReader
from thimble_zarr.interchange.notebook import export_notebook

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
    for name in VARIABLES:
        _write_raw(reader, name, inputs.raw_file(name))
    if not raw_only:
        export_notebook(reader, inputs.notebook_file, overwrite=True)
        write_mask(inputs.mask_file, labels)
        with h5py.File(inputs.hdf5_file, "w") as file:
            for name in VARIABLES:
                _write_hdf5(reader, name, file)
    vars(inputs).pop("known", None)
    known: dict[str, Any] = reader.read_scalars() | {
        "dead": ~labels.live,
        "shape": np.array([reader.n_rows, schema.n_tokens, schema.n_dims]),
        "implementation": np.array(schema.optimizer.implementation),
        "made": np.array(made),
    }
    np.savez(inputs.about_file, **known)


def _blocks(reader: StoreReader, name: str) -> Iterator[tuple[slice, np.ndarray]]:
    for start, stop in split_range(0, reader.n_rows, BLOCK_STEPS):
        yield slice(start, stop), reader.read(name, (start, stop))


def _write_raw(reader: StoreReader, name: str, path: Path) -> None:
    with path.open("wb") as file:
        for _, bits in _blocks(reader, name):
            file.write(bits.tobytes())


def _write_hdf5(reader: StoreReader, name: str, file: h5py.File) -> None:
    n_tokens, n_dims = reader.schema.n_tokens, reader.schema.n_dims
    dataset = file.create_dataset(
        name,
        (reader.n_rows, n_tokens, n_dims),
        np.uint16,
        chunks=(min(BLOCK_STEPS, reader.n_rows), *chunk_shape(n_tokens, n_dims)[1:]),
        **HDF5_OPTIONS,
    )
    for rows, bits in _blocks(reader, name):
        dataset[rows] = bits
