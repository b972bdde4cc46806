"""Write a store again with another coding, block by block, and compare every value.

Both stores hold the same bits; a copy that was interrupted is gone on with.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from thimble_zarr.bits import same_bits, storage_dtype
from thimble_zarr.errors import ConfigError, DamagedStoreError, StoreExistsError
from thimble_zarr.format.coding import CodingName
from thimble_zarr.format.indexing import Indices, as_slice
from thimble_zarr.format.layout import default_memory_bytes, plan_layouts, split_range
from thimble_zarr.format.location import located, on_disk
from thimble_zarr.format.reader import History, not_begun
from thimble_zarr.format.schema import Schema, array_path, row_size
from thimble_zarr.format.stored_array import coding_of
from thimble_zarr.interrupts import interrupts_held
from thimble_zarr.store.coding.predicted import derive
from thimble_zarr.store.contents import StorePath, is_begun
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.writer import StoreWriter

_ARCHIVE_MEMORY_BYTES = 2**30
"""Longer blocks have fewer keyframes, and pcodec finds more in them."""

Progress = Callable[[int, int], None]
"""Called with the bytes done so far and the bytes to do."""


def recode(
    source: StorePath,
    path: StorePath,
    *,
    coding: CodingName = "predicted",
    archive: bool = False,
    memory_bytes: int | None = None,
    overwrite: bool = False,
    on_progress: Progress = lambda n_done, n_total: None,
) -> Sequence[StoreReader]:
    """Copy the committed rows of a store into a new one with another coding.

    Every value of the copy is read again and compared. A copy that was interrupted is gone on with
    when the same is asked for again.

    Parameters
    ----------
    source, path
        The store, and where the new one is to lie.
    coding
        `plain`, which any Zarr reader opens, or `predicted`, which takes a third of the disk.
    archive
        With `predicted`: compress the gradient for the least disk, which takes longer.
    memory_bytes
        Limits the memory that is taken, and so determines the length of blocks. By default 256 MB,
        with `predicted` 512 MB, and 1 GB for an archive.
    overwrite
        Replace a store at `path`.
    on_progress
        Called as bytes are written, and then compared.

    Returns
    -------
    sequence of StoreReader
        The new store's parameters.

    Raises
    ------
    ConfigError
        If the new store would lie in the old one, or `archive` was asked for with another coding.
    StoreExistsError, StoreError
        If another recording lies at `path`, or it cannot be written; or nothing is recorded yet.
    DamagedStoreError
        If the source cannot be read, or a value of the copy is not that of the source.

    Examples
    --------
    >>> from thimble_zarr import recode
    >>> (copy,) = recode("run.zarr", "small.zarr", coding="predicted")
    >>> copy.n_rows, copy.schema.coding.name
    (14, 'predicted')
    """
    path = on_disk(path).absolute()
    original = located(source)
    if isinstance(original, Path) and path.resolve().is_relative_to(original.resolve()):
        raise ConfigError(f"{source} cannot be written over itself; choose another path")
    if archive and coding != "predicted":
        raise ConfigError("archive is for the coding predicted; leave one of them out")
    readers = StoreReader.open_each(source)
    if not readers[0].n_rows:
        raise not_begun(readers[0])
    schemas = recoded_schemas(readers, coding, archive=archive, memory_bytes=memory_bytes)
    n_rows, row_bytes = readers[0].n_rows, sum(schema.row_bytes for schema in schemas.values())
    writer = _open(readers, schemas, path, overwrite=overwrite)
    steps = schemas[readers[0].group].layout.block_steps
    try:
        write_rows(
            readers, schemas, writer, lambda n_done, n_bytes: on_progress(n_done, 2 * n_bytes)
        )
    except BaseException:
        writer.release()  # what is committed stays, to go on from
        raise
    recoded = StoreReader.open_each(path)
    _compare_scalars(readers, recoded)
    for rows in split_range(0, n_rows, steps):
        _compare_block(readers, recoded, rows)
        on_progress(row_bytes * (n_rows + rows[1]), 2 * row_bytes * n_rows)
    return recoded


class Bits(Protocol):
    """The bits of a parameter, for one thread."""

    def read(self, name: str, rows: tuple[int, int], tokens: Indices) -> np.ndarray:
        """Return stored bits of a variable, as `Reader.read` does."""


class Rereadable(Protocol):
    """What is written again: a parameter of a store, or a part of one."""

    @property
    def group(self) -> str:
        """The parameter's name, if the recording holds several; else empty."""

    @property
    def schema(self) -> Schema:
        """What was recorded, and by what."""

    @property
    def n_rows(self) -> int:
        """Rows that can be read."""

    def read_steps(self) -> np.ndarray:
        """Return the step of each row."""

    def read_history(self) -> History:
        """Return which rows were filled in, or are missing."""

    def read_numbers(self) -> dict[str, np.ndarray]:
        """Return the scalars of each row, and what a prediction needs besides."""

    def read_logged(self) -> dict[str, np.ndarray]:
        """Return what was logged of each row besides the loss."""

    def opened(self) -> AbstractContextManager[Bits]:
        """Return the bits for one thread."""


