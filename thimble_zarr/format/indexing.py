"""Positions along an axis of a store, and the chunks they lie in."""

from collections.abc import Iterator

import numpy as np

from thimble_zarr.format.layout import split_range

Indices = range | np.ndarray
"""Positions along one axis of a store, in the order they were asked for."""


def by_chunk(
    tokens: Indices, chunk_tokens: int
) -> Iterator[tuple[int, slice | np.ndarray, slice | np.ndarray]]:
    """Yield each touched chunk, which of its tokens are asked for, and where among `tokens`."""
    if isinstance(tokens, range) and tokens.step == 1:
        for start, stop in split_range(tokens.start, tokens.stop, chunk_tokens):
            chunk, first = divmod(start, chunk_tokens)
            taken = slice(first, first + stop - start)
            yield chunk, taken, slice(start - tokens.start, stop - tokens.start)
        return
    ids = np.asarray(tokens)
    chunks, within = np.divmod(ids, chunk_tokens)
    order = np.argsort(chunks, kind="stable")
    for where in np.split(order, np.flatnonzero(np.diff(chunks[order])) + 1) if len(ids) else ():
        yield int(chunks[where[0]]), as_slice(within[where]), as_slice(where)


def as_slice(indices: np.ndarray) -> np.ndarray | slice:
    """Return consecutive indices as a slice, which copies nothing."""
    first, n = int(indices[0]), len(indices)
    consecutive = int(indices[-1]) == first + n - 1 and bool((np.diff(indices) == 1).all())
    return slice(first, first + n) if consecutive else indices
