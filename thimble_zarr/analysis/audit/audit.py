"""What an accounting compares and counts: which elements, and of each step of them which numbers.

Changes of 16-bit weights are compared in float32, which is finer than they by 13 bits or more, all
others in float64. Sums over tokens are float64, so cosines stay within [-1, 1]. NumPy is all that
this needs, and torch for a replay by torch; `table` makes columns of the numbers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from thimble_zarr.analysis.compute.comparison import (
    compare,
    is_as_recorded,
    not_exact_because,
    replayed,
)
from thimble_zarr.analysis.compute.reduction import Reduction, Statistics
from thimble_zarr.analysis.compute.source import TORCH, Selected, Source
from thimble_zarr.analysis.compute.sums import LEAST_SQUARE, step_sums, sums_of_products
from thimble_zarr.analysis.compute.variables import (
    decay,
    decays,
    formula_inputs,
    how_to_record,
    missing_inputs,
    replay_inputs,
    rounding_bound,
    ulp_before,
    unknown_scalars,
    update,
)
from thimble_zarr.analysis.compute.windows import Window
from thimble_zarr.bits import all_finite, decode, storage_dtype
from thimble_zarr.causes.replay import (
    recurrences,
    replay_device,
    replayed_names,
    why_in_part,
    without_bound,
)
from thimble_zarr.errors import ConfigError, SelectionError, all_listed, listed
from thimble_zarr.format.indexing import Indices, as_range
from thimble_zarr.format.schema import Schema

NOT_FINITE = "n_not_finite"

OF_FORMULA = ("predicted", "observed", "difference", "product", NOT_FINITE)
"""Numbers of each step: sums of squares, the sum of products, and a count."""

ROUNDED = ("n_beyond_rounding", "n_unbounded_rounding")
"""Elements of which the formula leaves more than rounding may, and those that nothing bounds."""

OF_MOVES = ("n_moved", "n_stalled", "displacement")

OF_REPLAY = {
    "n_different": np.add,
    "n_beyond": np.add,
    "n_unbounded": np.add,
    "max_ulp": np.maximum,
    "first": np.minimum,
}
"""Numbers of each step and recurrence, and how those of two parts become those of both."""


@dataclass(frozen=True)
class Audit:
    """What is compared. Made by `of`.

    `reduction` has the numbers of each step, which `tally` names, for each class of tokens: of
    those that are in the same subsets. `members` says whether each subset has each class, bool,
    shape `(subset, class)`, and `attrs` what the numbers depend on besides.
    """

    reduction: Reduction
    tally: "Tally"
    members: np.ndarray
    attrs: Mapping[str, str]

    @classmethod
    def of(
        cls,
        selected: Selected,
        *,
        formula: bool = True,
        replay: bool = True,
        extended: bool = False,
        subsets: Mapping[str, Indices] | None = None,
    ) -> "Audit":
        """Return the audit of a selection, of those of its steps that can be checked.

        It takes and raises what `accounting.accounting` does, but of subsets the positions.
        """
        source, schema = selected.source, selected.source.reader.schema
        _check_asked(schema, formula=formula, replay=replay, extended=extended)
        selected = _checkable(selected)
        _check_scalars(source)
        attrs = {"dtype": schema.dtypes["W"], "optimizer": schema.optimizer.name}
        names = _replayed(selected, attrs) if replay else ()
        if replay := bool(names):
            attrs |= {"device": replay_device(source), "replayed_by": TORCH}
            if source.program is None:
                attrs["not_exact_because"] = not_exact_because(source)
            else:  # torch is asked where the program differs, and then there may be a reason
                attrs |= {"replayed_by": source.program.name, "not_exact_because": ""}
        exact = None if replay and source.program else not attrs.get("not_exact_because")
        if exact is False:
            attrs["not_judged"] = ", ".join(without_bound(schema, names))
        tally = Tally(names, exact, extended, formula)
        statistics = Statistics(
            tally,
            tally.combine,
            np.float32 if storage_dtype(schema.dtypes["W"]).itemsize == 2 else np.float64,
            replay_inputs(schema) if replay else formula_inputs(schema) if formula else ("W",),
            cached=not replay,
            at_once=tally.at_once if tally.can_be_at_once else None,
        )
        if subsets is None:
            return cls(Reduction(selected, statistics), tally, np.ones((1, 1), bool), attrs)
        # Sorted by the subsets they are in, no token is gone through twice.
        of_token = np.stack([np.isin(selected.tokens, subset) for subset in subsets.values()])
        members, classes = np.unique(of_token, axis=1, return_inverse=True)
        return cls(Reduction(selected, statistics, classes.reshape(-1)), tally, members, attrs)


def _replayed(selected: Selected, attrs: dict[str, str]) -> tuple[str, ...]:
    """Return what can be taken again of a selection, and note why the rest cannot."""
    schema = selected.source.reader.schema
    if schema.optimizer.ELEMENTWISE:
        return recurrences(schema)
    names = replayed_names(schema, selected.positions)
    if why := why_in_part(schema, selected.positions):
        others = [name for name in recurrences(schema) if name not in names]
        were = "were" if len(others) > 1 else "was"
        attrs["not_replayed"] = f"{all_listed(others)} {were} not replayed: {why}"
    return names


def _check_asked(schema: Schema, *, formula: bool, replay: bool, extended: bool) -> None:
    """Raise unless what is asked for can be computed of what was recorded."""
    if not schema.optimizer.CAN_BE_REPLAYED:
        return
    if not formula and not replay:
        off = "formula=False (--no-formula) and replay=False (--no-replay)"
        if schema.optimizer.formula is None:
            off = f"replay=False (--no-replay), as no formula of {schema.optimizer.name} is known"
        raise ConfigError(f"nothing is left to check with {off}")
    if not formula and extended:
        raise ConfigError(
            "extended columns are of the formula's table, and formula=False (--no-formula) turns "
            "that off"
        )
    if missing := missing_inputs("residual", schema):
        raise SelectionError(
            f"neither {schema.optimizer.name}'s formula nor the replay can be checked: "
            f"{how_to_record(missing, schema)}"
        )
    if replay and (missing := missing_inputs("unexplained", schema)):
        how = (
            "with replay=False (--no-replay)" if formula else "without formula=False (--no-formula)"
        )
        alone = f". The formula alone can be checked, {how}" if schema.optimizer.formula else ""
        raise SelectionError(
            f"the steps cannot be replayed: {how_to_record(missing, schema)}{alone}"
        )


def _check_scalars(source: Source) -> None:
    """Raise unless the hyper-parameters are known that every step needs which is taken again."""
    schema = source.reader.schema
    if not schema.optimizer.CAN_BE_REPLAYED:
        return
    if unknown := unknown_scalars(schema, source.recorded):
        told = "--learning-rate tells the learning rate" if "learning_rate" in unknown else ""
        raise SelectionError(
            f"no step can be checked: {source.reader.path} does not say {listed(unknown)}"
            f"{told and f'; {told}'}"
        )


def _checkable(selected: Selected) -> Selected:
    """Return a selection without the steps whose row before was not recorded."""
    rows, follows = np.asarray(selected.rows, np.int64), selected.source.follows
    whole = selected.source.reader.whole_rows
    there = rows[(rows > whole.start) & (rows < whole.stop)]
    checkable = there[follows[there]]
    if len(checkable) < len(rows):
        selected = replace(selected, rows=as_range(checkable))
    if 0 in (len(selected.rows), len(selected.tokens), len(selected.dims)):
        raise SelectionError(
            "nothing is selected that can be checked: an accounting needs at least one token "
            "and one step whose row before was recorded, and of this selection there are "
            f"{len(selected.rows):,} such steps, {len(selected.tokens):,} "
            f"{selected.source.reader.schema.row_name}s and {len(selected.dims):,} dims"
        )
    return selected


@dataclass(frozen=True)
class Tally:
    """Computes the numbers of a part of a window: `names`, then `OF_REPLAY` for each recurrence."""

    recurrences: tuple[str, ...]
    exact: bool | None
    extended: bool
    formula: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The numbers that are of the weights alone."""
        if not self.formula and not self.recurrences:
            return (NOT_FINITE,)
        of_formula = *OF_FORMULA, *(OF_MOVES if self.extended else ())
        judged = ("unexplained",) if self.recurrences else ROUNDED
        return *(of_formula if self.formula else (NOT_FINITE,)), *judged

    @property
    def combine(self) -> tuple[np.ufunc, ...]:
        """How the numbers of two parts become those of both, by number."""
        of_replay = tuple(OF_REPLAY.values()) * len(self.recurrences)
        return (np.add,) * len(self.names) + of_replay

    def __call__(self, part: Window) -> Iterator[np.ndarray]:
        """Yield the numbers of a part, an array each, by step."""
        if self.formula:
            yield from self._of_formula(part)
        elif all_finite(part.bits("W")):
            yield _NONE
        else:  # from a weight that is not finite, no step leads to one that is
            yield _count(~np.isfinite(part.current("W")))
        if self.recurrences:
            yield from _of_replay(part, exact=self.exact)

    @property
    def can_be_at_once(self) -> bool:
        """Whether machine code may compute all of it."""
        return self.formula and not self.extended

    def at_once(self, whole: Window) -> list[list[np.ndarray]] | None:
        """Return the numbers of all parts from machine code.

        None where NumPy must compute, or a replay is not as recorded.
        """
        of_replay = []
        if self.recurrences:
            if not is_as_recorded(whole, replayed(whole)):
                return None
            of_replay = [*_of_replay(whole, exact=self.exact)]
        of_formula = self._from_sums(whole, whole.tokens_of_parts())
        return of_formula and [[*of_part, *of_replay] for of_part in of_formula]

    def _from_sums(self, part: Window, tokens: Sequence[slice]) -> list[list[np.ndarray]] | None:
        """Return the formula's numbers of some of a part's tokens and of others; None likewise."""
        sums = step_sums(part, tokens, bounded=not self.recurrences)
        if sums is None:
            return None
        return [
            [of.predicted, of.observed, of.difference, of.product, _NONE]
            + ([] if of.n_beyond is None else [of.n_beyond, _NONE])  # all is finite, bounds too
            for of in sums
        ]

    def _of_formula(self, part: Window) -> Iterator[np.ndarray]:
        """Yield its numbers: from machine code if all are finite and not tiny, else from NumPy."""
        found = None if self.extended else self._from_sums(part, [slice(None)])
        yield from self._by_numpy(part) if found is None else found[0]

    def _by_numpy(self, part: Window) -> Iterator[np.ndarray]:
        previous, current = part.previous("W"), part.current("W")
        memory = part.memory("update"), part.memory("term")
        updated = update(part, out=memory)
        predicted = updated
        if part.of_rows(decays):
            predicted = decay(part)
            predicted += updated
        observed = np.subtract(current, previous, out=part.memory("observed"))
        sums = [_dot(predicted, predicted), _dot(observed, observed)]
        beyond = _beyond_float32(sums[0], predicted) or _beyond_float32(sums[1], observed)
        product = _dot(predicted, observed)
        moves = []
        if self.extended:
            moved = observed != 0
            moves = [_count(moved), _count(~moved & (predicted != 0))]
            moves.append(np.abs(observed / ulp_before(part)).sum(axis=(1, 2)))
        difference = np.subtract(observed, predicted, out=observed)  # which is not needed any more
        sums += [_dot(difference, difference), product]
        beyond = beyond or _beyond_float32(sums[2], difference)
        if beyond and part.dtype != np.float64:
            yield from self._by_numpy(part.in_float64())
            return
        yield from sums
        yield _NONE if np.isfinite(sums[2]).all() else _count(~np.isfinite(difference))
        yield from moves
        if not self.recurrences:
            bound = rounding_bound(part, updated, out=memory)
            explained = np.abs(difference, out=difference) <= bound  # NaN is not explained
            yield _NONE if explained.all() else _count(~explained)
            unbounded = np.isposinf(bound) & explained
            yield _NONE if not unbounded.any() else _count(unbounded)


