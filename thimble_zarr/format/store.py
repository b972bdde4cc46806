"""A store on disk: create it, commit blocks to it, open it, read rows of it.

Zarr declares the arrays and encodes the small ones into memory; `shard` encodes the big ones, and
`disk` writes them all, each file whole or not at all. A block is committed in one order::

    array files -> directories -> ledger (sizes, checksums) -> commit record

The commit record names the number of rows that count. A reader looks at nothing beyond it, so a
step of which any array is missing is never seen::

    run.zarr/
      zarr.json             group metadata; its `thimble` attribute is the Schema
      W/ grad/ ...          (step, token, dim), one shard file a block: `c.<block>.0.0`
      loss/ step/ ...       (step,), small files rewritten at each commit until they are full
      token/ count/ ...     (token,), written once
      .thimble/             a Zarr group without arrays, so that Zarr tools pass it by
        commit.json         the commit record, replaced atomically
        blocks.jsonl        the ledger, appended: checksums of all files and chunks of every commit,
                            and what it took to record since the commit before
        lock                held by the one writer
"""

import itertools
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any, Self

import filelock
import numpy as np
import zarr
from zarr.codecs import TransposeCodec
from zarr.core.buffer import Buffer
from zarr.core.common import JSON
from zarr.core.metadata import ArrayV3Metadata
from zarr.core.sync import sync
from zarr.errors import ZarrUserWarning
from zarr.storage import MemoryStore

from thimble_zarr.errors import (
    DamagedStoreError,
    NotAStoreError,
    StoreError,
    StoreExistsError,
    StoreLockedError,
    ThimbleError,
    UnsupportedFormatError,
)
from thimble_zarr.format.bits import BFLOAT16_RECIPE, fill_value, storage_dtype
from thimble_zarr.format.disk import Disk
from thimble_zarr.format.indexing import Indices, by_chunk
from thimble_zarr.format.layout import SCALAR_CHUNK_STEPS, split_range
from thimble_zarr.format.overhead import Overhead, Stopwatch
from thimble_zarr.format.reader import AlteredChunk
from thimble_zarr.format.schema import (
    ATTRIBUTE,
    DIMS,
    FORMAT_VERSION,
    LABELS,
    SCALARS,
    VARIABLES,
    Json,
    Schema,
    TokenLabels,
)
from thimble_zarr.format.shard import (
    CHUNK_ORDER,
    Checksums,
    ShardEncoder,
    ShardFile,
    chunk_codecs,
    decode_vector,
    locate_bit,
    values_checksum,
)

_Array = zarr.Array[ArrayV3Metadata]

StorePath = str | os.PathLike[str]

_BOOKKEEPING = ".thimble"
_COMMIT = f"{_BOOKKEEPING}/commit.json"
_LEDGER = f"{_BOOKKEEPING}/blocks.jsonl"
_LOCK = f"{_BOOKKEEPING}/lock"
_METADATA = "zarr.json"

_PER_STEP = {"step": "optimizer step, counted from 1; row 0 is the initial state", **SCALARS}


@dataclass(frozen=True, kw_only=True)
class Commit:
    """The commit record.

    Attributes
    ----------
    n_rows
        Committed rows: rows 0 to `n_rows - 1` can be read.
    complete
        True once the writer has closed the store.
    ledger_bytes, ledger_crc32
        How much of the ledger counts, and the CRC-32 of that much. (A chunk file ends with its own
        crc32c, and the crc32c of any such file is the same constant: the ledger needs another.)
    """

    n_rows: int = 0
    complete: bool = False
    ledger_bytes: int = 0
    ledger_crc32: int = 0


