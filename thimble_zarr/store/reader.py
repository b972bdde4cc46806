"""A store on disk: what lies where, and how to read rows of it.

The commit record names the number of rows that count. A reader looks at nothing beyond it, so a
step of which any array is missing is never seen::

    run.zarr/
      zarr.json             group metadata; its `thimble` attribute is the Schema
      W/ grad/ ...          (step, *dims of the parameter), one shard file a block, `c.<block>.0.0`
                            of a parameter of two dims
      loss/ step/ ...       (step,), small files rewritten at each commit until they are full
      token/ count/ ...     (token,), written once, in the order in which tokens lie in the arrays:
                            those known to be dead after all others, so that they share no chunk
                            with others, but for one
      .thimble/             a Zarr group without arrays, so that Zarr tools pass it by
        commit.json         the commit record, replaced atomically
        blocks.jsonl        the ledger, appended: checksums of all files and chunks of every commit,
                            and what it took to record since the commit before; where a run was
                            resumed, what was taken back
        lock                held by the one writer, who leaves its name in `writer.json` meanwhile

Several parameters are a child group each, named as they are, with all that the root of a single one
has: its arrays, its per-step scalars, its labels and its Schema. The root's `thimble` attribute is
the list of their names. The bookkeeping is the root's alone: a step is committed for all parameters
or for none, and file keys and the names of arrays in the ledger are paths from the root::

    run.zarr/
      zarr.json             `thimble` is {"format_version": 5, "parameters": ["wte.weight", ...]}
      wte.weight/
        zarr.json W/ grad/ ... loss/ step/ ... token/ ...
      .thimble/
"""

import itertools
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from thimble_zarr.bits import fill_value, storage_dtype
from thimble_zarr.errors import (
    ConfigError,
    DamagedStoreError,
    NotAStoreError,
    SelectionError,
    StoreError,
    UnsupportedFormatError,
)
from thimble_zarr.format.indexing import Indices, TokenGroup, token_groups
from thimble_zarr.format.layout import SCALAR_CHUNK_STEPS
from thimble_zarr.format.overhead import Overhead
from thimble_zarr.format.reader import AlteredChunk, Checksums, History, Recording, State
from thimble_zarr.format.schema import (
    ATTRIBUTE,
    FORMAT_VERSION,
    PARAMETERS,
    PER_STEP,
    Json,
    Schema,
    TokenLabels,
    array_path,
    check_group_name,
    read_content,
)
from thimble_zarr.store.commit import Commit
from thimble_zarr.store.files.base import Files, NotPlainFileError, OutsideError
from thimble_zarr.store.files.documents import read_document
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.keys import (
    COMMIT,
    LEDGER,
    LOCK,
    array_of,
    is_chunk_key,
    metadata_key,
    shard_key,
)
from thimble_zarr.store.ledger import FileChecksums, read_lines, recorded_files
from thimble_zarr.store.metadata import Declared, check_bounds
from thimble_zarr.store.rows import OpenedRows
from thimble_zarr.store.shard import ShardFile, decode_vector, locate_bit, values_checksum

StorePath = str | os.PathLike[str]


