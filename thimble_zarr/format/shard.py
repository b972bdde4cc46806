"""One block of one array as a Zarr shard: encode it and decode it, a chunk at a time.

Zarr's own encoder holds about five copies of a shard while it makes one, and a shard here is a
whole block; its decoder waits for an event loop between any two chunks. These few lines hold one
chunk and wait for the disk only. The bytes are what the array's metadata declare, so every reader
of the `sharding_indexed` codec reads them: chunks one after the other, each blosc-compressed and
followed by its crc32c, then the index of offsets and lengths and its crc32c. (Zarr specifications,
`sharding_indexed` 1.0 and `crc32c` 1.0.)
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import google_crc32c
import numpy as np
from numcodecs import Blosc, blosc
from zarr.codecs import BloscCodec, Crc32cCodec

_LEVEL = 5
_CHECKSUM_BYTES = 4
_BLOSC_HEADER = struct.Struct("<4B3I")
_EMPTY = 2**64 - 1
"""Offset and length of a chunk that was left out, because it held nothing but the fill value."""


def chunk_codecs(dtype: np.dtype) -> list[BloscCodec | Crc32cCodec]:
    """Return how chunks are encoded, as Zarr declares it in the metadata of an array."""
    return [
        BloscCodec(typesize=dtype.itemsize, cname="lz4", clevel=_LEVEL, shuffle="shuffle"),
        Crc32cCodec(),
    ]


@dataclass(frozen=True)
class Checksums:
    """What a chunk is known by.

    Attributes
    ----------
    stored
        crc32c of the chunk as it is stored, compressed. It follows the chunk in its file.
    values
        crc32c of the chunk's values. Two chunks that differ in a single bit differ in it by what
        tells which bit (`locate_bit`).
    """

    stored: int
    values: int


@dataclass
class ShardEncoder:
    """Encodes a block. Iterate over it once for the bytes of the shard, part by part.

    Attributes
    ----------
    bits
        The block, shape `(block_steps, token, dim)`, in the array's stored dtype.
    chunk_tokens
        Tokens a chunk; a last chunk that reaches beyond the tokens is filled up.
    fill
        The array's fill value.
    checksums
        Those of the chunks encoded so far.
    """

    bits: np.ndarray
    chunk_tokens: int
    fill: float
    checksums: list[Checksums] = field(default_factory=list, init=False)

    def __iter__(self) -> Iterator[bytes]:
        """Yield the encoded chunks and last the index."""
        compressor = Blosc(cname="lz4", clevel=_LEVEL, shuffle=Blosc.SHUFFLE)
        block_steps, n_tokens, n_dims = self.bits.shape
        little_endian = self.bits.dtype.newbyteorder("<")
        chunk = np.empty((block_steps, self.chunk_tokens, n_dims), dtype=little_endian)
        index: list[tuple[int, int]] = []
        offset = 0
        for start in range(0, n_tokens, self.chunk_tokens):
            part = self.bits[:, start : start + self.chunk_tokens]
            chunk[:, : part.shape[1]] = part
            chunk[:, part.shape[1] :] = self.fill
            encoded = compressor.encode(chunk)
            checksums = Checksums(google_crc32c.value(encoded), values_checksum(chunk))
            self.checksums.append(checksums)
            index.append((offset, len(encoded) + _CHECKSUM_BYTES))
            offset += index[-1][1]
            yield encoded + _as_bytes(checksums.stored)
        content = np.array(index, dtype="<u8").tobytes()
        yield content + _as_bytes(google_crc32c.value(content))


class ShardFile:
    """Decodes chunks of a shard. Use it as a context manager.

    Parameters
    ----------
    file
        The shard.
    n_chunks
        Chunks it has.
    shape, dtype
        Of each chunk.
    fill
        The array's fill value.

    Raises
    ------
    ValueError
        In every method, if the file is not what it should be or a checksum does not match.
    """

    def __init__(
        self, file: Path, *, n_chunks: int, shape: tuple[int, ...], dtype: np.dtype, fill: float
    ) -> None:
        self._file = file
        self._n_chunks = n_chunks
        self._chunk = np.empty(shape, dtype.newbyteorder("<"))
        self._fill = fill

    def __enter__(self) -> "ShardFile":
        self._descriptor = os.open(self._file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            self._index = self._read_index()
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)

    def decode(self, chunk: int) -> np.ndarray:
        """Return a chunk, in an array that the next call overwrites."""
        offset, n_bytes = self._index[chunk]
        if offset == n_bytes == _EMPTY:
            self._chunk.fill(self._fill)
            return self._chunk
        encoded = self._read(offset, n_bytes, what=f"chunk {chunk}")
        n_values, n_encoded = _blosc_sizes(encoded)
        if (n_values, n_encoded) != (self._chunk.nbytes, len(encoded)):
            raise ValueError(f"chunk {chunk} holds {n_values} bytes, not {self._chunk.nbytes}")
        blosc.decompress(encoded, self._chunk)
        return self._chunk

    def stored_checksum(self, chunk: int) -> int | None:
        """Return the checksum that follows a chunk, None where the chunk was left out."""
        offset, n_bytes = self._index[chunk]
        if offset == n_bytes == _EMPTY:
            return None
        checksum = self._pread(offset + n_bytes - _CHECKSUM_BYTES, _CHECKSUM_BYTES)
        return int.from_bytes(checksum, "little")

    def _read_index(self) -> list[tuple[int, int]]:
        n_bytes = 16 * self._n_chunks + _CHECKSUM_BYTES
        size = os.fstat(self._descriptor).st_size
        content = self._read(max(0, size - n_bytes), n_bytes, what="the index")
        numbers = np.frombuffer(content, "<u8").reshape(-1, 2).tolist()
        index = [(int(offset), int(length)) for offset, length in numbers]
        for offset, length in index:
            empty = offset == length == _EMPTY
            if not empty and not _CHECKSUM_BYTES < length <= size - offset:
                raise ValueError(f"its index points to {length} bytes at {offset}, outside of it")
        return index

    def _read(self, offset: int, n_bytes: int, *, what: str) -> np.ndarray:
        """Return the bytes that lie before a checksum that is right, and no copy of them."""
        content = np.frombuffer(self._pread(offset, n_bytes), np.uint8)
        value, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
        if _as_bytes(google_crc32c.value(value)) != checksum.tobytes():
            raise ValueError(f"the checksum of {what} does not match")
        return value

    def _pread(self, offset: int, n_bytes: int) -> bytes:
        content = os.pread(self._descriptor, n_bytes, offset)
        if len(content) != n_bytes:
            raise ValueError(f"it ends before the {n_bytes} bytes at {offset}")
        return content


def values_checksum(chunk: np.ndarray) -> int:
    """Return the crc32c of a chunk's values."""
    values = chunk.reshape(-1).view()
    values.flags.writeable = False  # the library takes no other
    checksum: int = google_crc32c.value(values)
    return checksum


