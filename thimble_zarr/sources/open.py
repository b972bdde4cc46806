"""Open a recording wherever it lies: a store, or a file of the original notebook."""

import fnmatch
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from thimble_zarr.errors import ConfigError, NotAStoreError, SelectionError
from thimble_zarr.format.location import located
from thimble_zarr.format.reader import Reader
from thimble_zarr.format.schema import TokenLabels
from thimble_zarr.sources.notebook.reader import NotebookReader
from thimble_zarr.store.reader import StorePath, StoreReader
from thimble_zarr.store.token_mask import read_mask


def open_recording(
    path: StorePath, *, parameters: Sequence[str] = (), token_mask: Path | None = None
) -> Sequence[Reader]:
    """Open the parameters of a store, or of a notebook's file in place.

    Parameters
    ----------
    path
        A store's directory or a safetensors file.
    parameters
        Names or patterns (`fnmatch`) of the parameters to open, all by default.
    token_mask
        The token mask of a notebook's file. A store has its labels.

    Raises
    ------
    NotAStoreError, UnsupportedFormatError, DamagedStoreError, StoreError
        If it is neither, of another format version, damaged, or cannot be read.
    ConfigError, CorpusError, SelectionError
        If a mask was given for a store, cannot be read, or is of another vocabulary; or if one of
        `parameters` matches nothing.
    """
    path = located(path)
    if isinstance(path, Path) and path.is_file():
        try:
            return _matching([open_notebook(path, token_mask=token_mask)], parameters)
        except NotAStoreError as error:
            raise NotAStoreError(f"{path} is not a thimble-zarr store; {error}") from error
    if token_mask is not None:
        raise ConfigError(
            f"{path} is no safetensors file, and a token mask is for those only; a store has the "
            "labels it was recorded or imported with"
        )
    return _matching(StoreReader.open_each(path), parameters)


def _matching(readers: Sequence[Reader], patterns: Sequence[str]) -> Sequence[Reader]:
    """Return the readers whose parameters match one of some patterns; all without a pattern."""
    names, matching = [reader.schema.parameter or "" for reader in readers], set()
    for pattern in patterns or ["*"]:
        found = fnmatch.filter(names, pattern)
        if not found:
            there = ", ".join(filter(None, names)) or "one without a name"
            raise SelectionError(f"{readers[0].path} has no parameter {pattern}; there is {there}")
        matching |= {*found}
    return [reader for reader, name in zip(readers, names, strict=True) if name in matching]


def open_notebook(file: StorePath, *, token_mask: Path | None = None) -> NotebookReader:
    """Open a notebook's file in place, with the labels of a token mask.

    Raises as `open_recording` does.
    """
    reader = NotebookReader.open(file)
    if token_mask is None:
        return reader
    live = read_mask(token_mask, reader.schema.n_tokens)
    return replace(reader, labels=TokenLabels(live=live, dead=~live))
