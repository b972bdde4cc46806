"""What is known of the tokens of a run: the coordinates of the token axis."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from thimble_zarr.errors import ConfigError

_UNPRINTABLE = re.compile(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\udc80-\udcff]")
"""Control characters but for tab and line ends, and bytes that are no text (`surrogateescape`)."""


def printable(text: str) -> str:
    r"""Return a token's text as every terminal shows it and every file format stores it.

    Control characters and bytes that are no text are written as bytes in brackets.

    Examples
    --------
    >>> printable("a\0")
    'a<0x00>'
    """
    return _UNPRINTABLE.sub(_in_brackets, text)


def _in_brackets(character: re.Match[str]) -> str:
    return "".join(f"<0x{byte:02X}>" for byte in character[0].encode(errors="surrogateescape"))


@dataclass(frozen=True, kw_only=True)
class TokenLabels:
    """What is known of the tokens of a run. Each is None where nobody said.

    Attributes
    ----------
    count
        Occurrences in the corpus, int64, shape `(token,)`.
    live, dead
        Whether the token occurs in the corpus, bool, shape `(token,)`. Dead means count 0; with
        tied weights every row gets a gradient, so the gradient says nothing about it.
    text
        The token as text.

    Examples
    --------
    >>> import thimble_zarr
    >>> thimble_zarr.TokenLabels.from_counts(np.array([5, 0, 2])).dead
    array([False,  True, False])
    """

    count: np.ndarray | None = None
    live: np.ndarray | None = None
    dead: np.ndarray | None = None
    text: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name, dtype in (("count", np.int64), ("live", np.bool_), ("dead", np.bool_)):
            values = getattr(self, name)
            if values is not None:
                # A mask of integers would be taken for positions.
                object.__setattr__(self, name, np.asarray(values).astype(dtype))

    @classmethod
    def from_counts(cls, count: np.ndarray, text: Sequence[str] | None = None) -> Self:
        """Label tokens by their occurrences: live where there is one, dead where there is none."""
        count = np.asarray(count, dtype=np.int64)
        return cls(count=count, live=count > 0, dead=count == 0, text=text)

    def of(self, token_ids: np.ndarray) -> Self:
        """Return the labels of some tokens."""
        known = {
            name: values[token_ids]
            for name in ("count", "live", "dead")
            if (values := getattr(self, name)) is not None
        }
        text = None if self.text is None else [self.text[token] for token in token_ids.tolist()]
        return type(self)(text=text, **known)

    def check_length(self, n_tokens: int) -> None:
        """Raise ConfigError unless every label has `n_tokens` entries."""
        for name in ("count", "live", "dead", "text"):
            labels = getattr(self, name)
            if labels is not None and len(labels) != n_tokens:
                raise ConfigError(
                    f"the parameter has {n_tokens} tokens, but {len(labels)} values of "
                    f"`{name}` were given; give one for each token"
                )
