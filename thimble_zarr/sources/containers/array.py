"""An array in a file, of which a few rows are read at a time, and what a file has of them."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self

import numpy as np

from thimble_zarr.bits import decode
from thimble_zarr.errors import DamagedStoreError, NotAStoreError, StoreError
from thimble_zarr.format.documents import Json
from thimble_zarr.format.layout import split_range
from thimble_zarr.store.files.local import tell_of_read


class FileArray(Protocol):
    """An array in a file, small to pickle. Its bits are little-endian, in `dtype`.

    `native` is `bfloat16` of its bits in 16-bit integers, and None of what has no fractions.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the bits."""

    @property
    def native(self) -> str | None:
        """Dtype of the numbers, as torch names it."""

    @property
    def has_whole_rows(self) -> bool:
        """Whether reading a part of a row takes as long as reading all of it."""

    def opened(self) -> AbstractContextManager[Any]:
        """Open the file, for as many calls of `read_rows` as are wanted, by one thread."""

    def read_rows(
        self, opened: Any, rows: range, columns: tuple[int, int], out: np.ndarray
    ) -> None:
        """Read consecutive rows, from the first column to before the last, into `out`."""

    def will_read(self, opened: Any, rows: range, columns: tuple[int, int]) -> None:
        """Say that `read_rows` will be asked for these, so that the disk may begin."""


@dataclass(frozen=True)
class RawArray:
    """An array whose rows lie in a file as they are in memory, end to end or in a few pieces.

    `offsets` say where in the file each piece of `piece_rows` rows begins.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    native: str | None
    offsets: tuple[int, ...]
    piece_rows: int
    has_whole_rows: bool = field(default=False, init=False)

    @classmethod
    def at(
        cls, file: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype, native: str | None
    ) -> Self:
        """Return an array that lies in one piece."""
        return cls(file, shape, dtype, native, (offset,), max(1, shape[0] if shape else 1))

    def part(self, index: int) -> Self:
        """Return the array at an index of the first axis. The array must lie in one piece."""
        shape = self.shape[1:]
        offset = self.offsets[0] + index * prod(shape) * self.dtype.itemsize
        return replace(self, shape=shape, offsets=(offset,), piece_rows=max((1, *shape[:1])))

    def opened(self) -> BinaryIO:
        """Open the file."""
        return self.file.open("rb", buffering=0)

    def read_rows(
        self, opened: BinaryIO, rows: range, columns: tuple[int, int], out: np.ndarray
    ) -> None:
        """Read rows straight into `out`, in one piece where they lie in one."""
        for start, stop, (offset, _) in self._ranges(rows, columns):
            opened.seek(offset)
            _read_into(opened, out[start - rows.start : stop - rows.start])

    def will_read(self, opened: BinaryIO, rows: range, columns: tuple[int, int]) -> None:
        """Tell the system of rows that will be read."""
        tell_of_read(opened.fileno(), [where for _, _, where in self._ranges(rows, columns)])

    def _ranges(
        self, rows: range, columns: tuple[int, int]
    ) -> Iterator[tuple[int, int, tuple[int, int]]]:
        """Yield rows that lie end to end, where they begin in the file, and their bytes."""
        first, end = columns
        column_bytes = prod(self.shape[2:]) * self.dtype.itemsize
        row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        is_whole = len(self.shape) < 2 or end - first == self.shape[1]
        for start, stop in split_range(rows.start, rows.stop, self.piece_rows if is_whole else 1):
            piece, row = divmod(start, self.piece_rows)
            offset = self.offsets[piece] + row * row_bytes + first * column_bytes
            yield start, stop, (offset, (stop - start) * (end - first) * column_bytes)


def _read_into(stream: BinaryIO, target: np.ndarray) -> None:
    if not target.size:
        return
    view = target.data.cast("B")  # refuses what is not contiguous, and would be a copy
    while view:
        n_read = stream.readinto(view)  # type: ignore[attr-defined]  # typeshed leaves it out
        if not n_read:
            raise DamagedStoreError("it was cut off after it was opened; copy it again")
        view = view[n_read:]


def whole(array: FileArray) -> np.ndarray:
    """Read a small array whole: its bits."""
    shape = array.shape or (1,)
    bits = np.empty(shape, array.dtype)
    if bits.size:
        with array.opened() as opened:
            array.read_rows(opened, range(shape[0]), (0, shape[1] if len(shape) > 1 else 1), bits)
    return bits.reshape(array.shape)


def number(bits: Any, native: str | None) -> Json:
    """Return a setting that was kept as an array without dimensions, as the run had it.

    A notebook rounds 0.001 to float32. The optimizer computed with the double 0.001, and only from
    that number do its steps follow exactly: it is the shortest decimal that rounds to what is
    there.
    """
    if native == "bfloat16":
        return float(decode(np.asarray(bits), native))
    if isinstance(bits, np.float16 | np.float32):
        return float(str(bits))
    value: Json = bits.item() if isinstance(bits, np.generic) else bits
    return value


@dataclass(frozen=True)
class FileContents:
    """What a file has: arrays by name, and settings, which are numbers or words.

    `container` is what kind of file it is, in words.
    """

    path: Path
    container: str
    arrays: Mapping[str, FileArray]
    settings: Mapping[str, Json]

    def named(self, names: tuple[str, ...]) -> tuple[str, FileArray] | tuple[None, None]:
        """Return the one array that has one of some names, and its name; None if none has.

        Raises NotAStoreError if several have.
        """
        found = [name for name in names if name in self.arrays]
        if len(found) > 1:
            raise NotAStoreError(f"it has {' and '.join(found)}, which should be the same")
        return (found[0], self.arrays[found[0]]) if found else (None, None)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Name the file in what is wrong with it."""
    try:
        yield
    except StoreError as error:
        raise type(error)(f"cannot read {path}: {error}") from error
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror or error}") from error
