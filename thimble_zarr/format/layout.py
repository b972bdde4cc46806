"""Integer planning: how many steps make a block, how many tokens a chunk, how many bytes it takes.

A *block* is the unit that is buffered, written and committed: `block_steps` rows of every variable.
A *chunk* is the part of a block that is compressed and read alone: all steps of the block for
`chunk_tokens` tokens. Everything here is a pure function of shapes; sizes are in bytes.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

DEFAULT_MEMORY_BYTES = 256 * 2**20
"""Default limit on a recorder's memory: its block buffers and what encoding a block needs."""

_PREDICTED_MEMORY_BYTES = 2 * DEFAULT_MEMORY_BYTES
"""The same where states are predicted: longer blocks have fewer keyframes."""

MAX_BUFFERS = 2
"""Blocks in memory at once: one being filled by training, one being written."""

MAX_BLOCK_STEPS = 128
"""Longest block. A crash costs the one being filled and, where the disk lags, the one before it, so
blocks of tiny models are not made longer."""

TARGET_CHUNK_BYTES = 2**17
"""A chunk of about this size decodes at full speed and still lets a few tokens be read alone."""

AUDIT_ELEMENTS = 2**17
"""Elements of a row of which torch's own code takes a step again at once, where that is audited."""

SCALAR_CHUNK_STEPS = 4096
"""Steps a chunk of the per-step scalars: one small file rewritten at each commit until full."""


_METADATA_BYTES = 2**17  # metadata of all arrays, ledger and commit record of a short run
_LABEL_BYTES = 64  # id, count, live, dead and text of a token


