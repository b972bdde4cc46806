"""Write a store: declare it whole, then append blocks to it, each committed before the next.

`metadata` declares the arrays, `shard` encodes them, and `files` writes them, each file whole or
not at all. A block of all parameters is committed in one order::

    array files -> ledger (sizes, checksums) -> names of the files -> commit record

So whatever a crash leaves, the ledger knows it: a file that a commit replaces (the last block's, if
a flush committed it short, and the scalars') is what one line of the ledger says or the next.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple, replace
from pathlib import Path
from typing import Self

import msgspec
import numpy as np

from thimble_zarr.bits import fill_value
from thimble_zarr.errors import ConfigError, StoreError, StoreExistsError, ThimbleError
from thimble_zarr.format import layout
from thimble_zarr.format.documents import TooLargeError, check_size
from thimble_zarr.format.layout import Layout
from thimble_zarr.format.overhead import Overhead, Stopwatch
from thimble_zarr.format.schema import Json, Schema, TokenLabels, array_path, check_group_name
from thimble_zarr.store.contents import StorePath, check_vacant, read_attribute
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.keys import (
    COMMIT,
    HOLDER,
    LEDGER,
    LOCK,
    array_key,
    array_of,
    metadata_key,
    shard_key,
    vector_key,
)
from thimble_zarr.store.ledger import Commit, Document, seal
from thimble_zarr.store.lock import WriterLock
from thimble_zarr.store.metadata import CONSOLIDATED, consolidated, declare, encoded, resized
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.resume import Cut, check_resumable, chosen_ids, leftovers, plan_cut
from thimble_zarr.store.shard import BLOSC_LEVEL, ShardEncoder, encode_vector

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
    spent
        What recording took so far, as far as it is committed.
    last_step
        The last committed step, -1 before there is one.
    """

    def __init__(
        self, path: Path, schemas: Mapping[str, Schema], *, level: int = BLOSC_LEVEL
    ) -> None:
        self._files = LocalFiles(path)
        self.schemas = schemas
        self.bytes_written = 0
        self.spent = Overhead()
        self.last_step = -1
        self._level = level
        self._lock: WriterLock  # taken once it is clear that all can be declared
        self._commit = Commit()
        self._ledger_bytes = 0
        self._ledger_crc32 = 0
        self._documents: dict[str, Document] = {}
        self._capacity = 0
        self._scalars: dict[str, np.ndarray] = {}
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
        schema
            What will be recorded: of a single parameter at the root of the store, or of several
            by the names of their groups.
        labels
            Coordinates of the token axis, of several parameters by name.
        token_ids
            By group, which rows of a parameter are recorded where not all are (`whole_tokens` of
            its schema): ascending, int64, shape `(token,)`.
        n_rows
            Rows to declare, where known. The store grows beyond it when it must, and is trimmed
            to what was committed when it is closed.
        overwrite
            Replace a store that lies at `path`. Anything else there is never replaced.

        Raises
        ------
        ConfigError
            If parameters are not cut into blocks of as many steps, a name cannot be that of a
            group, labels do not fit, or what is known of the run is more than readers take.
        StoreExistsError
            If the path is taken.
        StoreLockedError
            If a store lies there that another process is recording into.
        StoreError
            If the directory cannot be created or written.
        """
        path = Path(path).absolute()  # the process may change its directory
        schemas, labels = _by_group(schema, labels)
        _check_schemas(schemas, labels)
        check_vacant(path, overwrite=overwrite)
        writer = cls(path, schemas)
        values = writer._declare(labels, token_ids or {}, writer._layout.capacity(n_rows or 1))
        with ExitStack() as undo:
            try:
                writer._lock = WriterLock(path)
                undo.callback(writer._lock.release)
                writer._clear(overwrite=overwrite)
                undo.callback(writer._disk.remove)
                undo.callback(writer._disk.close)
                writer._begin(values)
            except ThimbleError:
                raise
            except OSError as error:
                raise StoreError(
                    f"cannot create a store at {path}: {error.strerror or error}; "
                    "choose a directory that can be written"
                ) from error
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
        path
            The store.
        schema
            What would be recorded now, as in `create`. Software other than torch, when recording
            started and what the user said of the run stay as they are in the store.
        labels
            Coordinates of the token axis, where they are to be compared with those in the store.
        token_ids
            As in `create`.
        n_rows
            Rows to declare, where known.
        kept_rows
            Committed rows to keep. All by default.
        approve
            Called with a reader of each parameter and the rows that are kept, before anything is
            changed. What it raises is raised, and the store is as it was.

        Raises
        ------
        NotAStoreError, UnsupportedFormatError, DamagedStoreError
            If there is no store at `path` that can be read.
        ResumeError
            If not the same would be recorded, fewer rows are committed than should be kept, or
            not every step was recorded.
        ConfigError
            If what is known of the run is more than readers take.
        StoreLockedError
            If another process is recording into it.
        StoreError
            If the disk cannot be written. Then as many rows are there as before, or those kept.
        """
        path = Path(path).absolute()
        schemas, labels = _by_group(schema, labels)
        StoreReader.open_each(path)  # what is no store is not locked
        with ExitStack() as undo:
            try:
                lock = WriterLock(path)
                undo.callback(lock.release)
                readers = StoreReader.open_each(path)
                kept_rows = check_resumable(
                    readers, schemas, labels, token_ids or {}, kept_rows=kept_rows
                )
                approve(readers, kept_rows)
                cut = plan_cut(readers, kept_rows)
                # What was declared stays: the ledger has a copy of it.
                level = readers[0].declared_level
                writer = cls(path, {r.group: r.schema for r in readers}, level=level)
                writer._lock = lock
                undo.callback(writer._disk.close)
                writer._go_on(readers, cut, writer._layout.capacity(max(n_rows or 1, kept_rows)))
            except ThimbleError:
                raise
            except OSError as error:
                raise StoreError(
                    f"cannot resume {path}: {error.strerror or error}; make room or choose a "
                    "disk that can be written"
                ) from error
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
    ) -> None:
        """Write one block and commit it. When this returns, its rows survive a power loss.

        A block that was committed short (by a flush) may be committed again with more rows.

        Parameters
        ----------
        first_row
            First row of the block, a multiple of `block_steps`.
        n_rows
            Rows that count, from `first_row` on. The rest of the block is stored as missing.
        arrays
            For each variable of each parameter, by its path in the store (`array_path`), its bits,
            shape `(block_steps, token, dim)`. Rows beyond `n_rows` are overwritten with the fill
            value.
        scalars
            For each per-step scalar, by its path, its values, float64, shape `(block_steps,)`.
        overhead
            What training spent on recording since the commit before, where that is measured.
        steps
            The step of each row, ascending, int64, shape `(block_steps,)` or shorter. Row t is of
            step t by default.

        Raises
        ------
        OSError
            If a file cannot be written. Committed rows stay as they were, and can be read.
        StoreError
            If the store is no longer there. Nothing is written to what is there now.
        """
        self._check_in_place()
        if first_row > self.n_rows:
            raise StoreError(f"rows {self.n_rows} to {first_row - 1} were never committed")
        if first_row % self._layout.block_steps or first_row + n_rows < self.n_rows:
            raise StoreError(f"rows from {first_row} on do not continue the last block")
        if steps is None:
            steps = np.arange(first_row, first_row + n_rows)
        self._grow(first_row + self._layout.block_steps)
        files, chunks = self._write_arrays(first_row, n_rows, arrays)
        files = self._labels | files | self._write_scalars(first_row, steps[:n_rows], scalars)
        self._disk.settle()
        self._check_in_place()  # that may have taken seconds
        end_row = first_row + n_rows
        entry: dict[str, Json] = {"rows": (first_row, end_row), "files": files, "chunks": chunks}
        if not self._ledger_bytes:
            entry["metadata"] = self._documents
        if overhead is not None:
            # What this commit has still to do is in the next lap.
            spent = overhead + self._stopwatch.lap()
            entry["overhead"] = spent.to_json()
            self.spent += spent
        self._append(seal(entry) + b"\n")
        self._disk.sync()
        self._commit_rows(end_row)
        self._labels = {}
        self.last_step = int(steps[n_rows - 1])

    def close(self) -> None:
        """Trim the arrays to what was committed, mark the store complete, release the lock.

        A store without a row is removed. Metadata are consolidated only now: a consolidated copy
        would go stale while arrays grow.

        Raises
        ------
        OSError
            If a file cannot be written. The lock is released all the same.
        StoreError
            If the store is no longer there. What is there now stays as it is.
        """
        try:
            self._check_in_place()
            if self.n_rows == 0:
                self._disk.remove()
                return
            self._resize(self.n_rows)
            self._documents |= {
                key: {**self._documents[key], CONSOLIDATED: consolidated(group, self._documents)}
                for group in {*self.schemas, ""}
                for key in [metadata_key(group)]
            }
            self._write_metadata()
            self._replace_commit(msgspec.structs.replace(self._commit, complete=True))
        finally:
            self.release()

    def discard(self) -> None:
        """Remove the store, of which nothing is wanted, and release the lock.

        Raises
        ------
        StoreError
            If the store is no longer there. What is there now stays as it is.
        """
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

    def _declare(
        self,
        labels: Mapping[str, TokenLabels],
        token_ids: Mapping[str, np.ndarray],
        capacity: int,
    ) -> dict[str, np.ndarray]:
        """Declare everything in memory; return the values of all labels, by their files.

        Raises
        ------
        ConfigError
            If any of it is more than readers take.
        """
        coordinates = {
            group: dict(_coordinates(schema, labels.get(group), token_ids.get(group)))
            for group, schema in self.schemas.items()
        }
        self._documents = declare(self.schemas, coordinates, capacity, level=self._level)
        self._capacity = capacity
        values = {
            vector_key((group, name)): array
            for group, arrays in coordinates.items()
            for name, array in arrays.items()
            if len(array)
        }
        self._check_readable(values)
        return values

    def _check_readable(self, labels: Iterable[str]) -> None:
        """Raise ConfigError if a document would be larger than what is read.

        The ledger's first line has a copy of all metadata, and so is larger than any document, also
        than the root's once they are consolidated: only spaces may make one larger.
        """
        largest = {"bytes": 2**63, "crc32": 2**32}
        files = dict.fromkeys(labels, largest)
        chunks: dict[str, Json] = {}
        for group, schema in self.schemas.items():
            n_chunks = -(-schema.n_tokens // schema.layout.chunk_tokens)
            for name in schema.dtypes:
                files[shard_key((group, name), 0, schema.shape)] = largest
                chunks[array_key((group, name))] = [(2**32, 2**32)] * n_chunks
            files |= {vector_key((group, name)): largest for name in schema.per_step}
        try:
            for document in self._documents.values():
                check_size(encoded(document))
            line: dict[str, Json] = {
                "rows": (0, self._layout.block_steps),
                "files": files,
                "chunks": chunks,
                "metadata": self._documents,
                "overhead": dict.fromkeys(Overhead().to_json(), 2**53 / 3),
                "crc32": 2**32,
            }
            check_size(json.dumps(line).encode())
        except TooLargeError as error:
            attrs_bytes = sum(len(json.dumps(one.attrs)) for one in self.schemas.values())
            raise ConfigError(
                f"the description of the run is too large for one document: {error}; "
                f"{attrs_bytes:,} of the bytes are `attrs`, which are kept with each parameter: "
                "keep large things in a file beside the store, or record fewer parameters"
            ) from error

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
                raise StoreError(
                    f"this disk takes {group} and another parameter's name for the same"
                )
            self._disk.put(key, [encoded(document)])
        for key, content in values.items():
            # The first commit has what was declared in the ledger.
            self._labels |= self._write_vector(key, self._encoded_vector(content))
        self._disk.sync()
        self._disk.append(LEDGER, 0, b"")  # a commit record is never without a ledger
        self._replace_commit(self._commit)
        self._stopwatch.lap()  # of the steps to come only

    def _go_on(self, readers: Sequence[StoreReader], cut: Cut, capacity: int) -> None:
        """Cut a store off and grow its arrays again. Wherever a crash ends this, it can be read."""
        labels = {reader.group: reader.read_labels() for reader in readers}
        self._declare(labels, chosen_ids(readers), capacity)
        self._load_scalars(readers, cut.n_rows)
        self._ledger_bytes, self._ledger_crc32 = cut.ledger_bytes, cut.ledger_crc32
        self._append(cut.line)
        self._commit_rows(cut.n_rows)
        self.last_step = int(readers[0].read_steps()[cut.n_rows - 1])
        self._disk.delete(leftovers(readers, cut.n_rows))
        self._write_metadata()
        self._stopwatch.lap()

    def _write_arrays(
        self, first_row: int, n_rows: int, arrays: Mapping[str, np.ndarray]
    ) -> tuple[FileSizes, dict[str, Json]]:
        """Write the shards of a block; return their sizes, and checksums of their chunks."""
        files: FileSizes = {}
        chunks: dict[str, Json] = {}
        for group, schema in self.schemas.items():
            for name, native in schema.dtypes.items():
                path, fill = array_path(group, name), fill_value(native)
                bits = arrays[path]
                bits[n_rows:] = fill
                shard = ShardEncoder(bits, schema.layout.chunk_tokens, fill, schema.stored_order)
                # Each chunk has its own checksums: one of the file would only take time.
                key = shard_key((group, name), first_row // self._layout.block_steps, schema.shape)
                files[key] = {"bytes": self._write(key, shard)}
                chunks[path] = [astuple(checksums) for checksums in shard.checksums]
        return files, chunks

    def _write_scalars(
        self, first_row: int, steps: np.ndarray, scalars: Mapping[str, np.ndarray]
    ) -> FileSizes:
        """Write the chunks of per-step values that the block lies in, all rows so far.

        Parameters of one group of the optimizer have the same learning rate and all else: what is
        the same in all rows so far is kept in memory once, and encoded once.
        """
        chunk, offset = divmod(first_row, layout.SCALAR_CHUNK_STEPS)
        before, after = self._scalars if offset else {}, dict[str, np.ndarray]()
        known: dict[tuple[str, int, bytes], tuple[np.ndarray, bytes]] = {}
        files: FileSizes = {}
        names = [(group, name) for group, of in self.schemas.items() for name in of.per_step]
        for group, name in names:
            path = array_path(group, name)
            rows = (steps if name == "step" else scalars[path])[: len(steps)]
            same = name, id(before.get(path)), rows.tobytes()
            if same not in known:
                values = before[path].copy() if path in before else _missing_values(name)
                values[offset : offset + len(rows)] = rows
                known[same] = values, self._encoded_vector(values)
            after[path], content = known[same]
            files |= self._write_vector(vector_key((group, name), chunk), content)
        self._scalars = after
        return files

    def _load_scalars(self, readers: Sequence[StoreReader], n_rows: int) -> None:
        """Take up the chunk of per-step values that the next block lies in."""
        start = n_rows // layout.SCALAR_CHUNK_STEPS * layout.SCALAR_CHUNK_STEPS
        known: dict[tuple[str, bytes], np.ndarray] = {}
        for reader in readers:
            for name, values in (reader.read_scalars() | {"step": reader.read_steps()}).items():
                rows = values[start:n_rows]
                chunk = known.setdefault((name, rows.tobytes()), _missing_values(name))
                chunk[: len(rows)] = rows
                self._scalars[array_path(reader.group, name)] = chunk

    def _grow(self, n_rows: int) -> None:
        if n_rows > self._capacity:
            self._resize(self._layout.capacity(max(n_rows, 2 * self._capacity)))
            self._write_metadata()

    def _resize(self, n_rows: int) -> None:
        self._documents = {key: resized(one, n_rows) for key, one in self._documents.items()}
        self._capacity = n_rows

    def _write_metadata(self) -> None:
        for key, document in self._documents.items():
            self._disk.put(key, [encoded(document)])
        self._disk.sync()

    def _encoded_vector(self, values: np.ndarray) -> bytes:
        with self._stopwatch.time("encode_s"):
            return encode_vector(values)

    def _write_vector(self, key: str, content: bytes) -> FileSizes:
        """Write a chunk that is a file of its own; return size and checksum of the file."""
        return {key: {"bytes": self._write(key, [content]), "crc32": zlib.crc32(content)}}

    def _write(self, key: str, parts: Iterable[bytes]) -> int:
        n_bytes = self._disk.put(key, parts)
        self.bytes_written += n_bytes
        return n_bytes

    def _append(self, line: bytes) -> None:
        """Append a line to the ledger. It stays there if the commit fails: files may fit it."""
        self._disk.append(LEDGER, self._ledger_bytes, line)
        self._ledger_bytes += len(line)
        self._ledger_crc32 = zlib.crc32(line, self._ledger_crc32)

    def _commit_rows(self, n_rows: int) -> None:
        """Commit rows with all of the ledger."""
        n_bytes, crc32 = self._ledger_bytes, self._ledger_crc32
        self._replace_commit(Commit(n_rows=n_rows, ledger_bytes=n_bytes, ledger_crc32=crc32))

    def _replace_commit(self, commit: Commit) -> None:
        self._disk.put(COMMIT, [commit.to_bytes()])
        self._disk.sync()
        self._commit = commit


def _missing_values(name: str) -> np.ndarray:
    """Return a chunk of per-step values of which none is there."""
    return np.full(layout.SCALAR_CHUNK_STEPS, np.int64(-1) if name == "step" else np.nan)


def _coordinates(
    schema: Schema, labels: TokenLabels | None, token_ids: np.ndarray | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and values of the coordinates of the first axis, as it lies on disk.

    Text goes into two integer arrays, as Arrow does it: not every Zarr reader knows strings.
    """
    order, labels = schema.stored_order, labels or TokenLabels()
    if order is not None:
        labels = labels.of(order)
    if schema.has_tokens or token_ids is not None:
        ids = np.arange(schema.n_tokens) if token_ids is None else token_ids
        ids = ids if order is None else ids[order]
        yield schema.dims[0], ids
    for name in ("count", "live", "dead"):
        values = getattr(labels, name)
        if values is not None:
            yield name, np.asarray(values)
    if labels.text is not None:
        utf8 = [text.encode() for text in labels.text]
        yield "text_bytes", np.frombuffer(b"".join(utf8), np.uint8)
        yield "text_end", np.cumsum([len(text) for text in utf8], dtype=np.int64)


def _by_group(
    schema: Schema | Mapping[str, Schema],
    labels: TokenLabels | Mapping[str, TokenLabels] | None,
) -> tuple[dict[str, Schema], dict[str, TokenLabels]]:
    """Return what is known of each parameter, by its group; the one at the root has no name."""
    return (
        {"": schema} if isinstance(schema, Schema) else _named(schema),
        {"": labels} if isinstance(labels, TokenLabels) else dict(labels or {}),
    )


def _named(schemas: Mapping[str, Schema]) -> dict[str, Schema]:
    return {group: replace(schema, parameter=group) for group, schema in schemas.items()}


def _check_schemas(schemas: Mapping[str, Schema], labels: Mapping[str, TokenLabels]) -> None:
    """Raise ConfigError unless a store can hold all parameters with their labels."""
    lengths = {schema.layout.block_steps for schema in schemas.values()}
    if len(lengths) != 1:
        raise ConfigError(
            f"all parameters of a store need blocks of the same length, not {sorted(lengths)} steps"
        )
    for group, schema in schemas.items():
        if group or len(schemas) > 1:
            check_group_name(group)
        schema.check_json()
        if group in labels:
            schema.check_labels(labels[group])
