"""Causes that make numbers other than they were: gradients, states and hyper-parameters."""

from collections.abc import Sequence

import numpy as np

from thimble_zarr.bits import decode, unit_roundoff
from thimble_zarr.causes.cause import Facts, cause
from thimble_zarr.causes.evidence import Evidence, Failure
from thimble_zarr.optim.base import WEIGHT_DECAY
from thimble_zarr.optim.formula import W_BEFORE

_LARGEST_SCALE = 24
"""The exponent of the largest factor of a gradient scaler that is tried."""


@cause("scaled-gradient", is_everywhere=True)
def scaled_gradient(evidence: Evidence, failure: Failure) -> Facts | None:
    """The recorded gradient is {factor} times the one that the optimizer consumed.

    It was recorded before a gradient scaler's factor was divided out. Divided by it, every row
    follows from the row before.
    """
    if failure.states_are_right:
        return None
    for factor in _possible_scales(evidence, failure):
        # Where the product overflowed or lost bits, it cannot be undone to the bit.
        if all(_is_scaled(evidence, step, factor) for step in failure.sampled):
            return {"variable": "grad", "factor": f"{factor:g}"}
    return None


def _possible_scales(evidence: Evidence, failure: Failure) -> Sequence[float]:
    """Return the powers of two that a gradient may be too large by: one, if a formula tells."""
    if evidence.schema.optimizer.formula is None:
        if evidence.mended(failure.steps[0]).mean() > 0.99:
            return []  # with any other gradient most elements would follow, too
        exponents = (*range(1, _LARGEST_SCALE + 1), *range(-1, -_LARGEST_SCALE - 1, -1))
        return [2.0**exponent for exponent in exponents]
    ratios = np.array([_gradient_ratio(evidence, step) for step in failure.sampled])
    factors = np.unique(np.sign(ratios) * 2.0 ** np.round(np.log2(np.abs(ratios))))
    factor = float(factors[0])
    is_one = len(factors) == 1 and np.isfinite(factor) and factor not in (0.0, 1.0)
    return [factor] if is_one else []


def _is_scaled(evidence: Evidence, step: int, factor: float) -> bool:
    recorded = evidence.row("grad", step).dtype
    mended = _encode(evidence.values("grad", step) / factor, recorded)
    return bool(evidence.mended(step, {"grad": mended}).mean() >= 0.999)


@cause("rescaled-gradient", is_everywhere=True, needs_formula=True)
def rescaled_gradient(evidence: Evidence, failure: Failure) -> Facts | None:
    """The gradient recorded at step {step} is {factor} times the one that was consumed.

    The factor differs between steps: the gradient was clipped or rescaled after it was recorded.
    """
    if failure.states_are_right:
        return None
    ratios = [_gradient_ratio(evidence, step) for step in failure.sampled]
    u = unit_roundoff(evidence.schema.dtypes["grad"])
    of_weights = evidence.consumed(failure.steps[0]).variable == "W"
    if of_weights and max(ratios) - min(ratios) <= 4 * u * abs(ratios[0]):
        return None  # a learning rate would do the same
    for step, ratio in zip(failure.sampled, ratios, strict=True):
        grad, consumed = evidence.values("grad", step) / ratio, evidence.consumed(step)
        error = evidence.bounds(step, grad)[consumed.variable] * consumed.per_error
        # Besides, the consumed gradient was rounded, and the ratio is an estimate.
        allowed = error + 4 * u * np.abs(grad)
        fits = ~(np.abs(consumed.gradient - grad) > allowed)  # as far as it is known
        is_multiple = fits.mean() > 0.999
        if not (abs(ratio - 1) >= 4 * u and is_multiple):
            return None
    return {"variable": "grad", "factor": f"{ratios[0]:.4g}"}


def _gradient_ratio(evidence: Evidence, step: int) -> float:
    """Return the least-squares ratio of recorded to consumed gradient; NaN if it is unknown."""
    share = _slope(evidence.values("grad", step), evidence.consumed(step).gradient)
    return 1 / share if share else np.nan


def _slope(values: np.ndarray, others: np.ndarray) -> float:
    """Return what `values` are to be multiplied by to be nearest `others`; 0 if not known."""
    known = np.isfinite(values) & np.isfinite(others)
    values, others = values[known], others[known]
    square = float(values @ values)
    return float(others @ values) / square if square else 0.0


@cause("cast-states", is_everywhere=True)
def cast_states(evidence: Evidence, failure: Failure) -> Facts | None:
    """The values of {variable} were cast to {lower} and are kept as {native}.

    Each recorded value fits in {lower}, and most of the replayed values do not.
    """
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


@cause("other-learning-rate", is_everywhere=True, needs_formula=True)
def other_learning_rate(evidence: Evidence, failure: Failure) -> Facts | None:
    """The weights are those of learning rate {value}, and {recorded:g} is recorded.

    The states are right, and of the values that were tried this one gives the recorded weights.
    """
    return _other(evidence, failure, evidence.schema.optimizer.RATE)


