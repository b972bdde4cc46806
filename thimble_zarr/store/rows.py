"""Reading rows of a parameter into one array.

Shards of the last blocks stay open between calls, because whoever goes through a block a few tokens
at a time asks for each of its shards again and again, and opening one takes as long as reading a
chunk of it.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Self

import numpy as np

from thimble_zarr import tuning
from thimble_zarr.bits import storage_dtype
from thimble_zarr.errors import StoreError
from thimble_zarr.format.indexing import ChunkPart, Indices, as_range, by_chunk
from thimble_zarr.format.layout import split_range
from thimble_zarr.format.schema import Schema
from thimble_zarr.store.arrays import StoredArrays
from thimble_zarr.store.coding.chunk_decoder import ChunkDecoder
from thimble_zarr.store.coding.shard_codec import CHUNK_ORDER, ShardFile
from thimble_zarr.store.files.objects import aside

Spans = Sequence[tuple[int, int]]
"""Rows, `(start, stop)`, each within one block."""


class OpenedRows:
    """Rows of a store, for one thread. Use it as a context manager."""

    _blocks_open = 2
    """Blocks whose shards stay open: the one that is read, and the one that the disk is told of.
    Every thread that reads has as many, and a process may open some hundred files by default."""

    def __init__(self, arrays: StoredArrays) -> None:
        self._arrays, self._schema = arrays, arrays.schema
        self._shards: dict[int, dict[str, ShardFile]] = {}
        self._known: dict[int, tuple[Indices, list[ChunkPart]]] = {}
        self._decoder = ChunkDecoder(arrays, self._shard)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._keep(0)
        self._decoder.forget()

    def read(
        self,
        name: str,
        rows: tuple[int, int],
        tokens: Indices,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Read stored bits as `StoreReader.read` does."""
        block_steps = self._schema.layout.block_steps
        chunks, spans = self._chunks(tokens), [*split_range(*rows, block_steps)]
        shape = rows[1] - rows[0], len(tokens), self._schema.n_dims
        if out is None:
            out = np.empty(shape, storage_dtype(self._schema.dtypes[name]))
        row = f"V{out.itemsize * shape[2]}"  # what is copied at once, in half the time
        for at, (start, stop) in enumerate(spans):
            self._tell_of_read(name, spans[at:], chunks)
            offset = start % block_steps
            steps = slice(offset, offset + stop - start)
            into = out[start - rows[0] : stop - rows[0]]
            if name not in self._schema.arrays:
                for chunk, take, where in chunks:
                    part = self._decoder.chunk(name, start, chunk, take)[steps]
                    into.view(row)[:, where] = part.astype(out.dtype, copy=False).view(row)
                continue
            with self._arrays.decoding(name, start):
                shard = self._shard(name, start)
                for chunk, take, where in chunks:
                    if isinstance(take, slice) and isinstance(where, slice):
                        place = into[:, where].transpose(CHUNK_ORDER)
                        if shard.can_decode_into(place):
                            shard.decode(chunk, place)
                            continue
                    part = shard.decode(chunk)[take][:, steps].astype(out.dtype, copy=False)
                    into.view(row)[:, where] = part.view(row).transpose(CHUNK_ORDER)
        return out

    def will_read(self, names: Sequence[str], rows: tuple[int, int], tokens: Indices) -> None:
        """Say that `read` will be asked for these of several variables, so the disk may begin."""
        chunks = self._chunks(tokens)
        self._tell(names, [*split_range(*rows, self._schema.layout.block_steps)], chunks)

    def _tell_of_read(self, name: str, spans: Spans, chunks: Sequence[ChunkPart]) -> None:
        """Do nothing: a disk that is not told has begun as soon as it is asked."""

    def _tell(self, names: Sequence[str], spans: Spans, chunks: Sequence[ChunkPart]) -> None:
        """Say which chunks of which blocks will be read."""
        if len(chunks) < tuning.TUNING.few_chunks:
            return
        for start, _ in spans:
            for name in self._arrays_of(names):
                with suppress(StoreError), self._arrays.decoding(name, start):
                    self._shard(name, start).will_read([chunk for chunk, _, _ in chunks])

    def _arrays_of(self, names: Sequence[str]) -> Sequence[str]:
        """Return the arrays that are read for variables."""
        arrays = [of.name for of in self._schema.arrays.values() if of.variable in names]
        if len(arrays) > len(names):  # of what is coded all is needed, and of the gradient too
            return [*self._schema.arrays]
        return arrays

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
            self._keep(self._blocks_open - 1)
            shards = {}
        self._shards[block] = shards
        if name not in shards:
            shards[name] = self._arrays.shard(name, row).__enter__()
        return shards[name]

    def _keep(self, n_blocks: int) -> None:
        while len(self._shards) > n_blocks:
            for shard in self._shards.pop(next(iter(self._shards))).values():
                shard.__exit__()


class RemoteRows(OpenedRows):
    """Rows on a server. Shards are opened, and their chunks asked for, while others are read."""

    def __init__(self, arrays: StoredArrays) -> None:
        super().__init__(arrays)
        self._opening: dict[tuple[int, str], Future[ShardFile]] = {}
        self._told: set[tuple[int, str, int]] = set()
        self._blocks_open = tuning.TUNING.open_blocks

    def __exit__(self, *error: object) -> None:
        for opening in self._opening.values():
            opening.cancel()
        self._opening.clear()
        self._told.clear()
        super().__exit__(*error)

    def _tell_of_read(self, name: str, spans: Spans, chunks: Sequence[ChunkPart]) -> None:
        self._tell([name], spans, chunks)

    def _tell(self, names: Sequence[str], spans: Spans, chunks: Sequence[ChunkPart]) -> None:
        wanted = [chunk for chunk, _, _ in chunks]
        for start, _ in spans[: self._blocks_open // 2]:
            block = start // self._schema.layout.block_steps
            for name in self._arrays_of(names):
                if (told := (block, name, id(chunks))) in self._told:
                    continue
                self._told.add(told)
                shard, opening = (
                    self._shards.get(block, {}).get(name),
                    self._opening.get((block, name)),
                )
                if shard is not None and opening is None:
                    shard.will_read(wanted)
                    continue
                new = self._arrays.shard(name, start)
                open_ = new.__enter__ if opening is None else opening.result
                self._opening[block, name] = aside(_told, open_, wanted)

    def _shard(self, name: str, row: int) -> ShardFile:
        block = row // self._schema.layout.block_steps
        opening = self._opening.pop((block, name), None)
        if opening is not None:
            self._shards.setdefault(block, {})[name] = opening.result()
        return super()._shard(name, row)

    def _keep(self, n_blocks: int) -> None:
        before = {*self._shards}
        super()._keep(n_blocks)
        gone = before - {*self._shards}
        self._told = {told for told in self._told if told[0] not in gone}


def _told(open_: Callable[[], ShardFile], chunks: Sequence[int]) -> ShardFile:
    """Open a shard, and say which of its chunks will be read."""
    shard = open_()
    shard.will_read(chunks)
    return shard


def _placed(schema: Schema, tokens: Indices) -> Indices:
    """Return where tokens lie on disk."""
    if schema.places is None:
        return tokens
    if isinstance(tokens, range):
        tokens = np.arange(tokens.start, tokens.stop, tokens.step)
    return as_range(schema.places[tokens])
