"""A store on disk: what lies where, and how to read rows of it.

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
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from thimble_zarr.errors import (
    DamagedStoreError,
    NotAStoreError,
    StoreError,
    ThimbleError,
    UnsupportedFormatError,
)
from thimble_zarr.format.bits import fill_value, storage_dtype
from thimble_zarr.format.indexing import Indices, by_chunk
from thimble_zarr.format.layout import SCALAR_CHUNK_STEPS, split_range
from thimble_zarr.format.overhead import Overhead
from thimble_zarr.format.reader import AlteredChunk
from thimble_zarr.format.schema import ATTRIBUTE, SCALARS, Json, Schema, TokenLabels
from thimble_zarr.format.shard import (
    CHUNK_ORDER,
    Checksums,
    ShardFile,
    decode_vector,
    locate_bit,
    values_checksum,
)

StorePath = str | os.PathLike[str]

BOOKKEEPING = ".thimble"
COMMIT = f"{BOOKKEEPING}/commit.json"
LEDGER = f"{BOOKKEEPING}/blocks.jsonl"
LOCK = f"{BOOKKEEPING}/lock"
METADATA = "zarr.json"


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
        attribute = read_attribute(path)
        if attribute is None:
            raise NotAStoreError(
                f"{path} is not a thimble-zarr store; "
                "record one with `thimble-zarr train` or `thimble_zarr.Recorder`"
            )
        try:
            schema = Schema.from_attribute(attribute)
            commit = _read_commit(path / COMMIT)
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
        with (self.path / LEDGER).open("rb") as ledger:
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
                f"{self.path}/{key}",
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
                array = _Declared.read(self.path / name / METADATA)
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
            intact = os.stat(f"{self.path}/{key}").st_size > 0  # noqa: PTH116  # of every block
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


def read_attribute(path: Path) -> Json:
    """Return the `thimble` attribute of the group at `path`, None where there is none."""
    try:
        metadata = json.loads((path / METADATA).read_bytes())
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
