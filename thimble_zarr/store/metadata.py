"""What the metadata of an array may say: what the writer says, and nothing else.

A store may come from anywhere. No other codec is ever run, no other dtype is ever made, and nothing
is taken from memory that the files cannot hold.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from thimble_zarr.bits import storage_dtype
from thimble_zarr.errors import DamagedStoreError
from thimble_zarr.format.schema import Schema
from thimble_zarr.store.files.base import Files
from thimble_zarr.store.files.documents import read_document
from thimble_zarr.store.keys import LEDGER
from thimble_zarr.store.shard import MAX_CHUNK_BYTES, MAX_COMPRESSION

DTYPES = ("bool", "uint8", "uint16", "int64", "float16", "float32", "float64")
"""Dtypes of arrays, as Zarr names them."""

_CHUNK_CODECS = ("transpose", "bytes", "blosc", "crc32c")
_INDEX_CODECS = ("bytes", "crc32c")

_MIN_LINE_BYTES = 32
"""No line of a ledger is shorter, and each block has one."""


@dataclass(frozen=True)
class Declared:
    """What the metadata of an array say.

    Attributes
    ----------
    shape
        Of the array.
    file_shape
        Of what a file holds: a shard, where there are any, else a chunk.
    chunk_shape
        Of what is compressed at once, in the order of the array's axes.
    dtype
        As stored.
    fill
        What stands for missing.
    is_sharded
        Whether a file is a shard.
    level
        Blosc's, of which nothing depends but the size.
    """

    shape: tuple[int, ...]
    file_shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    dtype: np.dtype
    fill: float
    is_sharded: bool
    level: int

    @property
    def n_chunks(self) -> int:
        """Chunks a file."""
        return math.prod(self.file_shape) // math.prod(self.chunk_shape)

    @classmethod
    def read(cls, files: Files, key: str) -> Self:
        """Read a `zarr.json` of a store.

        Raises
        ------
        ValueError
            If it is not one that the writer of this format makes.
        OSError
            If it cannot be read.
        """
        return cls.of(read_document(files, key))

    @classmethod
    def of(cls, document: Any) -> Self:
        """Return what the content of a `zarr.json` says, or raise ValueError."""
        try:
            if (document["zarr_format"], document["node_type"]) != (3, "array"):
                raise ValueError("it is not a Zarr 3 array")
            if document.get("storage_transformers"):
                raise ValueError("it declares storage transformers")
            encoding = document["chunk_key_encoding"]
            if encoding != {"name": "default", "configuration": {"separator": "."}}:
                raise ValueError(f"its chunk keys have another encoding: {encoding}")
            if document["data_type"] not in DTYPES:
                raise ValueError(f"its dtype is {document['data_type']!r}")
            dtype = np.dtype(document["data_type"])
            shape = _sizes(document["shape"], least=0)
            file_shape = _sizes(document["chunk_grid"]["configuration"]["chunk_shape"], least=1)
            chunk, level = _checked_codecs(document["codecs"], file_shape)
            fill = document["fill_value"]
            fill = float("nan") if fill == "NaN" else float(fill)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"it is malformed: {error!r}") from error
        if not len(shape) == len(file_shape) == len(chunk) > 0:
            raise ValueError(f"its shapes differ in rank: {chunk}, {file_shape} and {shape}")
        if (
            any(size % part for size, part in zip(file_shape, chunk, strict=True))
            or math.prod(chunk) * dtype.itemsize > MAX_CHUNK_BYTES
        ):
            raise ValueError(f"chunks of shape {chunk} are not possible")
        is_sharded = document["codecs"][0]["name"] == "sharding_indexed"
        return cls(shape, file_shape, chunk, dtype, fill, is_sharded, level)


def _sizes(values: Iterable[object], *, least: int) -> tuple[int, ...]:
    sizes = tuple(values)
    if not all(type(size) is int and least <= size < 2**62 for size in sizes):
        raise ValueError(f"it has sizes {sizes}")
    return sizes  # type: ignore[return-value]  # they are integers


def _checked_codecs(
    codecs: Iterable[Mapping[str, Any]], chunk: tuple[int, ...]
) -> tuple[tuple[int, ...], int]:
    """Return shape and level of an inner chunk; raise ValueError for a codec no writer declares."""
    codecs = list(codecs)
    if [codec["name"] for codec in codecs] == ["sharding_indexed"]:
        sharding = codecs[0]["configuration"]
        chunk = _sizes(sharding["chunk_shape"], least=1)
        _check_names(sharding["index_codecs"], _INDEX_CODECS)
        if sharding.get("index_location", "end") != "end":
            raise ValueError("the index of its shards is not at their end")
        codecs = sharding["codecs"]
    _check_names(codecs, _CHUNK_CODECS)
    (level,) = [c["configuration"]["clevel"] for c in codecs if c["name"] == "blosc"]
    if type(level) is not int or not 0 <= level <= 9:
        raise ValueError(f"its level of compression is {level!r}")
    return chunk, level


def _check_names(codecs: Iterable[Mapping[str, Any]], expected: tuple[str, ...]) -> None:
    """Raise ValueError unless the codecs are these; the order of axes need not be changed."""
    names = tuple(codec["name"] for codec in codecs)
    if names not in (expected, expected[1:] if expected[0] == "transpose" else expected):
        others = [str(name) for name in names if name not in expected]
        what = f"the codec {others[0]}" if others else f"the codecs {', '.join(map(str, names))}"
        raise ValueError(f"it declares {what}, and a store has only {', '.join(expected)}")


def check_bounds(schema: Schema, n_rows: int, files: Files, shards: Iterable[str]) -> None:
    """Raise DamagedStoreError if a store claims to hold more than its files can.

    Parameters
    ----------
    schema
        What it claims.
    n_rows
        Rows that it claims.
    files
        The store, whose ledger has a line a block.
    shards
        Keys of some shards. The largest of them is measured.
    """
    layout = schema.layout
    itemsize = max((storage_dtype(native).itemsize for native in schema.dtypes.values()), default=1)
    row_bytes = layout.block_steps * schema.n_dims * itemsize
    if layout.chunk_tokens * row_bytes > MAX_CHUNK_BYTES:
        raise DamagedStoreError(
            f"it declares chunks of {layout.chunk_tokens * row_bytes:,} bytes, and none has more "
            f"than {MAX_CHUNK_BYTES:,}"
        )
    if not n_rows:
        return
    if layout.capacity(n_rows) // layout.block_steps * _MIN_LINE_BYTES > _size(files, LEDGER):
        raise DamagedStoreError(f"it claims {n_rows:,} rows, but its ledger is too short")
    held = MAX_COMPRESSION * max((_size(files, key) for key in shards), default=0)
    if layout.shard_tokens(schema.n_tokens) * row_bytes > held:
        raise DamagedStoreError(
            f"it declares {schema.n_tokens:,} x {schema.n_dims:,} elements, but its files "
            "are too small for that many"
        )


def _size(files: Files, key: str) -> int:
    try:
        return files.size(key)
    except (OSError, ValueError):
        return 0