@dataclass(frozen=True)
class Layout:
    """How the arrays of a parameter are cut: steps a block and so a chunk, and tokens a chunk."""

    block_steps: int
    chunk_tokens: int

    def capacity(self, n_rows: int) -> int:
        """Return `n_rows` rounded up to whole blocks."""
        return -(-n_rows // self.block_steps) * self.block_steps

    def shard_tokens(self, n_tokens: int) -> int:
        """Return `n_tokens` rounded up to whole chunks: the token extent of a shard."""
        return -(-n_tokens // self.chunk_tokens) * self.chunk_tokens


@dataclass(frozen=True)
class RowSize:
    """What decides how large a row of a parameter is: its shape, and bytes an element.

    Variables that are `predicted` are encoded all at once, and held until they are written.
    """

    n_tokens: int
    n_dims: int
    itemsizes: Mapping[str, int]
    predicted: Collection[str] = ()
    is_stepped_whole: bool = False

    @property
    def n_bytes(self) -> int:
        """Bytes of a row of all variables."""
        return self.n_tokens * self.n_dims * sum(self.itemsizes.values())

    @property
    def held_bytes(self) -> int:
        """Most bytes of a row that are held encoded."""
        each = sum(self.itemsizes[name] for name in self.predicted)
        return self.n_tokens * self.n_dims * each

    def token_bytes(self, block_steps: int) -> int:
        """Return the bytes of a block for one token, of the largest variable."""
        return block_steps * self.n_dims * max(self.itemsizes.values())


@dataclass(frozen=True)
class StoragePlan:
    """What recording a run takes, in bytes.

    Attributes
    ----------
    layout
        The block and chunk sizes that follow from the memory limit.
    array_bytes
        Uncompressed size of each `(step, token, dim)` array.
    disk_bytes
        Upper bound on disk space: all arrays without any gain from compression, metadata, labels of
        the tokens, and the compressed padding of the last block.
    likely_bytes
        The same where every prediction holds: of variables that are predicted only keyframes.
    memory_bytes
        Peak memory of the recorder: buffers, encoding, and the audit if there is one.
    """

    layout: Layout
    array_bytes: Mapping[str, int]
    disk_bytes: int
    likely_bytes: int
    memory_bytes: int


def default_memory_bytes(coding: str) -> int:
    """Return the default limit on the memory of a recorder that writes with a coding."""
    return _PREDICTED_MEMORY_BYTES if coding == "predicted" else DEFAULT_MEMORY_BYTES


def plan_layout(
    n_tokens: int,
    n_dims: int,
    itemsizes: Mapping[str, int],
    *,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> Layout:
    """Choose block and chunk sizes for one parameter, as `plan_layouts` does for several."""
    (layout,) = plan_layouts([RowSize(n_tokens, n_dims, itemsizes)], memory_bytes=memory_bytes)
    return layout


def plan_layouts(
    rows: Sequence[RowSize], *, memory_bytes: int = DEFAULT_MEMORY_BYTES
) -> list[Layout]:
    """Choose block and chunk sizes for parameters that are recorded together, from a row of each.

    The block is the longest power of two of steps, at most `MAX_BLOCK_STEPS`, of which
    `MAX_BUFFERS` fit in `memory_bytes`. It is the same for all, because they are committed
    together. It has at least one step, whatever the limit.
    """
    block_steps = 1
    while (
        block_steps < MAX_BLOCK_STEPS
        and recorder_memory_bytes(rows, 2 * block_steps, MAX_BUFFERS) <= memory_bytes
    ):
        block_steps *= 2
    return [Layout(block_steps, _chunk_tokens(row, block_steps)) for row in rows]


def _chunk_tokens(row: RowSize, block_steps: int) -> int:
    chunk_row_bytes = row.token_bytes(block_steps)
    # Of a predicted variable most chunks are not there; who reads one needs those of all.
    target_bytes = 2 * TARGET_CHUNK_BYTES if row.predicted else TARGET_CHUNK_BYTES
    n_chunks = max(1, round(row.n_tokens * chunk_row_bytes / target_bytes))
    return -(-row.n_tokens // min(n_chunks, row.n_tokens))


def count_buffers(rows: Sequence[RowSize], block_steps: int, memory_bytes: int) -> int:
    """Return how many blocks a recorder holds: as many as fit, at most `MAX_BUFFERS`, at least one.

    With one, training waits while each block is written.
    """
    fits = recorder_memory_bytes(rows, block_steps, MAX_BUFFERS) <= memory_bytes
    return MAX_BUFFERS if fits else 1


def recorder_memory_bytes(
    rows: Sequence[RowSize], block_steps: int, n_buffers: int = MAX_BUFFERS
) -> int:
    """Return the memory of a recorder that holds some blocks of `block_steps` steps.

    That is the blocks, of all variables of all parameters, what is held encoded of one of them, and
    the chunk that is being encoded: as it is, compressed, and with its checksum. Besides, Python
    and its libraries take some 20 MB and 0.25 MB a parameter for its metadata, whatever the shapes,
    and `SCALAR_CHUNK_STEPS` values of each per-step scalar, once for all parameters that have the
    same.
    """
    return n_buffers * block_steps * sum(row.n_bytes for row in rows) + max(
        _encoding_bytes(row, block_steps) + block_steps * row.held_bytes for row in rows
    )


def audit_memory_bytes(rows: Sequence[RowSize]) -> int:
    """Return what an audit takes besides: a row, and what takes a step of a part of one again.

    A block is as long without it, so that a run can be resumed with or without.
    """
    return sum(row.n_bytes for row in rows) + max(_taken_again_bytes(row) for row in rows)


def _taken_again_bytes(row: RowSize) -> int:
    n_elements = row.n_tokens * row.n_dims
    if not row.is_stepped_whole:
        n_elements = min(max(AUDIT_ELEMENTS, row.n_dims), n_elements)
    # Inputs, results and temporaries, and where each element lies; and some places of a few rows.
    return n_elements * (12 * max(row.itemsizes.values()) + 64 + 32)


def _encoding_bytes(row: RowSize, block_steps: int) -> int:
    one_token = row.token_bytes(block_steps)
    return 3 * min(2 * max(TARGET_CHUNK_BYTES, one_token), row.n_tokens * one_token)


def plan_storage(
    n_rows: int,
    n_tokens: int,
    n_dims: int,
    itemsizes: Mapping[str, int],
    *,
    n_scalars: int,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    predicted: Collection[str] = (),
    audited: bool = False,
    is_stepped_whole: bool = False,
) -> StoragePlan:
    """Add up what recording `n_rows` rows takes, with `n_scalars` per-step scalars of 8 bytes."""
    row = RowSize(n_tokens, n_dims, itemsizes, predicted, is_stepped_whole)
    (layout,) = plan_layouts([row], memory_bytes=memory_bytes)
    padding_bytes = layout.block_steps * row.n_bytes // 64
    besides = n_rows * n_scalars * 8 + _METADATA_BYTES + _LABEL_BYTES * n_tokens + padding_bytes
    n_buffers = count_buffers([row], layout.block_steps, memory_bytes)
    n_blocks = -(-n_rows // layout.block_steps)
    return StoragePlan(
        layout=layout,
        array_bytes={name: n_rows * n_tokens * n_dims * size for name, size in itemsizes.items()},
        disk_bytes=n_rows * row.n_bytes + n_blocks * row.held_bytes + besides,
        likely_bytes=n_rows * (row.n_bytes - row.held_bytes) + n_blocks * row.held_bytes + besides,
        memory_bytes=recorder_memory_bytes([row], layout.block_steps, n_buffers)
        + (audit_memory_bytes([row]) if audited else 0),
    )


def human_bytes(n_bytes: int) -> str:
    """Return a size as people read it, in decimal units."""
    for power, unit in ((18, "EB"), (15, "PB"), (12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        # Not "1000.00 MB", which is what rounding makes of a little less than 1 GB.
        if n_bytes >= 10**power - 10**power // 200_000:
            return f"{n_bytes / 10**power:.2f} {unit}"
    return f"{n_bytes} B"


def split_range(start: int, stop: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut `[start, stop)` at the multiples of `length`; yield the parts as `(start, stop)`."""
    while start < stop:
        end = min(stop, (start // length + 1) * length)
        yield start, end
        start = end
