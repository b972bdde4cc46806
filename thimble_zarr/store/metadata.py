"""Metadata of groups and arrays: what the writer declares, and the check that it is nothing else.

A store may come from anywhere. No other codec is ever run, no other dtype is ever made, and nothing
is taken from memory that the files cannot hold. The documents are those that zarr-python makes; its
import takes longer than many an answer, and so it is not asked for them.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Self

import numpy as np
from msgspec import Meta, convert
from msgspec.json import format as laid_out

from thimble_zarr.bits import BFLOAT16_RECIPE
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
    array_path,
)
from thimble_zarr.format.stored_array import LoggedArray, StoredArray
from thimble_zarr.format.versions import versioned
from thimble_zarr.optim.registry import VARIABLES
from thimble_zarr.store.coding.compression import (
    CODECS,
    COMPRESSIONS,
    DEFAULT,
    MAX_COMPRESSION,
    Compression,
    declared_compression,
)
from thimble_zarr.store.coding.shard_codec import MAX_CHUNK_BYTES
from thimble_zarr.store.files.base import Files
from thimble_zarr.store.keys import (
    BOOKKEEPING,
    LEDGER,
    METADATA,
    array_of,
    metadata_key,
    shard_key,
)
from thimble_zarr.store.ledger import Document

DTYPES = (
    *("bool", "uint8", "uint16", "uint32", "uint64"),
    *("int64", "float16", "float32", "float64"),
)
"""Dtypes of arrays, as Zarr names them."""

CONSOLIDATED = "consolidated_metadata"
"""Where a group has copies of the metadata below it: zarr-python's, and not yet in the standard."""

ROWS_AN_ITEM = "block_steps"
"""The attribute of an array whose first axis is the blocks: how many rows each has."""

_ENCODING = {"name": "default", "configuration": {"separator": "."}}
_BOOKKEEPING = "bookkeeping of thimble-zarr, no arrays"

_Sizes = tuple[Annotated[int, Meta(ge=0, lt=2**62)], ...]

_MIN_LINE_BYTES = 32
"""No line of a ledger is shorter, and each block has one."""


@dataclass(frozen=True)
class Declared:
    """How an array is stored, as its metadata say.

    A file holds a shard of `file_shape` or else a chunk; `chunk_shape` is compressed at once.
    """

    shape: tuple[int, ...]
    file_shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    dtype: np.dtype
    fill: float
    is_sharded: bool
    compression: Compression = DEFAULT

    @property
    def n_chunks(self) -> int:
        """Chunks a file."""
        return math.prod(self.file_shape) // math.prod(self.chunk_shape)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk before it is compressed."""
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    def document(self, dims: Sequence[str], attributes: Mapping[str, Json]) -> dict[str, Any]:
        """Return the content of its `zarr.json`."""
        fill = "NaN" if math.isnan(self.fill) else np.array(self.fill, self.dtype).item()
        return {
            "shape": [*self.shape],
            "data_type": self.dtype.name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [*self.file_shape]},
            },
            "chunk_key_encoding": _ENCODING,
            "fill_value": fill,
            "codecs": self._codecs(),
            "attributes": attributes,
            "dimension_names": [*dims],
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }

    def _codecs(self) -> list[dict[str, Json]]:
        codecs = [*self.compression.codecs(self.dtype.itemsize), _codec("crc32c")]
        if not self.is_sharded:
            return codecs
        if len(self.shape) > 1:
            codecs.insert(0, _codec("transpose", order=[*self.compression.order(len(self.shape))]))
        sharding = {
            "chunk_shape": [*self.chunk_shape],
            "codecs": codecs,
            "index_codecs": [_codec("bytes", endian="little"), _codec("crc32c")],
            "index_location": "end",
        }
        return [_codec("sharding_indexed", **sharding)]

    @classmethod
    def of(cls, document: Any) -> Self:
        """Return what the content of a `zarr.json` says, or raise ValueError.

        It must be as `document` would make it: nothing but sizes, dtype, fill and how it is
        compressed is open.
        """
        try:
            if document["data_type"] not in DTYPES:
                raise ValueError(f"its dtype is {document['data_type']!r}")
            shape = convert(document["shape"], _Sizes)
            file_shape = convert(document["chunk_grid"]["configuration"]["chunk_shape"], _Sizes)
            codecs, chunk_shape = document["codecs"], file_shape
            is_sharded = codecs[0]["name"] == "sharding_indexed"
            if is_sharded:
                sharding = codecs[0]["configuration"]
                chunk_shape, codecs = convert(sharding["chunk_shape"], _Sizes), sharding["codecs"]
            fill, dtype = float(document["fill_value"]), np.dtype(document["data_type"])
            compression = _compression(codecs)
        except (LookupError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"it is malformed: {error!r}") from error
        if not len(shape) == len(file_shape) == len(chunk_shape) > 0:
            raise ValueError(f"its shapes differ in rank: {chunk_shape}, {file_shape} and {shape}")
        declared = cls(shape, file_shape, chunk_shape, dtype, fill, is_sharded, compression)
        is_cut = 0 in (*file_shape, *chunk_shape) or np.mod(file_shape, chunk_shape).any()
        if is_cut or declared.chunk_bytes > MAX_CHUNK_BYTES:
            raise ValueError(f"chunks of shape {chunk_shape} are not possible")
        for name, ours in replace(declared, fill=0).document((), {}).items():
            if name not in _OPEN and (document.get(name) or []) != ours:
                raise ValueError(f"its {name} must be {ours}, not {document.get(name)}")
        return declared


