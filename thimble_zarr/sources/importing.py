"""A store made of a run in another file, in bounded memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from thimble_zarr.bits import storage_dtype
from thimble_zarr.errors import ConfigError, StoreError, ThimbleError
from thimble_zarr.format.layout import plan_layout, split_range
from thimble_zarr.format.location import on_disk
from thimble_zarr.format.schema import NOTEBOOK_FILE, Schema, TokenLabels
from thimble_zarr.interrupts import interrupts_held
from thimble_zarr.sources.layouts.notebook_attribute import NotebookLayout
from thimble_zarr.sources.reader import FileReader, maybe_narrow
from thimble_zarr.store.contents import check_vacant
from thimble_zarr.store.reader import StorePath, StoreReader
from thimble_zarr.store.writer import StoreWriter

Progress = Callable[[int, int], None]
"""Called with the bytes done so far and the bytes to do."""


@dataclass
class ByteCount:
    """Adds up bytes and tells of them."""

    n_total: int
    tell: Progress
    n_done: int = 0

    def add(self, n_bytes: int) -> None:
        """Add bytes."""
        self.n_done += n_bytes
        self.tell(self.n_done, self.n_total)


@contextmanager
def all_or_nothing(path: Path, undo: Callable[[], object]) -> Iterator[None]:
    """Leave nothing where something could not be written whole, also after Ctrl-C."""
    try:
        yield
    except BaseException as error:
        with interrupts_held(), suppress(OSError):
            undo()
        if isinstance(error, OSError) and not isinstance(error, ThimbleError):
            raise StoreError(
                f"cannot write {path}: {error.strerror or error}; nothing was left there"
            ) from error
        raise


def check_apart(files: Iterable[Path], path: StorePath) -> None:
    """Raise ConfigError if a file that is imported lies in the store that would be replaced."""
    store = on_disk(path).resolve()
    for file in files:
        if file.resolve().is_relative_to(store):
            raise ConfigError(f"{file} lies in {path}, which would be replaced; name another store")


def import_file(
    reader: FileReader,
    path: StorePath,
    *,
    overwrite: bool = False,
    on_progress: Progress = lambda n_done, n_total: None,
) -> StoreReader:
    """Make a store of a run in a file, block by block. A failure leaves nothing, nor does Ctrl-C.

    `on_progress` is called as bytes are read. Raises as `FileReader.read` does, ConfigError if the
    first notebook's file has a big tensor beside the notebook's, and StoreExistsError or StoreError
    if the store cannot be created or written.
    """
    check_vacant(path, overwrite=overwrite)
    check_apart([reader.path], path)
    if (attribute := reader.schema.attrs.get(NOTEBOOK_FILE)) is not None:
        NotebookLayout.from_attribute(attribute).check_all_kept()
    sizes = {name: _n_bytes(reader, name) for name in reader.run.series}
    scanned = {name for names in maybe_narrow(reader.run) for name in names}
    scanned &= {name for name in scanned if reader.schema.dtypes[name] == "bfloat16"}
    n_scanned = sum(sizes[name] for name in scanned)
    count = ByteCount(n_scanned + sum(sizes.values()), on_progress)
    if n_scanned:
        # The store's dtype must hold every row, and so every row is looked at.
        reader = reader.narrowed(range(reader.n_rows), on_bytes=count.add)
        count.add(n_scanned - count.n_done)  # it ends where one is found that is not
    itemsizes = {name: storage_dtype(of).itemsize for name, of in reader.schema.dtypes.items()}
    layout = plan_layout(reader.schema.n_tokens, reader.schema.n_dims, itemsizes)
    labels = reader.read_labels()
    write_store(
        path,
        replace(reader.schema, layout=layout).labelled(labels),
        n_rows=reader.n_rows,
        scalars=reader.read_scalars() | reader.read_logged(),
        read=partial(_rows, reader),
        count=count,
        labels=labels,
        token_ids=reader.run.token_ids,
        overwrite=overwrite,
    )
    return StoreReader.open(path)


def _n_bytes(reader: FileReader, name: str) -> int:
    array = reader.run.series[name].array
    return int(np.prod(array.shape)) * array.dtype.itemsize


def _rows(reader: FileReader, rows: tuple[int, int]) -> dict[str, np.ndarray]:
    with reader.opened() as opened:
        return {name: opened.read(name, rows) for name in reader.schema.dtypes}


def write_store(
    path: StorePath,
    schema: Schema,
    *,
    n_rows: int,
    scalars: Mapping[str, np.ndarray],
    read: Callable[[tuple[int, int]], dict[str, np.ndarray]],
    count: ByteCount,
    labels: TokenLabels | None = None,
    token_ids: np.ndarray | None = None,
    steps: np.ndarray | None = None,
    overwrite: bool = False,
) -> None:
    """Write a store of one parameter block by block, from what `read` returns of a range of rows.

    `count` is told of the bytes that are left until its total. The other arguments are those of
    `StoreWriter`. A failure leaves nothing, nor does Ctrl-C.
    """
    n_left, block_steps, undo = count.n_total - count.n_done, schema.layout.block_steps, ExitStack()
    with all_or_nothing(on_disk(path).absolute(), undo.close):
        with interrupts_held():
            ids = None if token_ids is None else {"": token_ids}
            writer = StoreWriter.create(
                path, schema, labels=labels, token_ids=ids, n_rows=n_rows, overwrite=overwrite
            )
            undo.callback(writer.discard)
        for start, stop in split_range(0, n_rows, block_steps):
            of_block = None if steps is None else steps[start:stop]
            with interrupts_held():
                padding = ((0, block_steps - (stop - start)), (0, 0), (0, 0))
                block = {
                    name: np.pad(bits, padding) if padding[0][1] else bits
                    for name, bits in read((start, stop)).items()
                }
                values = {name: of_run[start:stop] for name, of_run in scalars.items()}
                writer.commit_block(start, stop - start, block, values, steps=of_block)
            count.add(n_left * stop // n_rows - n_left * start // n_rows)
        with interrupts_held():
            writer.close()
            undo.pop_all()  # the store is whole, and Ctrl-C comes too late
