"""A parameter's arrays in a store: which files hold which rows, and reading them into one array.

Shards of the last blocks stay open between calls, because whoever goes through a block a few tokens
at a time asks for each of its shards again and again, and opening one takes as long as reading a
chunk of it.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from thimble_zarr import tuning
from thimble_zarr.bits import fill_value, storage_dtype
from thimble_zarr.errors import DamagedStoreError, StoreError
from thimble_zarr.format.indexing import ChunkPart, Indices, as_range, by_chunk
from thimble_zarr.format.layout import split_range
from thimble_zarr.format.schema import Schema, array_path
from thimble_zarr.store.files.base import Files, NotPlainFileError, read_document
from thimble_zarr.store.keys import metadata_key, shard_key, vector_key
from thimble_zarr.store.metadata import Declared
from thimble_zarr.store.shard_codec import CHUNK_ORDER, ShardFile, decode_vector

_BLOCKS_OPEN = 2
"""Blocks whose shards stay open: the one that is read, and the one that the disk is told of. Every
thread that reads has as many, and a process may open some hundred files by default."""


@contextmanager
def decoding(files: Files, what: str, key: str | None = None) -> Iterator[None]:
    """Tell damage, whatever codecs raise for it, from a disk that cannot be read.

    If the key of a committed file is given, it is damage too that there is none, or a link.
    """
    try:
        yield
    except (MemoryError, StoreError):
        raise
    except Exception as error:
        problem = ""
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            problem = f"the committed file {key} is missing or empty"
        elif isinstance(error, NotPlainFileError):
            problem = f"{key} is not opened: {error}"
        if key is not None and problem:
            problem = f"{files.path}: {problem}; restore it from a copy"
            raise DamagedStoreError(problem) from error
        if isinstance(error, OSError):
            raise StoreError(f"cannot read {what} of {files.path}: {error}") from error
        raise DamagedStoreError(
            f"cannot decode {what} of {files.path}: {error}; `thimble-zarr verify` lists all damage"
        ) from error


@dataclass(frozen=True)
class StoredArrays:
    """The arrays of a parameter in a store, of which `n_rows` are committed."""

    files: Files
    group: str
    schema: Schema
    n_rows: int
    _known: dict[str, Declared] = field(default_factory=dict, compare=False)

    def key(self, name: str) -> str:
        """Return the path of an array from the root of the store."""
        return array_path(self.group, name)

    def declared(self, name: str) -> Declared:
        """Return what the metadata of an array say, once they fit what was committed."""
        if name not in self._known:
            try:
                array = Declared.of(read_document(self.files, metadata_key(self.key(name))))
            except (OSError, ValueError) as error:
                raise DamagedStoreError(
                    f"cannot open array {self.key(name)} of {self.files.path}: {error}"
                ) from error
            self._check_shape(name, array.shape)
            self._known[name] = array
        return self._known[name]

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Zarr clips what is asked for to the array; in committed rows that is damage."""
        is_per_step = name in self.schema.dtypes or name in self.schema.per_step
        declared = (self.n_rows, *(self.schema.shape if name in self.schema.dtypes else ()))
        if is_per_step and (shape[0] < self.n_rows or shape[1:] != declared[1:]):
            raise DamagedStoreError(
                f"{self.files.path}: the array {self.key(name)} has shape {shape}, "
                f"and {declared} was committed"
            )

    def shard(self, name: str, row: int) -> ShardFile:
        """Return the shard of a row's block, not yet open."""
        schema, layout = self.schema, self.schema.layout
        return ShardFile(
            self.files,
            shard_key(self.key(name), row // layout.block_steps, schema.shape),
            n_chunks=layout.shard_tokens(schema.n_tokens) // layout.chunk_tokens,
            shape=(layout.chunk_tokens, layout.block_steps, schema.n_dims),
            dtype=storage_dtype(schema.dtypes[name]),
            fill=fill_value(schema.dtypes[name]),
        )

    def decoding(self, name: str, row: int) -> AbstractContextManager[None]:
        """Tell what is wrong with the shard of a row's block, or with what is declared of it."""
        self.declared(name)
        block, of_block = divmod(row, self.schema.layout.block_steps)
        of = "step" if self.schema.schedule is None else "row"
        what = f"{self.key(name)} from {of} {row - of_block} on"
        return decoding(self.files, what, shard_key(self.key(name), block, self.schema.shape))

    @contextmanager
    def block(self, name: str, row: int) -> Iterator[ShardFile]:
        """Open the shard of a row's block for decoding; whatever is wrong with it is damage."""
        with self.decoding(name, row), self.shard(name, row) as shard:
            yield shard

    def vector(self, name: str) -> np.ndarray:
        """Return the values of an array of one axis, of committed rows only."""
        array = self.declared(name)
        if len(array.shape) != 1:
            raise DamagedStoreError(f"{self.files.path}: the array {name} has shape {array.shape}")
        length = self.n_rows if name in self.schema.per_step else array.shape[0]
        parts = []
        for index in range(-(-length // array.chunk_shape[0])):
            key = vector_key(self.key(name), index)
            with decoding(self.files, self.key(name), key):
                if not (content := self.files.get(key)):
                    raise FileNotFoundError
                parts.append(decode_vector(content, array.chunk_shape[0], array.dtype))
        return np.concatenate([*parts, np.empty(0, array.dtype)])[:length]


class OpenedRows:
    """Rows of a store, for one thread. Use it as a context manager."""

    def __init__(self, arrays: StoredArrays) -> None:
        self._arrays, self._schema = arrays, arrays.schema
        self._shards: dict[int, dict[str, ShardFile]] = {}
        self._known: dict[int, tuple[Indices, list[ChunkPart]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._keep(0)

    def read(
        self,
        name: str,
        rows: tuple[int, int],
        tokens: Indices,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Read stored bits as `StoreReader.read` does."""
        block_steps = self._schema.layout.block_steps
        chunks = self._chunks(tokens)
        shape = rows[1] - rows[0], len(tokens), self._schema.n_dims
        if out is None:
            out = np.empty(shape, storage_dtype(self._schema.dtypes[name]))
        row = f"V{out.itemsize * shape[2]}"  # what is copied at once, in half the time
        for start, stop in split_range(*rows, block_steps):
            offset = start % block_steps
            steps = slice(offset, offset + stop - start)
            into = out[start - rows[0] : stop - rows[0]].view(row)
            with self._arrays.decoding(name, start):
                shard = self._shard(name, start)
                for chunk, take, where in chunks:
                    part = shard.decode(chunk)[take][:, steps].astype(out.dtype, copy=False)
                    into[:, where] = part.view(row).transpose(CHUNK_ORDER)
        return out

    def will_read(self, names: Sequence[str], rows: tuple[int, int], tokens: Indices) -> None:
        """Say that `read` will be asked for these of several variables, so the disk may begin."""
        chunks = [chunk for chunk, _, _ in self._chunks(tokens)]
        if len(chunks) < tuning.TUNING.few_chunks:
            return
        for start, _ in split_range(*rows, self._schema.layout.block_steps):
            for name in names:
                with suppress(StoreError), self._arrays.decoding(name, start):
                    self._shard(name, start).will_read(chunks)

    def _chunks(self, tokens: Indices) -> list[ChunkPart]:
        """Return the chunks that tokens lie in, and remember them while the same are asked for."""
        if id(tokens) not in self._known:
            if len(self._known) >= tuning.TUNING.remembered_selections:
                self._known.clear()
            chunks = list(by_chunk(_placed(self._schema, tokens), self._schema.layout.chunk_tokens))
            self._known[id(tokens)] = tokens, chunks  # held, so that no others have its id
        return self._known[id(tokens)][1]

    def _shard(self, name: str, row: int) -> ShardFile:
        """Return an open shard, and close those of a block that was not asked for lately."""
        block = row // self._schema.layout.block_steps
        shards = self._shards.pop(block, None)
        if shards is None:
            self._keep(_BLOCKS_OPEN - 1)
            shards = {}
        self._shards[block] = shards
        if name not in shards:
            shards[name] = self._arrays.shard(name, row).__enter__()
        return shards[name]

    def _keep(self, n_blocks: int) -> None:
        while len(self._shards) > n_blocks:
            for shard in self._shards.pop(next(iter(self._shards))).values():
                shard.__exit__()


def _placed(schema: Schema, tokens: Indices) -> Indices:
    """Return where tokens lie on disk."""
    if schema.places is None:
        return tokens
    if isinstance(tokens, range):
        tokens = np.arange(tokens.start, tokens.stop, tokens.step)
    return as_range(schema.places[tokens])
