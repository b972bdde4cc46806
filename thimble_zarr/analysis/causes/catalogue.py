"""The catalogue of causes: what can be wrong with a record, and how each shows itself.

One small class a cause; its docstring is the message. A run of failing steps is put before each, in
order, and the first that explains it is the cause. Most prove themselves: with the fault undone the
replay gives the recorded rows to the bit.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from thimble_zarr.analysis.causes.evidence import Bits, Evidence, Run, equal
from thimble_zarr.analysis.compute.replayed import bounds
from thimble_zarr.bits import decode, is_nan, unit_roundoff
from thimble_zarr.optim.base import COUNT, Consumed

_MAX_MATCHED = 256
"""Tokens that are looked for among all others."""

_MAX_CANDIDATES = 64
"""Failing steps among which a row is looked for."""

Facts = Mapping[str, object]
"""What a cause found out: the blanks of its message, and `step`, `token`, `dim`, `variable` where
they are other than those of the first wrong element. Step and token are given as to `Evidence`."""


class Named:
    """Something that can be wrong with a record. The docstring of each class is its message."""

    code: ClassVar[str]


class Cause(Named, ABC):
    """Something that shows in the replay."""

    @abstractmethod
    def explain(self, evidence: Evidence, run: Run) -> Facts | None:
        """Return what is found out if this is the cause of the run, else None."""


class BitFlip(Cause):
    """One bit of {variable} is flipped: bit {bit} at step {step}, {place}.

    With it flipped back, every row follows from the row before.
    """

    code = "bit-flip"

    def explain(self, evidence: Evidence, run: Run) -> Facts | None:
        if len(run.steps) > 2 or not _is_one_element(run):
            return None
        _, token, dim, _ = run.start
        element = evidence.element(token, dim)
        step = run.steps[0]
        suspects = [(name, step) for name in (*element.names, "grad")]
        suspects += [(name, step - 1) for name in element.names]
        for name, row in suspects:
            bit = _mending_bit(element, name, row)
            if bit is not None:
                return {"variable": name, "bit": bit, "step": row}
        return None


def _is_one_element(run: Run) -> bool:
    places = {
        tuple(first)
        for name in run.wrong
        for first, count in zip(run.first[name], run.counts[name], strict=True)
        if count
    }
    return len(places) == 1 and all(counts.max() <= 1 for counts in run.counts.values())


def _mending_bit(element: Evidence, name: str, row: int) -> int | None:
    """Return the bit of one element that, flipped, makes the rows around it follow."""
    recorded = element.row(name, row)
    unsigned = np.dtype(f"u{recorded.dtype.itemsize}")
    zero_state = element.source.steps[row] == 0 and name not in ("W", "grad")
    for bit in range(8 * unsigned.itemsize):
        mended = (recorded.view(unsigned) ^ unsigned.type(1 << bit)).view(recorded.dtype)
        if zero_state and mended.view(unsigned).any():
            continue
        if _follows(element, name, row, mended):
            return bit
    return None


def _follows(evidence: Evidence, name: str, row: int, mended: np.ndarray) -> bool:
    """Return whether the steps to and from a row hold with other bits of a variable in it."""
    if name == "grad":
        return evidence.mends(row, {"grad": mended})
    if evidence.follows(row):
        replayed = evidence.replay(row)
        if not equal(replayed, evidence.after(row) | {name: mended}).all():
            return False
    return not evidence.follows(row + 1) or evidence.mends(row + 1, {name: mended})


class MissingRow(Cause):
    """Values of {variable} are missing at step {step}.

    They are NaN, and those of the steps around it are not: the row was not written, or was lost.
    """

    code = "missing-row"

    def explain(self, evidence: Evidence, run: Run) -> Facts | None:
        for row in (run.steps[0] - 1, run.steps[0]):
            lost = {
                name: _lost(evidence, name, row)
                for name in ("grad", *evidence.names)
                if name != "grad" or evidence.source.steps[row] > 0
            }
            missing = {name: where for name, where in lost.items() if where.any()}
            if missing:
                first = next(iter(missing.values()))
                token, dim = np.argwhere(first)[0].tolist()
                whole = bool(first.all())
                return {
                    "variable": _joined(tuple(missing)),
                    "step": row,
                    "token": None if whole else int(evidence.tokens[token]),
                    "dim": None if whole else int(evidence.dims[dim]),
                }
        return None


def _lost(evidence: Evidence, name: str, row: int) -> np.ndarray:
    """Return where a variable is NaN at a row and was not at the row before."""
    lost = is_nan(evidence.row(name, row))
    if evidence.follows(row) and evidence.source.steps[row] > 1:
        lost &= ~is_nan(evidence.row(name, row - 1))
    return lost


class TornRow(Cause):
    """The row of step {step} was overwritten, in part or whole: {n} values of {variable}.

    With the values that the replay computes in their place, the next row follows.
    """

    code = "torn-row"

    def explain(self, evidence: Evidence, run: Run) -> Facts | None:
        step = run.steps[0]
        if len(run.steps) != 2 or not evidence.mends(step + 1, evidence.replay(step)):
            return None
        wrong = [name for name in run.wrong if run.counts[name][0]]
        n = sum(int(run.counts[name][0]) for name in wrong)
        return {"variable": _joined(wrong), "n": f"{n:,}"}


class ShiftedRows(Cause):
    """The rows of {variable} are shifted: row t holds what belongs to row t{by:+d}.

    Shifted back, every row follows from the row before.
    """

    code = "shifted-rows"

    def explain(self, evidence: Evidence, run: Run) -> Facts | None:
        if len(run.steps) < 3:
            return None
        states = tuple(name for name in evidence.names if name != "W")
        for group in (("grad",), ("W",), states, *((name,) for name in states)):
            for by in (-1, 1):
                late, early = max(by, 0), min(by, 0)
                steps = [
                    step
                    for step in run.sampled
                    if evidence.follows(step - late)
                    and evidence.follows(step - early)
                    and evidence.source.steps[step] - late > 1
                ]
                if steps and all(_shift_mends(evidence, step, group, by) for step in steps):
                    return {"variable": _joined(group), "by": by, "token": None, "dim": None}
        return None


def _shift_mends(evidence: Evidence, step: int, group: tuple[str, ...], by: int) -> bool:
    """Try a claim: what is in row t of some variables belongs to row t + `by`."""
    before = {name: evidence.row(name, step - by - (name != "grad")) for name in group}
    after = {name: evidence.row(name, step - by) for name in group if name != "grad"}
    return bool(equal(evidence.replay(step, before), evidence.after(step) | after).all())


class ShiftedHyperparameters(Cause):
    """The hyper-parameters are shifted: row t holds those of step t{by:+d}.

    Shifted back, every row follows from the row before.
    """

    code = "shifted-hyperparameters"

    def explain(self, evidence: Evidence, run: Run) -> Facts | None:
        if len(run.steps) < 3:
            return None
        recorded, labels = evidence.source.recorded, evidence.source.steps
        numbers = evidence.schema.optimizer.scalars
        for names in (numbers, (COUNT,), (*numbers, COUNT)):
            for by in (-1, 1):
                late, early = max(by, 0), min(by, 0)
                steps = [
                    step
                    for step in run.sampled
                    if labels[step] - late >= 1 and evidence.follows(step - early)
                ]
                if steps and all(
                    evidence.mends(
                        step, {}, **{name: float(recorded[name][step - by]) for name in names}
                    )
                    for step in steps
                ):
                    return {"variable": _joined(names), "by": by, "token": None, "dim": None}
        return None


class PermutedRows(Cause):
    """Rows are permuted: the row after step {before} is recorded as step {other}.

    There it follows, to the bit, from the row before and its own gradient.
    """

    code = "permuted-rows"

    def explain(self, evidence: Evidence, run: Run) -> Facts | None:
        step, token, _, _ = run.start
        one = evidence.token(token)
        for other in [other for run in evidence.runs for other in run.steps][:_MAX_CANDIDATES]:
            if other == step or not _is_row_of(one, step, other):
                continue
            if _is_row_of(evidence, step, other):
                return {
                    "before": evidence.source.steps[step - 1],
                    "other": evidence.source.steps[other],
                    "variable": None,
                    "token": None,
                    "dim": None,
                }
        return None


def _is_row_of(evidence: Evidence, step: int, other: int) -> bool:
    """Return whether the row after a step is recorded as that of another one."""
    replayed = evidence.replay(step, {"grad": evidence.row("grad", other)})
    return bool(equal(replayed, evidence.after(other)).all())


class PermutedTokens(Cause):
    """The {row}s of {variable} are permuted at step {step}.

    The values of {place} are those of {other}, and so on.
    """

    code = "permuted-tokens"

    def explain(self, evidence: Evidence, run: Run) -> Facts | None:
        # At the first step of all the moments are the gradient, and permuted as it is.
        step = run.sampled[len(run.sampled) // 2] if len(run.steps) > 2 else run.steps[0]
        replayed, recorded = evidence.replay(step), evidence.after(step)
        for name in run.wrong:
            places = _matches(recorded[name], replayed[name])
            if places is not None:
                return _permuted(evidence, name, places)
        if run.states_are_right:
            return None
        grad = evidence.row("grad", step)
        wrong = ~np.all(equal(replayed, recorded), axis=1)
        places = _nearest(_wanted_gradient(evidence, step), evidence.values("grad", grad), wrong)
        if places is None:
            return None
        moved = np.flatnonzero(places != np.arange(len(places)))
        same = equal(evidence.replay(step, {"grad": grad[places]}), recorded)[moved].all(axis=1)
        return _permuted(evidence, "grad", places) if same.mean() > 0.9 else None


def _permuted(evidence: Evidence, name: str, places: np.ndarray) -> Facts:
    first = int(np.flatnonzero(places != np.arange(len(places)))[0])
    return {
        "variable": name,
        "token": int(evidence.tokens[first]),
        "other": evidence.schema.place(
            int(evidence.source.token_ids[evidence.tokens[places[first]]])
        ),
        "dim": None,
    }


def _matches(rows: np.ndarray, others: np.ndarray) -> np.ndarray | None:
    """Return for each row which other it is, bit for bit, if nearly all are and not their own."""
    place = {row.tobytes(): index for index, row in enumerate(others)}
    places = np.array([place.get(row.tobytes(), -1) for row in rows])
    return _if_permuted(places, np.any(rows != others, axis=1))


def _nearest(rows: np.ndarray, others: np.ndarray, wrong: np.ndarray) -> np.ndarray | None:
    """Return which other the largest of the wrong rows are, where there is no doubt about it.

    Tokens that do not occur have nearly the same gradients; those that do are told apart.
    """
    places = np.arange(len(rows))
    if len(places) < 2:
        return None
    size = np.where(wrong, np.abs(rows).sum(axis=1), 0)
    for index in np.argsort(-size)[:_MAX_MATCHED].tolist():
        distance = np.abs(others - rows[index]).sum(axis=1)
        first, second = np.argpartition(distance, 1)[:2].tolist()
        if distance[first] < 0.5 * distance[second]:
            places[index] = first
    return _if_permuted(places, places != np.arange(len(rows)))


def _if_permuted(places: np.ndarray, moved: np.ndarray) -> np.ndarray | None:
    if int(np.sum(moved)) < 2 or float(np.mean(places[moved] < 0)) > 0.1:
        return None
    places = np.where(places < 0, np.arange(len(places)), places)
    return places if (places != np.arange(len(places))).sum() >= 2 else None


class ScaledGradient(Cause):
    """The recorded gradient is {factor} times the one that the optimizer consumed.

    It was recorded before a gradient scaler's factor was divided out. Divided by it, every row
    follows from the row before.
    """

    code = "scaled-gradient"

    def explain(self, evidence: Evidence, run: Run) -> Facts | None:
        if run.states_are_right:
            return None
        factors = {_power_of_two(evidence, step) for step in run.sampled}
        factor = factors.pop()
        if factors or factor in (0.0, 1.0):
            return None
        for step in run.sampled:
            grad = evidence.row("grad", step)
            mended = _encode(evidence.values("grad", grad) / factor, grad.dtype)
            # Where the product overflowed or lost bits, it cannot be undone to the bit.
            if evidence.share_mended(step, {"grad": mended}) < 0.999:
                return None
        return {"variable": "grad", "factor": f"{factor:g}", "token": None, "dim": None}


def _power_of_two(evidence: Evidence, step: int) -> float:
    """Return the power of two, of either sign, nearest to recorded over consumed gradient."""
    ratio = _gradient_ratio(evidence, step)
    return 0.0 if ratio is None else float(np.sign(ratio) * 2.0 ** np.round(np.log2(abs(ratio))))


def _gradient_ratio(evidence: Evidence, step: int) -> float | None:
    """Return recorded over consumed gradient, in the least squares sense."""
    recorded = evidence.values("grad", evidence.row("grad", step)).ravel()
    wanted = _wanted_gradient(evidence, step).ravel()
    known = np.isfinite(recorded) & np.isfinite(wanted)
    recorded, wanted = recorded[known], wanted[known]
    product = float(recorded @ wanted)
    return float(recorded @ recorded) / product if product else None


def _wanted_gradient(evidence: Evidence, step: int) -> np.ndarray:
    """Return the gradient that would have led to the recorded row, up to rounding."""
    return _consumed(evidence, step).gradient


def _consumed(evidence: Evidence, step: int) -> Consumed:
    before, after = _numbers(evidence, evidence.inputs(step)), evidence.after(step)
    scalars = evidence.scalars(step)
    return evidence.formula.consumed(before, _numbers(evidence, after), scalars)


def _numbers(evidence: Evidence, bits: Mapping[str, np.ndarray]) -> Bits:
    return {name: evidence.values(name, values) for name, values in bits.items()}


class RescaledGradient(Cause):
    """The gradient recorded at step {step} is {factor} times the one that was consumed.

    The factor differs between steps: the gradient was clipped or rescaled after it was recorded.
    """

    code = "rescaled-gradient"

    def explain(self, evidence: Evidence, run: Run) -> Facts | None:
        if run.states_are_right:
            return None
        ratios = [_gradient_ratio(evidence, step) for step in run.sampled]
        u = unit_roundoff(evidence.schema.dtypes["grad"])
        for step, ratio in zip(run.sampled, ratios, strict=True):
            if ratio is None or abs(ratio - 1) < 4 * u or not _rescaled(evidence, step, ratio, u):
                return None
        return {"variable": "grad", "factor": f"{ratios[0]:.4g}", "token": None, "dim": None}


def _rescaled(evidence: Evidence, step: int, ratio: float, u: float) -> bool:
    """Return whether a multiple of the gradient makes the moment, within what rounding allows."""
    grad = evidence.values("grad", evidence.row("grad", step)) / ratio
    consumed = _consumed(evidence, step)
    apart = np.abs(consumed.gradient - grad)
    error = _bounds(evidence, step, grad)[consumed.variable] * consumed.per_error
    # Besides, the consumed gradient was rounded, and the ratio is an estimate.
    return bool((apart <= error + 4 * u * np.abs(grad)).mean() > 0.999)


def _bounds(evidence: Evidence, step: int, grad: np.ndarray) -> Bits:
    before = _numbers(evidence, {name: evidence.inputs(step)[name] for name in evidence.names})
    return bounds(evidence.schema, before, grad, evidence.scalars(step))


class CastStates(Cause):
    """The values of {variable} were cast to {lower} and are kept as {native}.

    Each recorded value fits in {lower}, and most of the replayed values do not.
    """

    code = "cast-states"

    def explain(self, evidence: Evidence, run: Run) -> Facts | None:
        if len(run.steps) < 3:
            return None
        step = run.steps[0]
        replayed, recorded = (
            {name: evidence.values(name, bits) for name, bits in row.items()}
            for row in (evidence.replay(step), evidence.after(step))
        )
        cast = {
            lower: [
                name
                for name in run.wrong
                if name != "W"
                and evidence.schema.dtypes[name] != lower
                and (_cast(recorded[name], lower) == recorded[name]).all()
                and _share_held(replayed[name], lower) < 0.75
            ]
            for lower in ("bfloat16", "float16")
        }
        # Where numbers underflow, either dtype may hold what the other left of them.
        lower = max(cast, key=lambda lower: _n_reproduced(replayed, recorded, cast[lower], lower))
        if not cast[lower]:
            return None
        return {
            "variable": _joined(cast[lower]),
            "native": evidence.schema.dtypes[cast[lower][0]],
            "lower": lower,
            "token": None,
            "dim": None,
        }


def _share_held(values: np.ndarray, lower: str) -> float:
    """Return the share of numbers, other than zero, that a lower dtype can hold."""
    values = values[values != 0]
    return float((_cast(values, lower) == values).mean()) if values.size else 0.0


def _n_reproduced(replayed: Bits, recorded: Bits, names: list[str], lower: str) -> int:
    """Return how many recorded numbers a cast of those replayed gives."""
    return sum(int((_cast(replayed[name], lower) == recorded[name]).sum()) for name in names)


def _cast(values: np.ndarray, lower: str) -> np.ndarray:
    """Return numbers rounded to a lower dtype, float64."""
    if lower == "float16":
        return values.astype(np.float16).astype(np.float64)
    return decode(_encode(values, np.dtype(np.uint16)), "bfloat16", np.float64)


class OtherLearningRate(Cause):
    """The weights are those of learning rate {value}, and {recorded:g} is recorded.

    The moments are right, and of the values that were tried this one gives the recorded weights.
    """

    code = "other-learning-rate"
    name: ClassVar[str] = "learning_rate"

    def explain(self, evidence: Evidence, run: Run) -> Facts | None:
        if not run.states_are_right:
            return None
        step = run.steps[0]
        values = _fitting_values(evidence, step, self.name)
        if not values:
            return None
        return {
            "variable": self.name,
            "recorded": float(evidence.source.recorded[self.name][step]),
            "value": " to ".join(dict.fromkeys(f"{v:g}" for v in (min(values), max(values)))),
            "token": None,
            "dim": None,
        }


class OtherWeightDecay(OtherLearningRate):
    """The weights are those of weight decay {value}, and {recorded:g} is recorded.

    The moments are right, and of the values that were tried this one gives the recorded weights.
    """

    code = "other-weight-decay"
    name = "weight_decay"


def _fitting_values(evidence: Evidence, step: int, name: str) -> list[float]:
    """Return values of a hyper-parameter with which all weights are right, or nearly all.

    Rounding may hide the difference between values: then there are several.
    """
    recorded = float(evidence.source.recorded[name][step])

    def share_wrong(value: float) -> float:
        return 1 - evidence.share_mended(step, {}, **{name: value})

    estimate = max(_least_squares(evidence, step, name), 0.0)
    rounded = {float(f"{estimate:.{n}g}") for n in range(1, 9)}
    typical = {digit * 10.0**power for power in range(-6, 1) for digit in (1, 2, 3, 5)}
    wrong = {value: share_wrong(value) for value in {0.0, estimate} | rounded | typical}
    least = min(wrong.values())
    if least >= 0.1 * share_wrong(recorded):
        return []
    return [value for value, share in wrong.items() if share == least]


def _least_squares(evidence: Evidence, step: int, name: str) -> float:
    """Return the value that explains the observed change best, the change being linear in it."""
    before, after = evidence.inputs(step)["W"], evidence.after(step)["W"]
    observed = evidence.values("W", after) - evidence.values("W", before)
    zero, one = (_change(evidence, step, name, value) for value in (0.0, 1.0))
    slope = (one - zero).ravel()
    known = np.isfinite(slope) & np.isfinite(observed.ravel())
    slope, rest = slope[known], (observed - zero).ravel()[known]
    norm = float(slope @ slope)
    return float(rest @ slope) / norm if norm else 0.0


def _change(evidence: Evidence, step: int, name: str, value: float) -> np.ndarray:
    """Return the formula's change of the weights with another value of a hyper-parameter."""
    scalars = evidence.scalars(step) | {name: np.asarray(value)}
    inputs = _numbers(evidence, evidence.inputs(step) | evidence.after(step))
    formula = evidence.formula
    update = formula.update(inputs, formula.coefficients(scalars))
    W = evidence.values("W", evidence.inputs(step)["W"])
    change: np.ndarray = update + formula.decay_factor(scalars) * W
    return change


