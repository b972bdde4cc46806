"""Write a store: declare it whole, then append blocks to it, each committed before the next.

`metadata` declares the arrays, `shard_codec` encodes them, and `files` writes them, each file whole
or not at all. A block of all parameters is committed in one order::

    array files -> ledger (sizes, checksums) -> names of the files -> commit record

So whatever a crash leaves, the ledger knows it: a file that a commit replaces (the last block's, if
a flush committed it short, and the scalars') is what one line of the ledger says or the next.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np

from thimble_zarr.errors import ConfigError, StoreError, StoreExistsError
from thimble_zarr.format import layout
from thimble_zarr.format.audited import AuditCounts
from thimble_zarr.format.layout import Layout
from thimble_zarr.format.location import on_disk
from thimble_zarr.format.overhead import Overhead, Stopwatch
from thimble_zarr.format.schema import Schema, TokenLabels, array_path
from thimble_zarr.format.stored_array import LoggedArray
from thimble_zarr.store.coding.block_encoder import Block
from thimble_zarr.store.coding.shard_codec import encode_vector
from thimble_zarr.store.contents import (
    StorePath,
    by_group,
    check_schemas,
    check_vacant,
    disk_errors_named,
    read_attribute,
)
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.keys import COMMIT, HOLDER, LEDGER, LOCK, array_of, shard_key, vector_key
from thimble_zarr.store.ledger import Commit, Ledger, seal
from thimble_zarr.store.lock import WriterLock
from thimble_zarr.store.metadata import consolidate, declare, encoded, resize, with_logged
from thimble_zarr.store.per_step import PerStepValues, coordinates_of, logged_blocks, vectors
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.resume import check_resumable, leftovers, plan_cut

MarkedRows = Mapping[str, Mapping[str, Sequence[tuple[int, int]]]]
"""Rows as `(first, stop)`, by what is said of them and by the group of the parameter."""

FileSizes = dict[str, dict[str, int]]
"""What a line of the ledger says of files: the size, and unless it is a shard the CRC-32."""


class StoreWriter:
    """The one writer of a store. Made by `create` or `resume`; used by one thread at a time.

    Attributes
    ----------
    schemas
        What was declared of each parameter, by its group: empty for the root, which has one only.
    bytes_written
        Bytes put on disk so far.
    spent, last_step
        What recording took, and the last step, as far as it is committed; -1 before there is one.
    """

    def __init__(self, path: Path, schemas: Mapping[str, Schema]) -> None:
        self._files = LocalFiles(path)
        self.schemas = schemas
        self.bytes_written = 0
        self.spent = Overhead()
        self.last_step = -1
        self._lock: WriterLock  # taken once it is clear that all can be declared
        self._commit = Commit()
        self._ledger = Commit()  # what a commit of all its lines says
        self._capacity = 0
        self._documents: dict[str, dict[str, Any]] = {}
        self._per_step = PerStepValues()
        self._labels: FileSizes = {}
        self._stopwatch = Stopwatch()
        self._disk = self._files.writer(self._stopwatch)

    @classmethod
    def create(
        cls,
        path: StorePath,
        schema: Schema | Mapping[str, Schema],
        *,
        labels: TokenLabels | Mapping[str, TokenLabels] | None = None,
        token_ids: Mapping[str, np.ndarray] | None = None,
        n_rows: int | None = None,
        overwrite: bool = False,
    ) -> Self:
        """Declare a whole store on disk and take its lock.

        Parameters
        ----------
        path
            Directory to create.
        schema, labels
            Of a single parameter at the root of the store, or of several by their names.
        token_ids
            By name, which rows of a parameter are recorded where not all are: ascending, int64.
        n_rows
            Rows to declare, where known. The store grows when it must, and is trimmed in the end.
        overwrite
            Replace a store that lies at `path`. Anything else there is never replaced.

        Raises
        ------
        ConfigError
            If the parameters do not fit together or into a store, or labels do not fit.
        StoreExistsError, StoreLockedError, StoreError
            If the path is taken, another process records there, or it cannot be written.
        """
        path = on_disk(path).absolute()  # the process may change its directory
        schemas, labels = by_group(schema, labels)
        check_schemas(schemas, labels)
        check_vacant(path, overwrite=overwrite)
        writer = cls(path, schemas)
        coordinates = coordinates_of(schemas, labels, token_ids or {})
        writer._capacity = writer._layout.capacity(n_rows or 1)
        writer._documents = declare(schemas, coordinates, writer._capacity)
        remedy = "choose a directory that can be written"
        with ExitStack() as undo, disk_errors_named(f"create a store at {path}", remedy):
            writer._lock = WriterLock(path)
            undo.callback(writer._lock.release)
            writer._clear(overwrite=overwrite)
            undo.callback(writer._disk.remove)
            undo.callback(writer._disk.close)
            writer._begin(vectors(coordinates))
            undo.pop_all()
        return writer

    @classmethod
    def resume(
        cls,
        path: StorePath,
        schema: Schema | Mapping[str, Schema],
        *,
        labels: TokenLabels | Mapping[str, TokenLabels] | None = None,
        token_ids: Mapping[str, np.ndarray] | None = None,
        n_rows: int | None = None,
        kept_rows: int | None = None,
        approve: Callable[[Sequence[StoreReader], int], None] = lambda readers, kept_rows: None,
    ) -> Self:
        """Go on with a store, whether it was closed or its writer was killed.

        Whatever the commit record does not know is removed. The next block begins with the first
        row that is not kept, or with the one that has it: rows of that one which are kept must be
        committed again with it.

        Parameters
        ----------
        path, schema, labels, token_ids, n_rows
            As in `create`. They are compared with what was recorded (`check_resumable`).
        kept_rows
            Committed rows to keep. All by default.
        approve
            Called with a reader of each parameter and the rows that are kept, before anything is
            changed. What it raises is raised, and the store is as it was.

        Raises
        ------
        ResumeError, ConfigError
            If not the same would be recorded, or the rows to keep are not there.
        StoreError
            If there is none that can be read, another process is recording into it, or the disk
            cannot be written. Then as many rows are there as before, or those kept.
        """
        path = on_disk(path).absolute()
        schemas, labels = by_group(schema, labels)
        StoreReader.open_each(path)  # what is no store is not locked
        remedy = "make room or choose a disk that can be written"
        with ExitStack() as undo, disk_errors_named(f"resume {path}", remedy):
            lock = WriterLock(path)
            undo.callback(lock.release)
            readers = StoreReader.open_each(path)
            token_ids = token_ids or {}
            kept_rows = check_resumable(readers, schemas, labels, token_ids, kept_rows=kept_rows)
            approve(readers, kept_rows)
            cut = plan_cut(readers, kept_rows)
            writer = cls(path, {reader.group: reader.schema for reader in readers})
            writer._lock = lock
            undo.callback(writer._disk.close)
            writer._go_on(readers, *cut, writer._layout.capacity(max(n_rows or 1, kept_rows)))
            undo.pop_all()
        return writer

    @property
    def path(self) -> Path:
        """Where the store lies."""
        return self._files.path

    @property
    def n_rows(self) -> int:
        """Rows committed so far."""
        return self._commit.n_rows

    def commit_block(
        self,
        first_row: int,
        n_rows: int,
        arrays: Mapping[str, np.ndarray],
        scalars: Mapping[str, np.ndarray],
        overhead: Overhead | None = None,
        steps: np.ndarray | None = None,
        *,
        audit: AuditCounts | None = None,
        marked: MarkedRows | None = None,
    ) -> None:
        """Write one block and commit it. When this returns, its rows survive a power loss.

        A block that was committed short (by a flush) may be committed again with more rows.

        Parameters
        ----------
        first_row
            First row of the block, a multiple of `block_steps`.
        n_rows
            Rows that count, from `first_row` on. The rest is stored as missing.
        arrays
            The bits of each variable of each parameter, by its path in the store (`array_path`):
            shape `(block_steps, token, dim)`. Rows beyond `n_rows` are overwritten.
        scalars
            The values of each per-step scalar, by its path: float64, shape `(block_steps,)`.
        overhead
            What training spent on recording since the commit before, where that is measured.
        steps
            The step of each row, ascending, int64. Row t is of step t by default.
        audit
            How many of the steps were audited, where they were.
        marked
            The rows of which all but the gradient was worked out (`filled`), or is `missing`.

        Raises
        ------
        OSError
            If a file cannot be written, or the store is no longer there (StoreError). Committed
            rows stay as they were.
        """
        self._check_in_place()
        end_row = first_row + n_rows
        if first_row > self.n_rows:
            raise StoreError(f"rows {self.n_rows} to {first_row - 1} were never committed")
        if first_row % self._layout.block_steps or end_row < self.n_rows:
            raise StoreError(f"rows from {first_row} on do not continue the last block")
        if (end := first_row + self._layout.block_steps) > self._capacity:
            self._capacity = self._layout.capacity(max(end, 2 * self._capacity))
            resize(self._documents, self._capacity)
            self._write_metadata()
        steps = np.arange(first_row, end_row) if steps is None else steps[:n_rows]
        told = self._write_arrays(first_row, steps, arrays, scalars)
        told["files"] |= self._labels | self._write_scalars(first_row, steps, scalars)
        self._disk.settle()
        self._check_in_place()  # that may have taken seconds
        entry = {"rows": (first_row, end_row), **told}
        entry |= {} if self._ledger.ledger_bytes else {"metadata": self._documents}
        entry |= {} if audit is None else {"audit": audit.to_json()}
        entry |= {name: rows for name, rows in (marked or {}).items() if rows}
        if overhead is not None:
            spent = overhead + self._stopwatch.lap()
            entry["overhead"] = spent.to_json()
            self.spent += spent
        self._append(seal(entry) + b"\n", end_row)
        self._disk.sync()
        self._replace_commit(self._ledger)
        self._labels = {}
        self.last_step = int(steps[-1])

    def close(self) -> None:
        """Trim the arrays to what was committed, mark the store complete, release the lock.

        A store without a row is removed. Metadata are consolidated only now: a consolidated copy
        would go stale while arrays grow. Errors are those of `commit_block`.
        """
        try:
            self._check_in_place()
            if self.n_rows == 0:
                self._disk.remove()
                return
            resize(self._documents, self.n_rows)
            consolidate(self._documents, self.schemas)
            self._write_metadata()
            self._replace_commit(msgspec.structs.replace(self._commit, complete=True))
        finally:
            self.release()

    def discard(self) -> None:
        """Remove the store, of which nothing is wanted, and release the lock."""
        try:
            self._check_in_place()
            self._disk.close()
            self._disk.remove()
        finally:
            self.release()

    def release(self) -> None:
        """Give up the lock; nothing more is committed."""
        self._disk.close()
        self._lock.release()

    def _check_in_place(self) -> None:
        """Raise StoreError if the store was removed or replaced since its lock was taken."""
        if self._lock.is_in_place:
            return
        self._commit, self.last_step = Commit(), -1  # nothing of it is left
        raise StoreError(
            f"the store at {self.path} was removed or replaced while it was recorded, and nothing "
            "more is written there; record again, to a path that nothing else writes to"
        )

    @property
    def _layout(self) -> Layout:
        """How the first parameter is cut; blocks of all have as many steps."""
        return next(iter(self.schemas.values())).layout

    def _clear(self, *, overwrite: bool) -> None:
        """Remove an old store, whose lock is held, but for the lock.

        The commit record goes first: whatever a crash leaves, nobody takes it for the old store.
        """
        if not overwrite and read_attribute(self._files) is not None:
            raise StoreExistsError(
                f"{self.path} was just recorded by another process; choose another path"
            )
        self._disk.delete([COMMIT])
        self._disk.delete(key for key in self._files.list() if key not in (LOCK, HOLDER))

    def _begin(self, values: Mapping[str, np.ndarray]) -> None:
        """Write what was declared: an empty store, with the values of all labels."""
        for key, document in self._documents.items():
            group = array_of(key)
            if group and group in self.schemas and any(self._files.list(group)):
                raise StoreError(f"this disk takes {group} and another parameter for the same")
            self._disk.put(key, [encoded(document)])
        for key, content in values.items():
            # The first commit has what was declared in the ledger.
            self._labels |= self._write_vector(key, encode_vector(content))
        self._disk.sync()
        self._disk.append(LEDGER, 0, b"")  # a commit record is never without a ledger
        self._replace_commit(self._commit)
        self._stopwatch.lap()  # of the steps to come only

    def _go_on(
        self,
        readers: Sequence[StoreReader],
        ledger: Ledger,
        before: Commit,
        line: bytes,
        capacity: int,
    ) -> None:
        """Cut a store off and grow its arrays again. Wherever a crash ends this, it can be read."""
        self._capacity = capacity
        self._documents = {key: {**document} for key, document in ledger.metadata.items()}
        resize(self._documents, capacity)
        self._per_step.load(readers, before.n_rows)
        self._ledger = before
        self._append(line, before.n_rows)
        self._replace_commit(self._ledger)
        self.last_step = int(readers[0].read_steps()[before.n_rows - 1])
        self._disk.delete(leftovers(readers, before.n_rows))
        self._write_metadata()
        self._stopwatch.lap()

    def _write_arrays(
        self,
        first_row: int,
        steps: np.ndarray,
        arrays: Mapping[str, np.ndarray],
        scalars: Mapping[str, np.ndarray],
    ) -> dict[str, Any]:
        """Write the shards of a block; return what a line of the ledger says of them."""
        told: dict[str, dict[str, Any]] = {"files": {}, "chunks": {}}
        for group, schema in self.schemas.items():
            bits, numbers = (
                {name: of[array_path(group, name)] for name in names}
                for of, names in ((arrays, schema.dtypes), (scalars, schema.numbers))
            )
            block = Block(schema, bits, len(steps), numbers, steps)
            for array in schema.arrays.values():
                path = array_path(group, array.name)
                # Each chunk has its own checksums: one of the file would only take time.
                key = shard_key(path, first_row // self._layout.block_steps, schema.shape)
                told["files"][key] = {"bytes": self._write(key, block.encode(array))}
                told["chunks"][path] = [
                    astuple(checksums) for checksums in block.checksums[array.name]
                ]
                if array.name in block.values:
                    told.setdefault("values", {})[path] = block.values[array.name]
        return told

    def _write_scalars(
        self, first_row: int, steps: np.ndarray, scalars: Mapping[str, np.ndarray]
    ) -> FileSizes:
        """Write the chunks of per-step values that the block lies in, all rows so far."""
        steps_and_scalars = {
            path: (steps if name == "step" else scalars[path])[: len(steps)]
            for group, schema in self.schemas.items()
            for name in schema.per_step
            for path in [array_path(group, name)]
        }
        chunks = self._per_step.add(first_row, steps_and_scalars)
        index, files = first_row // layout.SCALAR_CHUNK_STEPS, FileSizes()
        for array, content in self._stopwatch.time_each("encode_s", chunks):
            files |= self._write_vector(vector_key(array, index), content)
        for key, rows in logged_blocks(self.schemas, first_row, len(steps), scalars):
            files |= self._write_vector(key, encode_vector(rows))
        return files

    def declare_logged(self, name: str, logged: LoggedArray) -> None:
        """Declare what is logged of each step; ConfigError once a commit has all declarations."""
        if self._ledger.ledger_bytes:
            raise ConfigError(
                f"{name} was first logged after step {self.last_step} was committed; log it from "
                "the first step on"
            )
        self.schemas, documents = with_logged(self.schemas, name, logged, self._capacity)
        self._documents |= documents
        self._write_metadata()

    def _write_metadata(self) -> None:
        for key, document in self._documents.items():
            self._disk.put(key, [encoded(document)])
        self._disk.sync()

    def _write_vector(self, key: str, content: bytes) -> FileSizes:
        """Write a chunk that is a file of its own; return size and checksum of the file."""
        return {key: {"bytes": self._write(key, [content]), "crc32": zlib.crc32(content)}}

    def _write(self, key: str, parts: Iterable[bytes]) -> int:
        n_bytes = self._disk.put(key, parts)
        self.bytes_written += n_bytes
        return n_bytes

    def _append(self, line: bytes, n_rows: int) -> None:
        """Append a line to the ledger. It stays there if the commit fails: files may fit it."""
        n_bytes, crc32 = self._ledger.ledger_bytes, self._ledger.ledger_crc32
        self._disk.append(LEDGER, n_bytes, line)
        n_bytes, crc32 = n_bytes + len(line), zlib.crc32(line, crc32)
        self._ledger = Commit(n_rows=n_rows, ledger_bytes=n_bytes, ledger_crc32=crc32)

    def _replace_commit(self, commit: Commit) -> None:
        self._disk.put(COMMIT, [commit.to_bytes()])
        self._disk.sync()
        self._commit = commit