@dataclass(frozen=True)
class StoreReader:
    """The committed rows of a parameter. Made by `open`; small to pickle, safe to share by threads.

    What is committed when the reader is opened is what it will ever see.

    Attributes
    ----------
    files
        The files of the store.
    schema
        What was declared.
    commit
        The commit record as it was when the store was opened.
    group
        The parameter's group in the store; empty where it is the root itself.
    """

    files: Files
    schema: Schema
    commit: Commit
    group: str = ""

    @classmethod
    def open(cls, path: StorePath, parameter: str | None = None) -> Self:
        """Open a store for reading, whether or not it is still being written.

        Parameters
        ----------
        path
            The store.
        parameter
            Which of its parameters. None where there is only one.

        Raises
        ------
        NotAStoreError
            If there is no store at `path`.
        UnsupportedFormatError
            If the store is of another format version.
        DamagedStoreError
            If its metadata or commit record cannot be read.
        SelectionError
            If it holds several parameters and none was chosen, or not the one that was.
        """
        content = _Content.read(path)
        (chosen,) = cls._open_groups(content, (content.choose(parameter),))
        return chosen

    @classmethod
    def open_each(cls, path: StorePath) -> tuple[Self, ...]:
        """Open every parameter of a store, all at the same commit, in the order of the recording.

        The one of a single parameter has no `group`. Errors are those of `open`.
        """
        content = _Content.read(path)
        return cls._open_groups(content, content.names or ("",))

    @classmethod
    def _open_groups(cls, content: "_Content", groups: tuple[str, ...]) -> tuple[Self, ...]:
        files = content.files
        readers: list[Self] = []
        for group in groups:
            try:
                commit = readers[0].commit if readers else Commit.read_checked(files)
                reader = cls(files, read_schema(files, group), commit, group)
                reader._check_bounds()
            except (UnsupportedFormatError, DamagedStoreError) as error:
                raise type(error)(f"cannot read {files.path / group}: {error}") from error
            readers.append(reader)
        return tuple(readers)

    @property
    def path(self) -> Path:
        """Root directory of the store."""
        return self.files.path

    @property
    def kind(self) -> str:
        """The format, and whether the recording has ended, in words."""
        return f"format {FORMAT_VERSION}, {self.recording}"

    @property
    def recording(self) -> Recording:
        """Whether the recording has ended, and if not, who is or was recording."""
        if self.commit.complete:
            return Recording(State.CLOSED)
        from thimble_zarr.store.lock import recording_of  # which few who read need

        recording = recording_of(self.files)
        if recording.state is State.CUT_OFF and Commit.read(self.files).complete:
            return Recording(State.RECORDING)  # it was, when the reader was opened
        return recording

    @property
    def integrity(self) -> Self:
        """What compares the store with what was committed."""
        return self

    @property
    def n_rows(self) -> int:
        """Committed rows: the initial state and committed steps, as far as they are recorded."""
        return self.commit.n_rows

    @property
    def declared_level(self) -> int:
        """The level of compression that is declared for the arrays."""
        return self._declared("W").level

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
            An array of the shape and dtype of what is returned, which may be read into.

        Returns
        -------
        numpy.ndarray
            Shape `(step, token, dim)`, dtype `storage_dtype` of the variable.

        Raises
        ------
        DamagedStoreError
            If a file is missing or empty, or a checksum does not match.
        """
        with self.opened() as opened:
            every = range(self.schema.n_tokens)
            return opened.read(name, rows, every if tokens is None else tokens, out)

    def opened(self) -> OpenedRows:
        """Return the same rows for one thread, which has files kept open while it reads a few."""
        return OpenedRows(self.schema, self._shard, self._decoding_block)

    def altered_chunks(
        self, rows: tuple[int, int], *, before_block: Callable[[int], object] | None = None
    ) -> Iterator[AlteredChunk]:
        """Find chunks, and files of scalars and labels, that are not those that were committed.

        Their files are sound: something stored them again, with good checksums. Only chunks that
        were stored again are decoded, so that looking for them costs next to nothing.

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
        layout = self.schema.layout
        ledger, files = self._read_ledger()
        recorded: dict[FileChecksums, str] = {}
        for first_row, chunks in ledger.items():
            if not (first_row < rows[1] and rows[0] < first_row + layout.block_steps):
                continue
            if before_block is not None:
                before_block(first_row + layout.block_steps)
            for name, checksums in chunks.items():
                altered = self._altered_in(name, first_row, checksums)
                if not altered or self._was_stored_since(name, first_row):
                    continue
                recorded = recorded or recorded_files(self._ledger_entries())
                origin = recorded.get(tuple(self.stored_checksums(name, first_row)))
                yield from (replace(one, recorded_as=origin) for one in altered)
        for key, crc32 in files.items():
            found = self._file_crc32(key)
            if found == crc32:
                continue
            since = [entry["files"].get(key, {}).get("crc32") for entry in self._since()]
            if found not in since:
                recorded = recorded or recorded_files(self._ledger_entries())
                name, _, chunk = key.removeprefix(array_path(self.group, "")).partition("/c.")
                first_row = int(chunk) * SCALAR_CHUNK_STEPS
                origin = recorded.get(found)
                yield AlteredChunk(name, key, 1, origin, first_row, None, None, None)

    def _since(self) -> list[dict[str, Any]]:
        """Return what the ledger says beyond what this reader sees.

        A writer may have stored files again, with more rows, or was killed when it had.
        """
        with self._decoding("the ledger"):
            lines = read_lines(self.path / LEDGER, start=self.commit.ledger_bytes)
            return [dict(line.entry) for line in lines if line.entry is not None]

    def _was_stored_since(self, name: str, first_row: int) -> bool:
        """Return whether a block is, in this variable, what the ledger says of it since."""
        return any(
            not self._altered_in(name, first_row, self._checksums(entry, name))
            for entry in self._since()
            if entry["rows"][0] == first_row
        )

    def _checksums(self, entry: Mapping[str, Any], name: str) -> np.ndarray:
        """Return what a line of the ledger says of the chunks of a variable.

        Their `Checksums`, uint32, shape `(chunk, 2)`: a long run has millions of them.
        """
        return np.array(entry["chunks"][self._key(name)], np.uint32).reshape(-1, 2)

    def _file_crc32(self, key: str) -> int:
        if not is_chunk_key(key):
            raise DamagedStoreError(f"{self.path}: its ledger has a file {key!r}, as no store has")
        self._check_file(key)
        with self._decoding(key):
            return zlib.crc32((self.path / key).read_bytes())

    def _altered_in(self, name: str, first_row: int, checksums: np.ndarray) -> list[AlteredChunk]:
        file = self._shard_key(name, first_row)
        with self._block(name, first_row) as shard:
            return [
                AlteredChunk(
                    name,
                    file,
                    len(checksums),
                    None,
                    first_row,
                    chunk,
                    self._tokens_of(chunk),
                    Checksums(*committed),
                )
                for chunk, (committed, stored) in enumerate(
                    zip(checksums.tolist(), shard.stored_checksums(), strict=True)
                )
                if stored != committed[0] and values_checksum(shard.decode(chunk)) != committed[1]
            ]

    def _tokens_of(self, chunk: int) -> Indices:
        """Return the tokens of a chunk, as they lie in it."""
        start, length = chunk * self.schema.layout.chunk_tokens, self.schema.layout.chunk_tokens
        order = self.schema.stored_order
        tokens: Indices = range(self.schema.n_tokens) if order is None else order
        return tokens[start : start + length]

    def stored_checksums(self, name: str, first_row: int) -> list[int | None]:
        """Return the checksum that follows each chunk of a block, None where one was left out.

        Raises
        ------
        DamagedStoreError
            If the file cannot be decoded.
        """
        with self._block(name, first_row) as shard:
            return shard.stored_checksums()

    def flipped_bit(self, altered: AlteredChunk) -> tuple[int, int, int, int] | None:
        """Return row, token, dim and bit, if one flipped bit is all that altered a chunk.

        It takes seconds.
        """
        if altered.committed is None or altered.chunk is None or altered.tokens is None:
            return None
        with self._block(altered.variable, altered.first_row) as shard:
            values = shard.decode(altered.chunk)
        bit = locate_bit(values.tobytes(), altered.committed.values)
        if bit is None:
            return None
        index, bit = divmod(bit, 8 * values.itemsize)
        token, row, dim = (int(part) for part in np.unravel_index(index, values.shape))
        if token >= len(altered.tokens):  # it is in what fills up the last chunk
            return None
        return altered.first_row + row, int(altered.tokens[token]), dim, bit

    def _read_ledger(self) -> tuple[dict[int, dict[str, np.ndarray]], dict[str, int]]:
        """Return checksums of the chunks of each block, and CRC-32 of the files of all else.

        Of what was committed again the last ones.
        """
        blocks: dict[int, dict[str, np.ndarray]] = {}
        files: dict[str, int] = {}
        ours = array_path(self.group, "")
        with self._decoding("the ledger"):
            for entry in self._ledger_entries():
                chunks = entry["chunks"]
                if "resumed" in entry:  # the run went on from there
                    end_row = entry["rows"][1]
                    blocks = {row: known for row, known in blocks.items() if row < end_row}
                    files = {key: crc for key, crc in files.items() if key not in entry["removed"]}
                blocks[entry["rows"][0]] = {
                    name: self._checksums(entry, name) for name in self.schema.dtypes
                }
                files |= {
                    key: file["crc32"]
                    for key, file in entry["files"].items()
                    if key.startswith(ours) and array_of(key) not in chunks
                }
                for key in [key for key in files if array_of(key) in entry.get("dropped", ())]:
                    del files[key]  # a label that a repair left out
        return blocks, files

    def _ledger_entries(self) -> Iterator[dict[str, Any]]:
        n_bytes, crc32 = 0, 0
        for line in read_lines(self.path / LEDGER, stop=self.commit.ledger_bytes):
            if line.entry is None:
                raise ValueError(f"the checksum of its line at byte {line.start} does not match")
            n_bytes, crc32 = line.stop, zlib.crc32(line.content, crc32)
            yield dict(line.entry)
        if (n_bytes, crc32) != (self.commit.ledger_bytes, self.commit.ledger_crc32):
            raise ValueError("it is not the one that was committed")

    @contextmanager
    def _block(self, name: str, row: int) -> Iterator[ShardFile]:
        """Open the shard of a row's block for decoding; whatever is wrong with it is damage."""
        with self._decoding_block(name, row), self._shard(name, row) as shard:
            yield shard

    def _shard(self, name: str, row: int) -> ShardFile:
        """Return the shard of a row's block, not yet open."""
        schema, layout = self.schema, self.schema.layout
        key = self._shard_key(name, row)
        self._check_file(key)
        return ShardFile(
            f"{self.path}/{key}",
            n_chunks=layout.shard_tokens(schema.n_tokens) // layout.chunk_tokens,
            shape=(layout.chunk_tokens, layout.block_steps, schema.n_dims),
            dtype=storage_dtype(schema.dtypes[name]),
            fill=fill_value(schema.dtypes[name]),
        )

    def _shard_key(self, name: str, row: int) -> str:
        """Return the file of a row's block, as a path in the store."""
        block = row // self.schema.layout.block_steps
        return shard_key((self.group, name), block, self.schema.shape)

    def _decoding_block(self, name: str, row: int) -> AbstractContextManager[None]:
        """Tell what is wrong with the shard of a row's block, or with what is declared of it."""
        self._declared(name)
        first_row = row - row % self.schema.layout.block_steps
        of = "step" if self.schema.schedule is None else "row"
        return self._decoding(f"{self._key(name)} from {of} {first_row} on")

    def read_scalars(self) -> dict[str, np.ndarray]:
        """Return every per-step scalar: float64, shape `(n_rows,)`, NaN where missing."""
        return {name: self._read_vector(name) for name in self.schema.scalars}

    def read_steps(self) -> np.ndarray:
        """Return the step of each row, ascending: int64, shape `(n_rows,)`."""
        if self.schema.schedule is None:
            return np.arange(self.n_rows)
        steps = self._read_vector("step")
        self._check_ascending("step", steps)
        return steps

    def read_token_ids(self) -> np.ndarray:
        """Return which row of the parameter each token is, ascending: int64, shape `(token,)`."""
        schema = self.schema
        if schema.whole_tokens is None and schema.places is None:
            return np.arange(schema.n_tokens)
        name = schema.dims[0]
        ids = self._read_vector(name)
        if schema.places is not None and len(ids) == schema.n_tokens:
            ids = ids[schema.places]
        self._check_ascending(name, ids)
        n_whole = schema.whole_tokens or schema.n_tokens
        if len(ids) != schema.n_tokens or ids[-1] >= n_whole:
            raise DamagedStoreError(
                f"{self.path}: {self._key(name)} has {len(ids)} ids, and {schema.n_tokens} "
                f"below {n_whole} were declared"
            )
        return ids

    def _check_ascending(self, name: str, labels: np.ndarray) -> None:
        ascend = labels.dtype == np.int64 and (labels[1:] > labels[:-1]).all()
        if not (ascend and (labels[:1] >= 0).all()):
            raise DamagedStoreError(f"{self.path}: the labels {self._key(name)} do not ascend")

    def read_labels(self) -> TokenLabels:
        """Return what is known of the tokens."""
        known = {
            name: self._read_vector(name)
            for name in ("count", "live", "dead", "text_bytes", "text_end")
            if (self.path / self._key(name)).is_dir()
        }
        text = None
        with self._decoding("the labels"):
            if {"text_bytes", "text_end"} & set(known):
                utf8 = known.pop("text_bytes").tobytes()
                ends = [0, *known.pop("text_end").tolist()]
                if sorted(ends) != ends or ends[-1] != len(utf8):
                    raise ValueError("the texts of the tokens do not follow one another")
                text = [utf8[start:end].decode() for start, end in itertools.pairwise(ends)]
            labels = TokenLabels(text=text, **known)
            labels.check_length(self.schema.n_tokens)
        return labels if self.schema.places is None else labels.of(self.schema.places)

    def token_groups(self, tokens: Indices, most: int) -> list[TokenGroup]:
        """Return tokens in groups of at most `most`, or of one chunk, that share few chunks."""
        schema = self.schema
        places, chunk_tokens = schema.places, schema.layout.chunk_tokens
        return token_groups(tokens, most, places=places, chunk_tokens=chunk_tokens)

    def read_history(self) -> History:
        """Return what recording took and where it was resumed.

        Raises
        ------
        DamagedStoreError
            If the ledger is damaged.
        """
        return History(self.read_overhead(), self.read_resumptions())

    def read_overhead(self) -> dict[int, Overhead]:
        """Return what recording took, of all parameters together, by the first row of each block.

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

    def read_resumptions(self) -> list[int]:
        """Return the steps after which the run was resumed, in the order in which that was done.

        Raises
        ------
        DamagedStoreError
            If the ledger is damaged.
        """
        with self._decoding("the ledger"):
            return [
                int(entry["rows"][1]) - 1 for entry in self._ledger_entries() if "resumed" in entry
            ]

    def disk_bytes(self) -> int:
        """Return the size of all files of the store."""
        n_bytes = 0
        for file in self.path.rglob("*"):
            with suppress(FileNotFoundError):  # a writer may just have renamed it
                n_bytes += file.stat().st_size if file.is_file() else 0
        return n_bytes

    def _check_bounds(self) -> None:
        """Raise DamagedStoreError if the store claims to hold more than its files can."""
        last = max(0, self.n_rows - 1) // self.schema.layout.block_steps
        shards = [
            shard_key((self.group, name), block, self.schema.shape)
            for name in self.schema.dtypes
            for block in (0, last)
        ]
        check_bounds(self.schema, self.n_rows, self.files, shards)

    def _declared(self, name: str) -> Declared:
        """Return what the metadata of an array say, once they fit what was committed."""
        known = self.__dict__.setdefault("_arrays", {})
        if name not in known:
            try:
                array = Declared.read(self.files, metadata_key(self._key(name)))
            except (OSError, ValueError) as error:
                raise DamagedStoreError(
                    f"cannot open array {self._key(name)} of {self.path}: {error}"
                ) from error
            self._check_shape(name, array.shape)
            known[name] = array
        declared: Declared = known[name]
        return declared

    def __reduce__(self) -> tuple[type[Self], tuple[Files, Schema, Commit, str]]:
        return type(self), (self.files, self.schema, self.commit, self.group)

    def _key(self, name: str) -> str:
        """Return the path of an array or file of the parameter from the root of the store."""
        return array_path(self.group, name)

    def _read_vector(self, name: str) -> np.ndarray:
        array = self._declared(name)
        if len(array.shape) != 1:
            raise DamagedStoreError(f"{self.path}: the array {name} has shape {array.shape}")
        length = self.n_rows if name in PER_STEP else array.shape[0]
        parts = []
        for index in range(-(-length // array.chunk_shape[0])):
            key = self._key(f"{name}/c.{index}")
            self._check_file(key)
            with self._decoding(self._key(name)):
                content = (self.path / key).read_bytes()
                parts.append(decode_vector(content, array.chunk_shape[0], array.dtype))
        return np.concatenate([*parts, np.empty(0, array.dtype)])[:length]

    @contextmanager
    def _decoding(self, what: str) -> Iterator[None]:
        """Tell damage, whatever Zarr and its codecs raise for it, from a disk that cannot read."""
        try:
            yield
        except (MemoryError, StoreError):
            raise
        except OSError as error:
            raise StoreError(f"cannot read {what} of {self.path}: {error}") from error
        except Exception as error:
            raise DamagedStoreError(
                f"cannot decode {what} of {self.path}: {error}; `thimble-zarr verify` lists all "
                "damage"
            ) from error

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Zarr clips what is asked for to the array; in committed rows that is damage."""
        declared = (self.n_rows, *self.schema.shape)
        if name in self.schema.dtypes:
            sound = shape[:1] >= declared[:1] and shape[1:] == declared[1:]
        else:
            sound = name not in PER_STEP or shape[:1] >= declared[:1]
        if not sound:
            raise DamagedStoreError(
                f"{self.path}: the array {self._key(name)} has shape {shape}, "
                f"and {declared} was committed"
            )

    def _check_file(self, key: str) -> None:
        """Zarr reads a missing or empty file as fill values; in a committed block it is damage."""
        try:
            found = os.lstat(f"{self.path}/{key}")  # of every block
        except FileNotFoundError:
            found = None
        if found and not stat.S_ISREG(found.st_mode):
            raise DamagedStoreError(
                f"{self.path}: {key} is not a plain file, and is not opened; restore it from a copy"
            )
        if not (found and found.st_size):
            raise DamagedStoreError(
                f"{self.path}: the committed file {key} is missing or empty; restore it from a copy"
            )


