"""Chunks of variables that are stored as they differ from their prediction.

Whoever wants one state of some tokens gets all of them computed, from the gradient, the keyframe
and the residuals of the block alone. So the last chunks are kept, because the other states will be
asked for next. The values of each chunk have a checksum in the ledger, and are never handed out
with another: a program that is wrong, here or where it was recorded, is an error and not a number.
"""

from collections.abc import Callable

import numpy as np

from thimble_zarr import tuning
from thimble_zarr.errors import StoreError
from thimble_zarr.format.stored_array import StoredArray
from thimble_zarr.store.arrays import StoredArrays
from thimble_zarr.store.coding.predicted import Bits, decoded_checksum
from thimble_zarr.store.coding.shard_codec import CHUNK_ORDER, ShardFile
from thimble_zarr.store.keys import shard_key
from thimble_zarr.store.ledger import read_lines

Take = slice | np.ndarray
"""Which tokens of a chunk."""


class ChunkDecoder:
    """Decodes chunks of the coded variables of a parameter, for one thread.

    `shard` returns the open shard of an array and a row.
    """

    def __init__(self, arrays: StoredArrays, shard: Callable[[str, int], ShardFile]) -> None:
        self._arrays, self._shard = arrays, shard
        self._known: dict[tuple[int, int, bytes | str], Bits] = {}
        self._n_bytes = 0
        self._memory: dict[np.dtype, np.ndarray] = {}

    def chunk(self, name: str, row: int, chunk: int, take: Take) -> np.ndarray:
        """Return the bits of a variable of some tokens in a chunk of a row's block.

        `take` says which of the chunk's tokens. The shape is `(step, token, dim)`, with all steps
        of the block. Raises DamagedStoreError if the chunk is not the one that was recorded.
        """
        first = row - row % self._arrays.schema.layout.block_steps
        key = first, chunk, take.tobytes() if isinstance(take, np.ndarray) else str(take)
        if key not in self._known:
            whole = self._decode(first, chunk)
            decoded = {one: np.ascontiguousarray(bits[:, take]) for one, bits in whole.items()}
            self._n_bytes += _n_bytes(decoded)
            while self._known and self._n_bytes > tuning.TUNING.decoded_bytes:
                self._n_bytes -= _n_bytes(self._known.pop(next(iter(self._known))))
            self._known[key] = decoded
        return self._known[key][name]

    def forget(self) -> None:
        """Let go of all chunks; they are many, and whoever reads holds on to this in a circle."""
        self._known.clear()
        self._memory.clear()
        self._n_bytes = 0

    def _decode(self, first: int, chunk: int) -> Bits:
        """Return all coded variables in a chunk of the block that begins with row `first`."""
        schema = self._arrays.schema
        length = schema.layout.chunk_tokens
        tokens = slice(0, min(length, schema.n_tokens - chunk * length))
        rows = slice(first, min(first + schema.layout.block_steps, self._arrays.n_rows))
        keyframe, left, grads = {}, {}, None
        for of in schema.arrays.values():
            with self._arrays.decoding(of.name, first):
                shard = self._shard(of.name, first)
                if of.is_sparse and shard.is_left_out(chunk):
                    continue
                bits = shard.decode(chunk).transpose(CHUNK_ORDER)[: rows.stop - first, tokens]
            if of.is_keyframe:
                keyframe[of.variable] = _native(bits[0])
            elif of.is_sparse:
                left[of.variable] = _native(bits)
            else:
                grads = _native(bits)
        decoded = self._arrays.prediction.at(rows).restore(keyframe, grads, left)
        for of in schema.arrays.values():
            if of.is_keyframe:
                self._check(of, first, chunk, decoded[of.variable])
        return decoded

    def _check(self, of: StoredArray, first: int, chunk: int, bits: np.ndarray) -> None:
        """Raise DamagedStoreError unless decoded values are those that were recorded."""
        arrays, schema = self._arrays, self._arrays.schema
        key = shard_key(arrays.key(of.name), first // schema.layout.block_steps, schema.shape)
        record = arrays.recorded.get(key)
        if record is None or record.values is None:  # the ledger was repaired
            return
        shape = schema.layout.chunk_tokens, schema.layout.block_steps, schema.n_dims
        found = decoded_checksum(bits, shape, schema.fill(of.variable), self._memory)
        if record.values[chunk : chunk + 1].tolist() == [found]:
            return
        with arrays.decoding(of.name, first):
            if self._was_cut_off():
                raise StoreError(
                    f"{arrays.files.path} was cut off and gone on with after it was opened; open "
                    "it again"
                )
            raise ValueError(
                f"{of.variable} in chunk {chunk} is not what was recorded: the program "
                f"{schema.coding.program} computes something else here, or a file was changed"
            )

    def _was_cut_off(self) -> bool:
        """Whether rows may be others than those that were committed when the store was opened.

        A block that is stored again with more rows still has the same in those before.
        """
        lines = read_lines(self._arrays.files, self._arrays.commit.ledger_bytes)
        return any(line.entry is not None and line.entry.resumed is not None for line in lines)


def _n_bytes(decoded: Bits) -> int:
    return sum(bits.nbytes for bits in decoded.values())


def _native(bits: np.ndarray) -> np.ndarray:
    """Return a copy as this machine computes: on disk every number is little-endian."""
    return bits.astype(bits.dtype.newbyteorder("="), order="C")
