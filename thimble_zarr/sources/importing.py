"""A store made of a run in another file, in bounded memory."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from thimble_zarr.bits import storage_dtype
from thimble_zarr.errors import StoreError, ThimbleError
from thimble_zarr.format.layout import plan_layout, split_range
from thimble_zarr.format.schema import NOTEBOOK_FILE
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
    _write(reader, path, overwrite=overwrite, count=count, n_bytes=sum(sizes.values()))
    return StoreReader.open(path)


def _n_bytes(reader: FileReader, name: str) -> int:
    array = reader.run.series[name].array
    return int(np.prod(array.shape)) * array.dtype.itemsize


def _write(
    reader: FileReader, path: StorePath, *, overwrite: bool, count: ByteCount, n_bytes: int
) -> None:
    """Write all blocks of a store."""
    labels, ids = reader.read_labels(), reader.run.token_ids
    itemsizes = {name: storage_dtype(of).itemsize for name, of in reader.schema.dtypes.items()}
    layout = plan_layout(reader.schema.n_tokens, reader.schema.n_dims, itemsizes)
    schema = replace(reader.schema, layout=layout).labelled(labels)
    undo = ExitStack()
    with all_or_nothing(Path(path).absolute(), undo.close):
        with interrupts_held():
            writer = StoreWriter.create(
                path,
                schema,
                labels=labels,
                token_ids=None if ids is None else {"": ids},
                n_rows=reader.n_rows,
                overwrite=overwrite,
            )
            undo.callback(writer.discard)
        scalars = reader.read_scalars()
        for rows in split_range(0, reader.n_rows, layout.block_steps):
            with interrupts_held():
                values = {name: of_run[slice(*rows)] for name, of_run in scalars.items()}
                block = _block(reader, rows, layout.block_steps)
                writer.commit_block(rows[0], rows[1] - rows[0], block, values)
            count.add(n_bytes * (rows[1] - rows[0]) // reader.n_rows)
        with interrupts_held():
            writer.close()
            undo.pop_all()  # the store is whole, and Ctrl-C comes too late


def _block(reader: FileReader, rows: tuple[int, int], block_steps: int) -> dict[str, np.ndarray]:
    """Return some rows of each variable, filled up to a block."""
    n_missing = block_steps - (rows[1] - rows[0])
    padding = ((0, n_missing), (0, 0), (0, 0))
    with reader.opened() as opened:
        found = {name: opened.read(name, rows) for name in reader.schema.dtypes}
    return {name: np.pad(bits, padding) if n_missing else bits for name, bits in found.items()}
