"""The conditions that are looked for, in the order in which they are told.

Each is a function that finds out what there is to say; its docstring is what is said. They read
`Measurements` only, and so do not know where these come from.
"""

import math
from collections.abc import Iterator

import numpy as np

from thimble_zarr.analysis.health.condition import Concern, Condition, Facts, condition
from thimble_zarr.analysis.health.measurements import Measurements
from thimble_zarr.bits import decode, encode, spacing, unit_roundoff
from thimble_zarr.optim.base import LEARNING_RATE

LOSS = "loss"

MOST = 0.5
"""Share of the updates from which on they are called most."""

LOST = 0.1
"""Part of a step's size that rounding must take from it: of a sparse gradient most updates may be
tiny, and nothing of the step is lost with them."""

STAYS = 0.9
"""Share of the steps from a first one on at which something must be so, to be so from there on."""

EXPLODES = 10
"""Times its median from which on a gradient's norm explodes. In sound runs of ours it stays below
3, of a sample of tokens below 4."""

LEAST_STEPS = 5
"""Steps that a median is of at least."""

LOGGED = 0.9
"""Share of the steps whose loss is known from which on one that is not known was not a number."""

MANTISSAS_TRIED = 2**10
"""As many as float16 has."""


@condition("loss-not-finite")
def loss_is_not_finite(of: Measurements) -> Iterator[Facts]:
    """The loss is {what} at {n_steps} of {n_known} steps, first at step {step}."""
    loss = of.scalars[LOSS]
    is_nan = _nan_was_logged(of)
    wrong = is_nan | np.isinf(loss)
    if wrong.any():
        what = " or ".join(
            name for name, at in (("NaN", is_nan), ("infinite", np.isinf(loss))) if at.any()
        )
        n_known = int(np.count_nonzero(~np.isnan(loss) | is_nan))
        yield {"step": _first(of, wrong), "what": what, "n_steps": _n(wrong), "n_known": n_known}


def _nan_was_logged(of: Measurements) -> np.ndarray:
    """Return where the loss was NaN; a loss that was not logged is NaN, too.

    It was where a loss is known of nearly all other steps, but not of a step that was skipped, and
    the last one's may come yet. And it was from when one should have been logged, if none was any
    more and the gradient, or where that is not recorded the step, is no number any more.
    """
    loss = of.scalars[LOSS]
    missing = np.isnan(loss)
    known = np.flatnonzero(~missing)
    none = np.zeros(len(loss), bool)
    if len(known) == 0:
        return none
    if len(known) >= LOGGED * len(loss):
        counts: np.ndarray = missing & of.taken & (of.steps < of.steps[-1])
        return counts
    interval = int(np.diff(known, prepend=-1).max())
    later = np.arange(len(loss)) >= known[-1] + interval
    numbers = np.isfinite(of.grad_norm)
    if not numbers.any():
        numbers = np.isfinite(of.updates.size)
    went_on = bool(numbers[later].any()) or not numbers.any()
    return none if went_on else later


@condition("gradient-explodes")
def gradient_explodes(of: Measurements) -> Iterator[Facts]:
    """The norm of the gradient explodes at {n_steps} of {n_known} steps, first at step {step}.

    At step {largest_step} it is {largest:.3g}; its median is {median:.3g} ({looked_at}).
    """
    norms = of.grad_norm
    known = np.isfinite(norms)
    median = float(np.median(norms[known])) if known.any() else math.nan
    explodes = (np.isnan(norms) & of.taken) | np.isinf(norms)
    explodes &= ~np.isnan(norms).all()  # it was not recorded
    if median > 0 and _n(known) >= LEAST_STEPS:
        explodes |= norms >= EXPLODES * median
    if explodes.any():
        largest = int(np.argmax(np.where(np.isnan(norms) & explodes, np.inf, np.nan_to_num(norms))))
        yield {
            "step": _first(of, explodes),
            "n_steps": _n(explodes),
            "n_known": _n(~np.isnan(norms) | explodes),
            "largest": float(norms[largest]),
            "largest_step": int(of.steps[largest]),
            "median": median,
            "looked_at": of.grad_looked_at,
        }


@condition("learning-rate-zero")
def learning_rate_is_zero(of: Measurements) -> Iterator[Facts]:
    """The learning rate is 0 at {n_steps} of {n_known} steps, {since} step {step}{on}.

    These steps leave the weights as they are.
    """
    rate = of.scalars[LEARNING_RATE.name]
    zero = rate == 0
    positive = np.flatnonzero(rate > 0)
    if len(positive):
        zero[: positive[0]] = False  # it may grow from 0
    if zero.any():
        stays = bool(zero[int(np.argmax(zero)) :].all())
        words = {"since": "from", "on": " on"} if stays else {"since": "first at", "on": ""}
        yield {"step": _first(of, zero), "n_steps": _n(zero), "n_known": len(rate), **words}


