"""Files of a store that nobody vouches for: read them with bounds, and nothing but plain files.

A store may come from anywhere. JSON in it is of bounded size and depth, a link must not lead out of
the store, and what is no file (a pipe would keep a reader waiting for ever) is not opened.
"""

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

MAX_DOCUMENT_BYTES = 2**26
"""Largest JSON document that is read."""

MAX_ITEMS = 2**21
"""Most items of all lists and objects in a document: in memory each takes some hundred bytes."""

MAX_DEPTH = 64
"""Deepest nesting of lists and objects in a document."""

_KEY = re.compile(r"(?:[^/\\\0]+/)+c\.\d+(?:\.\d+)*")


_FLAGS = sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_BINARY"))


class TooLargeError(ValueError):
    """A document has more bytes or items than are read."""


def open_regular(file: Path) -> BinaryIO:
    """Open a plain file for reading.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If it is a link, a directory, a pipe or anything else that is no plain file.
    OSError
        If it cannot be opened.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | _FLAGS)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError("it is a link, which is not followed") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is not a plain file")
    return os.fdopen(descriptor, "rb")


def read_document(file: Path) -> Any:
    """Return a JSON document.

    Raises
    ------
    ValueError
        If it is not JSON, too large, too deep, or no plain file.
    OSError
        If it cannot be read.
    """
    with open_regular(file) as stream:
        n_bytes = os.fstat(stream.fileno()).st_size
        if n_bytes > MAX_DOCUMENT_BYTES:
            raise ValueError(f"it is larger than {MAX_DOCUMENT_BYTES:,} bytes")
        return parsed(stream.read(n_bytes))  # which takes that much at once


def parsed(content: bytes, max_depth: int = MAX_DEPTH) -> Any:
    """Return what JSON says.

    Raises
    ------
    TooLargeError
        If it has too many bytes or items.
    ValueError
        If it is not JSON or is nested deeper than `max_depth`.
    """
    check_size(content)
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(value, max_depth)
    return value


def check_size(content: bytes) -> None:
    """Raise TooLargeError if JSON is more than is read: what is not read must not be written."""
    n_items = sum(content.count(mark) for mark in (b",", b"[", b"{"))
    if len(content) > MAX_DOCUMENT_BYTES or n_items > MAX_ITEMS:
        raise TooLargeError(
            f"it has {len(content):,} bytes and {n_items:,} items, and at most "
            f"{MAX_DOCUMENT_BYTES:,} bytes and {MAX_ITEMS:,} items are read"
        )


def _check_depth(value: Any, max_depth: int) -> None:
    level = [value]
    for _ in range(max_depth):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {max_depth} deep")


def is_chunk_key(key: str) -> bool:
    """Return whether a key names a chunk file, of a directory within the store."""
    return bool(_KEY.fullmatch(key)) and not {".", ".."} & set(key.split("/"))


def leads_out(path: Path, root: Path) -> bool:
    """Return whether links on the way lead from the store at `root` to a `path` outside of it."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))
