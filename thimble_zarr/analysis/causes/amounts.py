"""Causes that make numbers other than they were: gradients, states and hyper-parameters."""

from typing import ClassVar

import numpy as np

from thimble_zarr.analysis.causes.cause import Cause, Facts
from thimble_zarr.analysis.causes.evidence import Evidence, Failure
from thimble_zarr.bits import decode, unit_roundoff
from thimble_zarr.optim.base import LEARNING_RATE, WEIGHT_DECAY, Scalar


class ScaledGradient(Cause):
    """The recorded gradient is {factor} times the one that the optimizer consumed.

    It was recorded before a gradient scaler's factor was divided out. Divided by it, every row
    follows from the row before.
    """

    code = "scaled-gradient"
    is_everywhere = needs_formula = True

    def explain(self, evidence: Evidence, failure: Failure) -> Facts | None:
        if failure.states_are_right:
            return None
        ratios = np.array([_gradient_ratio(evidence, step) for step in failure.sampled])
        factors = np.unique(np.sign(ratios) * 2.0 ** np.round(np.log2(np.abs(ratios))))
        factor = float(factors[0])
        if len(factors) > 1 or not np.isfinite(factor) or factor in (0.0, 1.0):
            return None
        for step in failure.sampled:
            grad = evidence.row("grad", step)
            mended = _encode(evidence.values("grad", grad) / factor, grad.dtype)
            # Where the product overflowed or lost bits, it cannot be undone to the bit.
            if evidence.share_mended(step, {"grad": mended}) < 0.999:
                return None
        return {"variable": "grad", "factor": f"{factor:g}"}


def _gradient_ratio(evidence: Evidence, step: int) -> float:
    """Return recorded over consumed gradient, in the least squares sense; NaN if not known."""
    recorded = evidence.values("grad", evidence.row("grad", step)).ravel()
    consumed = evidence.consumed(step).gradient.ravel()
    known = np.isfinite(recorded) & np.isfinite(consumed)
    recorded, consumed = recorded[known], consumed[known]
    product = float(recorded @ consumed)
    return float(recorded @ recorded) / product if product else np.nan


class RescaledGradient(Cause):
    """The gradient recorded at step {step} is {factor} times the one that was consumed.

    The factor differs between steps: the gradient was clipped or rescaled after it was recorded.
    """

    code = "rescaled-gradient"
    is_everywhere = needs_formula = True

    def explain(self, evidence: Evidence, failure: Failure) -> Facts | None:
        if failure.states_are_right:
            return None
        ratios = [_gradient_ratio(evidence, step) for step in failure.sampled]
        u = unit_roundoff(evidence.schema.dtypes["grad"])
        for step, ratio in zip(failure.sampled, ratios, strict=True):
            if not abs(ratio - 1) >= 4 * u or not _rescaled(evidence, step, ratio, u):
                return None
        return {"variable": "grad", "factor": f"{ratios[0]:.4g}"}


def _rescaled(evidence: Evidence, step: int, ratio: float, u: float) -> bool:
    """Return whether a multiple of the gradient was consumed, within what rounding allows."""
    grad = evidence.values("grad", evidence.row("grad", step)) / ratio
    consumed = evidence.consumed(step)
    error = evidence.bounds(step, grad)[consumed.variable] * consumed.per_error
    # Besides, the consumed gradient was rounded, and the ratio is an estimate.
    allowed = error + 4 * u * np.abs(grad)
    return bool((np.abs(consumed.gradient - grad) <= allowed).mean() > 0.999)


class WrongGradient(Cause):
    """The gradient of step {step} is not the one that the optimizer consumed.

    Another gradient explains the states, and the rows before and after the step are sound.
    """

    code = "wrong-gradient"
    is_local = needs_formula = True

    def explain(self, evidence: Evidence, failure: Failure) -> Facts | None:
        step = failure.steps[0]
        states = [state.name for state in evidence.schema.optimizer.states]
        wrong = [name for name in states if name in failure.wrong]
        if len(failure.steps) > 1 or not wrong or len(wrong) < min(2, len(states)):
            return None
        consumed = evidence.consumed(step)
        allowed = evidence.bounds(step, consumed.gradient)
        error = allowed[consumed.variable] * consumed.per_error
        before, after = evidence.numbers(evidence.inputs(step)), evidence.after(step)
        explained, lower, upper = (
            evidence.formula.advance(before, consumed.gradient + by, evidence.scalars(step))
            for by in (0, -error, error)
        )
        for name in wrong:
            spread = np.maximum(*(abs(end[name] - explained[name]) for end in (lower, upper)))
            apart = abs(evidence.values(name, after[name]) - explained[name])
            if float((apart <= allowed[name] + spread).mean()) <= 0.999:
                return None
        return {"variable": "grad"}


