"""Encode one block of one array as a Zarr shard, a chunk at a time.

Zarr's own encoder holds about five copies of a shard while it makes one, and a shard here is a
whole block. These few lines hold one chunk. The bytes are what the array's metadata declare, so
every reader of the `sharding_indexed` codec reads them: chunks one after the other, each
blosc-compressed and followed by its crc32c, then the index of offsets and lengths and its crc32c.
(Zarr specifications, `sharding_indexed` 1.0 and `crc32c` 1.0.)
"""

from collections.abc import Iterator

import google_crc32c
import numpy as np
from numcodecs import Blosc
from zarr.codecs import BloscCodec, Crc32cCodec

_LEVEL = 5


def chunk_codecs(dtype: np.dtype) -> list[BloscCodec | Crc32cCodec]:
    """Return how chunks are encoded, as Zarr declares it in the metadata of an array."""
    return [
        BloscCodec(typesize=dtype.itemsize, cname="lz4", clevel=_LEVEL, shuffle="shuffle"),
        Crc32cCodec(),
    ]


def encode_shard(bits: np.ndarray, *, chunk_tokens: int, fill: float) -> Iterator[bytes]:
    """Yield the bytes of a shard, part by part.

    Parameters
    ----------
    bits
        The block, shape `(block_steps, token, dim)`, in the array's stored dtype.
    chunk_tokens
        Tokens a chunk; a last chunk that reaches beyond the tokens is filled up.
    fill
        The array's fill value.

    Yields
    ------
    bytes
        An encoded chunk, and last the index.
    """
    compressor = Blosc(cname="lz4", clevel=_LEVEL, shuffle=Blosc.SHUFFLE)
    block_steps, n_tokens, n_dims = bits.shape
    little_endian = bits.dtype.newbyteorder("<")
    chunk = np.empty((block_steps, chunk_tokens, n_dims), dtype=little_endian)
    index: list[tuple[int, int]] = []
    offset = 0
    for start in range(0, n_tokens, chunk_tokens):
        part = bits[:, start : start + chunk_tokens]
        chunk[:, : part.shape[1]] = part
        chunk[:, part.shape[1] :] = fill
        encoded = _with_checksum(compressor.encode(chunk))
        index.append((offset, len(encoded)))
        offset += len(encoded)
        yield encoded
    yield _with_checksum(np.array(index, dtype="<u8").tobytes())


def _with_checksum(content: bytes) -> bytes:
    checksum: int = google_crc32c.value(content)
    return content + checksum.to_bytes(4, "little")
