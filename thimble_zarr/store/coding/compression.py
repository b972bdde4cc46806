"""How chunks are compressed: by codecs of blosc that every implementation of Zarr reads.

LZ4 is fast and bounded in what it gains, so a small file cannot claim much memory. A gradient has
exponents that are alike and mantissas that are noise: there bits of one weight beside each other
(`bitshuffle`) take less disk than bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numcodecs import Blosc

from thimble_zarr.format.schema import Json

_SHUFFLES = {"shuffle": Blosc.SHUFFLE, "bitshuffle": Blosc.BITSHUFFLE}
_MAX_LEVEL = 9


@dataclass(frozen=True)
class Compression:
    """Blosc's compressor, its level, of which nothing depends but the size, and its shuffle."""

    cname: str = "lz4"
    level: int = 9
    shuffle: str = "shuffle"

    def __post_init__(self) -> None:
        known = self.cname in ("lz4", "zstd") and self.shuffle in _SHUFFLES
        if not (known and isinstance(self.level, int) and 0 <= self.level <= _MAX_LEVEL):
            raise ValueError(f"blosc with {self.cname}, {self.shuffle} at {self.level} is not read")

    @property
    def encoder(self) -> Blosc:
        """What compresses a chunk."""
        return Blosc(cname=self.cname, clevel=self.level, shuffle=_SHUFFLES[self.shuffle])

    def codec(self, itemsize: int) -> dict[str, Json]:
        """Return the codec as the metadata of an array of such elements declare it."""
        configuration: dict[str, Json] = {
            "typesize": itemsize,
            "cname": self.cname,
            "clevel": self.level,
            "shuffle": self.shuffle,
            "blocksize": 0,
        }
        return {"name": "blosc", "configuration": configuration}

    @classmethod
    def of(cls, codec: Mapping[str, Any]) -> "Compression":
        """Return what a declared codec says; raise ValueError if no store has it."""
        configuration = codec["configuration"]
        return cls(configuration["cname"], configuration["clevel"], configuration["shuffle"])


COMPRESSIONS: Mapping[str, Compression] = {
    "lz4": Compression(),
    "lz4-bitshuffle": Compression(shuffle="bitshuffle"),
    "zstd-bitshuffle": Compression("zstd", 3, "bitshuffle"),
}
"""By the name that a schema has for them (`Coding.gradient_codec`). Of LZ4 the highest level takes
no longer than others here, and the least disk."""

DEFAULT = COMPRESSIONS["lz4"]