_OPEN = ("fill_value", "attributes", "dimension_names")
"""What a document has that is not compared, because an array is decoded the same whatever it is."""


def _compression(codecs: Sequence[Mapping[str, Any]]) -> Compression:
    """Return how chunks are compressed; raise ValueError if there is a codec that no store has."""
    for codec in codecs:
        if codec["name"] not in CODECS:
            raise ValueError(
                f"it declares the codec {codec['name']}, and a store has only {', '.join(CODECS)}"
            )
    return declared_compression(codecs)


def _codec(name: str, **configuration: Any) -> dict[str, Json]:
    return {"name": name} | ({"configuration": configuration} if configuration else {})


def _group(attributes: Mapping[str, Json]) -> dict[str, Any]:
    return {"attributes": attributes, "zarr_format": 3, "node_type": "group"}


def declare(
    schemas: Mapping[str, Schema],
    coordinates: Mapping[str, Mapping[str, np.ndarray]],
    capacity: int,
) -> dict[str, dict[str, Any]]:
    """Return all metadata of a store of so many rows, by their keys.

    The coordinates of each parameter's rows are given by its group, as they lie on disk. Raises
    ConfigError if a chunk would be too large, or a document larger than what is read.
    """
    alone = schemas.get("")
    attribute = versioned({PARAMETERS: [*schemas]}) if alone is None else alone.to_attribute()
    documents = {METADATA: _group({ATTRIBUTE: attribute})}
    documents[metadata_key(BOOKKEEPING)] = _group({"description": _BOOKKEEPING})
    n_chunks = 0
    for group, schema in schemas.items():
        if group:
            documents[metadata_key(group)] = _group({ATTRIBUTE: schema.to_attribute()})
        for name, array, dims, attributes in _arrays(schema, coordinates[group], capacity):
            path = array_path(group, name)
            if array.chunk_bytes > MAX_CHUNK_BYTES:
                raise ConfigError(
                    f"{path} would have chunks of {array.chunk_bytes:,} bytes, and none has more "
                    f"than {MAX_CHUNK_BYTES:,}; record some of its rows, or leave it out"
                )
            n_chunks += array.n_chunks
            documents[metadata_key(path)] = array.document(dims, attributes)
    _check_readable(documents, n_chunks, schemas)
    return documents


