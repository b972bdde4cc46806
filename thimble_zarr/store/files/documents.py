"""Files of a store that nobody vouches for: read them with bounds, and nothing but plain files.

A store may come from anywhere. JSON in it is of bounded size and depth, a link must not lead out of
the store, and what is no file (a pipe would keep a reader waiting for ever) is not opened.
"""

import errno
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from thimble_zarr.format import documents
from thimble_zarr.store.files.base import Files

_FLAGS = sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_BINARY"))


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


def read_document(files: Files, key: str) -> Any:
    """Return a JSON document of a store.

    Raises
    ------
    ValueError
        If it is not JSON, too large, too deep, or no plain file.
    OSError
        If it cannot be read.
    """
    with files.open(key) as file:
        if file.n_bytes > documents.MAX_DOCUMENT_BYTES:
            raise ValueError(f"it is larger than {documents.MAX_DOCUMENT_BYTES:,} bytes")
        return documents.parsed(file.read(0, file.n_bytes))


def leads_out(path: Path, root: Path) -> bool:
    """Return whether links on the way lead from the store at `root` to a `path` outside of it."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))
