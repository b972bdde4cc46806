"""The numbers of some consecutive rows, computed in two passes over them.

The first pass has the means of each group, the second what is relative to them and everything else.
Both go through the rows window by window (`compute.windows`), so that no array of weights of all
tokens exists, only the few numbers that each token has. They are the same bit for bit however a
run is cut into such rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from thimble_zarr.analysis.compute.source import Selected
from thimble_zarr.analysis.compute.sums import LEAST_SQUARE
from thimble_zarr.analysis.compute.variables import step_scalars
from thimble_zarr.analysis.compute.windows import Window
from thimble_zarr.analysis.summary.contents import Contents
from thimble_zarr.analysis.summary.formula import Observed, compared
from thimble_zarr.analysis.summary.groups import Groups
from thimble_zarr.analysis.summary.means import Arrays, Means, count_identical
from thimble_zarr.analysis.summary.passes import Parts, Passes, Place
from thimble_zarr.analysis.summary.statistics import (
    beyond_float32,
    count_of_tokens,
    largest_of,
    over_dims,
    over_tokens,
    quantiles,
    sums_of_groups,
    vector_norm,
)
from thimble_zarr.bits import least_positive, storage_dtype, unit_roundoff
from thimble_zarr.format.indexing import as_slice


def numbers_of(selected: Selected, groups: Groups, native: str) -> Arrays:
    """Return every variable of a summary of selected rows, but for `is_member`.

    ULP are those of the dtype `native`. The last steps are of these rows only.
    """
    with (
        np.errstate(divide="ignore", invalid="ignore", over="ignore"),
        selected.source.reader.opened() as opened,
    ):
        passes, means = Passes(selected, groups.classes, opened), Means(selected, groups)
        numbers = _Numbers(selected, groups, native, means)
        inputs = numbers.contents.inputs
        for rows in passes.turns:
            means.fill(rows, passes.first(rows, inputs))
            numbers.fill(passes.second(rows, inputs, numbers.dtype))
        return numbers.arrays_of_all()


@dataclass
class _Numbers:
    """The second pass: goes through the rows and fills the arrays."""

    selected: Selected
    groups: Groups
    native: str
    means: Means
    arrays: Arrays = field(default_factory=dict)
    sums: Arrays = field(default_factory=dict)

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

    def fill(self, parts: Parts) -> None:
        """Fill the arrays with what parts have."""
        for at, index, part in parts:
            self._of_weights(part, at, index)

    def arrays_of_all(self) -> Arrays:
        """Return all the arrays, when they are filled."""
        return self.arrays | self.means.of_group | self._of_groups() | self._last_steps()

    def _of_weights(self, part: Window, at: Place, index: int) -> None:
        """Fill in what the weights are and do, and then all else."""
        before, after = part.previous("W"), part.current("W")
        delta = np.subtract(after, before, out=part.memory("delta"))
        per_unit = _cells_per_unit(before, self.native, part.memory("per unit"))
        cells = np.multiply(delta, per_unit, out=part.memory("cells"))
        moved = delta != 0
        n_moved = count_of_tokens(moved)
        squares = [np.vecdot(of, of) for of in (after, delta, cells)]
        if part.dtype != np.float64 and _weights_beyond(squares, n_moved, part.follows):
            self._of_weights(part.in_float64(), at, index)
            return
        distance, size, length = (np.sqrt(of, dtype=np.float64) for of in squares)
        self.arrays["norm_W"][at], self.arrays["norm_delta_W"][at] = distance, size
        if np.isnan(size[part.follows]).any():  # a change that is no number is not known
            n_moved = n_moved - count_of_tokens(np.isnan(delta))
        self.arrays["n_moved"][at] = np.where(part.follows[:, np.newaxis], n_moved, np.nan)
        self.sums["observed"][index, at[0]] += (size**2).sum(axis=-1)
        self.sums["n_moved"][index, at[0]] += n_moved.sum(axis=-1)
        self._of_cells(cells, length, at)
        self._of_means(part, at, index, (delta, size))
        self._of_states(part, at, index)
        if self.contents.has_formula:
            observed = Observed(delta, per_unit, moved, squares[0])
            self._of_formula(part, at, index, observed)

    def _of_states(self, part: Window, at: Place, index: int) -> None:
        """Fill in the norms of what the optimizer saw and keeps."""
        totals: dict[tuple[str, bool], np.ndarray] = {}
        for name, is_square in self._norms_of:
            values = part.current(name)
            total = over_dims(values) if is_square else np.vecdot(values, values)
            if part.dtype != np.float64 and beyond_float32(total, values):
                self._of_states(part.in_float64(), at, index)
                return
            wide = total.astype(np.float64, copy=False)
            totals[name, is_square] = wide if is_square else np.sqrt(wide)
        for name, state in self._norms.items():
            self.arrays[name][at] = totals[state, False]
        for name, estimate in self.contents.estimates.items():
            of = {of: totals[of, estimate.is_square][..., np.newaxis] for of in estimate.inputs}
            norm = estimate.compute(of, part.of_rows(step_scalars))[..., 0]
            self.arrays[name][at] = np.sqrt(norm) if estimate.is_square else np.abs(norm)
        if self.contents.has_gradient:
            grad = part.current("grad")
            if part.dtype != np.float64:  # their sum over tokens may cancel
                grad = part.in_float64().memory("wide")
                np.copyto(grad, part.current("grad"))
            self.sums["grad"][index, at[0]] += over_tokens(grad)

    @cached_property
    def _norms(self) -> dict[str, str]:
        """The variables whose norm is kept as it is."""
        of_gradient = {"norm_grad": "grad"} if self.contents.has_gradient else {}
        return of_gradient | self.contents.states

    @cached_property
    def _norms_of(self) -> dict[tuple[str, bool], None]:
        """The variables that norms are of, and whether they are squares already."""
        pairs = [(name, False) for name in self._norms.values()]
        for estimate in self.contents.estimates.values():
            pairs += [(name, estimate.is_square) for name in estimate.inputs]
        return dict.fromkeys(pairs)

    def _of_formula(self, part: Window, at: Place, index: int, observed: Observed) -> None:
        """Fill in what the formula predicts, and what it leaves."""
        found = compared(part, observed, _cells(self.native))
        for name in ("predicted", "product", "n_stalled", "n_below"):
            of_part = getattr(found, name)
            self.sums[name][index, at[0]] += of_part if of_part.ndim == 1 else of_part.sum(axis=1)
        self.arrays["norm_residual"][at] = np.sqrt(found.left)

    def _of_cells(self, cells: np.ndarray, length: np.ndarray, at: Place) -> None:
        """Fill in how far weights moved on the lattice, and in which steps their regimes were."""
        scale, n_dims = _cells(self.native), cells.shape[-1]
        l2 = length * scale
        np.abs(cells, out=cells)
        l1 = over_dims(cells) * scale
        largest = largest_of(cells) * scale
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
        (delta, size), relative = observed, self.means.relative(index, part.dtype)
        rows = at[0]
        along = np.matmul(delta, relative.steps[rows])
        away = np.subtract(part.current("W"), relative.near[rows], out=part.memory("update"))
        across = np.matmul(away, relative.beyond[rows])
        squares_away = np.vecdot(away, away)
        if part.dtype != np.float64:
            # Weights may be close to a centroid, and those of others so large that it is far.
            known = np.isfinite(across).all() and np.isfinite(along[part.follows]).all()
            if not known or beyond_float32(squares_away, away):
                wide = delta.astype(np.float64), size
                self._of_means(part.in_float64(), at, index, wide)
                return
        cosines = along / size[..., np.newaxis] / relative.lengths[rows]
        squares = squares_away[..., np.newaxis] + relative.squares[rows]
        distances = squares + 2.0 * across
        for column, group in enumerate(relative.groups):
            self.arrays["cosine_to_mean"][group][at] = cosines[..., column]
            distance = np.sqrt(distances[..., column])
            if not (distances[..., column] >= _CANCELLED * squares[..., column]).all():
                distance = self._distance(part.in_float64(), rows, group)
            self.arrays["centroid_distance"][group][at] = distance

    def _distance(self, part: Window, rows: slice, group: int) -> np.ndarray:
        """Return the distances from the centroid of a group, computed dim by dim."""
        centroid = self.means.of_group["centroid"][group, rows, np.newaxis]
        away = np.subtract(part.current("W"), centroid, out=part.memory("update"))
        return vector_norm(away)

    def _of_groups(self) -> Arrays:
        """Return the numbers of each group."""
        groups, sums = self.groups, {}
        for name, of_class in self.sums.items():
            sums[name] = sums_of_groups(of_class, groups.has_class)
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


_CANCELLED = 0.25
"""Share of the squares that they are the sum of, of which squares have lost two bits."""

_MOVED, _EARLY, _MIDLIFE = (np.uint8(1 << bit) for bit in range(3))
"""What is noted of each step of a token."""

_MANY_DIMS = 1024
"""Of more, sums of float32 squares could be wrong by more than a millionth."""


def _weights_beyond(
    squares: Sequence[np.ndarray], n_moved: np.ndarray, follows: np.ndarray
) -> bool:
    """Return whether squares of weights, steps and cells overflowed, or may have underflowed."""
    weights, steps, cells = squares
    if not ((weights > LEAST_SQUARE) & (weights < np.inf)).all():
        return True
    small = (steps < LEAST_SQUARE) & (n_moved > 0)
    return bool(small.any() or not np.isfinite(cells[follows]).all())


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