@dataclass(frozen=True)
class _Content:
    """What the root of a store says of it: the Schema of its one parameter, or several groups."""

    files: Files
    content: Mapping[str, Json]
    names: tuple[str, ...]

    @classmethod
    def read(cls, path: StorePath) -> Self:
        files = LocalFiles(Path(path).absolute())  # the process may change its directory
        path = files.path
        if not files.is_there:
            raise NotAStoreError(f"there is nothing at {path}; check the path")
        attribute = read_attribute(files) if _has_bookkeeping(files) else None
        if attribute is None:
            raise NotAStoreError(
                f"{path} is not a thimble-zarr store; "
                "record one with `thimble-zarr train` or `thimble_zarr.Recorder`"
            )
        try:
            content = read_content(attribute)
            names = content.get(PARAMETERS, ())
            if not (isinstance(names, Sequence) and all(isinstance(name, str) for name in names)):
                raise DamagedStoreError(f"its parameters must be names, not {names!r}")
            for name in names:
                check_group_name(str(name))
        except ConfigError as error:
            raise DamagedStoreError(f"cannot read {path}: {error}") from error
        except (UnsupportedFormatError, DamagedStoreError) as error:
            raise type(error)(f"cannot read {path}: {error}") from error
        return cls(files, content, tuple(map(str, names)))

    def choose(self, parameter: str | None) -> str:
        """Return the group of a parameter, by default of the only one there is."""
        if not self.names and parameter in (None, self.content.get("parameter")):
            return ""
        if parameter is None and len(self.names) == 1:
            return self.names[0]
        if parameter in self.names:
            return parameter
        if parameter is None:
            raise SelectionError(
                f"{self.files.path} holds {len(self.names)} parameters, and one must be chosen, by "
                "`parameter=` in Python or --parameter on the command line: "
                f"{_listed(self.names)}"
            )
        there = _listed(self.names) or self.content.get("parameter") or "one without a name"
        raise SelectionError(f"{self.files.path} has no parameter {parameter}; there is {there}")


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _MOST_LISTED} more (`thimble-zarr info` lists them all)"
    return ", ".join(names[:_MOST_LISTED]) + (rest if len(names) > _MOST_LISTED else "")