class CastStates(Cause):
    """The values of {variable} were cast to {lower} and are kept as {native}.

    Each recorded value fits in {lower}, and most of the replayed values do not.
    """

    code = "cast-states"
    is_everywhere = True

    def explain(self, evidence: Evidence, failure: Failure) -> Facts | None:
        if len(failure.steps) < 3:
            return None
        step, dtypes = failure.steps[0], evidence.schema.dtypes
        replayed = evidence.numbers(evidence.replay(step))
        recorded = evidence.numbers(evidence.after(step))
        found: list[tuple[int, str, list[str]]] = []
        for lower in ("bfloat16", "float16"):
            names = [
                name
                for name in failure.wrong
                if name != "W"
                and dtypes[name] != lower
                and (_cast(recorded[name], lower) == recorded[name]).all()
                and _share_held(replayed[name], lower) < 0.75
            ]
            # Where numbers underflow, either dtype may hold what the other left of them.
            n_cast = sum((_cast(replayed[name], lower) == recorded[name]).sum() for name in names)
            found += [(int(n_cast), lower, names)] if names else []
        if not found:
            return None
        _, lower, names = max(found, key=lambda one: one[0])
        return {"variable": ", ".join(names), "native": dtypes[names[0]], "lower": lower}


def _share_held(values: np.ndarray, lower: str) -> float:
    """Return the share of numbers, other than zero, that a lower dtype can hold."""
    values = values[values != 0]
    return float((_cast(values, lower) == values).mean()) if values.size else 0.0


def _cast(values: np.ndarray, lower: str) -> np.ndarray:
    """Return numbers rounded to a lower dtype, float64."""
    stored = np.dtype(np.float16 if lower == "float16" else np.uint16)
    return decode(_encode(values, stored), lower, np.float64)


def _encode(values: np.ndarray, stored: np.dtype) -> np.ndarray:
    """Return the stored bits of numbers, rounded to nearest even where they must be."""
    if stored != np.uint16:
        return values.astype(stored)
    bits = values.astype(np.float32).view(np.uint32)
    rounded: np.ndarray = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


class OtherLearningRate(Cause):
    """The weights are those of learning rate {value}, and {recorded:g} is recorded.

    The states are right, and of the values that were tried this one gives the recorded weights.
    """

    code = "other-learning-rate"
    is_everywhere = needs_formula = True
    scalar: ClassVar[Scalar] = LEARNING_RATE

    def explain(self, evidence: Evidence, failure: Failure) -> Facts | None:
        name, step = self.scalar.name, failure.steps[0]
        if not failure.states_are_right or name not in evidence.schema.optimizer.scalars:
            return None
        recorded = float(evidence.source.recorded[name][step])
        values = _fitting_values(evidence, step, name, recorded)
        if not values:
            return None
        shown = " to ".join(dict.fromkeys(f"{v:g}" for v in (min(values), max(values))))
        return {"variable": name, "recorded": recorded, "value": shown}


class OtherWeightDecay(OtherLearningRate):
    """The weights are those of weight decay {value}, and {recorded:g} is recorded.

    The states are right, and of the values that were tried this one gives the recorded weights.
    """

    code = "other-weight-decay"
    scalar = WEIGHT_DECAY


def _fitting_values(evidence: Evidence, step: int, name: str, recorded: float) -> list[float]:
    """Return values of a hyper-parameter with which all weights are right, or nearly all.

    Rounding may hide the difference between values: then there are several.
    """

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
    inputs, formula = evidence.inputs(step), evidence.formula
    before = evidence.values("W", inputs["W"])
    row = evidence.numbers(inputs | evidence.after(step))

    def change(value: float) -> np.ndarray:
        scalars = evidence.scalars(step) | {name: np.asarray(value)}
        update = formula.update(row, formula.coefficients(scalars))
        predicted: np.ndarray = update + formula.decay_factor(scalars) * before
        return predicted

    zero, one = change(0.0), change(1.0)
    slope, rest = (one - zero).ravel(), (row["W"] - before - zero).ravel()
    known = np.isfinite(slope) & np.isfinite(rest)
    slope, rest = slope[known], rest[known]
    norm = float(slope @ slope)
    return float(rest @ slope) / norm if norm else 0.0


class ExternalChange(Cause):
    """Something other than the optimizer changed weights: {n} at step {step}.

    The states are right, but these weights are not what the optimizer computed. Or else a number
    that only the update uses (eps) is not the recorded one.
    """

    code = "external-change"
    is_local = True

    def explain(self, evidence: Evidence, failure: Failure) -> Facts | None:
        return {"n": f"{int(failure.counts['W'][0]):,}"} if failure.states_are_right else None
