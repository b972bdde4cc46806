"""A store made of the notebook's file, block by block in bounded memory.

What a store has no place for is kept in its attribute `notebook_file`, so that the file can be made
of the store again, byte for byte.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from thimble_zarr.format.layout import split_range
from thimble_zarr.format.schema import TokenLabels
from thimble_zarr.interrupts import interrupts_held
from thimble_zarr.sources.notebook.exchange import ByteCount, Progress, all_or_nothing
from thimble_zarr.sources.notebook.file_layout import FILE_NAMES, STATES
from thimble_zarr.sources.notebook.reader import NotebookReader, has_narrow_states
from thimble_zarr.store.contents import check_vacant
from thimble_zarr.store.reader import StorePath, StoreReader
from thimble_zarr.store.writer import StoreWriter


def import_notebook(
    file: Path,
    path: StorePath,
    *,
    labels: TokenLabels | None = None,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> StoreReader:
    """Make a store of a notebook's file, block by block. A failure leaves nothing, nor does Ctrl-C.

    Parameters
    ----------
    file
        The safetensors file.
    path, overwrite
        Store to create, and whether it replaces one.
    labels
        Labels of the tokens, such as a token mask gives.
    on_progress
        Called as bytes are read.

    Raises
    ------
    NotAStoreError, DamagedStoreError
        If the file is not one of the notebook, or was cut off.
    ConfigError
        If the labels are not of as many tokens, or the file has a big tensor beside the notebook's.
    StoreExistsError, StoreError
        If the store cannot be created or written, or the file cannot be read.
    """
    check_vacant(path, overwrite=overwrite)
    reader = NotebookReader.open(file, labels=labels)
    reader.layout.check_all_kept()
    big = {ours: reader.layout.tensors[name].n_bytes for ours, name in FILE_NAMES.items()}
    n_scanned = sum(big[name] for name in STATES) if has_narrow_states(reader.schema) else 0
    count = ByteCount(n_scanned + sum(big.values()), on_progress)
    if n_scanned:
        # The store's dtype must hold every row, and so every row is looked at.
        reader = reader.narrowed(range(reader.n_rows), on_bytes=count.add)
        count.add(n_scanned - count.n_done)  # it ends where one is found that is not
    schema = reader.schema.labelled(labels)
    undo = ExitStack()
    with all_or_nothing(Path(path).absolute(), undo.close):
        with interrupts_held():
            writer = StoreWriter.create(
                path, schema, labels=labels, n_rows=reader.n_rows, overwrite=overwrite
            )
            undo.callback(writer.discard)
        scalars = reader.read_scalars()
        for rows in split_range(0, reader.n_rows, reader.schema.layout.block_steps):
            with interrupts_held():
                _commit_rows(writer, reader, rows, scalars)
            count.add(sum(big.values()) * (rows[1] - rows[0]) // reader.n_rows)
        with interrupts_held():
            writer.close()
            undo.pop_all()  # the store is whole, and Ctrl-C comes too late
    return StoreReader.open(path)


def _commit_rows(
    writer: StoreWriter,
    reader: NotebookReader,
    rows: tuple[int, int],
    scalars: Mapping[str, np.ndarray],
) -> None:
    """Commit one block; a function of its own, so that only one block is in memory."""
    n_rows = rows[1] - rows[0]
    n_missing = reader.schema.layout.block_steps - n_rows
    padding = ((0, n_missing), (0, 0), (0, 0))
    arrays = {}
    for name in reader.schema.dtypes:
        bits = reader.read(name, rows)
        arrays[name] = np.pad(bits, padding) if n_missing else bits
    values = {name: of_run[slice(*rows)] for name, of_run in scalars.items()}
    writer.commit_block(rows[0], n_rows, arrays, values)