_MOST_LISTED = 24
"""Parameters that an error lists."""


def read_attribute(files: Files, group: str = "") -> Json:
    """Return the `thimble` attribute of a group, None where there is none."""
    try:
        attribute: Json = read_document(files, metadata_key(group))["attributes"][ATTRIBUTE]
        return attribute
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    except OSError as error:
        raise StoreError(f"cannot read {files.path / group}: {error.strerror}") from error


def read_schema(files: Files, group: str) -> Schema:
    """Return what a group of a store says it holds.

    Raises
    ------
    UnsupportedFormatError, DamagedStoreError
        If that cannot be read.
    """
    try:
        files.size(metadata_key(group))
    except NotPlainFileError as error:
        raise DamagedStoreError(str(error)) from error
    except OSError:
        pass  # it has no attribute
    return Schema.from_attribute(read_attribute(files, group))


def read_declared(path: StorePath) -> Schema | None:
    """Return what is declared of the first parameter of a store, be anything committed or not.

    None where nothing is: there is no store, or its writer was killed as soon as it began.

    Raises
    ------
    UnsupportedFormatError, DamagedStoreError
        If what is declared cannot be read.
    """
    files = LocalFiles(Path(path).absolute())
    if read_attribute(files) is None:
        return None
    group = next(iter(_Content.read(path).names), "")
    attribute = read_attribute(files, group)
    try:
        return None if attribute is None else Schema.from_attribute(attribute)
    except (UnsupportedFormatError, DamagedStoreError) as error:
        raise type(error)(f"cannot read {files.path / group}: {error}") from error


