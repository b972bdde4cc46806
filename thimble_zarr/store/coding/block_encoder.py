"""A block of a parameter as the shards of its arrays, a chunk at a time.

What is stored as it is takes the memory of one chunk. Of variables that are stored as they differ
from their prediction all shards come from one pass, and are held until they are written: a few
bytes where the prediction holds, at most about as many as the block has of them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from thimble_zarr.format.reader import Checksums
from thimble_zarr.format.schema import Schema
from thimble_zarr.format.stored_array import StoredArray
from thimble_zarr.store.coding.compression import COMPRESSIONS
from thimble_zarr.store.coding.predicted import Bits, Prediction, decoded_checksum
from thimble_zarr.store.coding.shard_codec import (
    CHUNK_ORDER,
    ShardBuilder,
    ShardEncoder,
    chunk_slices,
    values_checksum,
)


@dataclass
class Block:
    """Rows of a parameter, to be encoded: `encode` the array after array, each once.

    Attributes
    ----------
    schema
        The parameter's.
    bits
        Of each variable, shape `(block_steps, token, dim)`. Rows that do not count are overwritten.
    n_rows
        Rows that count.
    scalars, steps
        The per-step values of the rows, by name, and the step of each that counts.
    checksums, values
        Of the arrays encoded so far those of the chunks of their shard, and of keyframes besides
        those of the chunks of their variable, as they are decoded.
    """

    schema: Schema
    bits: Bits
    n_rows: int
    scalars: Mapping[str, np.ndarray]
    steps: np.ndarray
    checksums: dict[str, list[Checksums]] = field(default_factory=dict, init=False)
    values: dict[str, list[int]] = field(default_factory=dict, init=False)
    _held: dict[str, list[bytes]] = field(default_factory=dict, init=False)

    def encode(self, array: StoredArray) -> Iterator[bytes]:
        """Yield the shard of an array, part by part."""
        if array.is_keyframe or array.is_sparse:
            if not self._held:
                self._predict()
            yield from self._held.pop(array.name)
            return
        bits, fill = self.bits[array.variable], array.fill
        bits[self.n_rows :] = fill
        compression, order = COMPRESSIONS[array.codec], self.schema.stored_order
        shard = ShardEncoder(bits, self.schema.layout.chunk_tokens, fill, order, compression)
        yield from shard
        self.checksums[array.name] = shard.checksums

    def _predict(self) -> None:
        """Encode the shards of all variables that are predicted."""
        schema = self.schema
        scalars = {name: values[: self.n_rows] for name, values in self.scalars.items()}
        prediction = Prediction.of(schema, scalars, self.steps)
        coded = [one for one in schema.arrays.values() if one.is_keyframe or one.is_sparse]
        builders = {one.name: ShardBuilder(COMPRESSIONS[one.codec]) for one in coded}
        self._held = {one.name: [] for one in coded}
        self.values |= {one.name: [] for one in coded if one.is_keyframe}
        length, order = schema.layout.chunk_tokens, schema.stored_order
        shape, memory = (
            (length, schema.layout.block_steps, schema.n_dims),
            dict[np.dtype, np.ndarray](),
        )
        none = np.empty((0, 0, schema.n_dims))
        nothing = {
            one.name: values_checksum(_padded(one, none, shape)) for one in coded if one.is_sparse
        }
        for tokens in chunk_slices(schema.n_tokens, length):
            where = tokens if order is None else order[tokens]
            rows = {one: bits[: self.n_rows, where] for one, bits in self.bits.items()}
            grads = rows.pop("grad", None)
            left = prediction.residuals(rows, grads)
            for one in coded:
                builder, parts = builders[one.name], self._held[one.name]
                if one.is_keyframe:
                    of_rows, fill = rows[one.variable], schema.fill(one.variable)
                    self.values[one.name].append(decoded_checksum(of_rows, shape, fill, memory))
                    parts.append(builder.add(_padded(one, of_rows[:1], (length, 1, shape[2]))))
                    continue
                if one.variable in left:
                    parts.append(builder.add(_padded(one, left[one.variable], shape)))
                else:
                    builder.leave_out(nothing[one.name])
        for name, builder in builders.items():
            self._held[name].append(builder.index())
            self.checksums[name] = builder.checksums


def _padded(array: StoredArray, bits: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Return bits of shape `(step, token, dim)` as a chunk, what is not there filled up."""
    chunk = np.full(shape, array.fill, array.dtype.newbyteorder("<"))
    chunk[: bits.shape[1], : len(bits)] = bits.transpose(CHUNK_ORDER)
    return chunk