_NONE = np.zeros(1)


def _dot(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the sum of products of each step, float64 but for the products of one token.

    So it does not depend on which tokens are added together first.
    """
    sums: np.ndarray = sums_of_products(left, right).sum(axis=1, dtype=np.float64)
    return sums


def _beyond_float32(squares: np.ndarray, values: np.ndarray) -> bool:
    """Return whether squares of float32 values overflowed, or may have underflowed."""
    suspect = ~((squares > LEAST_SQUARE) & (squares < np.inf))
    if not suspect.any():
        return False
    values = values[suspect]
    return bool(values.max() > 0 or values.min() < 0)  # `any` takes several times as long


def _count(elements: np.ndarray) -> np.ndarray:
    counts: np.ndarray = np.count_nonzero(elements, axis=(1, 2))
    return counts


def _of_replay(part: Window, *, exact: bool | None) -> Iterator[np.ndarray]:
    after = replayed(part)
    comparisons = compare(part, after, exact=exact)
    unexplained = _NONE if "W" in after else np.full(1, np.nan)
    if "W" in after and (differs := comparisons["W"].differs).any():
        replay = decode(after["W"], part.source.reader.schema.dtypes["W"], np.float64)
        difference = np.where(differs, part.current("W") - replay, 0.0)
        unexplained = _dot(difference, difference)
    yield unexplained
    for comparison in comparisons.values():
        if not comparison.differs.any():
            yield from (_NONE, _NONE, _NONE, _NONE, np.full(1, np.inf))
            continue
        yield _count(comparison.differs)
        yield _count(comparison.beyond)
        yield _count(comparison.unbounded)
        yield comparison.distance.max(axis=(1, 2))
        beyond = comparison.beyond.any(axis=(1, 2), keepdims=True)
        wrong = np.where(beyond, comparison.beyond, comparison.differs)
        yield np.where(wrong, part.positions, np.inf).min(axis=(1, 2))