def why_empty(path: StorePath) -> str:
    """Return why nothing is committed in a store, as far as that is known, and what to do."""
    from thimble_zarr.store.lock import recording_of  # which few who read need

    schema = None
    with suppress(StoreError):
        schema = read_declared(path)
    is_imported = schema is not None and schema.is_imported
    return recording_of(LocalFiles(Path(path))).why_empty(is_imported=is_imported)


def is_begun(path: StorePath) -> bool:
    """Return whether there is anything at `path` but a store without a row: perhaps a recording."""
    files = LocalFiles(Path(path))
    return not files.is_vacant and not is_without_rows(files)


def is_without_rows(files: Files) -> bool:
    """Return whether it is a store into which nothing was ever committed.

    It may not be declared wholly either, if its writer was killed as soon as it began.
    """
    if not _has(files, LOCK):
        return False
    try:
        return Commit.read(files).n_rows == 0
    except DamagedStoreError:
        return not _has(files, COMMIT) and not (_has(files, LEDGER) and files.size(LEDGER))


def _has(files: Files, key: str) -> bool:
    """Return whether there is a file, or what should be one."""
    try:
        files.size(key)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except NotPlainFileError:
        return key != LOCK
    return True


def _has_bookkeeping(files: Files) -> bool:
    """Return whether a store's own files do not lie elsewhere."""
    try:
        files.size(COMMIT)
    except OutsideError:
        return False
    except (OSError, ValueError):
        pass  # somebody else says what is wrong with it
    return True
