"""Text for people: how wide it may be, and columns of words and numbers that fit."""

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

DEFAULT_WIDTH = 100
"""Columns of a table that goes to a file or a pipe."""

DEFAULT_ROWS = 10
"""Steps that a table shows, so that all of a check fits on a screen."""

_LEAST_WIDTH = 8
"""Columns are not made narrower: a number that is cut is none."""


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


def _is_limited() -> bool:
    return sys.stdout.isatty() or "COLUMNS" in os.environ


def aligned(rows: Iterable[Sequence[str]], *, width: int | None = None) -> str:
    """Return rows as columns: the first to the left, the others to the right.

    Where they are wider than `width`, the middle of the widest cells is left out.
    """
    columns = [*zip(*rows, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    while width is not None and sum(widths) + 2 * len(widths) - 2 > width:
        if max(widths) <= _LEAST_WIDTH:
            break
        widths[widths.index(max(widths))] -= 1
    cells = [
        [f"{_shortened(cell, width):{'>' if index else '<'}{width}}" for cell in column]
        for index, (column, width) in enumerate(zip(columns, widths, strict=True))
    ]
    return "\n".join("  ".join(row).rstrip() for row in zip(*cells, strict=True))


def _shortened(text: str, width: int) -> str:
    """Leave out the middle of a text that is too wide; both ends of a path tell something."""
    if len(text) <= width:
        return text
    n_first = (width - 1) // 2
    return f"{text[:n_first]}…{text[len(text) - (width - 1 - n_first) :]}"


Column = Sequence[str]
"""The cells of a column, its head first, all of one width."""


def packed(first: Column, columns: Iterable[Column]) -> str:
    """Return columns as a table, cut into several where it is too wide, each with `first`."""
    tables: list[list[Column]] = []
    room = 0
    for column in columns:
        room -= 1 + len(column[0])
        if not tables or room < 0:
            tables.append([first])
            room = text_width() - len(first[0]) - 1 - len(column[0])
        tables[-1].append(column)
    return "\n\n".join("\n".join(map(" ".join, zip(*table, strict=True))) for table in tables)


def number_column(head: str, values: Sequence[float], *, sign: str = "", gap_at: int = 0) -> Column:
    """Return numbers below their head, to the right; a space sets the head apart.

    `sign` is a space to leave one before each number for a sign. Before the number `gap_at`, if it
    is not 0, dots say that some are left out.
    """
    cells = [" " + head, *_numbers(values, sign)]
    width = max(map(len, cells))
    if gap_at:
        cells.insert(1 + gap_at, "..." if width > 3 else "..")
    return [cell.rjust(width) for cell in cells]


def _numbers(values: Sequence[float], sign: str) -> list[str]:
    """Return numbers with the same number of decimals, six at most, or in powers of ten.

    Zeros that all end with are left out. Powers of ten are taken where a number would look like
    zero, or where they take less room.
    """
    if not isinstance(values[0], float):
        return [f"{value:{sign}d}" for value in values]
    cells = [f"{value:{sign}.6f}" for value in values]
    n_zeros = min((len(cell) - len(cell.rstrip("0")) for cell in cells if "." in cell), default=0)
    cells = [cell[: len(cell) - min(n_zeros, 5)] if "." in cell else cell for cell in cells]
    is_wide = max(map(len, cells)) > 12
    if any(0 < abs(v) < 1e-6 or (is_wide and abs(v) > 1e6) for v in values):
        cells = [f"{value:{sign}.6e}" for value in values]
    return ["NaN" if "nan" in cell else cell for cell in cells]