def write_rows(
    readers: Sequence[Rereadable],
    schemas: Mapping[str, Schema],
    writer: StoreWriter,
    on_progress: Progress,
) -> None:
    """Write all rows that are not there yet, and close the store."""
    n_rows, row_bytes = readers[0].n_rows, sum(schema.row_bytes for schema in schemas.values())
    steps, numbers = schemas[readers[0].group].layout.block_steps, _numbers(readers, schemas)
    for rows in split_range(writer.n_rows - writer.n_rows % steps, n_rows, steps):
        with interrupts_held():
            _copy_block(readers, schemas, writer, rows, *numbers)
        on_progress(row_bytes * rows[1], row_bytes * n_rows)
    with interrupts_held():
        writer.close()


def recoded_schemas(
    readers: Sequence[Rereadable],
    coding: CodingName,
    *,
    archive: bool = False,
    memory_bytes: int | None = None,
) -> dict[str, Schema]:
    """Return what is to be declared of each parameter."""
    if memory_bytes is None:
        memory_bytes = _ARCHIVE_MEMORY_BYTES if archive else default_memory_bytes(coding)
    codings = {
        one.group: coding_of(coding, one.schema.optimizer, one.schema.dtypes, archive=archive)
        for one in readers
    }
    rows = [row_size(one.schema.shape, one.schema.dtypes, codings[one.group]) for one in readers]
    layouts = plan_layouts(rows, memory_bytes=memory_bytes)
    return {
        one.group: replace(one.schema, coding=codings[one.group], layout=layout)
        for one, layout in zip(readers, layouts, strict=True)
    }


def _open(
    readers: Sequence[StoreReader], schemas: Mapping[str, Schema], path: Path, *, overwrite: bool
) -> StoreWriter:
    """Create the new store, or go on with one that was begun.

    Raises StoreExistsError if another recording lies there, or nobody can tell.
    """
    labels = {one.group: one.read_labels() for one in readers if one.schema.has_tokens}
    ids = {
        one.group: one.read_token_ids() for one in readers if one.schema.whole_tokens is not None
    }
    schema = schemas.get("", schemas)
    if is_begun(path) and not overwrite:
        if readers[0].schema.schedule is not None:
            raise StoreExistsError(
                f"{path} exists, and a copy of a recording with a schedule cannot be gone on with; "
                "choose another path, or replace it (--overwrite, overwrite=True)"
            )
        return StoreWriter.resume(
            path,
            schema,
            labels=labels,
            token_ids=ids,
            approve=lambda there, kept_rows: _check_begun(readers, schemas, there, kept_rows),
        )
    return StoreWriter.create(
        path,
        schema,
        labels=labels,
        token_ids=ids,
        n_rows=readers[0].n_rows,
        overwrite=overwrite or not is_begun(path),
    )


def _check_begun(
    readers: Sequence[StoreReader],
    schemas: Mapping[str, Schema],
    there: Sequence[StoreReader],
    kept_rows: int,
) -> None:
    """Raise StoreExistsError unless rows that are there already are what would be written."""
    rows = slice(kept_rows)
    for one, other in zip(readers, there, strict=True):
        was, now = other.schema.coding.gradient_codec, schemas[one.group].coding.gradient_codec
        if was != now:  # an archive, or none
            raise StoreExistsError(
                f"{other.path} has gradients by the codec {was}, not {now}; choose another path, "
                "or replace it (--overwrite, overwrite=True)"
            )
        schema = replace(one.schema, coding=other.schema.coding, layout=other.schema.layout)
        ours, theirs = one.read_scalars(), other.read_scalars()
        is_same = schema == other.schema and kept_rows <= one.n_rows
        if not is_same or any(
            not np.array_equal(values[rows], theirs[name], equal_nan=True)
            for name, values in ours.items()
        ):
            raise StoreExistsError(
                f"{other.path} has another recording than {one.path}; choose another path, or "
                "replace it (--overwrite, overwrite=True)"
            )


