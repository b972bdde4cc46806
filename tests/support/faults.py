"""Copies of a recording in which something is not as it was recorded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from thimble_zarr.format.schema import array_path
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.writer import StoreWriter

Arrays = dict[str, np.ndarray]


def rewrite(
    source_path: Path, target_path: Path, change: Callable[[Arrays, Arrays], object]
) -> None:
    """Write a store anew, whole and with good checksums, after `change` had its way with it.

    `change` gets the stored bits of every variable, shape `(step, token, dim)`, and every per-step
    scalar, shape `(step,)`, by their paths in the store, and writes into them. Among the scalars is
    the label of each row, `step`, which is that of all parameters.
    """
    readers = StoreReader.open_each(source_path)
    n_rows, length = readers[0].n_rows, readers[0].schema.layout.block_steps
    bits = {
        array_path(reader.group, name): reader.read(name, (0, n_rows)).copy()
        for reader in readers
        for name in reader.schema.dtypes
    }
    scalars = {
        array_path(reader.group, name): values.copy()
        for reader in readers
        for name, values in reader.read_numbers().items()
    }
    scalars["step"] = readers[0].read_steps().copy()
    change(bits, scalars)
    steps = scalars.pop("step")
    schemas = {reader.group: reader.schema for reader in readers}
    labels = {reader.group: reader.read_labels() for reader in readers if reader.schema.has_tokens}
    chosen = [reader for reader in readers if reader.schema.whole_tokens is not None]
    writer = StoreWriter.create(
        target_path,
        schemas.get("", schemas),
        labels=labels,
        token_ids={reader.group: reader.read_token_ids() for reader in chosen},
        n_rows=n_rows,
    )
    for start in range(0, n_rows, length):
        writer.commit_block(
            start,
            min(length, n_rows - start),
            {name: _rows(values, start, length) for name, values in bits.items()},
            {name: _rows(values, start, length) for name, values in scalars.items()},
            steps=steps[start : start + length],
        )
    writer.close()


def _rows(values: np.ndarray, start: int, length: int) -> np.ndarray:
    """Return `length` rows from `start` on; those that are not there are zero."""
    rows = np.zeros((length, *values.shape[1:]), dtype=values.dtype)
    there = values[start : start + length]
    rows[: len(there)] = there
    return rows


def flip_bit(bits: np.ndarray, index: tuple[int, ...], bit: int) -> None:
    """Flip one bit of one element, 0 the least."""
    pattern = bits.view(f"u{bits.dtype.itemsize}")
    pattern[index] ^= pattern.dtype.type(1 << bit)


def flip_in_place(store: Path, name: str, place: tuple[int, int, int], bit: int) -> None:
    """Flip one bit of one stored element through zarr-python; again, and it is as it was."""
    row, token, dim = place
    places = StoreReader.open(store).schema.places
    token = token if places is None else places[token]
    array = zarr.open_array(store, path=name, mode="r+")
    bits = np.asarray(array[row, token])
    flip_bit(bits, (dim,), bit)
    array[row, token] = bits


def relabel(source_path: Path, target_path: Path, **schema: object) -> None:
    """Copy a store that says something else of itself: fields of its schema, None to leave one out.

    Mappings are merged into what is there.
    """
    shutil.copytree(source_path, target_path)
    file = target_path / "zarr.json"
    metadata = json.loads(file.read_text())
    _merge(metadata["attributes"]["thimble"], schema)
    file.write_text(json.dumps(metadata))


def _merge(target: dict[str, object], changes: dict[str, object]) -> None:
    for name, value in changes.items():
        there = target.get(name)
        if isinstance(value, dict) and isinstance(there, dict):
            _merge(there, value)
        elif value is None:
            target.pop(name, None)
        else:
            target[name] = value


def everything(path: Path) -> list[Any]:
    """Return all that can be read of a store."""
    reader = StoreReader.open(path)
    rows = (0, reader.n_rows)
    labels = reader.read_labels()
    arrays = [reader.read(name, rows) for name in reader.schema.dtypes]
    arrays += [*reader.read_scalars().values(), labels.count, labels.live, labels.dead]
    content = [None if array is None else array.tobytes() for array in arrays]
    return [reader.schema, reader.commit.complete, labels.text, *content]
