"""How the states of a parameter are written: as they are, or as what a prediction leaves of them.

An optimizer's step is a function of the row before and the gradient. So with coding `predicted` a
store has the gradient of each step, of each block the first row of every state, and of the other
rows only the bits in which they are not what a portable program (`optim.programs`) makes of the row
before: normally none. `store.predicted` does it; this is what the schema says of it.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from thimble_zarr.bits import fill_value, storage_dtype
from thimble_zarr.errors import ConfigError
from thimble_zarr.optim.registry import VARIABLES

CodingName = Literal["plain", "predicted"]

_SUFFIX = "_coded"


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
        How the gradient is compressed: a key of `store.compression.COMPRESSIONS`.
    """

    name: str = "plain"
    program: str | None = None
    gradient_codec: str = "lz4"

    def __post_init__(self) -> None:
        if self.name not in get_args(CodingName):
            raise ConfigError(
                f"there is no coding {self.name!r}; choose among {', '.join(get_args(CodingName))}"
            )

    @property
    def is_predicted(self) -> bool:
        """Whether states are written as they differ from their prediction."""
        return self.name == "predicted"

    def coded(self, variables: Collection[str]) -> tuple[str, ...]:
        """Return which of some variables are written as they differ from their prediction."""
        return tuple(name for name in variables if name != "grad") if self.is_predicted else ()

    def array(self, variable: str, native: str) -> "StoredArray":
        """Return what array has a variable of a dtype: one of another name where it is coded."""
        long_name, dtype = VARIABLES[variable], storage_dtype(native)
        if not self.coded((variable,)):
            codec = self.gradient_codec if variable == "grad" else "lz4"
            return StoredArray(variable, long_name, dtype, fill_value(native), codec)
        long_name = (
            f"bits of {variable}: of the first row of a block as they are, of others XOR the "
            "predicted ones"
        )
        return StoredArray(variable + _SUFFIX, long_name, np.dtype(f"u{dtype.itemsize}"), 0, "lz4")

    def variable(self, array: str) -> str:
        """Return the variable that an array has: what undoes `array_name`."""
        return array.removesuffix(_SUFFIX) if self.is_predicted else array


@dataclass(frozen=True)
class StoredArray:
    """An array of a parameter's shape on disk.

    `codec` is how it is compressed, a key of `store.compression.COMPRESSIONS`.
    """

    name: str
    long_name: str
    dtype: np.dtype
    fill: float
    codec: str


PLAIN = Coding()
