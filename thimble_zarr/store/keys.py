"""Keys: where in a store each file lies, and what a key says of its file. Nothing else knows.

A parameter's files lie in its group, which is empty where it is the only one. An array is known by
its path (`array_path`), as in the ledger::

    zarr.json                  metadata of the root
    wte.weight/zarr.json       of a group
    wte.weight/W/zarr.json     of an array
    wte.weight/W/c.3.0.0       the shard of block 3 of an array of three axes
    wte.weight/loss/c.0        the first chunk of an array of one axis
    .thimble/...               the bookkeeping of all parameters
"""

import re
from collections.abc import Sequence

from thimble_zarr.format.schema import array_path

BOOKKEEPING = ".thimble"
COMMIT = f"{BOOKKEEPING}/commit.json"
LEDGER = f"{BOOKKEEPING}/blocks.jsonl"
LOCK = f"{BOOKKEEPING}/lock"
HOLDER = f"{BOOKKEEPING}/writer.json"
PUBLISHER = f"{BOOKKEEPING}/publisher.json"
METADATA = "zarr.json"

_CHUNK = re.compile(r"(?:[^/\\\0]+/)+c\.\d+(?:\.\d+)*")
_METADATA = re.compile(r"(?:[^/\\\0]+/)*zarr\.json")


def metadata_key(node: str = "") -> str:
    """Return where the metadata of a group or an array are; of the root by default."""
    return array_path(node, METADATA)


def shard_key(array: str, block: int, shape: Sequence[int]) -> str:
    """Return the file of a block of an array, of a parameter of some shape.

    Examples
    --------
    >>> shard_key("W", 3, (11, 5))
    'W/c.3.0.0'
    """
    return vector_key(array, block) + ".0" * len(shape)


def vector_key(array: str, chunk: int = 0) -> str:
    """Return the file of a chunk of an array of one axis."""
    return f"{array}/c.{chunk}"


def is_chunk_key(key: str) -> bool:
    """Return whether a key names a chunk or shard, of a directory within the store."""
    return bool(_CHUNK.fullmatch(key)) and not {".", ".."} & set(key.split("/"))


def is_metadata(key: str) -> bool:
    """Return whether a key names metadata, of the root or of a directory within the store."""
    return bool(_METADATA.fullmatch(key)) and not {".", ".."} & set(key.split("/"))


def array_of(key: str) -> str:
    """Return the path of the array that a file belongs to."""
    return key.rpartition("/")[0]


def split_array_key(array: str) -> tuple[str, str]:
    """Return the group and the name of an array: what undoes `array_path`."""
    group, _, name = array.rpartition("/")
    return group, name


def chunk_index(key: str) -> int:
    """Return the number along the first axis of a chunk or shard.

    Examples
    --------
    >>> chunk_index("wte.weight/W/c.3.0.0")
    3
    """
    return int(key.rpartition("/c.")[2].partition(".")[0])
