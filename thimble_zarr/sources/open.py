"""Open a recording wherever it lies: a store, or a file of another layout."""

import fnmatch
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from thimble_zarr.errors import ConfigError, NotAStoreError, SelectionError, listed
from thimble_zarr.format.location import located
from thimble_zarr.format.reader import Reader
from thimble_zarr.sources.learning_rate import read_learning_rate
from thimble_zarr.sources.reader import FileReader
from thimble_zarr.store.reader import StorePath, StoreReader
from thimble_zarr.store.token_mask import read_mask

R = TypeVar("R", bound=Reader)


def open_recording(
    path: StorePath,
    *,
    parameters: Sequence[str] = (),
    token_mask: Path | None = None,
    learning_rate: str | None = None,
) -> Sequence[Reader]:
    """Open the parameters of a store, or the runs in a file in place.

    Parameters
    ----------
    path
        A store's directory, a file of a layout that is known (`registry.LAYOUTS`), or a directory
        with one.
    parameters
        Names or patterns (`fnmatch`) of the parameters or runs to open, all by default.
    token_mask, learning_rate
        The token mask of a file, and its learning rate by step (`read_learning_rate`), where it
        does not have them. A store has both.

    Raises
    ------
    NotAStoreError, UnsupportedFormatError, DamagedStoreError, StoreError
        If it is neither, of another format version, damaged, or cannot be read.
    ConfigError, CorpusError, SelectionError
        If a mask or a learning rate was given for a store, cannot be read, or is of another
        vocabulary or run; or if one of `parameters` matches nothing.
    """
    path = located(path)
    file = _file_at(path)
    if file is not None:
        try:
            return open_file(
                file, parameters=parameters, token_mask=token_mask, learning_rate=learning_rate
            )
        except NotAStoreError as error:
            raise NotAStoreError(f"{path} is not a thimble-zarr store; {error}") from error
    if token_mask is not None or learning_rate is not None:
        what = "token mask" if token_mask is not None else "learning rate"
        raise ConfigError(
            f"{path} is no safetensors file and no HDF5 file, and a {what} is for those only; a "
            "store has what it was recorded or imported with"
        )
    return _matching(StoreReader.open_each(path), parameters)


def open_one(path: StorePath, parameter: str | None = None) -> Reader:
    """Open a parameter of a store, or a run in a file, by name where there are several.

    Raises as `open_recording` does, and SelectionError if there are several and none was chosen.
    """
    file = _file_at(path)
    return StoreReader.open(path, parameter) if file is None else open_file_alone(file, parameter)


def open_file(
    file: StorePath,
    *,
    parameters: Sequence[str] = (),
    token_mask: Path | None = None,
    learning_rate: str | None = None,
) -> Sequence[FileReader]:
    """Open the runs in a file in place.

    Takes and raises what `open_recording` does.
    """
    readers = _matching(FileReader.open_each(file), parameters)
    if token_mask is not None:
        n_tokens = readers[0].run.whole_tokens or readers[0].schema.n_tokens
        labels = read_mask(token_mask, n_tokens)
        readers = [reader.labelled(labels) for reader in readers]
    if learning_rate is not None:
        rates = read_learning_rate(learning_rate, readers[0].n_rows)
        readers = [replace(reader, learning_rate=rates) for reader in readers]
    return readers


def open_file_alone(
    file: StorePath,
    parameter: str | None = None,
    *,
    token_mask: Path | None = None,
    learning_rate: str | None = None,
) -> FileReader:
    """Open the run in a file, or one of several by its name, with what `open_file` takes.

    Raises SelectionError, too, if the file holds several and none was chosen.
    """
    patterns = () if parameter is None else (parameter,)
    path = _file_at(file) or file
    readers = open_file(
        path, parameters=patterns, token_mask=token_mask, learning_rate=learning_rate
    )
    if len(readers) > 1:
        raise SelectionError(
            f"{file} holds {len(readers)} runs, and one must be chosen, by `parameter=` in Python "
            "or --parameter on the command line: "
            f"{listed((of.schema.parameter for of in readers), most=24)}"
        )
    return readers[0]


def _file_at(path: StorePath) -> Path | None:
    """Return the file that a path is, or the one recording in a directory that is no store."""
    path = located(path)
    if not isinstance(path, Path):
        return None
    if not path.is_dir():
        return path if path.is_file() else None
    if (path / "zarr.json").exists():
        return None
    files = [file for kind in ("*.safetensors", "*.h5", "*.hdf5") for file in path.glob(kind)]
    return files[0] if len(files) == 1 else None


def _matching(readers: Sequence[R], patterns: Sequence[str]) -> Sequence[R]:
    """Return the readers whose parameters match one of some patterns; all without a pattern."""
    names, matching = [reader.schema.parameter or "" for reader in readers], set()
    for pattern in patterns or ["*"]:
        found = fnmatch.filter(names, pattern)
        if not found:
            there = ", ".join(filter(None, names)) or "one without a name"
            raise SelectionError(f"{readers[0].path} has no parameter {pattern}; there is {there}")
        matching |= {*found}
    return [reader for reader, name in zip(readers, names, strict=True) if name in matching]
