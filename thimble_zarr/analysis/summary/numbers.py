"""The numbers of some consecutive rows, computed in two passes over them.

The first pass has the means of each group, the second what is relative to them and everything else.
Both go through the rows window by window (`compute.windows`), so that no array of weights of all
tokens exists, only the few numbers that each token has. They are the same bit for bit however a
run is cut into such rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from thimble_zarr import tuning
from thimble_zarr.analysis.audit.audit import LEAST_SQUARE
from thimble_zarr.analysis.compute.reduction import by_class
from thimble_zarr.analysis.compute.source import Selected
from thimble_zarr.analysis.compute.variables import decay, decays, step_scalars, update
from thimble_zarr.analysis.compute.windows import Window, token_groups, windows_of
from thimble_zarr.analysis.summary.contents import Contents
from thimble_zarr.analysis.summary.groups import Groups
from thimble_zarr.analysis.summary.identical import count_identical, row_hashes
from thimble_zarr.analysis.summary.quantiles import quantiles
from thimble_zarr.bits import least_positive, storage_dtype, unit_roundoff
from thimble_zarr.format.indexing import as_slice

Arrays = dict[str, np.ndarray]

Place = tuple[slice, slice | np.ndarray]
"""Where a part lies: among the rows, and among the selected tokens."""


def numbers_of(selected: Selected, groups: Groups, native: str) -> Arrays:
    """Return every variable of a summary of selected rows, but for `is_member`.

    ULP are those of the dtype `native`. The last steps are of these rows only.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        means = _Means.of(selected, groups)
        return _Numbers(selected, groups, native, means).compute()


def _parts(
    selected: Selected,
    classes: np.ndarray,
    inputs: tuple[str, ...],
    dtype: type[np.floating] = np.float64,
) -> Iterator[tuple[Place, int, Window]]:
    """Yield the parts of all windows, none with tokens of two classes, and the class of each."""
    source, rows, dims = selected.source, selected.rows, selected.dims
    for tokens, among in token_groups(source, selected.tokens):
        places = np.arange(len(classes))[among]
        small = token_groups(source, tokens, cached=True)
        groups = [by_class(group, classes[places]) for group in small]
        for (steps, where), window in windows_of(source, rows, groups, dims, inputs):
            positions = places[where]
            n_bytes = tuning.TUNING.summary_part_bytes
            for (part_rows, part_tokens), part in window.parts(classes[positions], dtype, n_bytes):
                first = steps.start + part_rows.start
                at = slice(first, first + len(part.rows)), as_slice(positions[part_tokens])
                yield at, int(classes[positions[part_tokens.start]]), part


@dataclass(frozen=True)
class _Means:
    """The means of each group, by name: float64, shape `(group, step, dim)`; and row hashes."""

    of_group: Arrays
    hashes: np.ndarray

    @classmethod
    def of(cls, selected: Selected, groups: Groups) -> "_Means":
        n_rows, n_dims = len(selected.rows), len(selected.dims)
        has_class = groups.has_class
        sums = {
            name: np.zeros((has_class.shape[1], n_rows, n_dims))
            for name in ("centroid", "mean_delta_W")
        }
        hashes = np.empty((n_rows, len(selected.tokens)), np.uint64)
        for (rows, tokens), index, part in _parts(selected, groups.classes, ("W",)):
            before, after = part.previous("W"), part.current("W")
            delta = np.subtract(after, before, out=part.memory("delta"))
            sums["centroid"][index, rows] += _over_tokens(after)
            sums["mean_delta_W"][index, rows] += _over_tokens(delta)
            hashes[rows, tokens] = row_hashes(part.bits("W"))
        return cls({name: _means(of, groups) for name, of in sums.items()}, hashes)


def _sums(of_class: np.ndarray, has_class: np.ndarray) -> np.ndarray:
    """Return sums over the tokens of each group, from those of each class."""
    # Not by a product of matrices: what is NaN in another class is no matter of a group.
    return np.stack([of_class[classes].sum(axis=0) for classes in has_class])


def _means(of_class: np.ndarray, groups: Groups) -> np.ndarray:
    n_members = groups.is_member.sum(axis=1)[:, np.newaxis, np.newaxis]
    means: np.ndarray = _sums(of_class, groups.has_class) / n_members
    return means