class ExternalChange(Cause):
    """Something other than the optimizer changed weights: {n} at step {step}.

    The moments are right, but these weights are not what the optimizer computed. Or else a number
    that only the update uses (eps) is not the recorded one.
    """

    code = "external-change"

    def explain(self, evidence: Evidence, run: Run) -> Facts | None:
        if not run.states_are_right:
            return None
        return {"n": f"{int(run.counts['W'][0]):,}"}


class WrongGradient(Cause):
    """The gradient of step {step} is not the one that the optimizer consumed.

    Another gradient explains both moments, and the rows before and after the step are sound.
    """

    code = "wrong-gradient"

    def explain(self, evidence: Evidence, run: Run) -> Facts | None:
        step = run.steps[0]
        states = [state.name for state in evidence.schema.optimizer.states]
        wrong = [name for name in states if name in run.wrong]
        if len(run.steps) > 1 or not wrong or len(wrong) < min(2, len(states)):
            return None
        consumed = _consumed(evidence, step)
        allowed_of = _bounds(evidence, step, consumed.gradient)
        error = allowed_of[consumed.variable] * consumed.per_error
        before, after = (
            _numbers(evidence, bits) for bits in (evidence.inputs(step), evidence.after(step))
        )
        explained, lower, upper = (
            evidence.formula.advance(before, consumed.gradient + by, evidence.scalars(step))
            for by in (0, -error, error)
        )
        for name in wrong:
            spread = np.maximum(*(abs(end[name] - explained[name]) for end in (lower, upper)))
            apart = abs(after[name] - explained[name])
            if float((apart <= allowed_of[name] + spread).mean()) <= 0.999:
                return None
        return {"variable": "grad"}


