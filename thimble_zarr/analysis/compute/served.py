"""How much of a recording on a server a task asks for at once, and so holds in memory.

Each request takes long, and a server reads more of a file than it sends. So a task has all tokens
of a block, unless they are too many, and asks for what it needs of a file in one request.
"""

from thimble_zarr import tuning
from thimble_zarr.format.indexing import Indices
from thimble_zarr.format.location import Url
from thimble_zarr.format.reader import Reader
from thimble_zarr.format.schema import row_size


def windows_ahead(reader: Reader, tokens: Indices) -> int:
    """Return how many windows are announced ahead of reading them: for a disk, only the next."""
    if not isinstance(reader.path, Url):
        return 1
    most = tuning.TUNING.windows_ahead
    return max(1, min(most, tuning.TUNING.ahead_bytes // _block_bytes(reader, tokens)))


def reads_together(reader: Reader, tokens: Indices) -> bool:
    """Return whether a task has all of these tokens."""
    n_bytes = _block_bytes(reader, tokens)
    return isinstance(reader.path, Url) and n_bytes <= tuning.TUNING.served_block_bytes


def held_bytes(reader: Reader, tokens: Indices, group_tokens: int) -> int:
    """Return what a task holds at most of files on a server: the window it reads, and those ahead.

    A task that does not have all tokens has groups of `group_tokens`.
    """
    if not isinstance(reader.path, Url):
        return 0
    if not reads_together(reader, tokens):
        tokens = tokens[:group_tokens]
    return (1 + windows_ahead(reader, tokens)) * _block_bytes(reader, tokens)


def _block_bytes(reader: Reader, tokens: Indices) -> int:
    """Return the bytes of all variables of tokens in a block, as they are decoded."""
    schema = reader.schema
    row = row_size((len(tokens), *schema.shape[1:]), schema.dtypes)
    return max(1, schema.layout.block_steps * row.n_bytes)
