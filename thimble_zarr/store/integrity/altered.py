"""Which chunks are not those that were committed, though their files are sound.

Something stored them again, with good checksums. Only such chunks are decoded, so that looking for
them costs next to nothing.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from thimble_zarr.format import layout
from thimble_zarr.format.indexing import Indices
from thimble_zarr.format.reader import AlteredChunk, Checksums
from thimble_zarr.format.schema import array_path
from thimble_zarr.store.keys import array_of, chunk_index, shard_key, split_array_key
from thimble_zarr.store.ledger import (
    Commit,
    FileChecksums,
    FileRecord,
    Ledger,
    read_lines,
    recorded_files,
)
from thimble_zarr.store.rows import StoredArrays, decoding
from thimble_zarr.store.shard import locate_bit, values_checksum


@dataclass(frozen=True)
class StoreIntegrity:
    """Compares a parameter's files with what is committed of them (`Integrity`)."""

    arrays: StoredArrays
    commit: Commit

    def altered_chunks(
        self, rows: tuple[int, int], *, before_block: Callable[[int], object] | None = None
    ) -> Iterator[AlteredChunk]:
        """Find chunks, and files of scalars and labels, that are not those that were committed.

        Parameters
        ----------
        rows
            `(start, stop)`. Whole blocks are looked at.
        before_block
            Called before each with the row it ends before. It may wait until somebody else has
            read the block: then the disk need not look for each checksum.

        Raises
        ------
        DamagedStoreError
            If a file or the ledger is damaged.
        """
        files, schema = self.arrays.files, self.arrays.schema
        with decoding(files, "the ledger"):
            ledger = Ledger.read(files, self.commit, prefix=array_path(self.arrays.group, ""))
        steps = schema.layout.block_steps
        for first_row in ledger.ends:
            if not (first_row < rows[1] and rows[0] < first_row + steps):
                continue
            if before_block is not None:
                before_block(first_row + steps)
            for name in schema.dtypes:
                key = shard_key(self.arrays.key(name), first_row // steps, schema.shape)
                with decoding(files, "the ledger"):
                    record = ledger.records[key]
                yield from self._altered_in(name, key, record)
        for key, record in ledger.records.items():
            if record.crc32 is not None:
                yield from self._altered_file(key, record)

    def flipped_bit(self, altered: AlteredChunk) -> tuple[int, int, int, int] | None:
        """Return row, token, dim and bit, if one flipped bit is all that altered a chunk.

        It takes seconds.
        """
        if altered.committed is None or altered.chunk is None or altered.tokens is None:
            return None
        with self.arrays.block(altered.variable, altered.first_row) as shard:
            values = shard.decode(altered.chunk)
        bit = locate_bit(values.tobytes(), altered.committed.values)
        if bit is None:
            return None
        index, bit = divmod(bit, 8 * values.itemsize)
        token, row, dim = (int(part) for part in np.unravel_index(index, values.shape))
        if token >= len(altered.tokens):  # it is in what fills up the last chunk
            return None
        return altered.first_row + row, int(altered.tokens[token]), dim, bit

    def _altered_in(self, name: str, key: str, record: FileRecord) -> Iterator[AlteredChunk]:
        altered = self._differing(name, record)
        since = self._since.get(key, []) if altered else []
        if not altered or any(not self._differing(name, later) for later in since):
            return
        with self.arrays.block(name, record.first_row) as shard:
            origin = self._recorded.get(tuple(shard.stored_checksums()))
        assert record.chunks is not None
        for chunk in altered:
            yield AlteredChunk(
                name,
                key,
                len(record.chunks),
                origin,
                record.first_row,
                chunk,
                self._tokens_of(chunk),
                Checksums(*record.chunks[chunk].tolist()),
            )

    def _differing(self, name: str, record: FileRecord) -> list[int]:
        """Return the chunks of a shard that do not have the values that a line tells of."""
        if record.chunks is None:
            return []
        with self.arrays.block(name, record.first_row) as shard:
            return [
                chunk
                for chunk, (told, stored) in enumerate(
                    zip(record.chunks.tolist(), shard.stored_checksums(), strict=True)
                )
                if stored != told[0] and values_checksum(shard.decode(chunk)) != told[1]
            ]

    def _altered_file(self, key: str, record: FileRecord) -> Iterator[AlteredChunk]:
        """Look at a file of scalars or labels."""
        files = self.arrays.files
        with decoding(files, key, key):
            if not (content := files.get(key)):
                raise FileNotFoundError
        found = zlib.crc32(content)
        if found == record.crc32 or found in [later.crc32 for later in self._since.get(key, [])]:
            return
        _, name = split_array_key(array_of(key))
        first_row = chunk_index(key) * layout.SCALAR_CHUNK_STEPS
        yield AlteredChunk(name, key, 1, self._recorded.get(found), first_row, None, None, None)

    @property
    def _since(self) -> dict[str, list[FileRecord]]:
        """What the ledger says by now beyond what is committed here.

        A writer may have stored files again, with more rows, or was killed when it had.
        """
        records: dict[str, list[FileRecord]] = {}
        with decoding(self.arrays.files, "the ledger"):
            for line in read_lines(self.arrays.files, self.commit.ledger_bytes):
                for key, record in (line.records() if line.entry is not None else {}).items():
                    records.setdefault(key, []).append(record)
        return records

    @cached_property
    def _recorded(self) -> dict[FileChecksums, str]:
        """Every file that was committed, by what it is known by."""
        with decoding(self.arrays.files, "the ledger"):
            return recorded_files(read_lines(self.arrays.files, stop=self.commit.ledger_bytes))

    def _tokens_of(self, chunk: int) -> Indices:
        """Return the tokens of a chunk, as they lie in it."""
        schema = self.arrays.schema
        length, order = schema.layout.chunk_tokens, schema.stored_order
        tokens: Indices = range(schema.n_tokens) if order is None else order
        return tokens[chunk * length : (chunk + 1) * length]
