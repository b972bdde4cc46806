"""How the states of a parameter are written: as they are, or as what a prediction leaves of them.

An optimizer's step is a function of the row before and the gradient. So with coding `predicted` a
store has the gradient of each step, of each block the first row of every state, and of the other
rows only the bits in which they are not what a portable program (`optim.programs`) makes of the row
before: normally none. `store.coding.predicted` does it; this is what the schema says of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from thimble_zarr.bits import fill_value, storage_dtype
from thimble_zarr.errors import ConfigError
from thimble_zarr.optim.base import Optimizer
from thimble_zarr.optim.programs.registry import program_of
from thimble_zarr.optim.registry import VARIABLES

CodingName = Literal["plain", "predicted"]

CodecName = Literal["lz4", "lz4-bitshuffle", "zstd-bitshuffle", "pcodec"]
"""How arrays are compressed: a key of `store.coding.compression.COMPRESSIONS`."""


@dataclass(frozen=True)
class Coding:
    """How the arrays of a parameter are written.

    Attributes
    ----------
    name
        `plain`: every array as it is. `predicted`: each state as it differs from its prediction.
    program
        The portable program that predicts, by name and version; None where a row is predicted to be
        as the one before it.
    gradient_codec
        How the gradient is compressed: a key of `store.coding.compression.COMPRESSIONS`.
    """

    name: str = "plain"
    program: str | None = None
    gradient_codec: str = "lz4"

    def __post_init__(self) -> None:
        if self.name not in get_args(CodingName):
            raise ConfigError(
                f"there is no coding {self.name!r}; choose among {', '.join(get_args(CodingName))}"
            )
        if self.gradient_codec not in get_args(CodecName):
            raise ConfigError(
                f"there is no codec {self.gradient_codec!r}; choose among "
                f"{', '.join(get_args(CodecName))}"
            )

    @property
    def is_predicted(self) -> bool:
        """Whether states are written as they differ from their prediction."""
        return self.name == "predicted"

    def predicts(self, variable: str) -> bool:
        """Return whether a variable is written as it differs from its prediction."""
        return self.is_predicted and variable != "grad"

    def arrays(self, variable: str, native: str) -> tuple["StoredArray", ...]:
        """Return the arrays that have a variable of a dtype: one, or where it is coded two."""
        plain = StoredArray(
            name=variable,
            variable=variable,
            long_name=VARIABLES[variable],
            dtype=storage_dtype(native),
            fill=fill_value(native),
            codec=self.gradient_codec if variable == "grad" else "lz4",
        )
        if not self.predicts(variable):
            return (plain,)
        keyframe = replace(
            plain,
            name=f"{variable}_keyframe",
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


PLAIN = Coding()


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
    codec = "zstd-bitshuffle" if archive else "lz4-bitshuffle"
    return Coding(name, None if program is None else program.name, codec)
