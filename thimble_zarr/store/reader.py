"""Read a store: the rows that are committed, per-step values and labels.

The commit record names the number of rows that count. A reader looks at nothing beyond it, so a
step of which any array is missing is never seen. What lies where `keys` shows, and docs/format.md
tells. Several parameters are a group each, with all that the root of a single one has but the
bookkeeping: a step is committed for all parameters or for none.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from thimble_zarr.errors import DamagedStoreError
from thimble_zarr.format.indexing import Indices
from thimble_zarr.format.location import Location
from thimble_zarr.format.reader import History, Recording, State
from thimble_zarr.format.schema import Schema, TokenLabels
from thimble_zarr.format.versions import FORMAT_VERSION
from thimble_zarr.store.arrays import StoredArrays, decoding
from thimble_zarr.store.contents import Contents, has_file, read_attribute, reading
from thimble_zarr.store.contents import StorePath as StorePath
from thimble_zarr.store.files.base import Files, NotListedError
from thimble_zarr.store.files.place import files_at
from thimble_zarr.store.integrity.altered import StoreIntegrity
from thimble_zarr.store.integrity.recorded import RecordedValues
from thimble_zarr.store.keys import metadata_key, vector_key
from thimble_zarr.store.ledger import Commit, Ledger, unchanged_rows
from thimble_zarr.store.lock import recording_of
from thimble_zarr.store.metadata import check_bounds
from thimble_zarr.store.rows import OpenedRows, RemoteRows


@dataclass(frozen=True)
class StoreReader:
    """The committed rows of a parameter. Made by `open`; small to pickle, safe to share by threads.

    What is committed when the reader is opened is what it will ever see.

    `commit` is the commit record as it was when the store was opened, and `group` the parameter's
    group in the store, which is empty where it is the root itself.
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
        NotAStoreError, UnsupportedFormatError, DamagedStoreError
            If there is no store at `path` that can be read.
        SelectionError
            If it holds several parameters and none was chosen, or not the one that was.
        """
        contents = Contents.read(files_at(path))
        (chosen,) = cls._open_groups(contents.files, (contents.choose(parameter),))
        return chosen

    @classmethod
    def open_each(cls, path: StorePath) -> tuple[Self, ...]:
        """Open every parameter of a store, all at the same commit, in the order of the recording.

        The one of a single parameter has no `group`. Errors are those of `open`.
        """
        return cls.open_files(files_at(path))

    @classmethod
    def open_files(cls, files: Files) -> tuple[Self, ...]:
        """Open every parameter of a store, wherever its files lie."""
        return cls._open_groups(files, Contents.read(files).groups)

    @classmethod
    def _open_groups(cls, files: Files, groups: tuple[str, ...]) -> tuple[Self, ...]:
        readers: list[Self] = []
        for group in groups:
            with reading(files.path / group):
                commit = readers[0].commit if readers else Commit.read_checked(files)
                schema = Schema.from_attribute(read_attribute(files, group))
                check_bounds(files, group, schema, commit.n_rows)
            readers.append(cls(files, schema, commit, group))
        return tuple(readers)

    @property
    def path(self) -> Location:
        """Where the store lies."""
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
        recording = recording_of(self.files)
        if recording.state is State.CUT_OFF and Commit.read(self.files).complete:
            return Recording(State.RECORDING)  # it was, when the reader was opened
        return recording

    @property
    def integrity(self) -> StoreIntegrity:
        """What compares the store with what was committed."""
        return StoreIntegrity(self.arrays, self.commit)

    def chunk_checksums(self) -> RecordedValues:
        """Return what chunks of equal values are recognised by, as the ledger says."""
        return RecordedValues.of(self.arrays)

    @cached_property
    def arrays(self) -> StoredArrays:
        """The arrays of the parameter, and which files hold which rows of them."""
        return StoredArrays(self.files, self.group, self.schema, self.commit)

    @property
    def n_rows(self) -> int:
        """Committed rows: the initial state and committed steps, as far as they are recorded."""
        return self.commit.n_rows

    @property
    def whole_rows(self) -> range:
        """All rows, but of a run that was imported from a file with states of some."""
        return self.schema.whole_rows(self.n_rows)

    @property
    def identity(self) -> str:
        """What the committed rows are known by: the ledger is only ever added to."""
        return f"{self.commit.ledger_bytes}:{self.commit.ledger_crc32:08x}"

    def rows_since(self, identity: str) -> int:
        """Return how many of the first rows were there when the store had that identity.

        What was added to the ledger since then says from which row on it was cut off.
        """
        n_bytes, _, crc32 = identity.partition(":")
        try:
            return unchanged_rows(self.files, self.commit, int(n_bytes), int(crc32, 16))
        except (ValueError, OSError):
            return 0

    def read(
        self,
        name: str,
        rows: tuple[int, int],
        tokens: Indices | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Read stored bits of a variable: shape `(step, token, dim)`, dtype `storage_dtype` of it.

        Besides what it returns, or reads into `out`, it takes the memory of one chunk. The rows are
        `(start, stop)` within the committed ones; the tokens may be in any order, and are all by
        default. Raises DamagedStoreError if a file is missing, or a checksum does not match.
        """
        with self.opened() as opened:
            every = range(self.schema.n_tokens)
            return opened.read(name, rows, every if tokens is None else tokens, out)

    def opened(self) -> OpenedRows:
        """Return the same rows for one thread, which has files kept open while it reads a few."""
        return RemoteRows(self.arrays) if self.files.is_remote else OpenedRows(self.arrays)

    def read_scalars(self) -> dict[str, np.ndarray]:
        """Return every per-step scalar: float64, shape `(n_rows,)`, NaN where missing."""
        self.arrays.will_read(self.schema.scalars)
        return {name: self.arrays.vector(name) for name in self.schema.scalars}

    def read_numbers(self) -> dict[str, np.ndarray]:
        """Return the same, with what torch derived from them, as far as that is stored."""
        self.arrays.will_read(self.schema.numbers)
        return {name: self.arrays.vector(name) for name in self.schema.numbers}

    def read_logged(self) -> dict[str, np.ndarray]:
        """Return what was logged besides the loss, shape `(n_rows, ...)`, NaN where nothing was."""
        return {name: self.arrays.logged(name) for name in self.schema.logged}

    def read_steps(self) -> np.ndarray:
        """Return the step of each row, ascending: int64, shape `(n_rows,)`."""
        if self.schema.schedule is None:
            return np.arange(self.n_rows)
        steps = self.arrays.vector("step")
        self._check_ascending("step", steps)
        return steps

    def read_token_ids(self) -> np.ndarray:
        """Return which row of the parameter each token is, ascending: int64, shape `(token,)`."""
        schema = self.schema
        if schema.whole_tokens is None and schema.places is None:
            return np.arange(schema.n_tokens)
        name = schema.dims[0]
        ids = self.arrays.vector(name)
        if schema.places is not None and len(ids) == schema.n_tokens:
            ids = ids[schema.places]
        self._check_ascending(name, ids)
        n_whole = schema.whole_tokens or schema.n_tokens
        if len(ids) != schema.n_tokens or ids[-1] >= n_whole:
            raise DamagedStoreError(
                f"{self.path}: {self.arrays.key(name)} has {len(ids)} ids, and {schema.n_tokens} "
                f"below {n_whole} were declared"
            )
        return ids

    def _check_ascending(self, name: str, labels: np.ndarray) -> None:
        ascend = labels.dtype == np.int64 and (labels[1:] > labels[:-1]).all()
        if not (ascend and (labels[:1] >= 0).all()):
            raise DamagedStoreError(
                f"{self.path}: the labels {self.arrays.key(name)} do not ascend"
            )

    def read_labels(self) -> TokenLabels:
        """Return what is known of the tokens."""
        names = "count", "live", "dead", "text_bytes", "text_end"
        self.arrays.will_read(names)
        known = {
            name: self.arrays.vector(name)
            for name in names
            if any(has_file(self.files, key) for key in self._files_of(name))
        }
        text = None
        with decoding(self.files, "the labels"):
            if {"text_bytes", "text_end"} & set(known):
                utf8 = known.pop("text_bytes").tobytes()
                ends = [0, *known.pop("text_end").tolist()]
                if sorted(ends) != ends or ends[-1] != len(utf8):
                    raise ValueError("the texts of the tokens do not follow one another")
                text = [utf8[start:end].decode() for start, end in itertools.pairwise(ends)]
            labels = TokenLabels(text=text, **known)
            labels.check_length(self.schema.n_tokens)
        return labels if self.schema.places is None else labels.of(self.schema.places)

    def _files_of(self, label: str) -> tuple[str, str]:
        array = self.arrays.key(label)
        return metadata_key(array), vector_key(array)

    def read_history(self) -> History:
        """Return what recording took, where it was resumed and what is missing: the ledger says."""
        return self._history

    @cached_property
    def _history(self) -> History:
        if self.schema.coding.program is not None:  # its files are needed for decoding
            ledger = self.arrays.ledger
        else:
            with decoding(self.files, "the ledger"):
                ledger = Ledger.read(self.files, self.commit, prefix=None)
        filled, missing = (
            # A cut may have left fewer rows of a block.
            [
                (first, min(stop, self.n_rows))
                for marked in ledger.marked.values()
                for first, stop in marked[kind].get(self.group, ())
                if first < self.n_rows
            ]
            for kind in (0, 1)
        )
        return History(ledger.overhead, ledger.resumed_after, ledger.audits, filled, missing)

    def disk_bytes(self) -> int:
        """Return the size of all files of the store, where nobody tells of those committed."""
        try:
            return self.files.total_bytes()
        except NotListedError:
            return sum(record.n_bytes for record in self.arrays.recorded.values())

    def __reduce__(self) -> tuple[type[Self], tuple[Files, Schema, Commit, str]]:
        return type(self), (self.files, self.schema, self.commit, self.group)
