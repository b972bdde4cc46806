"""Arrays of one axis, which are small files of their own: per-step values and coordinates."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from thimble_zarr.format import layout
from thimble_zarr.format.schema import Schema, TokenLabels, array_path
from thimble_zarr.store.coding.shard_codec import encode_vector
from thimble_zarr.store.keys import shard_key, split_array_key, vector_key
from thimble_zarr.store.reader import StoreReader


class PerStepValues:
    """The chunk of per-step values that the next block lies in, of all parameters.

    Parameters of one group of the optimizer have the same learning rate and all else: what is the
    same in all rows so far is kept in memory once, and encoded once.
    """

    def __init__(self) -> None:
        self._values: dict[str, np.ndarray] = {}

    def load(self, readers: Sequence[StoreReader], n_rows: int) -> None:
        """Take up the rows before `n_rows` that lie in the chunk of the next one."""
        start = n_rows - n_rows % layout.SCALAR_CHUNK_STEPS
        known: dict[tuple[str, bytes], np.ndarray] = {}
        for reader in readers:
            for name, values in (reader.read_numbers() | {"step": reader.read_steps()}).items():
                rows = values[start:n_rows]
                chunk = known.setdefault((name, rows.tobytes()), _missing(name))
                chunk[: len(rows)] = rows
                self._values[reader.arrays.key(name)] = chunk

    def add(self, first_row: int, rows: Mapping[str, np.ndarray]) -> Iterator[tuple[str, bytes]]:
        """Take up the rows of a block from `first_row` on; yield each array's whole chunk."""
        offset = first_row % layout.SCALAR_CHUNK_STEPS
        before = self._values if offset else {}
        known: dict[tuple[str, int, bytes], tuple[np.ndarray, bytes]] = {}
        after = {}
        for array, added in rows.items():
            _, name = split_array_key(array)
            same = name, id(before.get(array)), added.tobytes()
            if same not in known:
                values = before[array].copy() if array in before else _missing(name)
                values[offset : offset + len(added)] = added
                known[same] = values, encode_vector(values)
            after[array], content = known[same]
            yield array, content
        self._values = after


def _missing(name: str) -> np.ndarray:
    """Return a chunk of per-step values of which none is there."""
    return np.full(layout.SCALAR_CHUNK_STEPS, np.int64(-1) if name == "step" else np.nan)


def logged_blocks(
    schemas: Mapping[str, Schema], first_row: int, n_rows: int, logged: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the file of a block of each array that is logged, and all its rows."""
    for group, schema in schemas.items():
        for name, of in schema.logged.items():
            path, rows = array_path(group, name), of.missing(schema.layout.block_steps)
            rows[:n_rows] = logged[path][:n_rows]
            yield shard_key(path, first_row // schema.layout.block_steps, of.shape), rows


def coordinates_of(
    schemas: Mapping[str, Schema],
    labels: Mapping[str, TokenLabels],
    token_ids: Mapping[str, np.ndarray],
) -> dict[str, dict[str, np.ndarray]]:
    """Return the coordinates of the first axis of each parameter, by its group and their names."""
    return {
        group: dict(_coordinates(schema, labels.get(group), token_ids.get(group)))
        for group, schema in schemas.items()
    }


def vectors(coordinates: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the values of all coordinates by their files; one without values has none."""
    return {
        vector_key(array_path(group, name)): values
        for group, arrays in coordinates.items()
        for name, values in arrays.items()
        if len(values)
    }


def _coordinates(
    schema: Schema, labels: TokenLabels | None, token_ids: np.ndarray | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and values of the coordinates of the first axis, as it lies on disk.

    Text goes into two integer arrays, as Arrow does it: not every Zarr reader knows strings.
    """
    order, labels = schema.stored_order, labels or TokenLabels()
    if order is not None:
        labels = labels.of(order)
    if schema.has_tokens or token_ids is not None:
        ids = np.arange(schema.n_tokens) if token_ids is None else token_ids
        yield schema.dims[0], ids if order is None else ids[order]
    for name in ("count", "live", "dead"):
        if (values := getattr(labels, name)) is not None:
            yield name, np.asarray(values)
    if labels.text is not None:
        utf8 = [text.encode() for text in labels.text]
        yield "text_bytes", np.frombuffer(b"".join(utf8), np.uint8)
        yield "text_end", np.cumsum([len(text) for text in utf8], dtype=np.int64)