@dataclass
class _Numbers:
    """The second pass: goes through the rows and fills the arrays."""

    selected: Selected
    groups: Groups
    native: str
    means: _Means
    arrays: Arrays = field(default_factory=dict)
    sums: Arrays = field(default_factory=dict)
    narrowed: dict[type[np.floating], tuple[np.ndarray, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        schema = self.selected.source.reader.schema
        self.contents = Contents(schema)
        self.shape = len(self.selected.rows), len(self.selected.tokens)
        n_groups, n_classes = self.groups.has_class.shape
        for name in self.contents.of_token:
            self.arrays[name] = np.empty(self.shape, np.float32)
        for name in self.contents.of_member:
            self.arrays[name] = np.full((n_groups, *self.shape), np.nan, np.float32)
        self.flags = np.zeros(self.shape, np.uint8)
        for name in ("observed", "n_moved", "predicted", "product", "n_stalled", "n_below"):
            self.sums[name] = np.zeros((n_classes, self.shape[0]))
        if self.contents.has_gradient:
            self.sums["grad"] = np.zeros((n_classes, self.shape[0], len(self.selected.dims)))
        self.steps = self.selected.steps

    @property
    def dtype(self) -> type[np.floating]:
        """What numbers of weights are computed in: float32 is finer than 16 bits by 13 or more."""
        stored = self.selected.source.reader.schema.dtypes["W"]
        is_fine = storage_dtype(stored).itemsize == 2 and len(self.selected.dims) <= _MANY_DIMS
        return np.float32 if is_fine and self.native != "float64" else np.float64

    def compute(self) -> Arrays:
        """Return all the arrays."""
        classes, inputs = self.groups.classes, self.contents.inputs
        for at, index, part in _parts(self.selected, classes, inputs, self.dtype):
            self._of_weights(part, at, index)
        return self.arrays | self.means.of_group | self._of_groups() | self._last_steps()

    def _of_weights(self, part: Window, at: Place, index: int) -> None:
        """Fill in what the weights are and do, and then all else."""
        before, after = part.previous("W"), part.current("W")
        delta = np.subtract(after, before, out=part.memory("delta"))
        per_unit = _cells_per_unit(before, self.native, part.memory("per unit"))
        cells = np.multiply(delta, per_unit, out=part.memory("cells"))
        moved = delta != 0
        n_moved = _count(moved)
        squares = [np.vecdot(of, of) for of in (after, delta, cells)]
        if part.dtype != np.float64 and _beyond_float32(squares, n_moved, part.follows):
            self._of_weights(part.in_float64(), at, index)
            return
        distance, size, length = (np.sqrt(of, dtype=np.float64) for of in squares)
        self.arrays["norm_W"][at], self.arrays["norm_delta_W"][at] = distance, size
        if np.isnan(size[part.follows]).any():  # a change that is no number is not known
            n_moved = n_moved - _count(np.isnan(delta))
        self.arrays["n_moved"][at] = np.where(part.follows[:, np.newaxis], n_moved, np.nan)
        self.sums["observed"][index, at[0]] += (size**2).sum(axis=-1)
        self.sums["n_moved"][index, at[0]] += n_moved.sum(axis=-1)
        self._of_cells(cells, length, at)
        self._of_means(part, at, index, (delta, size))
        self._of_states(part.in_float64(), at, index, (delta, per_unit, moved, cells))

    def _of_states(
        self, part: Window, at: Place, index: int, observed: tuple[np.ndarray, ...]
    ) -> None:
        """Fill in the norms of what the optimizer saw and keeps, and what follows from that."""
        if self.contents.has_gradient:
            grad = part.current("grad")
            self.arrays["norm_grad"][at] = _norm(grad)
            self.sums["grad"][index, at[0]] += _over_tokens(grad)
        for name, state in self.contents.states.items():
            self.arrays[name][at] = _norm(part.current(state))
        for name, estimate in self.contents.estimates.items():
            total = _over_dims if estimate.is_square else _norm
            states = {of: total(part.current(of))[..., np.newaxis] for of in estimate.inputs}
            norm = estimate.compute(states, part.of_rows(step_scalars))[..., 0]
            self.arrays[name][at] = np.sqrt(norm) if estimate.is_square else np.abs(norm)
        if self.contents.has_formula:
            self._of_formula(part, at, index, observed)

    def _of_formula(
        self, part: Window, at: Place, index: int, observed: tuple[np.ndarray, ...]
    ) -> None:
        """Fill in what the formula predicts, and what it leaves."""
        (delta, per_unit, moved, memory), rows = observed, at[0]
        predicted = update(part, out=(part.memory("update"), part.memory("term")))
        if part.of_rows(decays):
            predicted += decay(part)
        stalled = ~moved if predicted.all() else np.greater(predicted != 0, moved)
        self.sums["n_stalled"][index, rows] += _count_all(stalled)
        self.sums["predicted"][index, rows] += np.vecdot(predicted, predicted).sum(axis=-1)
        memory[...] = predicted
        memory *= per_unit
        below = np.abs(memory, out=memory) < 0.5 / _cells(self.native)
        self.sums["n_below"][index, rows] += _count_all(below)
        wide = part.memory("term")
        wide[...] = delta
        self.sums["product"][index, rows] += np.vecdot(predicted, wide).sum(axis=-1)
        self.arrays["norm_residual"][at] = _norm(np.subtract(wide, predicted, out=predicted))

    def _of_cells(self, cells: np.ndarray, length: np.ndarray, at: Place) -> None:
        """Fill in how far weights moved on the lattice, and in which steps their regimes were."""
        scale, n_dims = _cells(self.native), cells.shape[-1]
        l2 = length * scale
        np.abs(cells, out=cells)
        l1 = _over_dims(cells) * scale
        largest = _largest(cells) * scale
        for name, values in (("l1_ulp", l1), ("l2_ulp", l2), ("max_ulp", largest)):
            self.arrays[name][at] = values
        flags = (l1 > 0) * _MOVED
        flags |= (l2 > np.sqrt(n_dims)) * _EARLY
        flags |= (largest > 1) * _MIDLIFE
        self.flags[at] = flags

    def _last_steps(self) -> Arrays:
        """Return the last of the steps at which each token was in a regime; 0 for none."""
        late = (self.flags & (_MOVED | _MIDLIFE)) == _MOVED
        holds = {
            "freeze_step": self.flags & _MOVED > 0,
            "last_early": self.flags & _EARLY > 0,
            "last_midlife": self.flags & _MIDLIFE > 0,
            "last_late": late,
        }
        order = np.argsort(-self.steps, kind="stable")  # of a selection in any order
        n_after = {name: np.argmax(of[order], axis=0) for name, of in holds.items()}
        return {
            name: np.where(of.any(axis=0), self.steps[order][n_after[name]], 0)
            for name, of in holds.items()
        }

    def _of_means(
        self, part: Window, at: Place, index: int, observed: tuple[np.ndarray, np.ndarray]
    ) -> None:
        """Fill in how weights lie and move relative to each group that they are in."""
        (delta, size), rows = observed, at[0]
        at_rows = rows, np.newaxis
        for group in np.flatnonzero(self.groups.has_class[:, index]):
            mean, length, near, rest = (of[group][at_rows] for of in self._means_in(part.dtype))
            product = np.matmul(delta, mean.swapaxes(1, 2))[..., 0]
            self.arrays["cosine_to_mean"][group][at] = product / (size * length)
            away = np.subtract(part.current("W"), near, out=part.memory("away"))
            if part.dtype != np.float64:
                away -= rest
            self.arrays["centroid_distance"][group][at] = _norm(away)

    def _means_in(self, dtype: type[np.floating]) -> tuple[np.ndarray, ...]:
        """Return mean steps, their lengths, centroids, and what `dtype` does not have of those."""
        if dtype not in self.narrowed:
            mean, centroid = (self.means.of_group[of] for of in ("mean_delta_W", "centroid"))
            near = centroid.astype(dtype)
            rest = (centroid - near).astype(dtype)
            self.narrowed[dtype] = mean.astype(dtype), _norm(mean), near, rest
        return self.narrowed[dtype]

    def _of_groups(self) -> Arrays:
        """Return the numbers of each group."""
        groups, sums = self.groups, {}
        for name, of_class in self.sums.items():
            sums[name] = _sums(of_class, groups.has_class)
        found = self._of_steps(sums)
        n_members = groups.is_member.sum(axis=1)
        if self.contents.has_gradient:
            found["mean_grad"] = sums["grad"] / n_members[:, np.newaxis, np.newaxis]
        counts = count_identical(self.means.hashes, groups.is_member)
        found["n_identical"], found["largest_identical"] = counts
        members = [as_slice(np.flatnonzero(of)) for of in groups.is_member]
        for name in self.contents.of_token:
            of = [quantiles(self.arrays[name][:, tokens]) for tokens in members]
            found[f"{name}_quantiles"] = np.stack(of)
        for name in self.contents.of_member:
            pairs = zip(self.arrays[name], members, strict=True)
            of = [quantiles(values[:, tokens]) for values, tokens in pairs]
            found[f"{name}_quantiles"] = np.stack(of)
        return found

    def _of_steps(self, sums: Mapping[str, np.ndarray]) -> Arrays:
        """Return norms, cosine and shares, NaN at rows that follow none."""
        n_elements = self.groups.is_member.sum(axis=1)[:, np.newaxis] * len(self.selected.dims)
        observed, predicted = np.sqrt(sums["observed"]), np.sqrt(sums["predicted"])
        found = {
            "norm_observed": observed,
            "share_moved": sums["n_moved"] / n_elements,
            "norm_predicted": predicted,
            "cosine_predicted": sums["product"] / (predicted * observed),
            "share_stalled": sums["n_stalled"] / n_elements,
            "share_below_half_ulp": sums["n_below"] / n_elements,
        }
        follows = self.selected.source.follows[np.asarray(self.selected.rows)]
        return {
            name: np.where(follows, values, np.nan)
            for name, values in found.items()
            if name in self.contents.of_step
        }


def _norm(values: np.ndarray) -> np.ndarray:
    norms: np.ndarray = np.sqrt(np.vecdot(values, values))
    return norms


_MOVED, _EARLY, _MIDLIFE = (np.uint8(1 << bit) for bit in range(3))
"""What is noted of each step of a token."""

_MANY_DIMS = 1024
"""Of more, sums of float32 squares could be wrong by more than a millionth."""


def _beyond_float32(
    squares: Sequence[np.ndarray], n_moved: np.ndarray, follows: np.ndarray
) -> bool:
    """Return whether squares of weights, steps and cells overflowed, or may have underflowed."""
    weights, steps, cells = squares
    if not ((weights > LEAST_SQUARE) & (weights < np.inf)).all():
        return True
    small = (steps < LEAST_SQUARE) & (n_moved > 0)
    return bool(small.any() or not np.isfinite(cells[follows]).all())


# What follows is `sum`, `max` and `count_nonzero` along an axis, which NumPy takes three times as
# long for.


def _over_tokens(values: np.ndarray) -> np.ndarray:
    sums: np.ndarray = np.matmul(np.ones((1, values.shape[1])), values)[:, 0]
    return sums


def _over_dims(values: np.ndarray) -> np.ndarray:
    sums: np.ndarray = np.matmul(values, np.ones(values.shape[2], values.dtype))
    return sums


def _largest(values: np.ndarray) -> np.ndarray:
    at = values.argmax(axis=-1)[..., np.newaxis]
    largest: np.ndarray = np.take_along_axis(values, at, axis=-1)[..., 0]
    return largest


def _count_all(flags: np.ndarray) -> list[int]:
    """Return how many flags of each step are set."""
    return [int(np.count_nonzero(of_step)) for of_step in flags]


def _count(flags: np.ndarray) -> np.ndarray:
    """Return how many flags of each token are set."""
    return _over_dims(flags.astype(np.float32))


def _cells(native: str) -> float:
    """Return the numbers of a dtype from 1 to 2."""
    return 0.5 / unit_roundoff(native)


def _cells_per_unit(values: np.ndarray, native: str, out: np.ndarray) -> np.ndarray:
    """Return how many cells of a dtype's lattice a distance of 1 has at a number, over `_cells`.

    Without that factor they are powers of two, made of the exponent's bits. Numbers that are not
    finite have none, and get infinity: a way from them is infinite, too, or NaN.
    """
    signed, n_bits, bias = _BITS[values.dtype.type]
    exponent = np.array((2 * bias + 1) << n_bits, signed)
    least = values.dtype.type(least_positive(native) * _cells(native))
    powers = np.bitwise_and(values.view(signed), exponent, out=out.view(signed))
    np.maximum(out, least, out=out)
    np.subtract(np.array((2 * bias) << n_bits, signed), powers, out=powers)
    return out


_BITS = {np.float64: (np.int64, 52, 1023), np.float32: (np.int32, 23, 127)}
"""Of each dtype integers of its size, the bits of its fraction, and what 1 has as exponent."""
