"""Metadata of groups and arrays: what the writer declares, and the check that it is nothing else.

A store may come from anywhere. No other codec is ever run, no other dtype is ever made, and nothing
is taken from memory that the files cannot hold. The documents are those that zarr-python makes; its
import takes longer than many an answer, and so it is not asked for them.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from thimble_zarr.bits import BFLOAT16_RECIPE, fill_value, storage_dtype
from thimble_zarr.errors import ConfigError, DamagedStoreError
from thimble_zarr.format import layout
from thimble_zarr.format.schema import (
    ATTRIBUTE,
    LABELS,
    PARAMETERS,
    ROW_LABEL,
    VARIABLES,
    Json,
    Schema,
    versioned,
)
from thimble_zarr.store.files.base import Files
from thimble_zarr.store.files.documents import read_document
from thimble_zarr.store.keys import BOOKKEEPING, LEDGER, METADATA, array_key, array_of, metadata_key
from thimble_zarr.store.ledger import Document
from thimble_zarr.store.shard import BLOSC_LEVEL, MAX_CHUNK_BYTES, MAX_COMPRESSION, chunk_order

DTYPES = ("bool", "uint8", "uint16", "int64", "float16", "float32", "float64")
"""Dtypes of arrays, as Zarr names them."""

CONSOLIDATED = "consolidated_metadata"
"""Where a group has copies of the metadata below it: zarr-python's, and not yet in the standard."""

_ENCODING = {"name": "default", "configuration": {"separator": "."}}
_CHUNK_CODECS = ("transpose", "bytes", "blosc", "crc32c")
_INDEX_CODECS = ("bytes", "crc32c")

_MIN_LINE_BYTES = 32
"""No line of a ledger is shorter, and each block has one."""


def declare(
    schemas: Mapping[str, Schema],
    labels: Mapping[str, Mapping[str, np.ndarray]],
    capacity: int,
    *,
    level: int = BLOSC_LEVEL,
) -> dict[str, Document]:
    """Return every metadata document of a store, by its key.

    Parameters
    ----------
    schemas
        What is recorded of each parameter, by its group.
    labels
        By group, the values of each coordinate of its rows, as they lie on disk.
    capacity
        Rows of the arrays.
    level
        Of compression.

    Raises
    ------
    ConfigError
        If a chunk would be too large.
    """
    alone = schemas.get("")
    attribute = versioned({PARAMETERS: [*schemas]}) if alone is None else alone.to_attribute()
    documents: dict[str, Document] = {
        METADATA: _group({ATTRIBUTE: attribute}),
        metadata_key(BOOKKEEPING): _group(
            {"description": "bookkeeping of thimble-zarr, no arrays"}
        ),
    }
    for group, schema in schemas.items():
        if group:
            documents[metadata_key(group)] = _group({ATTRIBUTE: schema.to_attribute()})
        arrays = itertools.chain(
            _variables(schema, capacity),
            _scalars(schema, capacity),
            _coordinates(schema, labels[group]),
        )
        for name, array in arrays:
            path = array_key((group, name))
            documents[metadata_key(path)] = array.document(path, level)
    return documents


def encoded(document: Document) -> bytes:
    """Return a document as it is written, with its copies of others in a single line."""
    return json.dumps(document, indent=None if CONSOLIDATED in document else 2).encode()


def resized(document: Document, n_rows: int) -> Document:
    """Return the document of an array with so many rows, if its first axis is the steps."""
    if not is_per_step(document):
        return document
    return {**document, "shape": [n_rows, *document["shape"][1:]]}


def is_per_step(document: Document) -> bool:
    """Return whether the first axis of an array is the steps."""
    names = document.get("dimension_names")
    return isinstance(names, list) and "step" in names[:1]


def consolidated(group: str, documents: Mapping[str, Document]) -> dict[str, Json]:
    """Return what a group has of the documents below it, by their keys: their copies."""
    copies: dict[str, Json] = {}
    for path, document in below(group, documents):
        copy = {name: value for name, value in document.items() if name != CONSOLIDATED}
        if copy.get("node_type") == "group":
            copy[CONSOLIDATED] = _inline({})
        copies[path] = copy
    return _inline(copies)


def below(group: str, documents: Mapping[str, Document]) -> Iterator[tuple[str, Document]]:
    """Yield documents below a group, by the paths of what they describe from there."""
    for key, document in documents.items():
        path = array_of(key)
        if path != group and (not group or path.startswith(f"{group}/")):
            yield path.removeprefix(f"{group}/"), document


