"""Which chunks are not those that were committed, though their files are sound.

Something stored them again, with good checksums. Only such chunks are decoded, so that looking for
them costs next to nothing.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from thimble_zarr.format import layout
from thimble_zarr.format.indexing import Indices
from thimble_zarr.format.reader import AlteredChunk, Checksums
from thimble_zarr.format.schema import array_path
from thimble_zarr.store.arrays import StoredArrays, decoding
from thimble_zarr.store.coding.shard_codec import locate_bit
from thimble_zarr.store.integrity.expected import Expected
from thimble_zarr.store.integrity.files import differing_chunks
from thimble_zarr.store.keys import array_of, chunk_index, shard_key, split_array_key
from thimble_zarr.store.ledger import Commit, FileChecksums, FileRecord, Ledger


def name_of_chunks(record: FileRecord) -> str:
    """Return what a shard's chunks are known by, in a few characters; nothing of another file."""
    if record.chunks is None:
        return ""
    return hashlib.sha256(record.chunks.astype("<u4").tobytes()).hexdigest()


@dataclass(frozen=True)
class StoreIntegrity:
    """Compares a parameter's files with what is committed of them (`Integrity`)."""

    arrays: StoredArrays
    commit: Commit

    def altered_chunks(
        self, rows: tuple[int, int], *, before_block: Callable[[int], object] | None = None
    ) -> Iterator[AlteredChunk]:
        """Find chunks, and files of scalars and labels, that are not those that were committed.

        Whole blocks are looked at. If `before_block` waits until somebody else has read the block,
        the disk need not look for each checksum.

        Raises
        ------
        DamagedStoreError
            If a file or the ledger is damaged.
        """
        group, schema = self.arrays.group, self.arrays.schema
        with decoding(self.arrays.files, "the ledger"):
            ledger = Ledger.read(self.arrays.files, self.commit, prefix=array_path(group, ""))
        steps = schema.layout.block_steps
        for first_row in ledger.ends:
            if not (first_row < rows[1] and rows[0] < first_row + steps):
                continue
            if before_block is not None:
                before_block(first_row + steps)
            for name in schema.arrays:
                self.arrays.shard(name, first_row).will_open()
            for name in schema.arrays:
                key = shard_key(self.arrays.key(name), first_row // steps, schema.shape)
                with decoding(self.arrays.files, "the ledger"):
                    record = ledger.records[key]
                yield from self._altered_in(key, record)
        others = {key: of for key, of in ledger.records.items() if of.crc32 is not None}
        self.arrays.files.will_open(others)
        for key, record in others.items():
            yield from self._altered_in(key, record)

    def flipped_bit(self, altered: AlteredChunk) -> tuple[int, int, int, int] | None:
        """Return row, token, dim and bit, if one flipped bit is all that altered a chunk.

        It takes seconds.
        """
        if altered.committed is None or altered.chunk is None or altered.tokens is None:
            return None
        _, name = split_array_key(array_of(altered.file))
        with self.arrays.block(name, altered.first_row) as shard:
            values = shard.decode(altered.chunk)
        bit = locate_bit(values.tobytes(), altered.committed.values)
        if bit is None:
            return None
        index, bit = divmod(bit, 8 * values.itemsize)
        token, row, dim = (int(part) for part in np.unravel_index(index, values.shape))
        if token >= len(altered.tokens):  # it is in what fills up the last chunk
            return None
        return altered.first_row + row, int(altered.tokens[token]), dim, bit

    def _altered_in(self, key: str, record: FileRecord) -> Iterator[AlteredChunk]:
        changed, files = self._changes(key, record), self.arrays.files
        if not changed:
            return
        with decoding(files, "the ledger"):
            # A writer may have stored the file again, with more rows, or was killed when it had.
            if not all(self._changes(key, later) for later in self._expected.promised(key)):
                return
            recorded_as = self._expected.recorded_files.get(self._checksums(key, record))
        _, name = split_array_key(array_of(key))
        if record.chunks is None:
            first_row = chunk_index(key) * layout.SCALAR_CHUNK_STEPS
            yield AlteredChunk(name, key, 1, recorded_as, first_row, None, None, None)
            return
        schema = self.arrays.schema
        length, order = schema.layout.chunk_tokens, schema.stored_order
        tokens: Indices = range(schema.n_tokens) if order is None else order
        for chunk in changed:
            yield AlteredChunk(
                schema.arrays[name].variable,
                key,
                len(record.chunks),
                recorded_as,
                record.first_row,
                chunk,
                tokens[chunk * length : (chunk + 1) * length],
                Checksums(*record.chunks[chunk].tolist()),
            )

    @cached_property
    def _expected(self) -> Expected:
        return Expected(self.arrays.files, self.commit, ledger_bytes=self.commit.ledger_bytes)

    def _changes(self, key: str, record: FileRecord) -> list[int]:
        """Return the chunks of a file that are not as a line tells."""
        if record.chunks is not None:
            return self._differing(key, record)
        return [] if self._checksums(key, record) == record.crc32 else [0]

    def _differing(self, key: str, record: FileRecord) -> list[int]:
        """Return the chunks of a shard that do not have the values that a line tells of."""
        _, name = split_array_key(array_of(key))
        with self.arrays.block(name, record.first_row) as shard:
            if shard.published_as == name_of_chunks(record):
                return []
            return list(differing_chunks(shard, record, shard.stored_checksums()))

    def _checksums(self, key: str, record: FileRecord) -> FileChecksums:
        """Return what a file is known by now."""
        if record.chunks is not None:
            _, name = split_array_key(array_of(key))
            with self.arrays.block(name, record.first_row) as shard:
                return tuple(shard.stored_checksums())
        with decoding(self.arrays.files, key, key):
            if not (content := self.arrays.files.get(key)):
                raise FileNotFoundError
            return zlib.crc32(content)
