"""HDF5 files: datasets at the root are arrays, attributes of the root are settings.

h5py tells where datasets lie. Chunks that are not compressed and have whole rows are then read by
their place in the file, without HDF5: it would keep a lock, and a chunk may be larger than memory.
Everything else is read by h5py.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from thimble_zarr.bits import NATIVE_DTYPES
from thimble_zarr.errors import ConfigError, DamagedStoreError, NotAStoreError, StoreError
from thimble_zarr.format.layout import human_bytes
from thimble_zarr.sources.containers.array import FileArray, FileContents, RawArray, number, whole

if TYPE_CHECKING:
    import h5py

_SIGNATURE = b"\x89HDF\r\n\x1a\n"

_MOST_COMPRESSED_BYTES = 2**26
"""Of a chunk that must be decompressed whole: several processes do that at once."""


def is_hdf5(path: Path) -> bool:
    """Return whether a file is HDF5: it begins as that, or does after a block of the user's.

    Raises OSError if it cannot be read.
    """
    with path.open("rb") as stream:
        for offset in (0, *(2**power for power in range(9, 20))):
            stream.seek(offset)
            if stream.read(len(_SIGNATURE)) == _SIGNATURE:
                return True
    return False


@dataclass(frozen=True)
class DatasetArray:
    """A dataset that h5py reads, because it is compressed or cut in another way."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    native: str | None
    has_whole_rows: bool

    @contextmanager
    def opened(self) -> Iterator["h5py.Dataset"]:
        """Open the file."""
        with opened_file(self.file) as file:
            yield file[self.name]

    def read_rows(
        self, opened: "h5py.Dataset", rows: range, columns: tuple[int, int], out: np.ndarray
    ) -> None:
        """Read rows; HDF5 decompresses every chunk that one of them lies in."""
        where = (slice(rows.start, rows.stop), slice(*columns))[: len(self.shape)]
        with _h5py_errors():
            if self.shape:
                opened.read_direct(out, where)
            else:
                out[...] = opened[()]

    def will_read(self, opened: "h5py.Dataset", rows: range, columns: tuple[int, int]) -> None:
        """Do nothing: HDF5 alone knows where rows lie."""


@contextmanager
def opened_file(path: Path) -> Iterator["h5py.File"]:
    """Open a file for reading.

    Raises ConfigError if there is no h5py, DamagedStoreError if the file was cut off or is not
    sound, and OSError if it cannot be read.
    """
    try:
        import h5py
    except ImportError as error:
        raise ConfigError(
            f"{path} is an HDF5 file, and h5py, which reads those, is not installed; "
            "pip install 'thimble-zarr[hdf5]'"
        ) from error
    with path.open("rb"):
        pass  # what the system says of it is clearer
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DamagedStoreError(
            f"it begins as an HDF5 file, but is not a whole one ({error}); copy it again, or close "
            "it where it is written"
        ) from error
    with file, _h5py_errors():
        yield file


@contextmanager
def _h5py_errors() -> Iterator[None]:
    """Say in one way what h5py says in many."""
    try:
        yield
    except StoreError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise DamagedStoreError(f"HDF5 cannot read it ({error}); copy it again") from error


def read_hdf5(path: Path) -> FileContents:
    """Return what an HDF5 file has. Of its arrays only those without dimensions are read.

    Raises as `opened_file` does, NotAStoreError if an array cannot be read out of core, and
    DamagedStoreError if rows of one were never written.
    """
    with opened_file(path) as file:
        import h5py

        links = {name: file.get(name, getlink=True) for name in file}
        inside = (name for name, link in links.items() if isinstance(link, h5py.HardLink))
        datasets = {name: file[name] for name in inside if isinstance(file[name], h5py.Dataset)}
        settings: dict[str, Any] = {
            name: _setting(file.attrs[name])
            for name in file.attrs
            if _has(file.attrs.get_id(name), h5py.h5t.STRING)
        }
        has_user_block = file.userblock_size > 0
        arrays = {
            name: _array(path, name, of, by_place=not has_user_block)
            for name, of in datasets.items()
            if _has(of.id)
        }
    for name, array in arrays.items():
        if array.shape == ():
            settings[name] = number(whole(array)[()], array.native)
    return FileContents(
        path, "HDF5", {name: of for name, of in arrays.items() if of.shape}, settings
    )


def _has(of: Any, *more: int) -> bool:
    """Return whether a dataset or an attribute has numbers, or what else is asked for."""
    from h5py import h5t

    known = (h5t.INTEGER, h5t.FLOAT, h5t.ENUM, *more)
    return of.get_type().get_class() in known and of.shape is not None