def _inline(copies: Json) -> dict[str, Json]:
    return {"kind": "inline", "must_understand": False, "metadata": copies}


def _group(attributes: Mapping[str, Json]) -> Document:
    return {"attributes": attributes, "zarr_format": 3, "node_type": "group"}


@dataclass(frozen=True, kw_only=True)
class _Array:
    """An array to declare. Shards are of `file_shape`, chunks of `chunk_shape` if that is given."""

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    file_shape: tuple[int, ...]
    chunk_shape: tuple[int, ...] | None = None
    dtype: np.dtype
    fill: float
    attributes: Mapping[str, Json]

    def document(self, path: str, level: int) -> Document:
        dtype, chunk = self.dtype, self.chunk_shape or self.file_shape
        chunk_bytes = math.prod(chunk) * dtype.itemsize
        if chunk_bytes > MAX_CHUNK_BYTES:
            raise ConfigError(
                f"{path} would have chunks of {chunk_bytes:,} bytes, and none has more than "
                f"{MAX_CHUNK_BYTES:,}; record some of its rows, or leave it out"
            )
        endian = _codec("bytes", endian="little")
        codecs = [
            _codec("bytes") if dtype.itemsize == 1 else endian,
            _codec(
                "blosc",
                typesize=dtype.itemsize,
                cname="lz4",
                clevel=level,
                shuffle="shuffle",
                blocksize=0,
            ),
            _codec("crc32c"),
        ]
        if self.chunk_shape is not None:
            if len(chunk) > 1:
                codecs.insert(0, _codec("transpose", order=[*chunk_order(len(chunk))]))
            codecs = [
                _codec(
                    "sharding_indexed",
                    chunk_shape=[*chunk],
                    codecs=codecs,
                    index_codecs=[endian, _codec("crc32c")],
                    index_location="end",
                )
            ]
        grid = {"name": "regular", "configuration": {"chunk_shape": [*self.file_shape]}}
        return {
            "shape": [*self.shape],
            "data_type": dtype.name,
            "chunk_grid": grid,
            "chunk_key_encoding": _ENCODING,
            "fill_value": "NaN" if math.isnan(self.fill) else dtype.type(self.fill).item(),
            "codecs": codecs,
            "attributes": self.attributes,
            "dimension_names": [*self.dims],
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }


def _codec(name: str, **configuration: Json) -> dict[str, Json]:
    return {"name": name} | ({"configuration": configuration} if configuration else {})


def _variables(schema: Schema, capacity: int) -> Iterator[tuple[str, _Array]]:
    steps, tokens = schema.layout.block_steps, schema.layout.chunk_tokens
    shard_tokens = schema.layout.shard_tokens(schema.n_tokens)
    rest = schema.shape[1:]
    for name, native in schema.dtypes.items():
        attributes = {"long_name": VARIABLES[name], "dtype": native}
        if native == "bfloat16":
            attributes["encoding"] = BFLOAT16_RECIPE
        yield (
            name,
            _Array(
                dims=("step", *schema.dims),
                shape=(capacity, *schema.shape),
                file_shape=(steps, shard_tokens, *rest) if schema.shape else (steps,),
                chunk_shape=(steps, tokens, *rest) if schema.shape else (steps,),
                dtype=storage_dtype(native),
                fill=fill_value(native),
                attributes=attributes,
            ),
        )


def _scalars(schema: Schema, capacity: int) -> Iterator[tuple[str, _Array]]:
    for name, long_name in schema.per_step.items():
        is_label = name == "step"
        yield (
            name,
            _Array(
                dims=("step",),
                shape=(capacity,),
                file_shape=(layout.SCALAR_CHUNK_STEPS,),
                dtype=np.dtype(np.int64 if is_label else np.float64),
                fill=-1 if is_label else float("nan"),
                attributes={"long_name": long_name},
            ),
        )


def _coordinates(schema: Schema, labels: Mapping[str, np.ndarray]) -> Iterator[tuple[str, _Array]]:
    for name, values in labels.items():
        dim = {"text_bytes": "text_byte"}.get(name, schema.dims[0])
        yield (
            name,
            _Array(
                dims=(dim,),
                shape=values.shape,
                file_shape=(max(1, len(values)),),
                dtype=values.dtype,
                fill=0,
                attributes={"long_name": LABELS.get(name, ROW_LABEL)},
            ),
        )


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
            if encoding != _ENCODING:
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
