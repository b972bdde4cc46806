"""Texts of tokens, as people read them."""

import re

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
