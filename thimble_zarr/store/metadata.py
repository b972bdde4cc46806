"""Metadata of groups and arrays: what the writer declares, and the check that it is nothing else.

A store may come from anywhere. No other codec is ever run, no other dtype is ever made, and nothing
is taken from memory that the files cannot hold. The documents are those that zarr-python makes; its
import takes longer than many an answer, and so it is not asked for them.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from thimble_zarr.bits import BFLOAT16_RECIPE, fill_value, storage_dtype
from thimble_zarr.errors import ConfigError, DamagedStoreError
from thimble_zarr.format import layout
from thimble_zarr.format.documents import TooLargeError, check_size
from thimble_zarr.format.overhead import Overhead
from thimble_zarr.format.schema import (
    ATTRIBUTE,
    LABELS,
    PARAMETERS,
    ROW_LABEL,
    Json,
    Schema,
)
from thimble_zarr.format.versions import versioned
from thimble_zarr.optim.registry import VARIABLES
from thimble_zarr.store.files.base import Files
from thimble_zarr.store.files.documents import read_document
from thimble_zarr.store.keys import (
    BOOKKEEPING,
    LEDGER,
    METADATA,
    ArrayName,
    array_key,
    array_of,
    metadata_key,
    shard_key,
    vector_key,
)
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


class Declaration:
    """What a store that is written declares: its `documents`, by their keys.

    Parameters
    ----------
    schemas, coordinates
        What is recorded of each parameter, and the values of each coordinate of its rows as they
        lie on disk, by its group.
    capacity
        Rows of the arrays.
    level
        Of compression.

    Raises
    ------
    ConfigError
        If a chunk would be too large, or a document larger than what is read.
    """

    def __init__(
        self,
        schemas: Mapping[str, Schema],
        coordinates: Mapping[str, Mapping[str, np.ndarray]],
        capacity: int,
        *,
        level: int = BLOSC_LEVEL,
    ) -> None:
        self.capacity = capacity
        self._schemas, self._level = schemas, level
        alone = schemas.get("")
        attribute = versioned({PARAMETERS: [*schemas]}) if alone is None else alone.to_attribute()
        self.documents = {METADATA: _group({ATTRIBUTE: attribute})}
        self.documents[metadata_key(BOOKKEEPING)] = _group({"description": _BOOKKEEPING})
        for group, schema in schemas.items():
            if group:
                self.documents[metadata_key(group)] = _group({ATTRIBUTE: schema.to_attribute()})
            self._add_variables(group, schema)
            for name, long_name in schema.per_step.items():
                dtype, fill = (np.int64, -1) if name == "step" else (np.float64, float("nan"))
                chunk = (layout.SCALAR_CHUNK_STEPS,)
                self._add((group, name), long_name, ("step",), (capacity,), chunk, dtype, fill)
            for name, values in coordinates[group].items():
                dims = (_DIMS.get(name, schema.dims[0]),)
                label, chunk = LABELS.get(name, ROW_LABEL), (max(1, len(values)),)
                self._add((group, name), label, dims, values.shape, chunk, values.dtype, 0)
        self._check_readable(coordinates)

    def resize(self, n_rows: int) -> None:
        """Declare so many rows."""
        self.capacity = n_rows
        self.documents = {key: resized(one, n_rows) for key, one in self.documents.items()}

    def consolidate(self) -> None:
        """Copy all metadata below a group into its own, as zarr-python does."""
        copies = {group: consolidated(group, self.documents) for group in {*self._schemas, ""}}
        for group, below_it in copies.items():
            self.documents[metadata_key(group)][CONSOLIDATED] = below_it

    def _add_variables(self, group: str, schema: Schema) -> None:
        steps, tokens = schema.layout.block_steps, schema.layout.chunk_tokens
        shard_tokens = schema.layout.shard_tokens(schema.n_tokens)
        rest = schema.shape[1:]
        for name, native in schema.dtypes.items():
            more = {"dtype": native}
            if native == "bfloat16":
                more["encoding"] = BFLOAT16_RECIPE
            self._add(
                (group, name),
                VARIABLES[name],
                ("step", *schema.dims),
                (self.capacity, *schema.shape),
                (steps, shard_tokens, *rest) if schema.shape else (steps,),
                storage_dtype(native),
                fill_value(native),
                chunk_shape=(steps, tokens, *rest) if schema.shape else (steps,),
                **more,
            )

    def _add(
        self,
        array: ArrayName,
        long_name: str,
        dims: tuple[str, ...],
        shape: tuple[int, ...],
        file_shape: tuple[int, ...],
        stored: npt.DTypeLike,
        fill: float,
        *,
        chunk_shape: tuple[int, ...] | None = None,
        **more: str,
    ) -> None:
        """Declare an array. Its files are shards if the shape of their chunks is given."""
        dtype, chunk, path = np.dtype(stored), chunk_shape or file_shape, array_key(array)
        chunk_bytes = math.prod(chunk) * dtype.itemsize
        if chunk_bytes > MAX_CHUNK_BYTES:
            raise ConfigError(
                f"{path} would have chunks of {chunk_bytes:,} bytes, and none has more than "
                f"{MAX_CHUNK_BYTES:,}; record some of its rows, or leave it out"
            )
        codecs = _chunk_codecs(dtype.itemsize, self._level)
        if chunk_shape is not None:
            order = chunk_order(len(chunk))
            codecs = [_codec("transpose", order=[*order])] * (len(order) > 1) + codecs
            index_codecs = [_codec("bytes", endian="little"), _codec("crc32c")]
            sharding = {"codecs": codecs, "index_codecs": index_codecs, "index_location": "end"}
            codecs = [_codec("sharding_indexed", chunk_shape=[*chunk], **sharding)]
        self.documents[metadata_key(path)] = {
            "shape": [*shape],
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [*file_shape]}},
            "chunk_key_encoding": _ENCODING,
            "fill_value": "NaN" if math.isnan(fill) else np.array(fill, dtype).item(),
            "codecs": codecs,
            "attributes": {"long_name": long_name, **more},
            "dimension_names": [*dims],
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }

    def _check_readable(self, coordinates: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Raise ConfigError if a document would be larger than what is read.

        The ledger's first line has a copy of all metadata, and so is larger than any document, also
        than the root's once they are consolidated: only spaces may make one larger.
        """
        names: list[str] = []
        chunks: dict[str, Json] = {}
        for group, schema in self._schemas.items():
            n_chunks = -(-schema.n_tokens // schema.layout.chunk_tokens)
            for name in schema.dtypes:
                names.append(shard_key((group, name), 0, schema.shape))
                chunks[array_key((group, name))] = [(2**32, 2**32)] * n_chunks
            names += [vector_key((group, name)) for name in (*schema.per_step, *coordinates[group])]
        line: dict[str, Json] = {
            "rows": (0, layout.SCALAR_CHUNK_STEPS),
            "files": {key: {"bytes": 2**63, "crc32": 2**32} for key in names},
            "chunks": chunks,
            "metadata": self.documents,
            "overhead": dict.fromkeys(Overhead().to_json(), 2**53 / 3),
            "crc32": 2**32,
        }
        try:
            for document in self.documents.values():
                check_size(encoded(document))
            check_size(json.dumps(line).encode())
        except TooLargeError as error:
            attrs_bytes = sum(len(json.dumps(one.attrs)) for one in self._schemas.values())
            raise ConfigError(
                f"the description of the run is too large for one document: {error}; "
                f"{attrs_bytes:,} of the bytes are `attrs`, which are kept with each parameter: "
                "keep large things in a file beside the store, or record fewer parameters"
            ) from error


_BOOKKEEPING = "bookkeeping of thimble-zarr, no arrays"
_DIMS = {"text_bytes": "text_byte"}
"""Dims of coordinates that are not of the first axis."""


def _chunk_codecs(itemsize: int, level: int) -> list[dict[str, Json]]:
    blosc = {"cname": "lz4", "clevel": level, "shuffle": "shuffle", "blocksize": 0}
    return [
        _codec("bytes", endian="little") if itemsize > 1 else _codec("bytes"),
        _codec("blosc", typesize=itemsize, **blosc),
        _codec("crc32c"),
    ]


def _codec(name: str, **configuration: Any) -> dict[str, Json]:
    return {"name": name} | ({"configuration": configuration} if configuration else {})


def _group(attributes: Mapping[str, Json]) -> dict[str, Any]:
    return {"attributes": attributes, "zarr_format": 3, "node_type": "group"}


def encoded(document: Document) -> bytes:
    """Return a document as it is written, with its copies of others in a single line."""
    return json.dumps(document, indent=None if CONSOLIDATED in document else 2).encode()


def resized(document: Document, n_rows: int) -> dict[str, Any]:
    """Return a document with so many rows, if it is of an array whose first axis is the steps."""
    is_longer = is_per_step(document)
    return {**document} | ({"shape": [n_rows, *document["shape"][1:]]} if is_longer else {})


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


@dataclass(frozen=True)
class Declared:
    """What the metadata of an array say.

    A file holds a shard of `file_shape` or else a chunk; `chunk_shape` is compressed at once.
    `level` is Blosc's, of which nothing depends but the size.
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

    The ledger has a line for each block, and the largest of some shards is measured.
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
