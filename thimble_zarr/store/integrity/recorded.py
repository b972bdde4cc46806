"""The checksums that were committed of each chunk's values, for whoever compares two stores."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from thimble_zarr.store.files.base import NotPlainFileError
from thimble_zarr.store.keys import shard_key
from thimble_zarr.store.ledger import Commit, FileRecord, Ledger
from thimble_zarr.store.rows import StoredArrays, decoding

_VALUES = 1
"""The column of `FileRecord.chunks` with the checksums of the values."""


@dataclass(frozen=True)
class RecordedValues:
    """The checksums of the values of a parameter's chunks (`ChunkChecksums`)."""

    arrays: StoredArrays
    records: Mapping[str, FileRecord]

    @classmethod
    def of(cls, arrays: StoredArrays, commit: Commit) -> "RecordedValues":
        """Read them from the ledger; raise DamagedStoreError if that is damaged."""
        files: Any = arrays.files  # all that there are can be hashed
        with decoding(arrays.files, "the ledger"):
            return cls(arrays, _records(files, commit))

    def of_block(self, name: str, row: int) -> np.ndarray | None:
        """Return those of a variable in the block of a row, as they lie on disk: uint32.

        None where the file has another size than was committed: it was written again.
        """
        schema = self.arrays.schema
        block = row // schema.layout.block_steps
        key = shard_key(self.arrays.key(name), block, schema.shape)
        record, n_bytes = self.records.get(key), None
        with suppress(OSError, NotPlainFileError):
            n_bytes = self.arrays.files.size(key)
        if record is None or record.chunks is None or record.n_bytes != n_bytes:
            return None
        return record.chunks[:, _VALUES]


@lru_cache(maxsize=2)
def _records(files: Any, commit: Commit) -> Mapping[str, FileRecord]:
    """Return what a ledger says of all parameters, which are compared one after the other."""
    return Ledger.read(files, commit).records
