"""One block of one array as a Zarr shard: encode it and decode it, a chunk at a time.

Zarr's own encoder holds about five copies of a shard while it makes one, and a shard here is a
whole block; its decoder waits for an event loop between any two chunks. These few lines hold one
chunk and wait for the disk only. The bytes are what the array's metadata declare, so every reader
of the `sharding_indexed` codec reads them: chunks one after the other, each transposed, compressed
by blosc and followed by its crc32c, then the index of offsets and lengths and its crc32c. (Zarr
specifications, `sharding_indexed`, `transpose` and `crc32c` 1.0.)

In a chunk the token comes first: what a token's weights were at one step and the next lie close
together, so that the compressor sees how alike they are (a tenth less disk, and twice the speed of
decoding), and the rows of a token are one piece of memory.
"""

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property

import google_crc32c
import numpy as np

from thimble_zarr.format.reader import Checksums
from thimble_zarr.store.coding.compression import DEFAULT, MAX_OVERHEAD, Compression
from thimble_zarr.store.files.base import Files

CHUNK_ORDER = (1, 0, 2)
"""How the axes of a `(step, token, dim)` chunk are stored: token, step, dim. Its own inverse."""


MAX_CHUNK_BYTES = 2**31 - 17
"""Blosc compresses no more at once."""

_CHECKSUM_BYTES = 4
_EMPTY = 2**64 - 1
"""Offset and length of a chunk that was left out, because it held nothing but the fill value."""


@dataclass
class ShardBuilder:
    """Makes a shard of chunks, one after the other, each as it is stored: `(token, step, dim)`.

    `checksums` are those of the chunks so far.
    """

    compression: Compression = DEFAULT
    checksums: list[Checksums] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._index: list[tuple[int, int]] = []
        self._end = 0

    def leave_out(self, values: int) -> None:
        """Leave out the next chunk, all of the fill value; given is the checksum of its values."""
        self.checksums.append(Checksums(0, values))
        self._index.append((_EMPTY, _EMPTY))

    def add(self, chunk: np.ndarray) -> bytes:
        """Return the bytes of the next chunk."""
        encoded = self.compression.encode(chunk)
        checksums = Checksums(google_crc32c.value(encoded), values_checksum(chunk))
        self.checksums.append(checksums)
        n_bytes = len(encoded) + _CHECKSUM_BYTES
        self._index.append((self._end, n_bytes))
        self._end += n_bytes
        return encoded + _as_bytes(checksums.stored)

    def index(self) -> bytes:
        """Return the bytes that the shard ends with."""
        content = np.array(self._index, dtype="<u8").tobytes()
        return content + _as_bytes(google_crc32c.value(content))


@dataclass
class ShardEncoder:
    """Encodes a block. Iterate over it once for the bytes of the shard, part by part.

    Attributes
    ----------
    bits
        The block, shape `(block_steps, token, dim)`, in the array's stored dtype.
    chunk_tokens, fill
        Tokens a chunk, and what fills up a last one that reaches beyond the tokens.
    order
        The tokens in the order in which they are stored; as they come if None.
    compression
        How chunks are compressed.
    """

    bits: np.ndarray
    chunk_tokens: int
    fill: float
    order: np.ndarray | None = None
    compression: Compression = DEFAULT

    def __post_init__(self) -> None:
        self._builder = ShardBuilder(self.compression)

    @property
    def checksums(self) -> list[Checksums]:
        """Those of the chunks encoded so far."""
        return self._builder.checksums

    def __iter__(self) -> Iterator[bytes]:
        """Yield the encoded chunks and last the index."""
        block_steps, n_tokens, n_dims = self.bits.shape
        little_endian = self.bits.dtype.newbyteorder("<")
        chunk = np.empty((self.chunk_tokens, block_steps, n_dims), dtype=little_endian)
        for of_chunk in chunk_slices(n_tokens, self.chunk_tokens):
            part = self.bits[:, of_chunk if self.order is None else self.order[of_chunk]]
            part = part.transpose(CHUNK_ORDER)
            chunk[: len(part)] = part
            chunk[len(part) :] = self.fill
            yield self._builder.add(chunk)
        yield self._builder.index()


