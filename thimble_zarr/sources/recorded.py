"""What a layout says of a file: which runs are in it, and where the rows of each are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from thimble_zarr.format.labels import TokenLabels
from thimble_zarr.format.schema import Json
from thimble_zarr.sources.containers.array import FileArray, FileContents


@dataclass(frozen=True)
class Series:
    """The rows of a variable in a file.

    Attributes
    ----------
    array, name
        The array that has them, of shape `(row, token, dim)`, and what it is called there.
    shift
        Row t of the run is row `t - shift` of the array: 0 or 1.
    rows
        The rows of the run that are there. All others are missing.
    """

    array: FileArray
    name: str
    shift: int
    rows: range


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """A run in a file. What a file does not have is None, or not there.

    Attributes
    ----------
    n_rows
        Rows of the run: the initial state, and one for each step.
    series
        The variables that are there, by our names; always `W`.
    loss
        Loss of each row: float64, NaN where missing.
    logged
        What was logged of each row besides the loss, by name: shape `(n_rows, ...)`.
    settings
        What is known of the run, under the names of `rules.SETTINGS`.
    labels
        What is known of the tokens.
    token_ids, whole_tokens
        Which rows of the parameter are there, and how many it has, where not all are.
    parameter
        The name of the run, where a file has several.
    device
        Where it was trained, as torch names it.
    not_taken
        Arrays of the file that are no part of a recording.
    caveat
        What is wrong with the numbers, in words.
    attrs
        More that is to be known of the run.
    """

    n_rows: int
    series: Mapping[str, Series]
    loss: np.ndarray | None = None
    logged: Mapping[str, np.ndarray] = field(default_factory=dict)
    settings: Mapping[str, Json] = field(default_factory=dict)
    labels: TokenLabels = field(default_factory=TokenLabels)
    token_ids: np.ndarray | None = None
    whole_tokens: int | None = None
    parameter: str | None = None
    device: str = "unknown"
    not_taken: Sequence[str] = ()
    caveat: str | None = None
    attrs: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """A layout of files: what it is called, which files have it, and the runs in one.

    `recognises` looks at names, shapes and dtypes only. `runs` raises NotAStoreError where a file
    that was recognised does not hold what it should.
    """

    kind: str
    recognises: Callable[[FileContents], bool]
    runs: Callable[[FileContents], Sequence[RecordedRun]]
