"""Positions along an axis of a store, and the chunks they lie in."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from thimble_zarr.format.layout import split_range

Indices = range | np.ndarray
"""Positions along one axis of a store, in the order they were asked for."""

ChunkPart = tuple[int, slice | np.ndarray, slice | np.ndarray]
"""A chunk, which of its positions are asked for, and where these are among all."""

TokenGroup = tuple[Indices, slice | np.ndarray]
"""Some tokens, and where they lie among those that were asked for."""


def rows_and_dims(axes: Sequence[Indices], shape: Sequence[int]) -> tuple[Indices, Indices]:
    """Return a selection of a parameter as that of a matrix: rows, and all other axes as dims.

    Dims are positions along all axes but the first, flattened row by row. Of an axis that is not
    there the only position is returned.
    """
    rows, rest = (axes[0], axes[1:]) if axes else (range(1), axes)
    if len(rest) == 1:
        return rows, rest[0]
    whole = (
        isinstance(axis, range) and axis == range(n)
        for axis, n in zip(rest, shape[1:], strict=True)
    )
    if all(whole):
        return rows, range(math.prod(shape[1:]))
    grid = np.ix_(*(np.asarray(axis, dtype=np.int64) for axis in rest))
    dims: np.ndarray = np.ravel_multi_index(grid, tuple(shape[1:])).ravel()
    return rows, dims


def token_groups(
    tokens: Indices, most: int, *, places: np.ndarray | None, chunk_tokens: int
) -> list[TokenGroup]:
    """Cut tokens into groups of at most `most`, or of one chunk, that share few chunks.

    With each group comes where its tokens lie among `tokens`, which may be in any order. No group
    is empty. `places` is where each token lies on disk, None where that is its own number.
    """
    if len(tokens) == 0:
        return []
    if places is None:
        return _groups(tokens, chunk_tokens, most)
    if len(tokens) <= most:
        return [(tokens, slice(0, len(tokens)))]
    ids = np.asarray(tokens)
    order = np.argsort(places[ids])
    groups = _groups(as_range(places[ids[order]]), chunk_tokens, most)
    return [(ids[order[where]], as_slice(order[where])) for _, where in groups]


def _groups(tokens: Indices, length: int, most: int) -> list[TokenGroup]:
    if isinstance(tokens, range) and tokens.step == 1:
        return [
            (range(start, stop), slice(start - tokens.start, stop - tokens.start))
            for start, stop in split_range(tokens.start, tokens.stop, most // length * length)
        ]
    ids = np.asarray(tokens)
    if len(ids) <= most:
        return [(ids, slice(0, len(ids)))]
    groups: list[list[np.ndarray]] = []
    n_tokens = most
    for _, _, where in by_chunk(ids, length):
        positions = np.arange(len(ids))[where]
        n_tokens += len(positions)
        if n_tokens > most:
            groups.append([])
            n_tokens = len(positions)
        groups[-1].append(positions)
    joined = [np.concatenate(group) for group in groups]
    return [(ids[where], as_slice(where)) for where in joined]


def by_chunk(tokens: Indices, chunk_tokens: int) -> Iterator[ChunkPart]:
    """Yield each touched chunk, which of its tokens are asked for, and where among `tokens`."""
    if isinstance(tokens, range) and tokens.step == 1:
        for start, stop in split_range(tokens.start, tokens.stop, chunk_tokens):
            chunk, first = divmod(start, chunk_tokens)
            taken = slice(first, first + stop - start)
            yield chunk, taken, slice(start - tokens.start, stop - tokens.start)
        return
    ids = np.asarray(tokens)
    chunks, within = np.divmod(ids, chunk_tokens)
    if is_ascending(ids):
        yield from _ascending_by_chunk(chunks, within)
        return
    order = np.argsort(chunks, kind="stable")
    for where in np.split(order, np.flatnonzero(np.diff(chunks[order])) + 1):
        yield int(chunks[where[0]]), as_slice(within[where]), as_slice(where)


def _ascending_by_chunk(chunks: np.ndarray, within: np.ndarray) -> Iterator[ChunkPart]:
    """Yield what `by_chunk` does, with few calls a chunk: every block of a selection asks."""
    starts = np.flatnonzero(np.diff(chunks, prepend=-1))
    stops = np.append(starts[1:], len(chunks))
    columns = chunks[starts], starts, stops, within[starts], within[stops - 1]
    for chunk, start, stop, first, last in zip(*(c.tolist() for c in columns), strict=True):
        together = last - first == stop - start - 1
        yield chunk, slice(first, last + 1) if together else within[start:stop], slice(start, stop)


def as_range(indices: np.ndarray) -> Indices:
    """Return consecutive indices as a range, others as they are."""
    found = as_slice(indices) if len(indices) else indices
    return range(found.start, found.stop) if isinstance(found, slice) else found


def as_slice(indices: np.ndarray) -> np.ndarray | slice:
    """Return consecutive indices as a slice, which copies nothing."""
    first, n = int(indices[0]), len(indices)
    consecutive = int(indices[-1]) == first + n - 1 and is_ascending(indices)
    return slice(first, first + n) if consecutive else indices


def is_ascending(indices: np.ndarray) -> bool:
    """Return whether each index is greater than the one before."""
    return bool((indices[1:] > indices[:-1]).all())
