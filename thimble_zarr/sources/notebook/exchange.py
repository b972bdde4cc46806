"""What import and export share: all or nothing, and telling how far they are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from thimble_zarr.errors import StoreError, ThimbleError
from thimble_zarr.interrupts import interrupts_held

Progress = Callable[[int, int], None]
"""Called with the bytes done so far and the bytes to do."""


@dataclass
class ByteCount:
    """Adds up bytes and tells of them."""

    n_total: int
    on_progress: Progress | None
    n_done: int = 0

    def add(self, n_bytes: int) -> None:
        """Count more bytes."""
        self.n_done += n_bytes
        if self.on_progress is not None:
            self.on_progress(self.n_done, self.n_total)


@contextmanager
def all_or_nothing(path: Path, undo: Callable[[], object]) -> Iterator[None]:
    """Leave nothing where something could not be written whole, also after Ctrl-C."""
    try:
        yield
    except BaseException as error:
        with interrupts_held(), suppress(OSError):
            undo()
        if isinstance(error, OSError) and not isinstance(error, ThimbleError):
            raise StoreError(
                f"cannot write {path}: {error.strerror or error}; nothing was left there"
            ) from error
        raise
