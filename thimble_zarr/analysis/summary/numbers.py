"""The numbers of some consecutive rows, computed in two passes over them, in float64.

The first pass has the means of each group, the second what is relative to them and everything else.
Both go through the rows window by window (`compute.windows`), so that no array of weights of all
tokens exists, only the few numbers that each token has. They are the same bit for bit however a
run is cut into such rows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from thimble_zarr.analysis.compute.reduction import by_class
from thimble_zarr.analysis.compute.source import Selected
from thimble_zarr.analysis.compute.variables import decay, decays, update
from thimble_zarr.analysis.compute.windows import Window, token_groups, windows_of
from thimble_zarr.analysis.summary.contents import LAST_STEPS, Contents
from thimble_zarr.analysis.summary.groups import Groups
from thimble_zarr.analysis.summary.identical import count_identical, row_hashes
from thimble_zarr.analysis.summary.quantiles import quantiles
from thimble_zarr.bits import least_positive, unit_roundoff
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
    selected: Selected, classes: np.ndarray, inputs: tuple[str, ...]
) -> Iterator[tuple[Place, int, Window]]:
    """Yield the parts of all windows, none with tokens of two classes, and the class of each."""
    source, rows, dims = selected.source, selected.rows, selected.dims
    for group in token_groups(source, selected.tokens, cached=True):
        groups = [by_class(group, classes)]
        for (steps, where), window in windows_of(source, rows, groups, dims, inputs):
            positions = np.arange(len(classes))[where]
            for (part_rows, part_tokens), part in window.parts(classes[where]):
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
            sums["centroid"][index, rows] += after.sum(axis=1)
            sums["mean_delta_W"][index, rows] += delta.sum(axis=1)
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

    def __post_init__(self) -> None:
        schema = self.selected.source.reader.schema
        self.contents = Contents(schema)
        self.shape = len(self.selected.rows), len(self.selected.tokens)
        n_groups, n_classes = self.groups.has_class.shape
        for name in self.contents.of_token:
            self.arrays[name] = np.empty(self.shape, np.float32)
        for name in self.contents.of_member:
            self.arrays[name] = np.full((n_groups, *self.shape), np.nan, np.float32)
        for name in LAST_STEPS:
            self.arrays[name] = np.zeros(self.shape[1], np.int64)
        for name in ("observed", "n_moved", "predicted", "product", "n_stalled", "n_below"):
            self.sums[name] = np.zeros((n_classes, self.shape[0]))
        if self.contents.has_gradient:
            self.sums["grad"] = np.zeros((n_classes, self.shape[0], len(self.selected.dims)))
        self.steps = self.selected.steps

    def compute(self) -> Arrays:
        """Return all the arrays."""
        for at, index, part in _parts(self.selected, self.groups.classes, self.contents.inputs):
            self._of_states(part, at, index)
            self._of_weights(part, at, index)
        return self.arrays | self.means.of_group | self._of_groups()

    def _of_states(self, part: Window, at: Place, index: int) -> None:
        """Fill in the norms of what the optimizer saw and keeps."""
        if self.contents.has_gradient:
            grad = part.current("grad")
            self.arrays["norm_grad"][at] = _norm(grad)
            self.sums["grad"][index, at[0]] += grad.sum(axis=1)
        for name, state in self.contents.states.items():
            self.arrays[name][at] = _norm(part.current(state))
        for name, estimate in self.contents.estimates.items():
            states = {state: part.current(state) for state in estimate.inputs}
            values = estimate.compute(states, part.of_rows(_scalars))
            self.arrays[name][at] = np.sqrt(values.sum(-1)) if estimate.is_square else _norm(values)

    def _of_weights(self, part: Window, at: Place, index: int) -> None:
        """Fill in what the weights are and do."""
        before, after = part.previous("W"), part.current("W")
        delta = np.subtract(after, before, out=part.memory("delta"))
        size = _norm(delta)
        self.arrays["norm_W"][at] = _norm(after)
        self.arrays["norm_delta_W"][at] = size
        n_moved = np.count_nonzero(delta, axis=-1)
        if np.isnan(size[part.follows]).any():  # a change that is no number is not known
            n_moved -= np.count_nonzero(np.isnan(delta), axis=-1)
        self.arrays["n_moved"][at] = np.where(part.follows[:, np.newaxis], n_moved, np.nan)
        rows = at[0]
        self.sums["observed"][index, rows] += (size**2).sum(axis=-1)
        self.sums["n_moved"][index, rows] += n_moved.sum(axis=-1)
        per_unit = _cells_per_unit(before, self.native, part.memory("cells"))
        if self.contents.has_formula:
            self._of_formula(part, at, index, (delta, per_unit))
        self._of_cells(np.multiply(delta, per_unit, out=per_unit), at)
        self._of_means(part, at, index, (delta, size))

    def _of_formula(
        self, part: Window, at: Place, index: int, observed: tuple[np.ndarray, np.ndarray]
    ) -> None:
        """Fill in what the formula predicts, and what it leaves."""
        delta, per_unit = observed
        predicted = update(part, out=(part.memory("update"), part.memory("term")))
        if part.of_rows(decays):
            predicted += decay(part)
        rows, term = at[0], part.memory("term")
        wanted = predicted != 0
        stalled = np.logical_and(wanted, delta == 0, out=wanted)
        self.sums["n_stalled"][index, rows] += np.count_nonzero(stalled, axis=(1, 2))
        np.abs(np.multiply(predicted, per_unit, out=term), out=term)
        half = 0.5 / _cells(self.native)
        self.sums["n_below"][index, rows] += np.count_nonzero(term < half, axis=(1, 2))
        self.sums["predicted"][index, rows] += np.vecdot(predicted, predicted).sum(axis=-1)
        self.sums["product"][index, rows] += np.vecdot(predicted, delta).sum(axis=-1)
        self.arrays["norm_residual"][at] = _norm(np.subtract(delta, predicted, out=predicted))

    def _of_cells(self, cells: np.ndarray, at: Place) -> None:
        """Fill in how far weights moved on the lattice, and in which steps their regimes were."""
        scale, n_dims = _cells(self.native), cells.shape[-1]
        l2 = _norm(cells) * scale
        np.abs(cells, out=cells)
        l1, largest = cells.sum(axis=-1) * scale, cells.max(axis=-1) * scale
        for name, values in (("l1_ulp", l1), ("l2_ulp", l2), ("max_ulp", largest)):
            self.arrays[name][at] = values
        holds = {
            "freeze_step": l1 > 0,
            "last_early": l2 > np.sqrt(n_dims),
            "last_midlife": largest > 1,
            "last_late": (largest <= 1) & (l1 > 0),
        }
        steps = self.steps[at[0], np.newaxis]
        for name, condition in holds.items():
            last = self.arrays[name]
            last[at[1]] = np.maximum(last[at[1]], (condition * steps).max(axis=0))

    def _of_means(
        self, part: Window, at: Place, index: int, observed: tuple[np.ndarray, np.ndarray]
    ) -> None:
        """Fill in how weights lie and move relative to each group that they are in."""
        (delta, size), rows = observed, at[0]
        for group in np.flatnonzero(self.groups.has_class[:, index]):
            mean = self.means.of_group["mean_delta_W"][group, rows, np.newaxis]
            cosine = np.vecdot(delta, mean) / (size * _norm(mean))
            self.arrays["cosine_to_mean"][group][at] = cosine
        for group in np.flatnonzero(self.groups.has_class[:, index]):
            centroid = self.means.of_group["centroid"][group, rows, np.newaxis]
            away = np.subtract(part.current("W"), centroid, out=part.memory("term"))
            self.arrays["centroid_distance"][group][at] = _norm(away)

    def _of_groups(self) -> Arrays:
        """Return the numbers of each group."""
        groups, sums = self.groups, {}
        for name, of_class in self.sums.items():
            sums[name] = _sums(of_class, groups.has_class)
        found = self._of_steps(sums)
        n_members = groups.is_member.sum(axis=1)
        if self.contents.has_gradient:
            found["mean_grad"] = sums["grad"] / n_members[:, np.newaxis, np.newaxis]
        n_groups, n_rows = len(n_members), self.shape[0]
        for name in self.contents.counts:
            found[name] = np.empty((n_groups, n_rows), np.int64)
        for group, members in enumerate(groups.is_member):
            where = as_slice(np.flatnonzero(members))
            counts = count_identical(self.means.hashes[:, where])
            found["n_identical"][group], found["largest_identical"][group] = counts
        for name in self.contents.of_token:
            of = [quantiles(self.arrays[name][:, members]) for members in groups.is_member]
            found[f"{name}_quantiles"] = np.stack(of)
        for name in self.contents.of_member:
            pairs = zip(self.arrays[name], groups.is_member, strict=True)
            of = [quantiles(values[:, members]) for values, members in pairs]
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


def _scalars(part: Window) -> Arrays:
    return {name: part.scalar(name) for name in part.source.scalars}


def _norm(values: np.ndarray) -> np.ndarray:
    norms: np.ndarray = np.sqrt(np.vecdot(values, values))
    return norms


def _cells(native: str) -> float:
    """Return the numbers of a dtype from 1 to 2."""
    return 0.5 / unit_roundoff(native)


_EXPONENT = np.int64(0x7FF) << np.int64(52)


def _cells_per_unit(values: np.ndarray, native: str, out: np.ndarray) -> np.ndarray:
    """Return how many cells of a dtype's lattice a distance of 1 has at a number, over `_cells`.

    Without that factor they are powers of two, made of the exponent's bits. Numbers that are not
    finite have none, and get infinity: a way from them is infinite, too, or NaN.
    """
    least = np.float64(least_positive(native) * _cells(native))
    powers = np.bitwise_and(values.view(np.int64), _EXPONENT, out=out.view(np.int64))
    np.maximum(powers, least.view(np.int64), out=powers)
    np.subtract(np.int64(0x7FE) << np.int64(52), powers, out=powers)
    return out
