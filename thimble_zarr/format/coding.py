"""How the states of a parameter are written: as they are, or as what a prediction leaves of them.

An optimizer's step is a function of the row before and the gradient. So with coding `predicted` a
store has the gradient of each step, of each block the first row of every state, and of the other
rows only the bits in which they are not what a portable program (`optim.programs`) makes of the row
before: normally none. `store.coding.predicted` does it; this is what the schema says of it.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from thimble_zarr.errors import ConfigError

CodingName = Literal["plain", "predicted"]

CodecName = Literal["lz4", "lz4-bitshuffle", "pcodec"]
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


PLAIN = Coding()
