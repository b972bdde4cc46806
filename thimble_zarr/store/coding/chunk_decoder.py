"""Chunks of variables that are stored as they differ from their prediction.

Whoever wants one state of some tokens gets all of them computed, from the gradient, the keyframe
and the residuals of the block alone: where they are needed, or in memory that is used again. The
values of each chunk have a checksum in the ledger, and are never handed out with another: a program
that is wrong, here or where it was recorded, is an error and not a number.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from thimble_zarr.bits import storage_dtype
from thimble_zarr.errors import StoreError
from thimble_zarr.optim.programs.kernel import StepNumbers
from thimble_zarr.optim.programs.program import PortableProgram
from thimble_zarr.store.arrays import StoredArrays
from thimble_zarr.store.coding.predicted import Prediction
from thimble_zarr.store.coding.shard_codec import CHUNK_ORDER, ShardFile, values_checksum
from thimble_zarr.store.keys import shard_key
from thimble_zarr.store.ledger import read_lines

Chunks = Mapping[str, np.ndarray]
"""Stored bits by variable, of a chunk: shape `(token, step, dim)`."""


@dataclass(frozen=True)
class _Block:
    """What is known of a block: its first row, what predicts it, and the checksums of its values.

    Those are by keyframe, None where the ledger was repaired.
    """

    first: int
    prediction: Prediction
    values: Mapping[str, np.ndarray | None]

    @classmethod
    def of(cls, arrays: StoredArrays, first: int) -> Self:
        """Return what is known of the block that begins with row `first`."""
        schema, values = arrays.schema, {}
        steps = schema.layout.block_steps
        for of in schema.arrays.values():
            if of.is_keyframe:
                key = shard_key(arrays.key(of.name), first // steps, schema.shape)
                record = arrays.recorded.get(key)
                values[of.name] = None if record is None else record.values
        rows = slice(first, min(first + steps, arrays.n_rows))
        return cls(first, arrays.prediction.at(rows), values)


class ChunkDecoder:
    """Decodes chunks of a parameter whose states are predicted, for one thread.

    `shard` returns the open shard of an array and a row. Chunks have `shape`.
    """

    def __init__(self, arrays: StoredArrays, shard: Callable[[str, int], ShardFile]) -> None:
        self._arrays, self._shard = arrays, shard
        layout = arrays.schema.layout
        self.shape = layout.chunk_tokens, layout.block_steps, arrays.schema.n_dims
        self._memory: dict[str, np.ndarray] = {}
        self._last: _Block | None = None

    def chunk(self, row: int, chunk: int, into: Chunks | None = None) -> Chunks:
        """Return the bits of all variables in a chunk of a row's block.

        They are in the arrays of `into`, which have no gaps, as far as there are any; the others
        are overwritten when the next chunk is decoded. Raises DamagedStoreError if the chunk is not
        the one that was recorded.
        """
        schema, block = self._arrays.schema, self._block(row)
        length = schema.layout.chunk_tokens
        n_tokens = min(length, schema.n_tokens - chunk * length)
        n_rows = block.prediction.n_rows

        def rows(chunks: Chunks) -> dict[str, np.ndarray]:
            """Return the rows that there are, `(step, token, dim)`."""
            return {
                name: bits[:n_tokens, :n_rows].transpose(CHUNK_ORDER)
                for name, bits in chunks.items()
            }

        whole = {name: self._array(name) for name in schema.dtypes} | dict(into or {})
        left = self._decode(row, chunk, whole)
        states = rows(whole)
        grads = states.pop("grad", None)
        block.prediction.restore(states, grads, rows(left))
        for of in schema.arrays.values():
            if of.is_keyframe:
                bits, values = whole[of.variable], block.values[of.name]
                bits[n_tokens:] = bits[:, n_rows:] = schema.fill(of.variable)
                if values is not None and not _has_checksum(bits, values[chunk : chunk + 1]):
                    self._refuse(of.name, block.first, f"{of.variable} in chunk {chunk}")
        return whole

    def _decode(self, row: int, chunk: int, whole: Chunks) -> Chunks:
        """Put keyframes and gradients into a chunk; return residuals that are not zero."""
        left, name = {}, ""
        try:
            for name, of in self._arrays.schema.arrays.items():
                self._arrays.declared(name)
                shard = self._shard(name, row)
                if of.is_keyframe:
                    whole[of.variable][:, :1] = shard.decode(chunk)
                elif of.is_sparse and not shard.is_left_out(chunk):
                    bits = shard.decode(chunk)
                    left[of.variable] = bits.astype(bits.dtype.newbyteorder("="))
                elif not of.is_sparse and shard.can_decode_into(whole[of.variable]):
                    shard.decode(chunk, whole[of.variable])
                elif not of.is_sparse:
                    whole[of.variable][...] = shard.decode(chunk)
        except Exception:  # only now, for a context takes long beside what is done in it
            with self._arrays.decoding(name, row):
                raise
        return left

    def predicted(
        self,
        rows: tuple[int, int],
        chunks: Sequence[int],
        program: PortableProgram,
        numbers: StepNumbers,
    ) -> np.ndarray:
        """Return which rows a program makes of the one before: bool, `(step,)`.

        They are of one block. Of those rows no chunk has a residual of any variable.
        """
        block = self._block(rows[0])
        steps = slice(rows[0] - block.first, rows[1] - block.first)
        found = block.prediction.takes(steps, program, numbers)
        if steps.start == 0:  # it is stored as it is
            found[:1] = False
        for name, of in self._arrays.schema.arrays.items():
            if not of.is_sparse:
                continue
            with self._arrays.decoding(name, rows[0]):
                shard = self._shard(name, rows[0])
                for chunk in chunks:
                    if not shard.is_left_out(chunk):
                        found &= (shard.decode(chunk) == 0).all(axis=(0, 2))[steps]
        return found

    def forget(self) -> None:
        """Let go of all memory: whoever reads holds on to this in a circle."""
        self._memory.clear()
        self._last = None

    def _block(self, row: int) -> _Block:
        first = row - row % self._arrays.schema.layout.block_steps
        if self._last is None or self._last.first != first:
            self._last = _Block.of(self._arrays, first)
        return self._last

    def _array(self, name: str) -> np.ndarray:
        """Return memory for a variable in a chunk: fresh memory is slow."""
        if name not in self._memory:
            dtype = storage_dtype(self._arrays.schema.dtypes[name])
            self._memory[name] = np.empty(self.shape, dtype)
        return self._memory[name]

    def _refuse(self, name: str, row: int, what: str) -> None:
        """Raise what is wrong where decoded values are not those that were recorded."""
        arrays = self._arrays
        with arrays.decoding(name, row):
            if self.was_cut_off():
                raise StoreError(
                    f"{arrays.files.path} was cut off and gone on with after it was opened; open "
                    "it again"
                )
            raise ValueError(
                f"{what} is not what was recorded: the program {arrays.schema.coding.program} "
                "computes something else here, or a file was changed"
            )

    def was_cut_off(self) -> bool:
        """Whether rows may be others than those that were committed when the store was opened.

        A block that is stored again with more rows still has the same in those before.
        """
        lines = read_lines(self._arrays.files, self._arrays.commit.ledger_bytes)
        return any(line.entry is not None and line.entry.resumed is not None for line in lines)


def _has_checksum(bits: np.ndarray, checksum: np.ndarray) -> bool:
    """Return whether a chunk has the one checksum that there is, as it would be stored plain."""
    found = values_checksum(bits.astype(bits.dtype.newbyteorder("<"), copy=False))
    return bool(checksum.tolist() == [found])
