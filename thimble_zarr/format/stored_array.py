"""Which arrays on disk a variable has, by its coding."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from thimble_zarr.bits import fill_value, storage_dtype
from thimble_zarr.errors import ConfigError
from thimble_zarr.format.coding import PLAIN, Coding, CodingName
from thimble_zarr.optim.base import Optimizer
from thimble_zarr.optim.programs.registry import program_of
from thimble_zarr.optim.registry import variable_name


@dataclass(frozen=True, kw_only=True)
class StoredArray:
    """An array on disk that has a variable of a parameter, or part of what it takes to know it.

    Attributes
    ----------
    name
        Of the array.
    variable
        What it has.
    long_name
        What it holds, in words.
    dtype, fill
        Of its elements, and what stands for those that are not there.
    codec
        How it is compressed: a key of `store.coding.compression.COMPRESSIONS`.
    is_keyframe
        Whether it has one row a block, not all.
    is_sparse
        Whether chunks of nothing but the fill value are left out.
    """

    name: str
    variable: str
    long_name: str
    dtype: np.dtype
    fill: float
    codec: str
    is_keyframe: bool = False
    is_sparse: bool = False


def arrays_of(coding: Coding, variable: str, native: str) -> tuple[StoredArray, ...]:
    """Return the arrays that have a variable of a dtype: one, or where it is coded two."""
    plain = StoredArray(
        name=variable,
        variable=variable,
        long_name=variable_name(variable),
        dtype=storage_dtype(native),
        fill=fill_value(native),
        codec=coding.gradient_codec if variable == "grad" else "lz4",
    )
    if not coding.predicts(variable):
        return (plain,)
    keyframe = replace(
        plain,
        name=f"{variable}_keyframe",
        codec="lz4-bitshuffle",
        long_name=f"{plain.long_name}, of the first step of each block",
        is_keyframe=True,
    )
    residual = replace(
        plain,
        name=f"{variable}_residual",
        long_name=f"bits of {variable} XOR the predicted ones",
        dtype=np.dtype(f"u{plain.dtype.itemsize}"),
        fill=0,
        is_sparse=True,
    )
    return keyframe, residual


def coding_of(
    name: CodingName, optimizer: Optimizer, dtypes: Mapping[str, str], *, archive: bool = False
) -> Coding:
    """Return the coding of a name for a run: with the newest program that there is for it.

    Nothing predicts a run of which not every variable is recorded. Raises ConfigError if there is
    no coding of that name.
    """
    if not Coding(name).is_predicted:
        return PLAIN
    is_whole = {*dtypes} == {*optimizer.variables}
    program = program_of(optimizer, dtypes) if is_whole else None
    codec = "pcodec" if archive else "lz4-bitshuffle"
    return Coding(name, None if program is None else program.name, codec)


LOGGED_DTYPES = ("float16", "float32", "float64")
"""Dtypes of what is logged. They have NaN, which says of a step that nothing was."""

MAX_LOGGED_BYTES = 2**16
"""Size of what is logged of a step at most: a dataset has that of all steps in memory."""


@dataclass(frozen=True)
class LoggedArray:
    """The shape and dtype of what is logged at each step under one name."""

    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in LOGGED_DTYPES or not all(
            isinstance(size, int) and size > 0 for size in self.shape
        ):
            raise ConfigError(f"no array of shape {self.shape} and dtype {self.dtype} is logged")

    @property
    def row_bytes(self) -> int:
        """Bytes of a step."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def dims(self, name: str) -> tuple[str, ...]:
        """Return what the axes are called, that of the steps first."""
        return ("step", *(f"{name}_{axis}" for axis in range(len(self.shape))))

    def missing(self, n_rows: int) -> np.ndarray:
        """Return rows of which nothing was logged."""
        return np.full((n_rows, *self.shape), np.nan, self.dtype)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read what `asdict` makes of one."""
        return cls(tuple(content["shape"]), content["dtype"])