@condition("state-cannot-decay")
def state_cannot_decay(of: Measurements) -> Iterator[Facts]:
    """{variable} cannot decay in {dtype}.

    {factor:g} times a number is rounded back to that number, for {n_stuck} of {n_mantissas}
    mantissas.
    """
    schema = of.schema
    for state in schema.optimizer.states:
        if state.decay is None or state.name not in schema.dtypes:
            continue
        native, factors = schema.dtypes[state.name], of.scalars[state.decay]
        values, where = np.unique(factors, return_inverse=True)
        program = schema.optimizer.implementation if schema.device == "cpu" else ""
        counts = [stuck_mantissas(float(value), native, program) for value in values]
        n_stuck = np.array([n for n, _ in counts])[where]
        if n_stuck.any():
            most = int(np.argmax(n_stuck))
            yield {
                "step": _first(of, n_stuck > 0),
                "variable": state.name,
                "dtype": native,
                "factor": float(factors[most]),
                "n_stuck": int(n_stuck[most]),
                "n_mantissas": counts[0][1],
            }


def stuck_mantissas(factor: float, native: str, program: str = "") -> tuple[int, int]:
    """Return how many mantissas stay what they are if multiplied with a factor, and of how many.

    Of dtypes of more than 16 bits some are tried. None do where the factor is not to change them.
    `program` is that of torch on a CPU, of which one rounds the factor, too.
    """
    n_mantissas = min(MANTISSAS_TRIED, round(0.5 / unit_roundoff(native)))
    if not 0 < factor < 1:
        return 0, n_mantissas
    if program == "foreach":
        factor = float(decode(encode(np.array(factor), native), native))
    numbers = np.linspace(1, 2, n_mantissas, endpoint=False)
    stuck = encode(factor * numbers, native) == encode(numbers, native)
    return _n(stuck), n_mantissas


@condition("updates-vanish-at-the-start")
def updates_vanish_at_the_start(of: Measurements) -> Iterator[Facts]:
    """At step {step}, {share:.1%} of the updates are smaller than half a ULP and mostly are lost.

    An update is {size:.2g}. The weights have a standard deviation of {std:.3g}, and a ULP there is
    {ulp:.2g} ({looked_at}).
    """
    at, updates = of.first_update, of.updates
    if at is not None and _vanish(of)[at]:
        std, native = float(updates.std[at]), of.schema.dtypes["W"]
        yield {
            "step": int(of.steps[at]),
            "share": _share(updates.share_small[at]),
            "lost": float(updates.lost[at]),
            "std": std,
            "ulp": float(spacing(encode(np.array([std]), native), native)[0]),
            "size": float(updates.size[at]),
            "looked_at": updates.looked_at,
        }


@condition("updates-below-half-ulp")
def updates_are_below_half_ulp(of: Measurements) -> Iterator[Facts]:
    """From step {step} on, most updates are below half a ULP, and rounding loses most of those.

    They are {share:.1%} of all updates on average, and {last_share:.1%} at step {last_step}
    ({looked_at}).
    """
    updates = of.updates
    known = np.flatnonzero(~np.isnan(updates.share_small))
    vanish = _vanish(of)[known]
    from_here = np.cumsum(vanish[::-1])[::-1] / np.arange(len(known), 0, -1)
    since = known[np.flatnonzero(vanish & (from_here >= STAYS))]
    if len(since):
        last = known[-1]
        yield {
            "step": int(of.steps[since[0]]),
            "share": _share(np.mean(updates.share_small[known[known >= since[0]]])),
            "last_step": int(of.steps[last]),
            "last_share": _share(updates.share_small[last]),
            "last_lost": float(updates.lost[last]),
            "looked_at": updates.looked_at,
        }


def _vanish(of: Measurements) -> np.ndarray:
    """Return at which steps most updates are too small, and are missing from the step."""
    vanish: np.ndarray = (of.updates.share_small >= MOST) & (of.updates.lost >= LOST)
    return vanish


def _first(of: Measurements, where: np.ndarray) -> int:
    return int(of.steps[np.argmax(where)])


def _n(where: np.ndarray) -> int:
    return int(np.count_nonzero(where))


def _share(value: float | np.floating) -> float:
    """Return a share rounded down, so that 100 % is all."""
    return math.floor(1e3 * float(value)) / 1e3


CONDITIONS: tuple[Condition, ...] = tuple(
    one for one in list(vars().values()) if isinstance(one, Condition)
)


def concerns_of(measurements: Measurements) -> tuple[Concern, ...]:
    """Return what there is to say of a run."""
    return tuple(found for one in CONDITIONS for found in one.concerns(measurements))
