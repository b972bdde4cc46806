"""Write a store: declare it whole, then append blocks to it, each committed before the next.

Zarr declares the arrays, `shard` encodes them, and `disk` writes them, each file whole or not at
all. A block of all parameters is committed in one order::

    array files -> ledger (sizes, checksums) -> names of the files -> commit record

So whatever a crash leaves, the ledger knows it: a file that a commit replaces (the last block's, if
a flush committed it short, and the scalars') is what one line of the ledger says or the next.

Reading (`store`) needs no Zarr, whose import takes as long as many an answer: hence two modules.
"""

import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple, replace
from pathlib import Path
from typing import Self

import msgspec
import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec
from zarr.core.buffer import Buffer, cpu
from zarr.core.common import JSON
from zarr.core.metadata import ArrayV3Metadata
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from thimble_zarr.bits import BFLOAT16_RECIPE, fill_value, storage_dtype
from thimble_zarr.errors import ConfigError, StoreError, StoreExistsError, ThimbleError
from thimble_zarr.format import layout
from thimble_zarr.format.documents import TooLargeError, check_size, parsed
from thimble_zarr.format.layout import Layout
from thimble_zarr.format.overhead import Overhead, Stopwatch
from thimble_zarr.format.schema import (
    ATTRIBUTE,
    LABELS,
    PARAMETERS,
    ROW_LABEL,
    VARIABLES,
    Json,
    Schema,
    TokenLabels,
    array_path,
    check_group_name,
    versioned,
)
from thimble_zarr.store.contents import StorePath, is_without_rows, read_attribute
from thimble_zarr.store.files.disk import Disk, make_directory, remove_file, remove_files
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.keys import (
    BOOKKEEPING,
    COMMIT,
    HOLDER,
    LEDGER,
    LOCK,
    METADATA,
    shard_key,
)
from thimble_zarr.store.ledger import Commit, seal
from thimble_zarr.store.lock import WriterLock
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.resume import (
    Cut,
    check_resumable,
    chosen_ids,
    leftovers,
    plan_cut,
)
from thimble_zarr.store.shard import (
    BLOSC_LEVEL,
    MAX_CHUNK_BYTES,
    ShardEncoder,
    chunk_order,
    encode_vector,
)

_Array = zarr.Array[ArrayV3Metadata]


