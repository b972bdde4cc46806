"""The checksums that were committed of each chunk's values, for whoever compares two stores."""

from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from thimble_zarr.format.stored_array import StoredArray
from thimble_zarr.store.arrays import StoredArrays
from thimble_zarr.store.files.base import NotPlainFileError
from thimble_zarr.store.keys import shard_key
from thimble_zarr.store.ledger import FileRecord

_VALUES = 1
"""The column of `FileRecord.chunks` with the checksums of the values."""


@dataclass(frozen=True)
class RecordedValues:
    """The checksums of the values of a parameter's chunks (`ChunkChecksums`)."""

    arrays: StoredArrays

    @classmethod
    def of(cls, arrays: StoredArrays) -> "RecordedValues":
        """Read them from the ledger; raise DamagedStoreError if that is damaged."""
        arrays.recorded  # noqa: B018  # now, and not at the first question
        return cls(arrays)

    def of_block(self, name: str, row: int) -> np.ndarray | None:
        """Return those of a variable in the block of a row, as they lie on disk: uint32.

        None where the file has another size than was committed: it was written again.
        """
        schema = self.arrays.schema
        needed = [of for of in schema.arrays.values() if of.variable == name]
        if len(needed) > 1:  # it is computed from the gradient, too
            needed += [of for of in schema.arrays.values() if of.variable == "grad"]
        records = [self._as_committed(of, row // schema.layout.block_steps) for of in needed]
        if any(record is None for record in records) or records[0] is None:
            return None
        chunks = records[0].chunks
        plain = None if chunks is None else chunks[:, _VALUES]
        return records[0].values if needed[0].is_keyframe else plain

    def _as_committed(self, of: StoredArray, block: int) -> FileRecord | None:
        """Return what was committed of a file, None if its size is another."""
        key = shard_key(self.arrays.key(of.name), block, self.arrays.schema.shape)
        record, n_bytes = self.arrays.recorded.get(key), None
        with suppress(OSError, NotPlainFileError):
            n_bytes = self.arrays.files.size(key)
        return None if record is None or record.n_bytes != n_bytes else record
