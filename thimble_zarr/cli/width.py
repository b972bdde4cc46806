"""How wide text may be, and how it is made to fit."""

import os
import shutil
import sys
import textwrap

DEFAULT_WIDTH = 100
"""Columns of a table that goes to a file or a pipe."""


def text_width() -> int:
    """Return the columns of the terminal, or what COLUMNS says; else `DEFAULT_WIDTH`."""
    return shutil.get_terminal_size().columns if _is_limited() else DEFAULT_WIDTH


def wrapped(text: str, indent: str = "") -> str:
    """Break a line between words where it is too wide. For files and pipes it stays one line."""
    if not _is_limited():
        return text
    return textwrap.fill(
        text,
        text_width(),
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def shortened(text: str, width: int) -> str:
    """Leave out the middle of a text that is too wide; both ends of a path tell something."""
    if len(text) <= width:
        return text
    n_first = (width - 1) // 2
    return f"{text[:n_first]}…{text[len(text) - (width - 1 - n_first) :]}"


def _is_limited() -> bool:
    return sys.stdout.isatty() or "COLUMNS" in os.environ