class StoreWriter:
    """The one writer of a store. Made by `create`; used by one thread at a time.

    Attributes
    ----------
    path
        Root directory of the store.
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
        self.path = path
        self._level = level
        self.schemas = schemas
        self.bytes_written = 0
        self.spent = Overhead()
        self.last_step = -1
        self._lock: WriterLock  # taken once it is clear that all can be declared
        self._commit = Commit()
        self._ledger_bytes = 0
        self._ledger_crc32 = 0
        self._encoded: dict[str, Buffer] = {}
        alone = schemas.get("")
        attribute = versioned({PARAMETERS: [*schemas]}) if alone is None else alone.to_attribute()
        self._root = zarr.create_group(
            MemoryStore(self._encoded), zarr_format=3, attributes={ATTRIBUTE: attribute}
        )
        self._arrays: dict[str, _Array] = {}
        self._scalars: dict[str, np.ndarray] = {}
        self._declared: dict[str, dict[str, int]] = {}
        self._stopwatch = Stopwatch()
        self._disk = Disk(self._stopwatch)

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
                make_directory(path / BOOKKEEPING)
                writer._lock = WriterLock(path)
                undo.callback(writer._lock.release)
                _clear(path, overwrite=overwrite)
                undo.callback(shutil.rmtree, path, ignore_errors=True)
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
        block, offset = divmod(first_row, self._layout.block_steps)
        if first_row > self.n_rows:
            raise StoreError(f"rows {self.n_rows} to {first_row - 1} were never committed")
        if offset or first_row + n_rows < self.n_rows:
            raise StoreError(f"rows from {first_row} on do not continue the last block")
        if steps is None:
            steps = np.arange(first_row, first_row + n_rows)
        files = dict(self._declared)
        chunks: dict[str, list[tuple[int, int]]] = {}
        self._grow(first_row + self._layout.block_steps)
        for group, schema in self.schemas.items():
            for name, native in schema.dtypes.items():
                path, fill = array_path(group, name), fill_value(native)
                bits = arrays[path]
                bits[n_rows:] = fill
                shard = ShardEncoder(bits, schema.layout.chunk_tokens, fill, schema.stored_order)
                # Each chunk has its own checksums: one of the file would only take time.
                key = shard_key((group, name), block, schema.shape)
                files[key] = {"bytes": self._write(key, shard)}
                chunks[path] = [astuple(checksums) for checksums in shard.checksums]
        files |= self._write_scalars(first_row, steps[:n_rows], scalars)
        self._disk.settle()
        self._check_in_place()  # that may have taken seconds
        end_row = first_row + n_rows
        entry: dict[str, Json] = {"rows": (first_row, end_row), "files": files, "chunks": chunks}
        if not self._ledger_bytes:
            entry["metadata"] = self._metadata()
        if overhead is not None:
            # What this commit has still to do is in the next lap.
            spent = overhead + self._stopwatch.lap()
            entry["overhead"] = spent.to_json()
            self.spent += spent
        self._append(seal(entry) + b"\n")
        self._disk.sync((self.path / key).parent for key in files)
        self._replace_commit(
            msgspec.structs.replace(
                self._commit,
                n_rows=end_row,
                ledger_bytes=self._ledger_bytes,
                ledger_crc32=self._ledger_crc32,
            )
        )
        self._declared = {}
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
                shutil.rmtree(self.path)
                return
            self._resize(self.n_rows)
            self._consolidate()
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
            shutil.rmtree(self.path, ignore_errors=True)
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

    def _begin(self, values: Mapping[str, np.ndarray]) -> None:
        """Write what was declared: an empty store, with the values of all labels."""
        for group in self.schemas:
            if group:
                if (self.path / group).exists():
                    raise StoreError(
                        f"this disk takes {group} and another parameter's name for the same"
                    )
                make_directory(self.path / group)
        for key, content in values.items():
            # The first commit has what was declared in the ledger.
            self._declared |= self._write_vector(key, self._encoded_vector(content))
        self._write_metadata()
        directories = [self.path / name for name in (*self._arrays, *self.schemas)]
        self._disk.sync([*directories, self.path, self.path.parent])
        self._disk.append(self.path / LEDGER, 0, b"")
        self._disk.sync([self.path / BOOKKEEPING])  # a commit record is never without a ledger
        self._replace_commit(self._commit)
        self._stopwatch.lap()  # of the steps to come only

    def _go_on(self, readers: Sequence[StoreReader], cut: Cut, capacity: int) -> None:
        """Cut a store off and grow its arrays again. Wherever a crash ends this, it can be read."""
        labels = {reader.group: reader.read_labels() for reader in readers}
        self._declare(labels, chosen_ids(readers), capacity)
        self._load_scalars(readers, cut.n_rows)
        self._ledger_bytes, self._ledger_crc32 = cut.ledger_bytes, cut.ledger_crc32
        self._append(cut.line)
        self._replace_commit(
            Commit(
                n_rows=cut.n_rows, ledger_bytes=self._ledger_bytes, ledger_crc32=self._ledger_crc32
            )
        )
        self.last_step = int(readers[0].read_steps()[cut.n_rows - 1])
        remove_files(self.path / key for key in leftovers(readers, cut.n_rows))
        self._write_metadata()
        self._stopwatch.lap()

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
        values: dict[str, np.ndarray] = {}
        self._root.create_group(
            BOOKKEEPING, attributes={"description": "bookkeeping of thimble-zarr, no arrays"}
        )
        for group, schema in self.schemas.items():
            if group:
                self._root.create_group(group, attributes={ATTRIBUTE: schema.to_attribute()})
            self._declare_variables(group, schema, capacity)
            self._declare_scalars(group, capacity)
            values |= self._declare_labels(group, schema, labels.get(group), token_ids.get(group))
        self._check_readable(values)
        return values

    def _check_readable(self, labels: Iterable[str]) -> None:
        """Raise ConfigError if a document would be larger than what is read.

        The ledger's first line has a copy of all metadata, and so is larger than any document, also
        than the root's once they are consolidated: only spaces may make one larger.
        """
        largest = {"bytes": 2**63, "crc32": 2**32}
        files = dict.fromkeys(labels, largest)
        chunks: dict[str, list[tuple[int, int]]] = {}
        for group, schema in self.schemas.items():
            n_chunks = -(-schema.n_tokens // schema.layout.chunk_tokens)
            for name in schema.dtypes:
                path = array_path(group, name)
                files[shard_key((group, name), 0, schema.shape)] = largest
                chunks[path] = [(2**32, 2**32)] * n_chunks
            files |= {f"{array_path(group, name)}/c.0": largest for name in schema.per_step}
        try:
            for content in self._encoded.values():
                check_size(content.to_bytes())
            line: dict[str, Json] = {
                "rows": (0, self._layout.block_steps),
                "files": files,
                "chunks": chunks,
                "metadata": self._metadata(),
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

    def _declare_variables(self, group: str, schema: Schema, capacity: int) -> None:
        steps, tokens = schema.layout.block_steps, schema.layout.chunk_tokens
        shard_tokens = schema.layout.shard_tokens(schema.n_tokens)
        for name, native in schema.dtypes.items():
            attributes: dict[str, JSON] = {"long_name": VARIABLES[name], "dtype": native}
            if native == "bfloat16":
                attributes["encoding"] = BFLOAT16_RECIPE
            rest = schema.shape[1:]
            of_tokens = bool(schema.shape)
            self._create_array(
                array_path(group, name),
                dims=("step", *schema.dims),
                shape=(capacity, *schema.shape),
                dtype=storage_dtype(native),
                fill=fill_value(native),
                chunks=(steps, tokens, *rest) if of_tokens else (steps,),
                shards=(steps, shard_tokens, *rest) if of_tokens else (steps,),
                attributes=attributes,
            )

    def _declare_scalars(self, group: str, capacity: int) -> None:
        for name, long_name in self.schemas[group].per_step.items():
            is_label = name == "step"
            self._create_array(
                array_path(group, name),
                dims=("step",),
                shape=(capacity,),
                dtype=np.dtype(np.int64 if is_label else np.float64),
                fill=-1 if is_label else float("nan"),
                chunks=(layout.SCALAR_CHUNK_STEPS,),
                attributes={"long_name": long_name},
            )

    def _declare_labels(
        self,
        group: str,
        schema: Schema,
        labels: TokenLabels | None,
        token_ids: np.ndarray | None,
    ) -> dict[str, np.ndarray]:
        """Declare the coordinates of the rows; return the values of each, by its file."""
        files: dict[str, np.ndarray] = {}
        for name, dim, values in _label_arrays(schema, labels or TokenLabels(), token_ids):
            path = array_path(group, name)
            self._create_array(
                path,
                dims=(dim,),
                shape=values.shape,
                dtype=values.dtype,
                fill=0,
                chunks=(max(1, len(values)),),
                attributes={"long_name": LABELS.get(name, ROW_LABEL)},
            )
            if len(values):
                files[f"{path}/c.0"] = values
        return files

    def _create_array(
        self,
        path: str,
        *,
        dims: tuple[str, ...],
        shape: tuple[int, ...],
        dtype: np.dtype,
        fill: float,
        chunks: tuple[int, ...],
        shards: tuple[int, ...] | None = None,
        attributes: dict[str, JSON],
    ) -> None:
        chunk_bytes = math.prod(chunks) * dtype.itemsize
        if chunk_bytes > MAX_CHUNK_BYTES:
            raise ConfigError(
                f"{path} would have chunks of {chunk_bytes:,} bytes, and none has more than "
                f"{MAX_CHUNK_BYTES:,}; record some of its rows, or leave it out"
            )
        order = chunk_order(len(shape))
        self._arrays[path] = self._root.create_array(
            path,
            shape=shape,
            dtype=dtype,
            chunks=chunks,
            shards=shards,
            filters=[TransposeCodec(order=order)] if shards and len(order) > 1 else None,
            compressors=chunk_codecs(dtype, self._level),
            fill_value=fill,
            dimension_names=dims,
            chunk_key_encoding={"name": "default", "separator": "."},
            attributes=attributes,
        )

    def _write_scalars(
        self, first_row: int, steps: np.ndarray, scalars: Mapping[str, np.ndarray]
    ) -> dict[str, dict[str, int]]:
        """Write the chunks of per-step values that the block lies in, all rows so far.

        Parameters of one group of the optimizer have the same learning rate and all else: what is
        the same in all rows so far is kept in memory once, and encoded once.
        """
        chunk, offset = divmod(first_row, layout.SCALAR_CHUNK_STEPS)
        before, after = self._scalars if offset else {}, dict[str, np.ndarray]()
        known: dict[tuple[str, int, bytes], tuple[np.ndarray, bytes]] = {}
        files: dict[str, dict[str, int]] = {}
        arrays = [(group, name) for group, of in self.schemas.items() for name in of.per_step]
        for group, name in arrays:
            path = array_path(group, name)
            rows = (steps if name == "step" else scalars[path])[: len(steps)]
            same = name, id(before.get(path)), rows.tobytes()
            if same not in known:
                values = before[path].copy() if path in before else _missing_values(name)
                values[offset : offset + len(rows)] = rows
                known[same] = values, self._encoded_vector(values)
            after[path], content = known[same]
            files |= self._write_vector(f"{path}/c.{chunk}", content)
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
        capacity = next(iter(self._arrays.values())).shape[0]
        if n_rows > capacity:
            self._resize(self._layout.capacity(max(n_rows, 2 * capacity)))
            self._write_metadata()

    def _resize(self, n_rows: int) -> None:
        for group, schema in self.schemas.items():
            for name in (*schema.dtypes, *schema.per_step):
                array = self._arrays[array_path(group, name)]
                shape = (n_rows, *array.shape[1:])
                # There is nothing to delete, and looking for it would take seconds in a long run.
                sync(array.async_array.resize(shape, delete_outside_chunks=False))

    def _consolidate(self) -> None:
        """Copy all metadata below a group into its own, as zarr-python does.

        It would list all keys anew for each group, and take seconds where there are many.
        """
        nodes = {
            key.removesuffix(METADATA).rstrip("/"): json.loads(content.to_bytes())
            for key, content in self._encoded.items()
        }
        below = {
            path: node | _consolidated({}) if node["node_type"] == "group" else node
            for path, node in nodes.items()
            if path
        }
        for group in {*self.schemas, ""}:
            root = array_path(group, "")
            of_group = {
                path.removeprefix(root): node
                for path, node in below.items()
                if path.startswith(root)
            }
            content = json.dumps(nodes[group] | _consolidated(of_group)).encode()
            self._encoded[root + METADATA] = cpu.Buffer.from_bytes(content)

    def _metadata(self) -> dict[str, Json]:
        """Return every metadata document by its key: the first line of the ledger has a copy."""
        return {
            key: parsed(content.to_bytes())
            for key, content in self._encoded.items()
            if key.endswith(METADATA)
        }

    def _write_metadata(self) -> None:
        for key, content in self._encoded.items():
            self._disk.write(self.path / key, [content.to_bytes()])
        self._disk.sync((self.path / key).parent for key in self._encoded)

    def _encoded_vector(self, values: np.ndarray) -> bytes:
        with self._stopwatch.time("encode_s"):
            return encode_vector(values)

    def _write_vector(self, key: str, content: bytes) -> dict[str, dict[str, int]]:
        """Write a chunk that is a file of its own; return size and checksum of the file."""
        return {key: {"bytes": self._write(key, [content]), "crc32": zlib.crc32(content)}}

    def _write(self, key: str, parts: Iterable[bytes]) -> int:
        n_bytes = self._disk.write(self.path / key, parts)
        self.bytes_written += n_bytes
        return n_bytes

    def _append(self, line: bytes) -> None:
        """Append a line to the ledger. It stays there if the commit fails: files may fit it."""
        self._disk.append(self.path / LEDGER, self._ledger_bytes, line)
        self._ledger_bytes += len(line)
        self._ledger_crc32 = zlib.crc32(line, self._ledger_crc32)

    def _replace_commit(self, commit: Commit) -> None:
        self._disk.write(self.path / COMMIT, [commit.to_bytes()])
        self._disk.sync([self.path / BOOKKEEPING])
        self._commit = commit


def _missing_values(name: str) -> np.ndarray:
    """Return a chunk of per-step values of which none is there."""
    return np.full(layout.SCALAR_CHUNK_STEPS, np.int64(-1) if name == "step" else np.nan)


def _consolidated(metadata: Mapping[str, Json]) -> dict[str, Json]:
    """Return what zarr-python puts into a group; the Zarr specification does not have it yet."""
    return {
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": metadata}
    }


def _label_arrays(
    schema: Schema, labels: TokenLabels, token_ids: np.ndarray | None
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield name, dim and values of the coordinates of the first axis, as it lies on disk.

    Text goes into two integer arrays, as Arrow does it: not every Zarr reader knows strings.
    """
    order = schema.stored_order
    if order is not None:
        labels = labels.of(order)
    if schema.has_tokens or token_ids is not None:
        ids = np.arange(schema.n_tokens) if token_ids is None else token_ids
        ids = ids if order is None else ids[order]
        yield schema.dims[0], schema.dims[0], ids
    for name in ("count", "live", "dead"):
        values = getattr(labels, name)
        if values is not None:
            yield name, "token", np.asarray(values)
    if labels.text is not None:
        utf8 = [text.encode() for text in labels.text]
        yield "text_bytes", "text_byte", np.frombuffer(b"".join(utf8), np.uint8)
        yield "text_end", "token", np.cumsum([len(text) for text in utf8], dtype=np.int64)


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