def chunk_slices(n_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """Yield where the tokens of each chunk of a shard lie among all."""
    for start in range(0, n_tokens, chunk_tokens):
        yield slice(start, min(n_tokens, start + chunk_tokens))


@dataclass
class ShardFile:
    """Decodes chunks of a shard. Use it as a context manager.

    Attributes
    ----------
    files, key
        The store, and the shard in it, of `n_chunks` chunks.
    shape, dtype, fill
        Of each chunk, `(token, step, dim)`, and the array's fill value.
    compression
        How chunks are compressed.
    tail_bytes
        How much of the end of the file is read when it is opened, if that is more than the index.

    Raises
    ------
    FileNotFoundError
        If there is no such file, or an empty one.
    ValueError
        In every method, if the file is not what it should be or a checksum does not match.
    """

    files: Files
    key: str
    _: KW_ONLY
    n_chunks: int
    shape: tuple[int, ...]
    dtype: np.dtype
    fill: float
    compression: Compression = DEFAULT
    tail_bytes: int = 0

    def __enter__(self) -> "ShardFile":
        with ExitStack() as undo:
            tail_bytes = max(self._index_bytes, self.tail_bytes)
            self._file = undo.enter_context(self.files.open(self.key, tail_bytes))
            if self._file.n_bytes == 0:
                raise FileNotFoundError(f"{self.key} is empty")
            self._index = self._read_index()
            undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    @property
    def published_as(self) -> str:
        """What its chunks were known by when it was uploaded, if anybody knows."""
        return self._file.published_as

    def will_open(self) -> None:
        """Say that it will be opened, so that its index may be fetched."""
        self.files.will_open([self.key], self._index_bytes)

    def will_read(self, chunks: Iterable[int]) -> None:
        """Say which chunks will be read, so that the disk may begin."""
        self._file.will_read(self._index[[*chunks]].tolist())

    def tail_of(self, chunks: Sequence[int]) -> int:
        """Return how many bytes at the end have chunks in them, if next to nothing else; else 0."""
        spans = self._index[[*chunks]]
        spans = spans[spans[:, 0] != _EMPTY]
        wanted, start = int(spans[:, 1].sum()), int(spans[:, 0].min(initial=self._file.n_bytes))
        tail_bytes = self._file.n_bytes - start
        return tail_bytes if 6 * wanted >= 5 * (tail_bytes - self._index_bytes) else 0

    @property
    def most_bytes(self) -> int:
        """What the file has at most: of chunks that cannot be compressed."""
        of_chunk = math.prod(self.shape) * self.dtype.itemsize + MAX_OVERHEAD + _CHECKSUM_BYTES
        return self._index_bytes + self.n_chunks * of_chunk

    def decode(self, chunk: int, out: np.ndarray | None = None) -> np.ndarray:
        """Return a chunk, shape `(token, step, dim)`.

        It is `out` where that is given, an array of that shape and of the stored dtype without
        gaps. Else the array is overwritten when this thread decodes another chunk, of this shard or
        any other.
        """
        offset, n_bytes = self._span(chunk)
        dtype = self._stored_dtype
        if offset == _EMPTY:
            values = _scratch.chunk(self.shape, dtype) if out is None else out
            values.fill(self.fill)
            return values

        def memory(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
            if out is not None and out.shape == shape:
                return out
            return _scratch.chunk(shape, dtype)

        encoded = _checked(self._read(offset, n_bytes), f"chunk {chunk}")
        try:
            values = self.compression.decode(encoded, self.shape, dtype, memory)
        except ValueError as error:
            raise ValueError(f"chunk {chunk}: {error}") from error
        if out is not None and values is not out:
            out[...] = values
            return out
        return values

    def can_decode_into(self, out: np.ndarray) -> bool:
        """Return whether a chunk can be decoded into an array of shape `(token, step, dim)`."""
        same = out.shape == self.shape and out.dtype == self._stored_dtype
        return same and out.flags.c_contiguous

    @cached_property
    def _stored_dtype(self) -> np.dtype:
        return self.dtype.newbyteorder("<")

    def is_left_out(self, chunk: int) -> bool:
        """Return whether a chunk was left out, because it held nothing but the fill value."""
        return self._span(chunk)[0] == _EMPTY

    def computed_checksum(self, chunk: int) -> int:
        """Return the checksum of a chunk as it is stored, 0 where the chunk was left out.

        Nothing is decoded: this takes no longer than reading.
        """
        offset, n_bytes = self._span(chunk)
        if offset == _EMPTY:
            return 0
        stored = self._read(offset, n_bytes)
        _checked(stored, f"chunk {chunk}")
        return int.from_bytes(stored[-_CHECKSUM_BYTES:], "little")

    def stored_checksums(self) -> list[int]:
        """Return the checksum that follows each chunk, 0 where one was left out."""
        spans = [*map(self._span, range(self.n_chunks))]
        # Inside of the file: `_span` has looked.
        ends = [None if at == _EMPTY else at + n - _CHECKSUM_BYTES for at, n in spans]
        if self.files.is_remote:
            self._file.will_read([(at, _CHECKSUM_BYTES) for at in ends if at is not None])
        return [
            0 if at is None else int.from_bytes(self._file.read(at, _CHECKSUM_BYTES), "little")
            for at in ends
        ]

    def _span(self, chunk: int) -> tuple[int, int]:
        """Return offset and length of a chunk, both `_EMPTY` where it was left out."""
        offset, n_bytes = self._index[chunk].tolist()
        inside = _CHECKSUM_BYTES < n_bytes <= self._file.n_bytes - offset
        if not inside and not offset == n_bytes == _EMPTY:
            raise ValueError(f"its index points to {n_bytes} bytes at {offset}, outside of it")
        return offset, n_bytes

    @property
    def _index_bytes(self) -> int:
        return 16 * self.n_chunks + _CHECKSUM_BYTES

    def _read_index(self) -> np.ndarray:
        """Return offset and length of each chunk, uint64, shape `(chunk, 2)`."""
        n_bytes = self._index_bytes
        if n_bytes > self._file.n_bytes:
            raise ValueError(f"it has no room for the index of {self.n_chunks:,} chunks")
        content = self._read(self._file.n_bytes - n_bytes, n_bytes)
        return _checked(content, "the index").view("<u8").reshape(-1, 2).copy()

    def _read(self, offset: int, n_bytes: int) -> memoryview:
        """Return bytes of the file, in memory that the next call overwrites."""
        content = _scratch.stored(n_bytes)
        if self._file.read_into(content, offset) != n_bytes:
            raise ValueError(f"it ends before the {n_bytes} bytes at {offset}")
        return content.toreadonly()


class _Scratch(threading.local):
    """Memory in which a thread decodes: fresh memory takes longer than decoding into it."""

    def __init__(self) -> None:
        self._chunk = np.empty(0)
        self._stored = bytearray()

    def chunk(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        if self._chunk.shape != shape or self._chunk.dtype != dtype:
            self._chunk = np.empty(shape, dtype)
        return self._chunk

    def stored(self, n_bytes: int) -> memoryview:
        if len(self._stored) < n_bytes:
            self._stored = bytearray(n_bytes)
        return memoryview(self._stored)[:n_bytes]


_scratch = _Scratch()


def values_checksum(chunk: np.ndarray) -> int:
    """Return the crc32c of a chunk's values."""
    values = chunk.reshape(-1).view()
    values.flags.writeable = False  # the library takes no other
    return int(google_crc32c.value(values))


def encode_vector(values: np.ndarray) -> bytes:
    """Return the bytes of a chunk that is a file of its own."""
    little_endian = values.astype(values.dtype.newbyteorder("<"), copy=False)
    encoded = DEFAULT.encode(np.ascontiguousarray(little_endian))
    return encoded + _as_bytes(google_crc32c.value(encoded))


def decode_vector(content: bytes, shape: int | tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return the values of a chunk that is a file of its own, by default of one axis.

    Raises ValueError if it is not that many values, or its checksum does not match.
    """
    encoded = _checked(content, "its chunk")
    shape = (shape,) if isinstance(shape, int) else shape
    values = DEFAULT.decode(encoded, shape, dtype.newbyteorder("<"), np.empty)
    return values.astype(dtype, copy=False)


def _checked(content: bytes | memoryview, what: str) -> np.ndarray:
    """Return the bytes that lie before a checksum that is right, and no copy of them."""
    value = np.frombuffer(content, np.uint8)[:-_CHECKSUM_BYTES]
    if google_crc32c.value(value) != int.from_bytes(content[-_CHECKSUM_BYTES:], "little"):
        raise ValueError(f"the checksum of {what} does not match")
    return value


def locate_bit(values: bytes, checksum: int) -> int | None:
    """Return the one bit that must be flipped for values to have a crc32c, if there is one.

    It is the bit's number, 0 the least of the first byte. A crc is linear: flipping bit k changes
    it by a remainder that depends on the distance of the bit from the end alone, and up to
    2**31 - 1 bits no two distances have the same.
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