class Unbalanced(Cause):
    """Rows from step {step} on do not follow from the rows before.

    The first difference is in {variable}, at {place}. No known cause explains it.
    """

    code = "unbalanced"

    def explain(self, evidence: Evidence, run: Run) -> Facts | None:
        return {}


CAUSES: tuple[Cause, ...] = (
    BitFlip(),
    MissingRow(),
    PermutedTokens(),
    TornRow(),
    ShiftedRows(),
    ShiftedHyperparameters(),
    PermutedRows(),
    ScaledGradient(),
    RescaledGradient(),
    CastStates(),
    OtherLearningRate(),
    OtherWeightDecay(),
    ExternalChange(),
    WrongGradient(),
    Unbalanced(),
)
"""In the order they are asked: those that prove themselves to the bit come first."""

LOCAL = (BitFlip.code, MissingRow.code, TornRow.code, WrongGradient.code, ExternalChange.code)
"""Causes that each concern a place of their own, and are reported for each."""


def _encode(values: np.ndarray, stored: np.dtype) -> np.ndarray:
    """Return the stored bits of numbers, rounded to nearest even where they must be."""
    if stored != np.uint16:
        return values.astype(stored)
    bits = values.astype(np.float32).view(np.uint32)
    rounded: np.ndarray = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def _joined(names: Sequence[str]) -> str:
    return ", ".join(names)