def check_vacant(path: StorePath, *, overwrite: bool) -> None:
    """Raise StoreExistsError unless a store may be created at `path`.

    An empty directory is vacant; with `overwrite` so is a store, also one whose writer was killed
    before it was wholly declared. Nothing else ever is.
    """
    path = Path(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    files = LocalFiles(path)
    if read_attribute(files) is None and not is_without_rows(files):
        raise StoreExistsError(
            f"{path} exists and is not a thimble-zarr store, so it is never overwritten; "
            "choose another path"
        )
    if not overwrite:
        raise StoreExistsError(
            f"{path} already holds a recorded run; choose another path, or overwrite it "
            "(--overwrite, or overwrite=True)"
        )


def _clear(path: Path, *, overwrite: bool) -> None:
    """Remove an old store, whose lock is held, but for the lock.

    The commit record goes first: whatever a crash leaves, nobody takes it for the old store.
    """
    if not overwrite and read_attribute(LocalFiles(path)) is not None:
        raise StoreExistsError(f"{path} was just recorded by another process; choose another path")
    if (path / COMMIT).exists():
        remove_file(path / COMMIT)
    for entry in path.iterdir():
        if entry.name == BOOKKEEPING:
            for file in entry.iterdir():
                if file not in (path / LOCK, path / HOLDER):
                    file.unlink()
        elif entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def chunk_codecs(dtype: np.dtype, level: int = BLOSC_LEVEL) -> list[BloscCodec | Crc32cCodec]:
    """Return how chunks are encoded, as Zarr declares it in the metadata of an array."""
    return [
        BloscCodec(typesize=dtype.itemsize, cname="lz4", clevel=level, shuffle="shuffle"),
        Crc32cCodec(),
    ]
