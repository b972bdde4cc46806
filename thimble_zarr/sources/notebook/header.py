"""The safetensors container: what lies where in a file, without reading it.

A file is eight bytes of length, a JSON header of that length, and the tensors end to end. Reading
the header oneself, and the tensors by their offsets, keeps a file of any size out of memory: pages
of a mapped file would count as the process's own.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from thimble_zarr.errors import DamagedStoreError, NotAStoreError

DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(numpy)
    for name, numpy in {
        "U64": "<u8", "I64": "<i8", "F64": "<f8", "F32": "<f4", "U32": "<u4", "I32": "<i4",
        "BF16": "<u2", "F16": "<f2", "U16": "<u2", "I16": "<i2", "F8_E4M3": "u1", "F8_E5M2": "u1",
        "I8": "i1", "U8": "u1", "BOOL": "?",
    }.items()
}  # fmt: skip
"""What holds the bits of each dtype, in the order in which safetensors writes tensors: by dtype,
the largest first, and then by name."""

_MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file.

    Attributes
    ----------
    dtype
        As safetensors names it.
    shape
        Its shape.
    offset
        Where its first byte lies in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def n_bytes(self) -> int:
        """Size of the tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes
    ----------
    tensors
        Its tensors, by name, in the order in which they lie in the file.
    metadata
        What its writer noted, None where there is nothing.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] | None = None

    def to_bytes(self) -> bytes:
        """Return length and JSON as safetensors writes them, for tensors end to end."""
        content: dict[str, object] = {}
        if self.metadata is not None:
            content["__metadata__"] = dict(self.metadata)
        offset = 0
        for name, tensor in self.tensors.items():
            end = offset + tensor.n_bytes
            content[name] = {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "data_offsets": (offset, end),
            }
            offset = end
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def read_header(file: Path) -> Header:
    """Read what a file holds, and make sure that it is all there.

    Parameters
    ----------
    file
        A safetensors file.

    Returns
    -------
    Header

    Raises
    ------
    NotAStoreError
        If it is not a safetensors file.
    DamagedStoreError
        If it is one, but was cut off or has bytes too many.
    OSError
        If it cannot be read.
    """
    n_bytes = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        start = stream.read(1)
        if start != b"{" or not 2 <= length <= _MAX_HEADER_BYTES:
            raise NotAStoreError("it is not a safetensors file")
        if length > n_bytes - _LENGTH_BYTES:
            raise _cut_off(n_bytes, _LENGTH_BYTES + length)
        text = start + stream.read(length - 1)
    try:
        content = json.loads(text)
        metadata = content.pop("__metadata__", None)
        if not _is_metadata(metadata):
            raise ValueError("its metadata are not strings")
        tensors, n_expected = _lay_out(content, _LENGTH_BYTES + length)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NotAStoreError(f"it is not a sound safetensors file: {error}") from error
    if n_bytes != n_expected:
        raise _cut_off(n_bytes, n_expected)
    return Header(tensors, metadata)


def read_into(stream: BinaryIO, target: np.ndarray) -> None:
    """Fill a contiguous array with the next bytes of an unbuffered stream.

    Raises
    ------
    DamagedStoreError
        If the stream ends first.
    """
    view = target.reshape(-1).view(np.uint8).data
    while view:
        n_read = stream.readinto(view)  # type: ignore[attr-defined]  # typeshed leaves it out
        if not n_read:
            raise DamagedStoreError("it was cut off after it was opened; copy it again")
        view = view[n_read:]


def _lay_out(content: Mapping[str, object], start: int) -> tuple[dict[str, Tensor], int]:
    """Return the tensors in the order of their offsets, and where the last one ends."""
    found = sorted(
        (begin, end, name, tensor)
        for name, (begin, end, tensor) in (
            (name, _parse(name, entry, start)) for name, entry in content.items()
        )
    )
    position = 0
    for begin, end, name, tensor in found:
        if begin != position:
            raise ValueError(f"tensor {name!r} begins at byte {begin}, expected {position}")
        if end - begin != tensor.n_bytes:
            raise ValueError(
                f"tensor {name!r}, {tensor.dtype} of shape {tensor.shape}, takes {tensor.n_bytes} "
                f"bytes, and the header gives it {end - begin}"
            )
        position = end
    return {name: tensor for _, _, name, tensor in found}, start + position


def _parse(name: str, entry: object, start: int) -> tuple[int, int, Tensor]:
    if not isinstance(entry, Mapping):
        raise ValueError(f"tensor {name!r} is not described")
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not all(type(size) is int and size >= 0 for size in (begin, end, *shape)):
        raise ValueError(f"tensor {name!r} has shape {shape} at bytes {begin} to {end}")
    return begin, end, Tensor(dtype, tuple(shape), start + begin)


def _is_metadata(metadata: object) -> bool:
    return metadata is None or (
        isinstance(metadata, Mapping) and all(isinstance(text, str) for text in metadata.values())
    )


def _cut_off(n_bytes: int, n_expected: int) -> DamagedStoreError:
    return DamagedStoreError(
        f"it has {n_bytes:,} bytes, and its header promises {n_expected:,}; copy it again, or "
        "save it again"
    )
