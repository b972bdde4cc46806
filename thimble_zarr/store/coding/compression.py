"""How chunks are compressed: by codecs that are public, and have a name in Zarr.

Blosc is what every implementation of Zarr reads. Its LZ4 is fast and bounded in what it gains, so a
small file cannot claim much memory. A gradient has exponents that are alike and mantissas that are
noise: there bits of one weight beside each other (`bitshuffle`) take less disk than bytes. Pcodec
finds the distribution of numbers, and takes the least disk of a gradient if those of an element
follow one another; it is slow, and only some implementations read it.
"""

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numcodecs import Blosc, blosc

from thimble_zarr.errors import ConfigError
from thimble_zarr.format.schema import Json

Memory = Callable[[tuple[int, ...], np.dtype], np.ndarray]
"""Returns an array of a shape and dtype, in memory that is used again."""

MAX_COMPRESSION = 256
"""LZ4 stores at most 255 bytes in one."""

_MAX_GAINS = {1: MAX_COMPRESSION, 4: 2**16}
"""How many bytes a compressor stores in one, at most, by its number in Blosc's flags: LZ4, and
Zstandard, which takes four for a block of 128 kB of zeros."""

_BLOSC_HEADER = struct.Struct("<4B3I")

MAX_OVERHEAD = _BLOSC_HEADER.size
"""Bytes by which what cannot be compressed becomes longer."""

_ENDIAN: Json = {"endian": "little"}


class Compression(Protocol):
    """Turns a chunk of shape `(token, step, dim)`, or a vector, into bytes and back."""

    def encode(self, chunk: np.ndarray) -> bytes:
        """Return the bytes of a chunk, whose numbers are little-endian."""

    def decode(
        self, encoded: np.ndarray, shape: tuple[int, ...], dtype: np.dtype, memory: Memory
    ) -> np.ndarray:
        """Return the chunk; raise ValueError if the bytes are not those of so many numbers."""

    def order(self, n_axes: int) -> Sequence[int]:
        """Return how the axes of an array `(step, token, ...)` lie in a chunk."""

    def codecs(self, itemsize: int) -> list[dict[str, Json]]:
        """Return the codecs as the metadata of an array of such elements declare them."""


@dataclass(frozen=True)
class BloscCompression:
    """Blosc's compressor, its level, of which nothing depends but the size, and its shuffle."""

    cname: str = "lz4"
    level: int = 9
    shuffle: str = "shuffle"

    def __post_init__(self) -> None:
        known = self.cname in ("lz4", "zstd") and self.shuffle in _SHUFFLES
        if not (known and isinstance(self.level, int) and 0 <= self.level <= _MAX_LEVEL):
            raise ValueError(f"blosc with {self.cname}, {self.shuffle} at {self.level} is not read")

    def encode(self, chunk: np.ndarray) -> bytes:
        """Return the bytes of a chunk."""
        encoder = Blosc(cname=self.cname, clevel=self.level, shuffle=_SHUFFLES[self.shuffle])
        return bytes(encoder.encode(chunk))

    def decode(
        self, encoded: np.ndarray, shape: tuple[int, ...], dtype: np.dtype, memory: Memory
    ) -> np.ndarray:
        """Return the chunk.

        The header of a Blosc 1 buffer says how long it is, and how long what it holds. What that is
        was declared elsewhere, so whoever made it up can make it fit; but no compressor gains more
        than so much, which is looked at before memory is taken.
        """
        if len(encoded) < _BLOSC_HEADER.size:
            raise ValueError("it is shorter than its header")
        _, _, flags, _, n_values, _, n_encoded = _BLOSC_HEADER.unpack_from(encoded.data)
        n_bytes = math.prod(shape) * dtype.itemsize
        if (n_values, n_encoded) != (n_bytes, len(encoded)):
            raise ValueError(f"it holds {n_values} bytes, not {n_bytes}")
        if n_bytes > _MAX_GAINS.get(flags >> 5, 1) * n_encoded:
            raise ValueError(f"it cannot hold {n_bytes} bytes in {n_encoded}")
        values = memory(shape, dtype)
        blosc.decompress(encoded, values)
        return values

    def order(self, n_axes: int) -> Sequence[int]:
        """Return token, step and the rest: a token's rows are one piece of memory."""
        return (1, 0, *range(2, n_axes)) if n_axes > 1 else (0,)

    def codecs(self, itemsize: int) -> list[dict[str, Json]]:
        """Return `bytes` and `blosc`."""
        configuration: dict[str, Json] = {
            "typesize": itemsize,
            "cname": self.cname,
            "clevel": self.level,
            "shuffle": self.shuffle,
            "blocksize": 0,
        }
        as_bytes: dict[str, Json] = {"name": "bytes"}
        if itemsize > 1:
            as_bytes["configuration"] = _ENDIAN
        return [as_bytes, {"name": "blosc", "configuration": configuration}]


