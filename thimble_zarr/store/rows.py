"""Reading rows of a parameter into one array.

Shards of the last blocks stay open between calls, because whoever goes through a block a few tokens
at a time asks for each of its shards again and again, and opening one takes as long as reading a
chunk of it.
"""

from collections.abc import Callable, Mapping, Sequence
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
from thimble_zarr.optim.programs.kernel import StepNumbers
from thimble_zarr.optim.programs.program import PortableProgram
from thimble_zarr.store.arrays import Parts, StoredArrays
from thimble_zarr.store.coding.chunk_decoder import ChunkDecoder
from thimble_zarr.store.coding.shard_codec import CHUNK_ORDER, ShardFile
from thimble_zarr.store.files.base import ChangedError
from thimble_zarr.store.files.objects import aside

Spans = Sequence[tuple[int, int]]
"""Rows, `(start, stop)`, each within one block."""


Take = slice | np.ndarray
"""Some tokens of a chunk, or of what is read."""


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
        if out is None:
            shape = rows[1] - rows[0], len(tokens), self._schema.n_dims
            out = np.empty(shape, storage_dtype(self._schema.dtypes[name]))
        self.read_together({name: out}, rows, tokens)
        return out

    def read_together(
        self, outs: Mapping[str, np.ndarray], rows: tuple[int, int], tokens: Indices
    ) -> Mapping[str, np.ndarray]:
        """Read stored bits of several variables, each into an array, and return these."""
        coded = outs.keys() - self._schema.arrays.keys()
        chunks, spans = self._chunks(tokens), [*split_range(*rows, self._schema.layout.block_steps)]
        for at, (start, stop) in enumerate(spans):
            self._tell_of_read([*outs], spans[at:], chunks)
            into = {name: out[start - rows[0] : stop - rows[0]] for name, out in outs.items()}
            if coded and len(outs) > 1:
                self._decode(into, (start, stop), chunks)
                continue
            for name, of_rows in into.items():
                read = self._read_shared if name in coded else self._read_stored
                read(name, (start, stop), chunks, of_rows)
        return outs

    def _read_stored(
        self, name: str, rows: tuple[int, int], chunks: list[ChunkPart], out: np.ndarray
    ) -> None:
        """Read rows of a block of a variable that is stored as it is."""
        with self._arrays.decoding(name, rows[0]):
            shard = self._shard(name, rows[0])
            for chunk, take, where in chunks:
                place = _place(out, take, where)
                if place is not None and shard.can_decode_into(place):
                    shard.decode(chunk, place)
                else:
                    self._put(shard.decode(chunk), rows, take, out, where)

    def _decode(
        self, outs: Mapping[str, np.ndarray], rows: tuple[int, int], chunks: list[ChunkPart]
    ) -> None:
        """Read rows of a block of variables that are computed together."""
        shape = self._decoder.shape
        for chunk, take, where in chunks:
            into = {}
            for name, out in outs.items():
                place = _place(out, take, where)
                if place is not None and place.shape == shape and place.flags.c_contiguous:
                    into[name] = place
            whole = self._decoder.chunk(rows[0], chunk, into)
            for name in outs.keys() - into.keys():
                self._put(whole[name], rows, take, outs[name], where)

    def _read_shared(
        self, name: str, rows: tuple[int, int], chunks: list[ChunkPart], out: np.ndarray
    ) -> None:
        """Read rows of a block of a variable that is computed; the others are asked for next."""
        coded = [of.variable for of in self._schema.arrays.values() if of.is_keyframe]
        for chunk, take, where in chunks:

            def decoded(chunk: int = chunk, take: Take = take) -> Parts:
                whole = self._decoder.chunk(rows[0], chunk)
                return {one: self._part(whole[one], rows, take).copy() for one in coded}

            key = rows, chunk, take.tobytes() if isinstance(take, np.ndarray) else str(take)
            out[:, where] = self._arrays.shared.get(key, decoded)[name].transpose(CHUNK_ORDER)

    def _put(
        self,
        decoded: np.ndarray,
        rows: tuple[int, int],
        take: Take,
        out: np.ndarray,
        where: Take,
    ) -> None:
        """Copy rows of some tokens of a chunk."""
        row = f"V{out.itemsize * out.shape[-1]}"  # what is copied at once, in half the time
        part = self._part(decoded, rows, take).astype(out.dtype, copy=False)
        out.view(row)[:, where] = part.view(row).transpose(CHUNK_ORDER)

    def _part(self, decoded: np.ndarray, rows: tuple[int, int], take: Take) -> np.ndarray:
        """Return rows of a block of some tokens in a chunk of it."""
        first = rows[0] % self._schema.layout.block_steps
        return decoded[take][:, first : first + rows[1] - rows[0]]

    def predicted(
        self,
        rows: tuple[int, int],
        tokens: Indices,
        program: PortableProgram,
        numbers: StepNumbers,
    ) -> np.ndarray:
        """Return which rows are stored as what a program makes of the row before (`Rows`)."""
        found = np.zeros(rows[1] - rows[0], bool)
        if self._schema.coding.program is None:
            return found
        chunks = [chunk for chunk, _, _ in self._chunks(tokens)]
        for start, stop in split_range(*rows, self._schema.layout.block_steps):
            at = slice(start - rows[0], stop - rows[0])
            found[at] = self._decoder.predicted((start, stop), chunks, program, numbers[at])
        return found

    def will_read(self, names: Sequence[str], rows: tuple[int, int], tokens: Indices) -> None:
        """Say that `read` will be asked for these of several variables, so the disk may begin."""
        chunks = self._chunks(tokens)
        self._tell(names, [*split_range(*rows, self._schema.layout.block_steps)], chunks)

    def _tell_of_read(
        self, names: Sequence[str], spans: Spans, chunks: Sequence[ChunkPart]
    ) -> None:
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
        self._tails: dict[str, int] = {}
        self._blocks_open = tuning.TUNING.open_blocks

    def __exit__(self, *error: object) -> None:
        for opening in self._opening.values():
            opening.cancel()
        self._opening.clear()
        self._told.clear()
        super().__exit__(*error)

    def read_together(
        self, outs: Mapping[str, np.ndarray], rows: tuple[int, int], tokens: Indices
    ) -> Mapping[str, np.ndarray]:
        """Read stored bits of several variables, again if a shard was replaced meanwhile.

        A later commit stores the block with more rows, and the same in those before, unless rows
        were taken back.
        """
        try:
            return super().read_together(outs, rows, tokens)
        except ChangedError:
            if self._decoder.was_cut_off():
                raise
            self.__exit__()
            return super().read_together(outs, rows, tokens)

    def _tell_of_read(
        self, names: Sequence[str], spans: Spans, chunks: Sequence[ChunkPart]
    ) -> None:
        self._tell(names, spans, chunks)

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
                open_ = self._opener(name, start, wanted) if opening is None else opening.result
                self._opening[block, name] = aside(_told, open_, wanted)

    def _opener(self, name: str, row: int, chunks: Sequence[int]) -> Callable[[], ShardFile]:
        """Return what opens a shard, with the chunks if they are likely to be all at its end.

        They are where the shard of another block had them there, and where they are all there are.
        """
        shard = self._arrays.shard(name, row)
        if len(chunks) == shard.n_chunks:
            shard.tail_bytes = shard.most_bytes
        else:
            shard.tail_bytes = self._tails.get(name, 0) * 33 // 32

        def opened() -> ShardFile:
            shard.__enter__()
            self._tails[name] = shard.tail_of(chunks)
            return shard

        return opened

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


def _place(out: np.ndarray, take: Take, where: Take) -> np.ndarray | None:
    """Return where tokens of a chunk go, `(token, step, dim)`, if that is a view; else None.

    If as many tokens as the chunk has go there, they are all of it, in their order.
    """
    if isinstance(take, slice) and isinstance(where, slice):
        return out[:, where].transpose(CHUNK_ORDER)
    return None