def _blosc_sizes(encoded: np.ndarray) -> tuple[int, int]:
    """Return decoded and encoded size, as the header of a Blosc 1 buffer has them."""
    if len(encoded) < _BLOSC_HEADER.size:
        raise ValueError("a chunk is shorter than its header")
    *_, n_values, _, n_encoded = _BLOSC_HEADER.unpack(encoded[: _BLOSC_HEADER.size].tobytes())
    return n_values, n_encoded


def locate_bit(values: bytes, checksum: int) -> int | None:
    """Return the one bit that must be flipped for values to have a checksum, if there is one.

    A crc is linear: flipping bit k changes it by a remainder that depends on the distance of the
    bit from the end alone, and up to 2**31 - 1 bits no two distances have the same.

    Parameters
    ----------
    values
        What was read.
    checksum
        The crc32c that it should have.

    Returns
    -------
    int or None
        The bit's number, 0 the least of the first byte.
    """
    wanted = google_crc32c.value(values) ^ checksum
    # A checksum's bits are reflected: the last byte's most significant bit is the nearest one.
    remainder = google_crc32c.value(b"\x80") ^ google_crc32c.value(b"\0")
    n_bits = 8 * len(values)
    for distance in range(n_bits):
        if remainder == wanted:
            return n_bits - 1 - distance
        remainder = (remainder >> 1) ^ (_POLYNOMIAL if remainder & 1 else 0)
    return None


_POLYNOMIAL = 0x82F63B78
"""That of crc32c (Castagnoli), reflected."""


def _as_bytes(checksum: int) -> bytes:
    return checksum.to_bytes(_CHECKSUM_BYTES, "little")