def _arrays(
    schema: Schema, coordinates: Mapping[str, np.ndarray], capacity: int
) -> Iterator[tuple[str, Declared, Sequence[str], dict[str, Json]]]:
    """Yield the name of each array of a parameter, how it is stored, its dims and attributes."""
    for of in schema.arrays.values():
        steps = 1 if of.is_keyframe else schema.layout.block_steps
        shard, chunk = (
            (steps, tokens, *schema.shape[1:]) if schema.shape else (steps,)
            for tokens in (schema.layout.shard_tokens(schema.n_tokens), schema.layout.chunk_tokens)
        )
        native, codec = schema.dtypes[of.variable], COMPRESSIONS[of.codec]
        attributes: dict[str, Json] = {"long_name": of.long_name, "dtype": native}
        if native == "bfloat16" and not of.is_sparse:
            attributes["encoding"] = BFLOAT16_RECIPE
        if of.is_keyframe:
            attributes[ROWS_AN_ITEM] = schema.layout.block_steps
        shape = (n_items({"attributes": attributes}, capacity), *schema.shape)
        dims = ("block" if of.is_keyframe else "step", *schema.dims)
        yield (
            of.name,
            Declared(shape, shard, chunk, of.dtype, of.fill, is_sharded=True, compression=codec),
            dims,
            attributes,
        )
    length = (layout.SCALAR_CHUNK_STEPS,)
    for name, long_name in schema.per_step.items():
        kind, fill = (np.int64, -1) if name == "step" else (np.float64, float("nan"))
        stored = Declared((capacity,), length, length, np.dtype(kind), fill, is_sharded=False)
        yield name, stored, ("step",), {"long_name": long_name}
    for name, logged in schema.logged.items():
        yield name, *_logged_array(schema, name, logged, capacity)
    for name, values in coordinates.items():
        length = (max(1, len(values)),)
        stored = Declared(values.shape, length, length, values.dtype, 0, is_sharded=False)
        # Texts have more bytes than tokens.
        dim = "text_byte" if name == "text_bytes" else schema.dims[0]
        yield name, stored, (dim,), {"long_name": LABELS.get(name, ROW_LABEL)}


def with_logged(
    schemas: Mapping[str, Schema], name: str, logged: LoggedArray, capacity: int
) -> tuple[dict[str, Schema], dict[str, dict[str, Any]]]:
    """Return schemas of which the first has one array more that is logged, and its documents.

    Raises ConfigError if there is something else of that name.
    """
    group, schema = next(iter(schemas.items()))
    taken = {*schema.arrays, *schema.per_step, *LABELS, *schema.dims, *schema.logged}
    if name in taken | {*schemas, *VARIABLES} or not name.isidentifier():
        raise ConfigError(f"nothing can be logged as {name!r}: choose another name")
    schema = replace(schema, logged={**schema.logged, name: logged})
    array, dims, attributes = _logged_array(schema, name, logged, capacity)
    path = array_path(group, name)
    attribute = {metadata_key(group): _group({ATTRIBUTE: schema.to_attribute()})}
    documents = attribute | {metadata_key(path): array.document(dims, attributes)}
    return {**schemas, group: schema}, documents


def _logged_array(
    schema: Schema, name: str, logged: LoggedArray, capacity: int
) -> tuple[Declared, Sequence[str], dict[str, Json]]:
    """Return how what is logged of each step is stored: a block is a file, with dims and more."""
    chunk = (schema.layout.block_steps, *logged.shape)
    dtype = np.dtype(logged.dtype)
    stored = Declared((capacity, *logged.shape), chunk, chunk, dtype, math.nan, is_sharded=False)
    return stored, logged.dims(name), {"long_name": f"{name}, as logged at each step"}


def _check_readable(
    documents: Mapping[str, Document], n_chunks: int, schemas: Mapping[str, Schema]
) -> None:
    """Raise ConfigError if a document would be larger than what is read.

    The ledger's first line has a copy of all metadata, and so is larger than any document, also
    than the root's once they are consolidated: only spaces may make one larger.
    """
    line: dict[str, Json] = {
        "rows": (0, layout.SCALAR_CHUNK_STEPS),
        # A file's key is hardly longer than that of what describes it.
        "files": {f"{key}.0.0.0": {"bytes": 2**63, "crc32": 2**32} for key in documents},
        "chunks": {key: [] for key in documents} | {"": [(2**32, 2**32)] * n_chunks},
        "metadata": documents,
        "overhead": dict.fromkeys(Overhead().to_json(), 2**53 / 3),
        "crc32": 2**32,
    }
    try:
        for document in documents.values():
            check_size(encoded(document))
        check_size(json.dumps(line).encode())
    except TooLargeError as error:
        attrs_bytes = sum(len(json.dumps(one.attrs)) for one in schemas.values())
        raise ConfigError(
            f"the description of the run is too large for one document: {error}; "
            f"{attrs_bytes:,} of the bytes are `attrs`, which are kept with each parameter: "
            "keep large things in a file beside the store, or record fewer parameters"
        ) from error