def _setting(value: Any) -> Any:
    """Return an attribute as JSON has it."""
    if isinstance(value, np.ndarray):
        return [number(item, None) for item in value.ravel()]
    return value.decode(errors="replace") if isinstance(value, bytes) else number(value, None)


def _array(path: Path, name: str, dataset: "h5py.Dataset", *, by_place: bool) -> FileArray:
    shape, dtype = tuple(dataset.shape), dataset.dtype
    native = "bfloat16" if dtype.name == "uint16" else dtype.name
    native = native if native in NATIVE_DTYPES else None
    little = dtype.newbyteorder("<")
    if dataset.is_virtual or dataset.external:
        raise NotAStoreError(f"{name} lies in other files; write it into this one (h5repack does)")
    is_compressed = dataset.id.get_create_plist().get_nfilters() > 0
    if by_place and shape and not is_compressed and _is_as_in_memory(dataset):
        offsets, piece_rows = _offsets(name, dataset)
        if offsets:
            _check_there(path, name, shape, little, (offsets, piece_rows))
            return RawArray(path, shape, little, native, offsets, piece_rows)
    chunk_bytes = prod(dataset.chunks or ()) * dtype.itemsize
    if is_compressed and chunk_bytes > _MOST_COMPRESSED_BYTES:
        raise NotAStoreError(
            f"{name} is compressed in chunks of {human_bytes(chunk_bytes)}, each of which must be "
            "decompressed whole; write it again with chunks of one step (h5repack does)"
        )
    _check_written(name, dataset)
    return DatasetArray(path, name, shape, little, native, has_whole_rows=len(shape) > 2)


def _is_as_in_memory(dataset: "h5py.Dataset") -> bool:
    """Return whether numbers lie in the file as in memory: little-endian, and with all their bits.

    HDF5 has floats that NumPy has not, such as bfloat16: h5py makes other ones of them.
    """
    from h5py import h5t

    little = dataset.dtype.newbyteorder("<")
    return little.kind in "uf" and dataset.id.get_type().equal(h5t.py_create(little))


def _check_there(
    path: Path,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    pieces: tuple[tuple[int, ...], int],
) -> None:
    """Raise unless all rows are in the file."""
    offsets, piece_rows = pieces
    row_bytes, n_bytes = prod(shape[1:]) * dtype.itemsize, path.stat().st_size
    for start, offset in zip(range(0, shape[0], piece_rows), offsets, strict=True):
        if offset + min(piece_rows, shape[0] - start) * row_bytes > n_bytes:
            raise DamagedStoreError(
                f"rows of {name} from {start} on lie beyond its end; copy it again"
            )


def _offsets(name: str, dataset: "h5py.Dataset") -> tuple[tuple[int, ...], int]:
    """Return where pieces of rows lie in the file, and how many rows each has; () if they do not.

    The last chunk has room for rows beyond the last.
    """
    if dataset.chunks is None:
        offset = dataset.id.get_offset()
        return ((offset,), max(1, dataset.shape[0])) if offset is not None else ((), 1)
    if dataset.chunks[1:] != dataset.shape[1:]:
        return (), 1
    places: dict[int, int] = {}
    dataset.id.chunk_iter(lambda of: places.update({of.chunk_offset[0]: of.byte_offset}))
    starts = range(0, dataset.shape[0], dataset.chunks[0])
    _check_all(name, (start for start in starts if start not in places))
    return tuple(places[start] for start in starts), dataset.chunks[0]


def _check_written(name: str, dataset: "h5py.Dataset") -> None:
    """Raise unless all chunks are there: HDF5 reads one that is not as zeros."""
    if dataset.chunks is None:
        n_bytes = dataset.size * dataset.id.get_type().get_size()  # a number in the file
        _check_all(name, iter([0] if dataset.id.get_storage_size() < n_bytes else []))
        return
    n_chunks = Counter[int]()  # of the same rows, by the first
    dataset.id.chunk_iter(lambda of: n_chunks.update([of.chunk_offset[0]]))
    axes = zip(dataset.shape[1:], dataset.chunks[1:], strict=True)
    n_expected = prod(-(-length // chunk) for length, chunk in axes)
    starts = range(0, dataset.shape[0], dataset.chunks[0])
    _check_all(name, (start for start in starts if n_chunks[start] < n_expected))


def _check_all(name: str, missing: Iterator[int]) -> None:
    """Raise if there is a row that is missing. It ends at the first, however many there may be."""
    first = next(missing, None)
    if first is not None:
        raise DamagedStoreError(
            f"rows of {name} from {first} on were never written, and HDF5 would read them "
            "as zeros; the recording was cut off. Cut its datasets to the rows that are there"
        )
