"""Arithmetic as IEEE 754 has it, whatever a thread was set to.

`torch.set_flush_denormal(True)`, and some libraries once they are loaded, let a thread take numbers
below the normal ones for 0, and threads that it starts do the same. What was predicted so could not
be read by any other.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from thimble_zarr.errors import StoreError

_LEAST_NORMAL = sys.float_info.min

_ENVIRONMENT_BYTES = 512
"""More than any library of C has for an environment."""

_DEFAULT_ENVIRONMENT = ctypes.c_void_p(-1)
"""FE_DFL_ENV of Linux."""


@contextmanager
def ieee_arithmetic() -> Iterator[None]:
    """Let this thread compute with numbers below the normal ones, and then as before.

    Raises StoreError where it cannot be made to.
    """
    library = _library() if _flushes() else None
    before = ctypes.create_string_buffer(_ENVIRONMENT_BYTES)
    if library is not None:
        library.fegetenv(before)
        library.fesetenv(_DEFAULT_ENVIRONMENT)
    try:
        if _flushes():
            raise StoreError(
                "this thread takes the least numbers for 0, and so would get other bits than any "
                "other machine; call torch.set_flush_denormal(False) in it before"
            )
        yield
    finally:
        if library is not None:
            library.fesetenv(before)


def _flushes() -> bool:
    """Whether half of the least normal number is 0 in this thread."""
    return _LEAST_NORMAL * 0.5 == 0.0


@cache
def _library() -> Any:
    """Return the library of C that this process has loaded; None where it has another default."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "fesetenv") else None
