"""A parameter's arrays in a store: which files hold which rows of them, and what they say."""

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from thimble_zarr import tuning
from thimble_zarr.errors import DamagedStoreError, StoreError
from thimble_zarr.format.schema import Schema, array_path
from thimble_zarr.store.coding.compression import COMPRESSIONS
from thimble_zarr.store.coding.predicted import Prediction
from thimble_zarr.store.coding.shard_codec import ShardFile, decode_vector
from thimble_zarr.store.files.base import Files, NotPlainFileError, read_document
from thimble_zarr.store.keys import metadata_key, shard_key, vector_key
from thimble_zarr.store.ledger import Commit, FileRecord, Ledger
from thimble_zarr.store.metadata import Declared


@contextmanager
def decoding(files: Files, what: str, key: str | None = None) -> Iterator[None]:
    """Tell damage, whatever codecs raise for it, from a disk that cannot be read.

    If the key of a committed file is given, it is damage too that there is none, or a link.
    """
    try:
        yield
    except (MemoryError, StoreError):
        raise
    except Exception as error:
        problem = ""
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            problem = f"the committed file {key} is missing or empty"
        elif isinstance(error, NotPlainFileError):
            problem = f"{key} is not opened: {error}"
        if key is not None and problem:
            problem = f"{files.path}: {problem}; restore it from a copy"
            raise DamagedStoreError(problem) from error
        if isinstance(error, OSError):
            raise StoreError(f"cannot read {what} of {files.path}: {error}") from error
        raise DamagedStoreError(
            f"cannot decode {what} of {files.path}: {error}; `thimble-zarr verify` lists all damage"
        ) from error


Parts = Mapping[str, np.ndarray]
"""Rows of some tokens by variable."""