def _numbers(
    readers: Sequence[Rereadable], schemas: Mapping[str, Schema]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the per-step values of all rows, by path, with what is derived, and their steps."""
    numbers = dict[str, np.ndarray]()
    for reader in readers:
        schema, recorded = schemas[reader.group], reader.read_numbers()
        missing = np.full(reader.n_rows, np.nan)
        of_rows = {name: recorded.get(name, missing).copy() for name in schema.numbers}
        derive(schema, of_rows)
        of_rows |= reader.read_logged()
        numbers |= {array_path(reader.group, name): values for name, values in of_rows.items()}
    return numbers, readers[0].read_steps()


def _copy_block(
    readers: Sequence[Rereadable],
    schemas: Mapping[str, Schema],
    writer: StoreWriter,
    rows: tuple[int, int],
    numbers: Mapping[str, np.ndarray],
    steps: np.ndarray,
) -> None:
    """Copy some rows, which are a block of the new store; numbers and steps are of all rows."""
    arrays = dict[str, np.ndarray]()
    for reader in readers:
        schema = schemas[reader.group]
        shape = schema.layout.block_steps, schema.n_tokens, schema.n_dims
        bits = {name: np.empty(shape, storage_dtype(of)) for name, of in schema.dtypes.items()}
        for tokens, read in _read(reader, rows):
            for name, part in read.items():
                bits[name][: len(part), as_slice(np.asarray(tokens))] = part
        arrays |= {array_path(reader.group, name): of for name, of in bits.items()}
    scalars = {path: values[slice(*rows)] for path, values in numbers.items()}
    writer.commit_block(
        rows[0],
        rows[1] - rows[0],
        arrays,
        scalars,
        steps=steps[slice(*rows)],
        marked=_marked(readers, rows),
    )


def _read(
    reader: Rereadable, rows: tuple[int, int]
) -> Iterator[tuple[Indices, dict[str, np.ndarray]]]:
    """Yield the bits of all variables, some tokens at a time, so that each chunk is read once."""
    schema, length = reader.schema, reader.schema.layout.chunk_tokens
    n_bytes = (rows[1] - rows[0]) * schema.n_dims * 8
    n_tokens = length * max(1, _READ_BYTES // max(1, n_bytes * length))
    with reader.opened() as opened:
        for start, stop in split_range(0, schema.n_tokens, n_tokens):
            # In the order on disk they are whole chunks.
            order = schema.stored_order
            tokens = range(start, stop) if order is None else order[start:stop]
            yield tokens, {name: opened.read(name, rows, tokens) for name in schema.dtypes}


_READ_BYTES = 2**23


def _compare_block(
    readers: Sequence[StoreReader], recoded: Sequence[StoreReader], rows: tuple[int, int]
) -> None:
    """Raise DamagedStoreError if any value of the copy is another one."""
    for one, other in zip(readers, recoded, strict=True):
        with other.opened() as copy:
            for tokens, read in _read(one, rows):
                for name, bits in read.items():
                    if not same_bits(bits, copy.read(name, rows, tokens)):
                        raise _differs(one, other, f"{name} of rows {rows[0]} to {rows[1] - 1}")


def _compare_scalars(readers: Sequence[StoreReader], recoded: Sequence[StoreReader]) -> None:
    """Raise DamagedStoreError if any per-step value of the copy is another one."""
    for one, other in zip(readers, recoded, strict=True):
        ours = one.read_scalars() | one.read_logged()
        theirs = other.read_scalars() | other.read_logged()
        for name, values in ours.items():
            if not np.array_equal(values, theirs[name], equal_nan=True):
                raise _differs(one, other, name)


def _differs(one: StoreReader, other: StoreReader, what: str) -> DamagedStoreError:
    return DamagedStoreError(
        f"{other.path / other.group}: {what} is not as in {one.path}: one of the two was changed, "
        "or a disk is faulty; remove the copy and recode again"
    )


def _marked(
    readers: Sequence[Rereadable], rows: tuple[int, int]
) -> dict[str, dict[str, list[tuple[int, int]]]]:
    """Return which of some rows are said to be filled in, or missing."""
    found: dict[str, dict[str, list[tuple[int, int]]]] = {"filled": {}, "missing": {}}
    for reader in readers:
        history = reader.read_history()
        for name, marked in (("filled", history.filled), ("missing", history.missing)):
            for first, stop in marked:
                if first < rows[1] and stop > rows[0]:
                    part = max(first, rows[0]), min(stop, rows[1])
                    found[name].setdefault(reader.group, []).append(part)
    return found
