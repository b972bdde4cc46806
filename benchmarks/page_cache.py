"""Files that are not in the page cache."""

import os
from pathlib import Path


def drop(path: Path) -> None:
    """Drop a file from the page cache, as if it were larger than memory.

    Raises
    ------
    RuntimeError
        If the system has no call for it.
    """
    if not hasattr(os, "posix_fadvise"):
        raise RuntimeError("this system cannot drop files from its page cache")
    with path.open("rb", buffering=0) as file:
        os.fsync(file.fileno())  # what is not on disk yet is not dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