class SharedParts:
    """Parts of chunks that were computed, for all threads that read.

    Whoever wants one variable has all of them computed, and the others are asked for next.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[Any, Future[Parts]] = {}
        self._n_bytes = 0

    def get(self, key: Any, compute: Callable[[], Parts]) -> Parts:
        """Return what was computed under a key, or is now."""
        with self._lock:
            known = self._known.get(key)
            future = self._known[key] = known or Future()
        if known is None:
            try:
                future.set_result(compute())
            except BaseException as error:
                future.set_exception(error)
                with self._lock:
                    self._known.pop(key, None)
                raise
            self._keep(future.result())
        return future.result()

    def _keep(self, parts: Parts) -> None:
        """Count what was computed, and let go of what was computed first."""
        with self._lock:
            self._n_bytes += _n_bytes(parts)
            for key, future in [*self._known.items()]:
                if self._n_bytes <= tuning.TUNING.decoded_bytes:
                    return
                if future.done():
                    del self._known[key]
                    self._n_bytes -= _n_bytes(future.result())


def _n_bytes(parts: Parts) -> int:
    return sum(bits.nbytes for bits in parts.values())


@dataclass(frozen=True)
class StoredArrays:
    """The arrays of a parameter in a store, of which `commit.n_rows` rows are committed."""

    files: Files
    group: str
    schema: Schema
    commit: Commit
    shared: SharedParts = field(default_factory=SharedParts, compare=False, repr=False)
    _known: dict[str, Declared] = field(default_factory=dict, compare=False)

    @property
    def n_rows(self) -> int:
        """Committed rows."""
        return self.commit.n_rows

    def key(self, name: str) -> str:
        """Return the path of an array from the root of the store."""
        return array_path(self.group, name)

    def declared(self, name: str) -> Declared:
        """Return what the metadata of an array say, once they fit what was committed."""
        if name not in self._known:
            try:
                array = Declared.of(read_document(self.files, metadata_key(self.key(name))))
            except (OSError, ValueError) as error:
                raise DamagedStoreError(
                    f"cannot open array {self.key(name)} of {self.files.path}: {error}"
                ) from error
            self._check_shape(name, array.shape)
            self._known[name] = array
        return self._known[name]

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Zarr clips what is asked for to the array; in committed rows that is damage."""
        length = self.n_rows
        rest: tuple[int, ...] = ()
        if (of := self.schema.arrays.get(name)) is not None:
            rest = self.schema.shape
            length = -(-length // self.schema.layout.block_steps) if of.is_keyframe else length
        elif name in self.schema.logged:
            rest = self.schema.logged[name].shape
        elif name not in self.schema.per_step:
            return
        if shape[0] < length or shape[1:] != rest:
            raise DamagedStoreError(
                f"{self.files.path}: the array {self.key(name)} has shape {shape}, "
                f"and {(length, *rest)} was committed"
            )

    def shard(self, name: str, row: int) -> ShardFile:
        """Return the shard of a row's block of an array, not yet open."""
        schema, layout, of = self.schema, self.schema.layout, self.schema.arrays[name]
        n_rows = 1 if of.is_keyframe else layout.block_steps
        return ShardFile(
            self.files,
            shard_key(self.key(name), row // layout.block_steps, schema.shape),
            n_chunks=layout.shard_tokens(schema.n_tokens) // layout.chunk_tokens,
            shape=(layout.chunk_tokens, n_rows, schema.n_dims),
            dtype=of.dtype,
            fill=of.fill,
            compression=COMPRESSIONS[of.codec],
        )

    def decoding(self, name: str, row: int) -> AbstractContextManager[None]:
        """Tell what is wrong with the shard of a row's block, or with what is declared of it."""
        self.declared(name)
        block, of_block = divmod(row, self.schema.layout.block_steps)
        of = "step" if self.schema.schedule is None else "row"
        what = f"{self.key(name)} from {of} {row - of_block} on"
        return decoding(self.files, what, shard_key(self.key(name), block, self.schema.shape))

    @contextmanager
    def block(self, name: str, row: int) -> Iterator[ShardFile]:
        """Open the shard of a row's block for decoding; whatever is wrong with it is damage."""
        with self.decoding(name, row), self.shard(name, row) as shard:
            yield shard

    def will_read(self, names: Iterable[str]) -> None:
        """Say which arrays of one axis will be read."""
        keys = ((metadata_key(self.key(name)), vector_key(self.key(name))) for name in names)
        self.files.will_open(itertools.chain.from_iterable(keys))

    def vector(self, name: str) -> np.ndarray:
        """Return the values of an array of one axis, of committed rows only."""
        array = self.declared(name)
        if len(array.shape) != 1:
            raise DamagedStoreError(f"{self.files.path}: the array {name} has shape {array.shape}")
        length = self.n_rows if name in self.schema.per_step else array.shape[0]
        parts = []
        for index in range(-(-length // array.chunk_shape[0])):
            key = vector_key(self.key(name), index)
            with decoding(self.files, self.key(name), key):
                if not (content := self.files.get(key)):
                    raise FileNotFoundError
                parts.append(decode_vector(content, array.chunk_shape[0], array.dtype))
        return np.concatenate([*parts, np.empty(0, array.dtype)])[:length]

    def logged(self, name: str) -> np.ndarray:
        """Return what was logged at each committed row, NaN where nothing was."""
        array, parts = self.declared(name), []
        n_blocks = -(-self.n_rows // self.schema.layout.block_steps)
        keys = [shard_key(self.key(name), block, array.shape[1:]) for block in range(n_blocks)]
        self.files.will_open(keys)
        for key in keys:
            with decoding(self.files, self.key(name), key):
                parts.append(decode_vector(self.files.get(key), array.chunk_shape, array.dtype))
        empty = self.schema.logged[name].missing(0)
        found: np.ndarray = np.concatenate([*parts, empty])[: self.n_rows]
        return found

    @cached_property
    def prediction(self) -> Prediction:
        """What predicts the committed rows."""
        scalars = {name: self.vector(name) for name in self.schema.numbers}
        steps = np.arange(self.n_rows)
        if self.schema.schedule is not None:
            steps = self.vector("step")
        return Prediction.of(self.schema, scalars, steps)

    @cached_property
    def recorded(self) -> Mapping[str, FileRecord]:
        """What the ledger says of each file of the store."""
        return self.ledger.records

    @property
    def ledger(self) -> Ledger:
        """What the ledger says; do not add to it."""
        files: Any = self.files  # all that there are can be hashed
        with decoding(self.files, "the ledger"):
            return _ledger(files, self.commit)


@lru_cache(maxsize=2)
def _ledger(files: Any, commit: Commit) -> Ledger:
    """Return what a ledger says; of several parameters one after the other asks for it."""
    return Ledger.read(files, commit)
