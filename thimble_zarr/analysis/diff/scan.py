"""Find the first difference of each variable, and how it grows.

Blocks are gone through in their order. Where both runs have the same chunks, those with equal
recorded checksums are equal and not decoded: two runs of a thousand equal steps are compared in the
time that it takes to read two ledgers. A variable is done with its first difference.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from thimble_zarr.analysis.diff.pair import Both, OpenedPair, Pair, different, numbers
from thimble_zarr.analysis.diff.result import Difference, Growth
from thimble_zarr.bits import ulp_distance
from thimble_zarr.format.indexing import Indices
from thimble_zarr.format.reader import ChunkChecksums

Group = tuple[np.ndarray, Indices, Indices]


@dataclass
class Scan:
    """Goes through the arrays of a pair, and counts how chunks were compared.

    `by_values` does not rely on checksums.
    """

    pair: Pair
    by_values: bool = False
    by_checksum: int = field(default=0, init=False)
    by_value: int = field(default=0, init=False)

    def first_differences(self, reach: Callable[[int, int], object]) -> Iterator[Difference]:
        """Yield the first difference of each variable that has one.

        `reach` is called with how many steps were gone through, and how many there are.
        """
        open_, checksums = [*self.pair.variables], self._checksums()
        with OpenedPair(self.pair) as opened:
            for window in self.pair.windows():
                for name in [*open_]:
                    groups = self._unequal(name, window, checksums)
                    found = _first(opened, name, window, groups)
                    if found is not None:
                        open_.remove(name)
                        yield found
                reach(window.stop, len(self.pair.steps))

    def _checksums(self) -> tuple[ChunkChecksums, ChunkChecksums] | None:
        if self.by_values or not self.pair.is_alike:
            return None
        a, b = (reader.chunk_checksums() for reader in self.pair.readers)
        return None if a is None or b is None else (a, b)

    def _unequal(
        self, name: str, window: slice, checksums: tuple[ChunkChecksums, ChunkChecksums] | None
    ) -> Sequence[Group]:
        """Return the tokens of chunks that are not known to be equal, in pieces."""
        pair, (rows_a, rows_b) = self.pair, (rows[window] for rows in self.pair.rows)
        schema, (native_a, native_b) = pair.readers[0].schema, pair.natives(name)
        layout = schema.layout
        n_chunks = layout.shard_tokens(schema.n_tokens) // layout.chunk_tokens
        n_blocks = 1 + int(np.count_nonzero(np.diff(rows_a // layout.block_steps)))
        if checksums is None or native_a != native_b or (rows_a != rows_b).any():
            self.by_value += n_blocks * n_chunks
            return pair.groups
        a, b = (of.of_block(name, int(rows_a[0])) for of in checksums)
        if a is None or b is None or a.shape != b.shape:
            self.by_value += n_chunks
            return pair.groups
        unequal = np.flatnonzero(a != b)
        self.by_checksum += len(a) - len(unequal)
        self.by_value += len(unequal)
        if len(unequal) == len(a):
            return pair.groups
        order = np.arange(schema.n_tokens) if schema.stored_order is None else schema.stored_order
        which = np.isin(np.arange(len(order)) // layout.chunk_tokens, unequal)
        return pair.groups_of(np.sort(order[which]))


def _first(
    opened: OpenedPair, name: str, window: slice, groups: Sequence[Group]
) -> Difference | None:
    """Return the first difference of a variable in a window, by step, token and dim."""
    pair, natives = opened.pair, opened.pair.natives(name)
    n_different = np.zeros(window.stop - window.start, np.int64)
    found: list[tuple[int, int, int, Both]] = []
    for which, *tokens in groups:
        bits = opened.read(name, window, (tokens[0], tokens[1]))
        differ = different(bits, natives)
        counts = np.count_nonzero(differ, axis=(1, 2))
        if not counts.any():
            continue
        n_different += counts
        row = int((counts > 0).argmax())
        of_row = differ[row].any(axis=1)
        at = np.flatnonzero(of_row)
        token = int(at[pair.ids[which[at]].argmin()])
        dim = int(differ[row, token].argmax())
        values = bits[0][row, token, dim : dim + 1], bits[1][row, token, dim : dim + 1]
        found.append((row, int(pair.ids[which[token]]), dim, values))
    if not found:
        return None
    row, token, dim, values = min(found, key=lambda one: one[:3])
    a, b = numbers(values, natives)
    is_same_dtype = natives[0] == natives[1]
    return Difference(
        variable=name,
        step=int(pair.steps[window.start + row]),
        token=token,
        dim=dim,
        a=float(a[0]),
        b=float(b[0]),
        ulp=float(ulp_distance(*values)[0]) if is_same_dtype else None,
        n_different=int(n_different[row]),
        n_elements=len(pair.ids) * pair.readers[0].schema.n_dims,
    )


def first_of_scalars(pair: Pair) -> Iterator[Difference]:
    """Yield the first difference of each number of a step that has one."""
    for name, values in ({of: pair.scalar(of) for of in pair.scalars} | pair.logged).items():
        one, other = (of.reshape(len(of), -1).astype(np.float64) for of in values)
        differ = different((one, other), ("float64", "float64"))
        differ &= ~(np.isnan(one) & np.isnan(other))
        if differ.any():
            at, n_elements = int(differ.any(axis=1).argmax()), differ.shape[1]
            element = int(differ[at].argmax())
            a, b = (of.reshape(len(of), -1)[at, element : element + 1] for of in values)
            where = int(pair.steps[at]), None, None
            ulp, n_different = float(ulp_distance(a, b)[0]), int(differ[at].sum())
            yield Difference(name, *where, float(a[0]), float(b[0]), ulp, n_different, n_elements)


def growth_steps(pair: Pair, first: int) -> list[int]:
    """Return where growth is looked at: at a step, one, two, four, ... after it, and at the last.

    They are places among the steps of a pair.
    """
    start, last = int(np.searchsorted(pair.steps, first)), len(pair.steps) - 1
    places, ahead = [start], 1
    while start + ahead < last:
        places.append(start + ahead)
        ahead *= 2
    return sorted({*places, last})


def growth(pair: Pair, first: int) -> Iterator[Growth]:
    """Yield how far variables are apart, step after step, from the first that differs on."""
    with OpenedPair(pair) as opened:
        for place in growth_steps(pair, first):
            for name in pair.variables:
                yield _growth_at(opened, name, place)


def _growth_at(opened: OpenedPair, name: str, place: int) -> Growth:
    pair, natives = opened.pair, opened.pair.natives(name)
    n_different, apart, size, max_ulp = 0, 0.0, 0.0, 0.0
    for _, *tokens in pair.groups:
        bits = opened.read(name, slice(place, place + 1), (tokens[0], tokens[1]))
        differ = different(bits, natives)
        n_different += int(np.count_nonzero(differ))
        a, b = numbers(bits, natives)
        known = np.isfinite(a) & np.isfinite(b)
        with np.errstate(over="ignore"):
            apart += float(np.square(a[known] - b[known]).sum())
            size += float(np.square(a[known]).sum())
        if natives[0] == natives[1] and differ.any():
            max_ulp = max(max_ulp, float(ulp_distance(bits[0][differ], bits[1][differ]).max()))
    return Growth(
        variable=name,
        step=int(pair.steps[place]),
        n_different=n_different,
        n_elements=len(pair.ids) * pair.readers[0].schema.n_dims,
        relative=_ratio(np.sqrt(apart), np.sqrt(size)),
        max_ulp=max_ulp if natives[0] == natives[1] else None,
    )


def _ratio(part: float, whole: float) -> float:
    """Return a part of a whole, 0 where there is neither."""
    if part == 0:
        return 0.0
    return float(part / whole) if whole else float("inf")
