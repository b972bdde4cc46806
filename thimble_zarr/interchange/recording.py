"""Open a recording wherever it lies: a store, or a file of the original notebook."""

from dataclasses import replace
from pathlib import Path

from thimble_zarr.errors import ConfigError, NotAStoreError
from thimble_zarr.format.labels import read_mask
from thimble_zarr.format.schema import TokenLabels
from thimble_zarr.format.store import StorePath, StoreReader
from thimble_zarr.interchange.notebook import NotebookReader


def open_recording(
    path: StorePath, *, token_mask: Path | None = None
) -> StoreReader | NotebookReader:
    """Open a store, or a notebook's file in place.

    Parameters
    ----------
    path
        A store's directory or a safetensors file.
    token_mask
        The token mask of a notebook's file. A store has its labels.

    Raises
    ------
    NotAStoreError, UnsupportedFormatError, DamagedStoreError
        If it is neither, of another format version, or damaged.
    ConfigError
        If a mask was given for a store.
    CorpusError
        If the mask cannot be read or is of another vocabulary.
    StoreError
        If it cannot be read.
    """
    path = Path(path)
    if path.is_file():
        try:
            return open_notebook(path, token_mask=token_mask)
        except NotAStoreError as error:
            raise NotAStoreError(f"{path} is not a thimble-zarr store; {error}") from error
    if token_mask is not None:
        raise ConfigError(
            f"{path} is no safetensors file, and a token mask is for those only; a store has the "
            "labels it was recorded or imported with"
        )
    return StoreReader.open(path)


def open_notebook(file: StorePath, *, token_mask: Path | None = None) -> NotebookReader:
    """Open a notebook's file in place, with the labels of a token mask.

    Parameters
    ----------
    file
        The safetensors file.
    token_mask
        Its token mask.

    Raises
    ------
    NotAStoreError, DamagedStoreError
        If it is not one of the notebook, or was cut off.
    CorpusError
        If the mask cannot be read or is of another vocabulary.
    StoreError
        If it cannot be read.
    """
    reader = NotebookReader.open(file)
    if token_mask is None:
        return reader
    live = read_mask(token_mask, reader.schema.n_tokens)
    return replace(reader, labels=TokenLabels(live=live, dead=~live))