def encoded(document: Document) -> bytes:
    """Return a document as it is written, with its copies of others in a single line."""
    text = json.dumps(document).encode()  # which encodes in Python if it is to indent: much slower
    return text if CONSOLIDATED in document else laid_out(text, indent=2)


def resize(documents: Mapping[str, dict[str, Any]], n_rows: int) -> None:
    """Declare so many rows of each array whose first axis is the steps, or the blocks of them."""
    for document in documents.values():
        if is_of_rows(document):
            document["shape"] = [n_items(document, n_rows), *document["shape"][1:]]


def n_items(document: Document, n_rows: int) -> int:
    """Return how long the first axis of an array is that has so many rows."""
    return -(-n_rows // rows_an_item(document))


def rows_an_item(document: Document) -> int:
    """Return how many rows an item of the first axis of an array has: 1, or those of a block."""
    attributes = document.get("attributes")
    each = attributes.get(ROWS_AN_ITEM, 1) if isinstance(attributes, dict) else 1
    return each if type(each) is int and each > 0 else 1


def consolidate(documents: Mapping[str, dict[str, Any]], groups: Iterable[str]) -> None:
    """Copy all metadata below groups into their own, as zarr-python does."""
    copies = {group: consolidated(group, documents) for group in {*groups, ""}}
    for group, below_it in copies.items():
        documents[metadata_key(group)][CONSOLIDATED] = below_it


def is_of_rows(document: Document) -> bool:
    """Return whether the first axis of an array is the steps, or the blocks of them."""
    names = document.get("dimension_names")
    return isinstance(names, list) and names[:1] in (["step"], ["block"])


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


def check_bounds(files: Files, group: str, schema: Schema, n_rows: int) -> None:
    """Raise DamagedStoreError if a parameter claims more rows or elements than its files can hold.

    The ledger has a line for each block, and the first and last shards are measured.
    """
    layout, arrays = schema.layout, schema.arrays.values()
    itemsize = max((of.dtype.itemsize for of in arrays), default=1)
    row_bytes = layout.block_steps * schema.n_dims * itemsize
    if layout.chunk_tokens * row_bytes > MAX_CHUNK_BYTES:
        raise DamagedStoreError(
            f"it declares chunks of {layout.chunk_tokens * row_bytes:,} bytes, and none has more "
            f"than {MAX_CHUNK_BYTES:,}"
        )
    if not n_rows:
        return
    last = (n_rows - 1) // layout.block_steps
    if (last + 1) * _MIN_LINE_BYTES > _size(files, LEDGER):
        raise DamagedStoreError(f"it claims {n_rows:,} rows, but its ledger is too short")
    if not any(_can_hold(files, group, schema, of, block) for of in arrays for block in (0, last)):
        raise DamagedStoreError(
            f"it declares {schema.n_tokens:,} x {schema.n_dims:,} elements, but its files "
            "are too small for that many"
        )


def _can_hold(files: Files, group: str, schema: Schema, of: StoredArray, block: int) -> bool:
    """Return whether the file of a block of an array is large enough for what is declared."""
    key = shard_key(array_path(group, of.name), block, schema.shape)
    rows = 1 if of.is_keyframe else schema.layout.block_steps
    n_tokens = schema.layout.shard_tokens(schema.n_tokens)
    n_bytes = rows * n_tokens * schema.n_dims * of.dtype.itemsize
    return not of.is_sparse and n_bytes <= MAX_COMPRESSION * _size(files, key)


def _size(files: Files, key: str) -> int:
    try:
        return files.size(key)
    except (OSError, ValueError):
        return 0