@cause("other-weight-decay", is_everywhere=True, needs_formula=True)
def other_weight_decay(evidence: Evidence, failure: Failure) -> Facts | None:
    """The weights are those of weight decay {value}, and {recorded:g} is recorded.

    Of the values that were tried this one gives the recorded rows.
    """
    return _other(evidence, failure, WEIGHT_DECAY.name)


def _other(evidence: Evidence, failure: Failure, name: str) -> Facts | None:
    """Look for values of a hyper-parameter with which all weights are right, or nearly all.

    Rounding may hide the difference between values: then there are several. States are right, but
    for those that weight decay enters with the gradient.
    """
    step, optimizer = failure.steps[0], evidence.schema.optimizer
    of_weights = {*failure.wrong} <= {"W", *optimizer.of_weights}
    if name not in optimizer.scalars or not (of_weights or name == WEIGHT_DECAY.name):
        return None

    def share_wrong(value: float) -> float:
        return 1 - float(evidence.mended(step, scalars={name: value}).mean())

    recorded = float(evidence.source.recorded[name][step])
    found = [_estimate(evidence, step, name)] if of_weights else _decays_consumed(evidence, step)
    estimates = [max(estimate, 0.0) for estimate in found]
    rounded = {float(f"{of:.{n}g}") for of in estimates for n in range(1, 9)}
    typical = {digit * 10.0**power for power in range(-6, 1) for digit in (1, 2, 3, 5)}
    wrong = {value: share_wrong(value) for value in {0.0, *estimates} | rounded | typical}
    least = min(wrong.values())
    if least >= 0.1 * share_wrong(recorded):
        return None
    values = [value for value, share in wrong.items() if share == least]
    shown = " to ".join(dict.fromkeys(f"{v:g}" for v in (min(values), max(values))))
    return {"variable": name, "recorded": recorded, "value": shown}


def _decays_consumed(evidence: Evidence, step: int) -> list[float]:
    """Return the weight decay that the consumed gradient has in it, by either sign of a step."""
    recorded = float(evidence.source.recorded[WEIGHT_DECAY.name][step])
    more = evidence.consumed(step).gradient - evidence.values("grad", step)
    slope = _slope(evidence.values("W", step - 1), more)
    return [recorded + slope, recorded - slope]


def _estimate(evidence: Evidence, step: int, name: str) -> float:
    """Return the value that explains the observed change best, the change being linear in it."""
    before, formula = evidence.values("W", step - 1), evidence.formula
    row = evidence.numbers(evidence.inputs(step) | evidence.after(step)) | {W_BEFORE: before}

    def change(value: float) -> np.ndarray:
        scalars = evidence.scalars(step) | {name: np.asarray(value)}
        update = formula.update(row, formula.coefficients(scalars))
        predicted: np.ndarray = update + formula.decay_factor(scalars) * before
        return predicted

    zero = change(0.0)
    return _slope(change(1.0) - zero, row["W"] - before - zero)


@cause("external-change", is_local=True)
def external_change(evidence: Evidence, failure: Failure) -> Facts | None:
    """Something other than the optimizer changed weights: {n} at step {step}.

    The states are right, but these weights are not what the optimizer computed. Or else a number
    that only the update uses (eps) is not the recorded one.
    """
    return {"n": f"{failure.n_wrong['W']:,}"} if failure.states_are_right else None


@cause("wrong-gradient", is_local=True, needs_formula=True)
def wrong_gradient(evidence: Evidence, failure: Failure) -> Facts | None:
    """The gradient of step {step} is not the one that the optimizer consumed.

    Another gradient explains the states, and the rows before and after the step are sound.
    """
    step = failure.steps[0]
    states = [state.name for state in evidence.schema.optimizer.states]
    wrong = [name for name in states if name in failure.wrong]
    if len(failure.steps) > 1 or not wrong or len(wrong) < min(2, len(states)):
        return None
    consumed = evidence.consumed(step)
    unknown = np.isnan(consumed.gradient)
    consumed.gradient[unknown] = evidence.values("grad", step)[unknown]
    allowed = evidence.bounds(step, consumed.gradient)
    error = allowed[consumed.variable] * consumed.per_error
    before = evidence.numbers(evidence.inputs(step))
    explained, lower, upper = (
        evidence.formula.advance(before, consumed.gradient + by, evidence.scalars(step))
        for by in (0, -error, error)
    )
    for name in wrong:
        spread = np.maximum(*(abs(end[name] - explained[name]) for end in (lower, upper)))
        apart = abs(evidence.values(name, step) - explained[name])
        if float((apart <= allowed[name] + spread)[~unknown].mean()) <= 0.999:
            return None
    return {"variable": "grad"}


@cause("unbalanced")
def unbalanced(evidence: Evidence, failure: Failure) -> Facts | None:
    """Rows from step {step} on do not follow from the rows before.

    The first difference is in {variable}, at {place}. No known cause explains it.
    """
    return {}