_SHUFFLES = {"shuffle": Blosc.SHUFFLE, "bitshuffle": Blosc.BITSHUFFLE}
_MAX_LEVEL = 9


@dataclass(frozen=True)
class PcodecCompression:
    """Pcodec (`pcodec` on PyPI), with the numbers of an element at all steps side by side."""

    level: int = 8

    def encode(self, chunk: np.ndarray) -> bytes:
        """Return the bytes of a chunk."""
        numbers = np.ascontiguousarray(np.moveaxis(chunk, 1, -1) if chunk.ndim > 1 else chunk)
        return bytes(_pcodec(self.level).encode(numbers.reshape(-1)))

    def decode(
        self, encoded: np.ndarray, shape: tuple[int, ...], dtype: np.dtype, memory: Memory
    ) -> np.ndarray:
        """Return the chunk."""
        _pcodec(self.level)  # it says what is missing
        from pcodec import standalone

        stored = memory((shape[0], *shape[2:], *shape[1:2]), dtype)
        # That of numcodecs does not tell how many numbers there were: it leaves the rest as it was.
        read = standalone.simple_decompress_into(encoded.tobytes(), stored.reshape(-1))
        if not read.finished or read.n_processed != stored.size:
            raise ValueError(f"it does not hold {stored.size} numbers")
        return np.ascontiguousarray(np.moveaxis(stored, -1, 1)) if len(shape) > 1 else stored

    def order(self, n_axes: int) -> Sequence[int]:
        """Return token, the rest and step last."""
        return (*range(1, n_axes), 0)

    def codecs(self, itemsize: int) -> list[dict[str, Json]]:
        """Return `numcodecs.pcodec`, which needs no `bytes`."""
        return [{"name": _PCODEC, "configuration": {"level": self.level}}]


_PCODEC = "numcodecs.pcodec"


def _pcodec(level: int) -> Any:
    """Return the codec; raise ConfigError if it is not installed."""
    try:
        from numcodecs.pcodec import PCodec
    except ImportError as error:
        raise ConfigError(
            "an archived gradient is compressed by pcodec, which is not installed: "
            "pip install 'thimble-zarr[archive]'"
        ) from error
    return PCodec(level)


COMPRESSIONS: Mapping[str, Compression] = {
    "lz4": BloscCompression(),
    "lz4-bitshuffle": BloscCompression(shuffle="bitshuffle"),
    "pcodec": PcodecCompression(),
}
"""By the name that a schema has for them (`Coding.gradient_codec`). Of LZ4 the highest level takes
no longer than others here, and the least disk."""

DEFAULT = COMPRESSIONS["lz4"]


def declared_compression(codecs: Sequence[Mapping[str, Any]]) -> Compression:
    """Return how the codecs of an array compress; raise ValueError if no store has them."""
    for codec in codecs:
        if codec["name"] == "blosc":
            of = codec["configuration"]
            return BloscCompression(of["cname"], of["clevel"], of["shuffle"])
        if codec["name"] == _PCODEC:
            return PcodecCompression(codec["configuration"]["level"])
    raise ValueError("it is not compressed")


CODECS = ("transpose", "bytes", "blosc", _PCODEC, "crc32c")
"""Those that a store has."""