class StoreWriter:
    """The one writer of a store. Made by `create`; used by one thread at a time.

    Attributes
    ----------
    path
        Root directory of the store.
    schema
        What was declared.
    bytes_written
        Bytes put on disk so far.
    """

    def __init__(self, path: Path, schema: Schema, lock: filelock.BaseFileLock) -> None:
        self.path = path
        self.schema = schema
        self.bytes_written = 0
        self._lock = lock
        self._commit = Commit()
        self._encoded: dict[str, Buffer] = {}
        self._root = zarr.create_group(
            MemoryStore(self._encoded),
            zarr_format=3,
            attributes={ATTRIBUTE: schema.to_attribute()},
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
        schema: Schema,
        *,
        labels: TokenLabels | None = None,
        n_rows: int | None = None,
        overwrite: bool = False,
    ) -> Self:
        """Declare a whole store on disk and take its lock.

        Parameters
        ----------
        path
            Directory to create.
        schema
            What will be recorded.
        labels
            Coordinates of the token axis.
        n_rows
            Rows to declare, where known. The store grows beyond it when it must, and is trimmed
            to what was committed when it is closed.
        overwrite
            Replace a store that lies at `path`. Anything else there is never replaced.

        Raises
        ------
        StoreExistsError
            If the path is taken.
        StoreLockedError
            If a store lies there that another process is recording into.
        StoreError
            If the directory cannot be created or written.
        """
        path = Path(path).absolute()  # the process may change its directory
        labels = labels or TokenLabels()
        labels.check_length(schema.n_tokens)
        schema.check_json()
        check_vacant(path, overwrite=overwrite)
        with ExitStack() as undo:
            try:
                (path / _BOOKKEEPING).mkdir(parents=True, exist_ok=True)
                lock = _acquire_lock(path)
                undo.callback(lock.release)
                _clear(path, overwrite=overwrite)
                undo.callback(shutil.rmtree, path, ignore_errors=True)
                writer = cls(path, schema, lock)
                undo.callback(writer._disk.close)
                writer._declare(labels, schema.layout.capacity(n_rows or 1))
            except ThimbleError:
                raise
            except OSError as error:
                raise StoreError(
                    f"cannot create a store at {path}: {error.strerror or error}; "
                    "choose a directory that can be written"
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
            For each variable its bits, shape `(block_steps, token, dim)`. Rows beyond `n_rows`
            are overwritten with the fill value.
        scalars
            For each per-step scalar its values, float64, shape `(block_steps,)`.
        overhead
            What training spent on recording since the commit before, where that is measured.

        Raises
        ------
        OSError
            If a file cannot be written. Committed rows stay as they were.
        """
        layout = self.schema.layout
        if first_row > self.n_rows:
            raise StoreError(f"rows {self.n_rows} to {first_row - 1} were never committed")
        if first_row % layout.block_steps or first_row + n_rows < self.n_rows:
            raise StoreError(f"rows from {first_row} on are no block that goes on from the last")
        files = dict(self._declared)
        chunks: dict[str, list[tuple[int, int]]] = {}
        self._grow(first_row + layout.block_steps)
        for name, bits in arrays.items():
            fill = fill_value(self.schema.dtypes[name])
            bits[n_rows:] = fill
            key = f"{name}/c.{first_row // layout.block_steps}.0.0"
            shard = ShardEncoder(bits, layout.chunk_tokens, fill)
            # Each chunk has its own checksums: one of the file would only take time.
            files[key] = {"bytes": self._write(key, shard)}
            chunks[name] = [astuple(checksums) for checksums in shard.checksums]
        with self._stopwatch.time("encode_s"):
            self._encode_scalars(first_row, n_rows, scalars)
        files |= self._write_chunks()
        self._disk.sync((self.path / key).parent for key in files)
        end_row = first_row + n_rows
        entry: dict[str, Json] = {"rows": (first_row, end_row), "files": files, "chunks": chunks}
        if overhead is not None:
            # What this commit has still to do is in the next lap.
            entry["overhead"] = (overhead + self._stopwatch.lap()).to_json()
        self._append_commit(end_row, json.dumps(entry).encode() + b"\n")
        self._declared = {}

    def close(self) -> None:
        """Trim the arrays to what was committed, mark the store complete, release the lock.

        A store without a row is removed. Metadata are consolidated only now: a consolidated copy
        would go stale while arrays grow.
        """
        try:
            if self.n_rows == 0:
                shutil.rmtree(self.path)
                return
            self._resize(self.n_rows)
            self._consolidate()
            self._write_metadata()
            self._replace_commit(replace(self._commit, complete=True))
        finally:
            self.release()

    def discard(self) -> None:
        """Remove the store, of which nothing is wanted, and release the lock."""
        self._disk.close()
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Give up the lock; nothing more is committed."""
        self._disk.close()
        self._lock.release()

    def _declare(self, labels: TokenLabels, capacity: int) -> None:
        schema, layout = self.schema, self.schema.layout
        self._root.create_group(
            _BOOKKEEPING, attributes={"description": "bookkeeping of thimble-zarr, no arrays"}
        )
        for name, native in schema.dtypes.items():
            attributes: dict[str, JSON] = {"long_name": VARIABLES[name], "dtype": native}
            if native == "bfloat16":
                attributes["encoding"] = BFLOAT16_RECIPE
            self._create_array(
                name,
                dims=DIMS,
                shape=(capacity, schema.n_tokens, schema.n_dims),
                dtype=storage_dtype(native),
                fill=fill_value(native),
                chunks=(layout.block_steps, layout.chunk_tokens, schema.n_dims),
                shards=(
                    layout.block_steps,
                    layout.shard_tokens(schema.n_tokens),
                    schema.n_dims,
                ),
                attributes=attributes,
            )
        for name, long_name in _PER_STEP.items():
            is_label = name == "step"
            self._create_array(
                name,
                dims=("step",),
                shape=(capacity,),
                dtype=np.dtype(np.int64 if is_label else np.float64),
                fill=-1 if is_label else float("nan"),
                chunks=(SCALAR_CHUNK_STEPS,),
                attributes={"long_name": long_name},
            )
        for name, dim, values in _label_arrays(labels, schema.n_tokens):
            self._create_array(
                name,
                dims=(dim,),
                shape=values.shape,
                dtype=values.dtype,
                fill=0,
                chunks=(max(1, len(values)),),
                attributes={"long_name": LABELS[name]},
            )
            self._arrays[name][:] = values
        self._write_metadata()
        self._declared = self._write_chunks()  # the first commit has them in the ledger
        directories = [self.path / name for name in self._arrays]
        self._disk.sync([*directories, self.path, self.path.parent])
        (self.path / _LEDGER).touch()
        self._replace_commit(self._commit)
        self._stopwatch.lap()  # of the steps to come only

    def _create_array(
        self,
        name: str,
        *,
        dims: tuple[str, ...],
        shape: tuple[int, ...],
        dtype: np.dtype,
        fill: float,
        chunks: tuple[int, ...],
        shards: tuple[int, ...] | None = None,
        attributes: dict[str, JSON],
    ) -> None:
        # An array that is opened again forgets `write_empty_chunks`: keep the one that is created.
        self._arrays[name] = self._root.create_array(
            name,
            shape=shape,
            dtype=dtype,
            chunks=chunks,
            shards=shards,
            filters=[TransposeCodec(order=CHUNK_ORDER)] if shards else None,
            compressors=chunk_codecs(dtype),
            fill_value=fill,
            dimension_names=dims,
            chunk_key_encoding={"name": "default", "separator": "."},
            attributes=attributes,
            config={"write_empty_chunks": True},
        )

    def _encode_scalars(
        self, first_row: int, n_rows: int, scalars: Mapping[str, np.ndarray]
    ) -> None:
        """Encode the chunk of per-step values that the block lies in, all rows so far."""
        offset = first_row % SCALAR_CHUNK_STEPS
        start = first_row - offset
        rows = np.arange(first_row, first_row + n_rows)
        for name, values in {"step": rows, **scalars}.items():
            if offset == 0 or name not in self._scalars:
                fill = -1 if name == "step" else np.nan
                self._scalars[name] = np.full(SCALAR_CHUNK_STEPS, fill)
            chunk = self._scalars[name]
            chunk[offset : offset + n_rows] = values[:n_rows]
            array = self._arrays[name]
            stop = min(start + len(chunk), array.shape[0])
            array[start:stop] = chunk[: stop - start]

    def _grow(self, n_rows: int) -> None:
        capacity = self._arrays["step"].shape[0]
        if n_rows > capacity:
            self._resize(self.schema.layout.capacity(max(n_rows, 2 * capacity)))
            self._write_metadata()

    def _resize(self, n_rows: int) -> None:
        for name in (*self.schema.dtypes, *_PER_STEP):
            array = self._arrays[name]
            shape = (n_rows, *array.shape[1:])
            # There is nothing to delete, and looking for it would take seconds in a long run.
            sync(array.async_array.resize(shape, delete_outside_chunks=False))

    def _consolidate(self) -> None:
        with warnings.catch_warnings():
            # The Zarr specification does not define it yet; xarray warns where it is missing.
            warnings.simplefilter("ignore", ZarrUserWarning)
            zarr.consolidate_metadata(self._root.store)

    def _write_metadata(self) -> None:
        keys = [key for key in self._encoded if key.endswith(_METADATA)]
        for key in keys:
            self._disk.write(self.path / key, [self._encoded[key].to_bytes()])
        self._disk.sync((self.path / key).parent for key in keys)

    def _write_chunks(self) -> "dict[str, dict[str, int]]":
        """Move encoded chunks from memory to disk; return size and checksum of each file."""
        files = {}
        for key in [key for key in self._encoded if not key.endswith(_METADATA)]:
            content = self._encoded.pop(key).to_bytes()
            files[key] = {"bytes": self._write(key, [content]), "crc32": zlib.crc32(content)}
        return files

    def _write(self, key: str, parts: Iterable[bytes]) -> int:
        n_bytes = self._disk.write(self.path / key, parts)
        self.bytes_written += n_bytes
        return n_bytes

    def _append_commit(self, n_rows: int, line: bytes) -> None:
        """Append a block to the ledger, then make the commit record point behind it."""
        with (self.path / _LEDGER).open("r+b") as ledger:
            ledger.seek(self._commit.ledger_bytes)
            ledger.write(line)
            ledger.truncate()
            ledger.flush()
            with self._stopwatch.time("sync_s"):
                os.fsync(ledger.fileno())
        self._replace_commit(
            replace(
                self._commit,
                n_rows=n_rows,
                ledger_bytes=self._commit.ledger_bytes + len(line),
                ledger_crc32=zlib.crc32(line, self._commit.ledger_crc32),
            )
        )

    def _replace_commit(self, commit: Commit) -> None:
        record = {"format_version": FORMAT_VERSION} | asdict(commit)
        self._disk.write(self.path / _COMMIT, [json.dumps(record).encode()])
        self._disk.sync([self.path / _BOOKKEEPING])
        self._commit = commit


@dataclass(frozen=True)
class StoreReader:
    """The committed rows of a store. Made by `open`; small to pickle, safe to share by threads.

    What is committed when the reader is opened is what it will ever see.

    Attributes
    ----------
    path
        Root directory of the store.
    schema
        What was declared.
    commit
        The commit record as it was when the store was opened.
    """

    path: Path
    schema: Schema
    commit: Commit

    @classmethod
    def open(cls, path: StorePath) -> Self:
        """Open a store for reading, whether or not it is still being written.

        Raises
        ------
        NotAStoreError
            If there is no store at `path`.
        UnsupportedFormatError
            If the store is of another format version.
        DamagedStoreError
            If its metadata or commit record cannot be read.
        """
        path = Path(path).absolute()  # the process may change its directory
        if not path.exists():
            raise NotAStoreError(f"there is nothing at {path}; check the path")
        attribute = _read_attribute(path)
        if attribute is None:
            raise NotAStoreError(
                f"{path} is not a thimble-zarr store; "
                "record one with `thimble-zarr train` or `thimble_zarr.Recorder`"
            )
        try:
            schema = Schema.from_attribute(attribute)
            commit = _read_commit(path / _COMMIT)
        except (UnsupportedFormatError, DamagedStoreError) as error:
            raise type(error)(f"cannot read {path}: {error}") from error
        return cls(path, schema, commit)

    @property
    def n_rows(self) -> int:
        """Committed rows: the initial state and one for each committed step."""
        return self.commit.n_rows

    def read(
        self,
        name: str,
        rows: tuple[int, int],
        tokens: Indices | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Read stored bits of a variable.

        Besides what it returns it takes the memory of one chunk.

        Parameters
        ----------
        name
            One of the variables of the schema.
        rows
            `(start, stop)`, within the committed rows.
        tokens
            In any order. All by default.
        out
            What an earlier call returned. Its memory is used again if the shape is the same.

        Returns
        -------
        numpy.ndarray
            Shape `(step, token, dim)`, dtype `storage_dtype` of the variable.

        Raises
        ------
        DamagedStoreError
            If a file is missing or empty, or a checksum does not match.
        """
        self._declared(name)
        schema, layout = self.schema, self.schema.layout
        tokens = range(schema.n_tokens) if tokens is None else tokens
        chunks = list(by_chunk(tokens, layout.chunk_tokens))
        shape = rows[1] - rows[0], len(tokens), schema.n_dims
        if out is None or out.shape != shape:
            out = np.empty(shape, storage_dtype(schema.dtypes[name]))
        for start, stop in split_range(*rows, layout.block_steps):
            offset = start % layout.block_steps
            steps = slice(offset, offset + stop - start)
            into = out[start - rows[0] : stop - rows[0]]
            with self._block(name, start - offset) as shard:
                for chunk, take, where in chunks:
                    part = shard.decode(chunk)[take][:, steps]
                    into[:, where] = part.transpose(CHUNK_ORDER)
        return out

    def altered_chunks(self, rows: tuple[int, int]) -> Iterator[AlteredChunk]:
        """Find chunks, and files of scalars and labels, that are not those that were committed.

        Their files are sound: something stored them anew, with good checksums. Only chunks that
        were stored anew are decoded, so that looking for them costs next to nothing.

        Parameters
        ----------
        rows
            `(start, stop)`. Whole blocks are looked at.

        Raises
        ------
        DamagedStoreError
            If a file or the ledger is damaged.
        """
        layout = self.schema.layout
        ledger, files = self._read_ledger()
        for first_row, chunks in ledger.items():
            if not (first_row < rows[1] and rows[0] < first_row + layout.block_steps):
                continue
            for name, checksums in chunks.items():
                altered = self._altered_in(name, first_row, checksums)
                if altered:
                    # A writer may have committed this block again, with more rows, since.
                    newest, _ = type(self).open(self.path)._read_ledger()
                    altered = self._altered_in(name, first_row, newest[first_row][name])
                yield from altered
        for key, crc32 in files.items():
            if self._file_crc32(key) != crc32:
                _, newest_files = type(self).open(self.path)._read_ledger()
                if self._file_crc32(key) != newest_files[key]:
                    name, _, chunk = key.partition("/c.")
                    yield AlteredChunk(name, int(chunk) * SCALAR_CHUNK_STEPS, None, None)

    def _file_crc32(self, key: str) -> int:
        self._check_file(key)
        with self._decoding(key):
            return zlib.crc32((self.path / key).read_bytes())

    def _altered_in(
        self, name: str, first_row: int, checksums: list[Checksums]
    ) -> list[AlteredChunk]:
        with self._block(name, first_row) as shard:
            return [
                AlteredChunk(name, first_row, chunk * self.schema.layout.chunk_tokens, committed)
                for chunk, committed in enumerate(checksums)
                if shard.stored_checksum(chunk) != committed.stored
                and values_checksum(shard.decode(chunk)) != committed.values
            ]

    def flipped_bit(self, altered: AlteredChunk) -> tuple[int, int, int, int] | None:
        """Return row, token, dim and bit, if one flipped bit is all that altered a chunk.

        It takes seconds.
        """
        if altered.committed is None or altered.first_token is None:
            return None
        with self._block(altered.variable, altered.first_row) as shard:
            values = shard.decode(altered.first_token // self.schema.layout.chunk_tokens)
        bit = locate_bit(values.tobytes(), altered.committed.values)
        if bit is None:
            return None
        index, bit = divmod(bit, 8 * values.itemsize)
        token, row, dim = (int(part) for part in np.unravel_index(index, values.shape))
        return altered.first_row + row, altered.first_token + token, dim, bit

    def _read_ledger(self) -> tuple[dict[int, dict[str, list[Checksums]]], dict[str, int]]:
        """Return checksums of the chunks of each block, and CRC-32 of the files of all else.

        Of what was committed again the last ones.
        """
        blocks: dict[int, dict[str, list[Checksums]]] = {}
        files: dict[str, int] = {}
        arrays = tuple(f"{name}/" for name in self.schema.dtypes)
        with self._decoding("the ledger"):
            for entry in self._ledger_entries():
                blocks[entry["rows"][0]] = {
                    name: [Checksums(*checksums) for checksums in entry["chunks"][name]]
                    for name in self.schema.dtypes
                }
                files |= {
                    key: file["crc32"]
                    for key, file in entry["files"].items()
                    if not key.startswith(arrays)
                }
        return blocks, files

    def _ledger_entries(self) -> Iterator[dict[str, Any]]:
        with (self.path / _LEDGER).open("rb") as ledger:
            content = ledger.read(self.commit.ledger_bytes)
        if zlib.crc32(content) != self.commit.ledger_crc32:
            raise ValueError("its checksum does not match")
        return map(json.loads, content.splitlines())

    @contextmanager
    def _block(self, name: str, first_row: int) -> Iterator[ShardFile]:
        """Open the shard of a block for decoding; whatever is wrong with it is damage."""
        schema, layout = self.schema, self.schema.layout
        native = schema.dtypes[name]
        key = f"{name}/c.{first_row // layout.block_steps}.0.0"
        with self._decoding(f"{name} from step {first_row} on"):
            self._check_file(key)
            with ShardFile(
                self.path / key,
                n_chunks=layout.shard_tokens(schema.n_tokens) // layout.chunk_tokens,
                shape=(layout.chunk_tokens, layout.block_steps, schema.n_dims),
                dtype=storage_dtype(native),
                fill=fill_value(native),
            ) as shard:
                yield shard

    def read_scalars(self) -> dict[str, np.ndarray]:
        """Return every per-step scalar: float64, shape `(n_rows,)`, NaN where missing."""
        return {name: self._read_vector(name) for name in SCALARS}

    def read_labels(self) -> TokenLabels:
        """Return what is known of the tokens."""
        known = {
            name: self._read_vector(name)
            for name in ("count", "live", "dead", "text_bytes", "text_end")
            if (self.path / name).is_dir()
        }
        text = None
        if "text_end" in known:
            utf8 = known.pop("text_bytes").tobytes()
            ends = [0, *known.pop("text_end").tolist()]
            text = [utf8[start:end].decode() for start, end in itertools.pairwise(ends)]
        return TokenLabels(text=text, **known)

    def read_overhead(self) -> dict[int, Overhead]:
        """Return what recording took, by the first row of each block.

        A block that was committed more than once has what all of its commits took. Blocks that
        nobody measured are left out: those of an imported run, for example.

        Raises
        ------
        DamagedStoreError
            If the ledger is damaged.
        """
        blocks: dict[int, Overhead] = {}
        with self._decoding("the ledger"):
            for entry in self._ledger_entries():
                if "overhead" in entry:
                    n_bytes = sum(file["bytes"] for file in entry["files"].values())
                    spent = Overhead.from_json(entry["overhead"]) + Overhead(n_bytes=n_bytes)
                    first_row = entry["rows"][0]
                    blocks[first_row] = blocks.get(first_row, Overhead()) + spent
        return blocks

    def disk_bytes(self) -> int:
        """Return the size of all files of the store."""
        n_bytes = 0
        for file in self.path.rglob("*"):
            with suppress(FileNotFoundError):  # a writer may just have renamed it
                n_bytes += file.stat().st_size if file.is_file() else 0
        return n_bytes

    def _declared(self, name: str) -> "_Declared":
        """Return what the metadata of an array say, once they fit what was committed."""
        known = self.__dict__.setdefault("_arrays", {})
        if name not in known:
            try:
                array = _Declared.read(self.path / name / _METADATA)
            except (OSError, ValueError, LookupError, TypeError) as error:
                raise DamagedStoreError(
                    f"cannot open array {name} of {self.path}: {error}"
                ) from error
            self._check_shape(name, array.shape)
            known[name] = array
        declared: _Declared = known[name]
        return declared

    def __reduce__(self) -> tuple[type[Self], tuple[Path, Schema, Commit]]:
        return type(self), (self.path, self.schema, self.commit)

    def _read_vector(self, name: str) -> np.ndarray:
        array = self._declared(name)
        length = self.n_rows if name in SCALARS else array.shape[0]
        parts = []
        for index in range(-(-length // array.chunk_length)):
            key = f"{name}/c.{index}"
            self._check_file(key)
            with self._decoding(name):
                content = (self.path / key).read_bytes()
                parts.append(decode_vector(content, array.chunk_length, array.dtype))
        return np.concatenate([*parts, np.empty(0, array.dtype)])[:length]

    @contextmanager
    def _decoding(self, what: str) -> Iterator[None]:
        """Tell damage, whatever Zarr and its codecs raise for it, from a disk that cannot read."""
        try:
            yield
        except (MemoryError, ThimbleError):
            raise
        except OSError as error:
            raise StoreError(f"cannot read {what} of {self.path}: {error}") from error
        except Exception as error:
            raise DamagedStoreError(f"cannot decode {what} of {self.path}: {error}") from error

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Zarr clips what is asked for to the array; in committed rows that is damage."""
        declared = (self.n_rows, self.schema.n_tokens, self.schema.n_dims)
        if name in self.schema.dtypes:
            sound = len(shape) == 3 and shape[0] >= self.n_rows and shape[1:] == declared[1:]
        else:
            sound = name not in SCALARS or shape[0] >= self.n_rows
        if not sound:
            raise DamagedStoreError(
                f"{self.path}: the array {name} has shape {shape}, and {declared} was committed"
            )

    def _check_file(self, key: str) -> None:
        """Zarr reads a missing or empty file as fill values; in a committed block it is damage."""
        try:
            intact = (self.path / key).stat().st_size > 0
        except FileNotFoundError:
            intact = False
        if not intact:
            raise DamagedStoreError(
                f"{self.path}: the committed file {key} is missing or empty; restore it from a copy"
            )


@dataclass(frozen=True)
class _Declared:
    """What the metadata of an array say."""

    shape: tuple[int, ...]
    chunk_length: int
    dtype: np.dtype

    @classmethod
    def read(cls, file: Path) -> Self:
        metadata = json.loads(file.read_bytes())
        return cls(
            tuple(map(int, metadata["shape"])),
            int(metadata["chunk_grid"]["configuration"]["chunk_shape"][0]),
            np.dtype(metadata["data_type"]),
        )


def _read_attribute(path: Path) -> Json:
    """Return the `thimble` attribute of the group at `path`, None where there is none."""
    try:
        metadata = json.loads((path / _METADATA).read_bytes())
        attribute: Json = metadata["attributes"][ATTRIBUTE]
        return attribute
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error


def _read_commit(file: Path) -> Commit:
    try:
        record = json.loads(file.read_bytes())
        del record["format_version"]
        commit = Commit(**record)
        if not isinstance(commit.n_rows, int) or commit.n_rows < 0:
            raise ValueError(f"n_rows is {commit.n_rows!r}")
    except FileNotFoundError as error:
        raise DamagedStoreError("it has no commit record") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedStoreError(f"its commit record is malformed: {error}") from error
    return commit


def _label_arrays(labels: TokenLabels, n_tokens: int) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield name, dim and values of the token coordinates.

    Text goes into two integer arrays, as Arrow does it: not every Zarr reader knows strings.
    """
    yield "token", "token", np.arange(n_tokens)
    for name in ("count", "live", "dead"):
        values = getattr(labels, name)
        if values is not None:
            yield name, "token", np.asarray(values)
    if labels.text is not None:
        utf8 = [text.encode() for text in labels.text]
        yield "text_bytes", "text_byte", np.frombuffer(b"".join(utf8), np.uint8)
        yield "text_end", "token", np.cumsum([len(text) for text in utf8], dtype=np.int64)


def check_vacant(path: StorePath, *, overwrite: bool) -> None:
    """Raise StoreExistsError unless a store may be created at `path`.

    An empty directory is vacant; with `overwrite` so is a store. Nothing else ever is.
    """
    path = Path(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if _read_attribute(path) is None:
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
    """Remove an old store, whose lock is held, but for the lock."""
    if not overwrite and _read_attribute(path) is not None:
        raise StoreExistsError(f"{path} was just recorded by another process; choose another path")
    for entry in path.iterdir():
        if entry.name == _BOOKKEEPING:
            for file in entry.iterdir():
                if file != path / _LOCK:
                    file.unlink()
        elif entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _acquire_lock(path: Path) -> filelock.BaseFileLock:
    lock = filelock.FileLock(path / _LOCK, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise StoreLockedError(
            f"another process is recording into {path}; wait for it or choose another path"
        ) from error
    return lock
