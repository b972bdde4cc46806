"""The means of each group, and what tells tokens that are alike: the first pass of a summary."""

import functools
from dataclasses import dataclass, field

import numpy as np

from thimble_zarr.analysis.compute.source import Selected
from thimble_zarr.analysis.summary.groups import Groups
from thimble_zarr.analysis.summary.passes import Parts
from thimble_zarr.analysis.summary.statistics import over_tokens, sums_of_groups, vector_norm

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Relative:
    """What the tokens of a class are measured against, in the groups that they are in.

    Attributes
    ----------
    groups
        Which groups these are.
    near
        A centroid of one of them as the dtype has it, shape `(step, 1, dim)`.
    beyond
        The way from each centroid to that, shape `(step, dim, group)`.
    squares
        The squares of their lengths, float64, shape `(step, 1, group)`.
    steps
        Mean steps, shape `(step, dim, group)`.
    lengths
        Their lengths, float64, shape `(step, 1, group)`.
    """

    groups: np.ndarray
    near: np.ndarray
    beyond: np.ndarray
    squares: np.ndarray
    steps: np.ndarray
    lengths: np.ndarray


@dataclass
class Means:
    """The means of each group, by name: float64, shape `(group, step, dim)`; and row hashes."""

    selected: Selected
    groups: Groups
    of_group: Arrays = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._shape = len(self.selected.rows), len(self.selected.dims)
        for name in ("centroid", "mean_delta_W"):
            self.of_group[name] = np.empty((len(self.groups.names), *self._shape))
        self.hashes = np.empty((self._shape[0], len(self.selected.tokens)), np.uint64)
        self._relative: dict[tuple[int, type[np.floating]], Relative] = {}

    def fill(self, rows: slice, parts: Parts) -> None:
        """Go through the parts of some rows."""
        self._relative.clear()
        n_classes = self.groups.has_class.shape[1]
        centroid, delta_W = sums = np.zeros((2, n_classes, *self._shape))
        for (at, tokens), index, part in parts:
            before, after = part.previous("W"), part.current("W")
            delta = np.subtract(after, before, out=part.memory("delta"))
            centroid[index, at] += over_tokens(after)
            delta_W[index, at] += over_tokens(delta)
            self.hashes[at, tokens] = row_hashes(part.bits("W"))
        for of_group, of_class in zip(self.of_group.values(), sums, strict=True):
            of_group[:, rows] = means(of_class[:, rows], self.groups)

    def relative(self, index: int, dtype: type[np.floating]) -> Relative:
        """Return what the tokens of a class are measured against."""
        if (index, dtype) not in self._relative:
            self._relative[index, dtype] = self._of_class(index, dtype)
        return self._relative[index, dtype]

    def _of_class(self, index: int, dtype: type[np.floating]) -> Relative:
        groups = np.flatnonzero(self.groups.has_class[:, index])
        steps, centroids = (self.of_group[of][groups] for of in ("mean_delta_W", "centroid"))
        # Of the smallest group: those of others are further away.
        least = int(np.argmin(self.groups.is_member[groups].sum(axis=1)))
        near = centroids[least].astype(dtype)
        beyond = near - centroids
        return Relative(
            groups,
            near[:, np.newaxis],
            _columns(beyond.astype(dtype)),
            np.vecdot(beyond, beyond).T[:, np.newaxis],
            _columns(steps.astype(dtype)),
            vector_norm(steps).T[:, np.newaxis],
        )


def _columns(of_group: np.ndarray) -> np.ndarray:
    """Return vectors of each group and step as columns of a matrix of each step."""
    return np.ascontiguousarray(of_group.transpose(1, 2, 0))


def means(of_class: np.ndarray, groups: Groups) -> np.ndarray:
    """Return the means of each group, from the sums over the tokens of each class."""
    n_members = groups.is_member.sum(axis=1)[:, np.newaxis, np.newaxis]
    found: np.ndarray = sums_of_groups(of_class, groups.has_class) / n_members
    return found


_SEED = 20_240_229


def row_hashes(bits: np.ndarray) -> np.ndarray:
    """Return a hash of each token's weights, of shape `(step, token, dim)`: uint64.

    It is two of 32 bits, each of the sum of products of 32-bit words with random 64-bit numbers
    (Dietzfelbinger 1996), for which the probability is proven: two different rows have the same
    hash with a probability of 2^-64. So with 50,000 tokens one of 5,000 steps is wrong with one of
    less than 10^-6.
    """
    words = _words(np.ascontiguousarray(bits))
    keys = _keys(words.shape[-1])
    high, low = (np.vecdot(words, key[:-1]) + key[-1] for key in keys)
    hashes: np.ndarray = (high & np.uint64(0xFFFFFFFF << 32)) | (low >> np.uint64(32))
    return hashes


@functools.lru_cache(maxsize=8)
def _keys(n_words: int) -> np.ndarray:
    random = np.random.default_rng(_SEED)
    keys: np.ndarray = random.integers(0, 2**64 - 1, (2, n_words + 1), np.uint64, endpoint=True)
    return keys


def _words(bits: np.ndarray) -> np.ndarray:
    """Return rows as 32-bit words, as uint64."""
    if bits.dtype.itemsize == 2 and bits.shape[-1] % 2:
        return bits.view(np.uint16).astype(np.uint64)
    return bits.view(np.uint32).astype(np.uint64)


def count_identical(hashes: np.ndarray, is_member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each group and step how many tokens have a hash that another has, and most alike.

    `hashes` are of shape `(step, token)`, `is_member` of shape `(group, token)`.
    """
    n_groups, n_rows = len(is_member), len(hashes)
    n_identical = np.zeros((n_groups, n_rows), np.int64)
    largest = np.ones((n_groups, n_rows), np.int64)
    # NumPy sorts numbers of 32 bits ten times as fast, and most steps have none that are alike.
    high = np.sort((hashes >> np.uint64(32)).astype(np.uint32), axis=1)
    for row in np.flatnonzero((high[:, 1:] == high[:, :-1]).any(axis=1)):
        for group, members in enumerate(is_member):
            ordered = np.sort(hashes[row, members])
            ends = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
            sizes = np.diff(ends, prepend=0, append=len(ordered))
            n_identical[group, row], largest[group, row] = sizes[sizes > 1].sum(), sizes.max()
    return n_identical, largest
