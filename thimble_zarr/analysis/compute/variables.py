"""The variables of a recording, stored and derived, as functions of a window.

A derived variable is a formula with a name. It is evaluated in float64 on the window it is asked
for and rounded once, to float32.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from thimble_zarr.analysis.compute.replayed import replayed
from thimble_zarr.analysis.compute.windows import Window
from thimble_zarr.bits import decode, least_positive, spacing, unit_roundoff
from thimble_zarr.format.schema import VARIABLES, Schema, recorded_variables
from thimble_zarr.optim import adam as adamw


@dataclass(frozen=True)
class Derived:
    """A variable that is computed from stored ones.

    Attributes
    ----------
    long_name
        What it is, in words.
    inputs
        The stored variables that it needs, given the schema.
    compute
        The formula: from a window to its values, float64, shape `(step, token, dim)`.
    """

    long_name: str
    inputs: Callable[[Schema], tuple[str, ...]]
    compute: Callable[[Window], np.ndarray]


def delta_W(window: Window) -> np.ndarray:
    """Return the observed change of the weights."""
    previous = window.previous("W")
    change: np.ndarray = window.current("W") - previous
    return change


def adam_update(
    window: Window, out: tuple[np.ndarray, np.ndarray] | tuple[None, None] = (None, None)
) -> np.ndarray:
    """Return the change that the adaptive step predicts.

    It is computed in the arrays `out`, if they are given, and is in the first.
    """
    exp_avg_sq = window.decoded(window.source.second_moment, out[0])
    exp_avg = window.decoded("exp_avg", out[1])
    return adamw.adam_update(exp_avg, exp_avg_sq, window.of_rows(_update_scalars), out[0])


def _update_scalars(window: Window) -> adamw.UpdateScalars:
    names = ("learning_rate", "beta1", "beta2", "eps", "optimizer_step")
    scalars = adamw.update_scalars(**{name: window.scalar(name) for name in names})
    return adamw.UpdateScalars(*(scalar.astype(window.dtype) for scalar in scalars))


def weight_decay(window: Window) -> np.ndarray:
    """Return the coefficient that acts on the weights, shape `(step, 1, 1)`.

    Zero for Adam with L2 decay, which is in the gradient and so in the moments already.
    """
    coefficient = window.scalar("weight_decay")
    decoupled = window.source.reader.schema.optimizer.decoupled_weight_decay
    return coefficient if decoupled else np.zeros_like(coefficient)


def decays(window: Window) -> bool:
    """Return whether decoupled weight decay acts at any of the steps."""
    return bool(weight_decay(window).any())


def adam_decay(window: Window) -> np.ndarray:
    """Return the change that decoupled weight decay predicts."""
    return adamw.adam_decay(
        window.previous("W"),
        learning_rate=window.scalar("learning_rate"),
        weight_decay=weight_decay(window),
    )


def predicted(window: Window) -> np.ndarray:
    """Return update and decay together."""
    change: np.ndarray = adam_update(window) + adam_decay(window)
    return change


def adam_residual(window: Window) -> np.ndarray:
    """Return what the formula leaves of the observed change."""
    residual: np.ndarray = delta_W(window) - predicted(window)
    return residual


def unexplained(window: Window) -> np.ndarray:
    """Return what the exact replay leaves of the observed change: zero in a sound record."""
    bits = replayed(window)["W"]
    replay = decode(bits, window.source.reader.schema.dtypes["W"], np.float64)
    current = window.current("W")
    # Infinite weights of a diverged run, replayed as such, leave nothing.
    difference: np.ndarray = np.where(current == replay, 0.0, current - replay)
    return difference


def rounding(window: Window) -> np.ndarray:
    """Return what the exact replay does beyond the formula.

    It is taken as what `unexplained` leaves of the residual, both in float32, so that the two add
    up to it in that precision: to the bit in a sound record, where `unexplained` is zero.
    """
    residual, rest = adam_residual(window).astype(np.float32), unexplained(window)
    difference: np.ndarray = residual - rest.astype(np.float32)
    return difference


def ulp(window: Window) -> np.ndarray:
    """Return the spacing of the dtype at the weight."""
    return spacing(window.bits("W"), window.source.reader.schema.dtypes["W"])


def displacement_ulp(window: Window) -> np.ndarray:
    """Return the observed change in units of `ulp`: how far the weight moved on its lattice."""
    displacement: np.ndarray = delta_W(window) / ulp(window)
    return displacement


def stalled(window: Window) -> np.ndarray:
    """Return 1 where the formula wants a move and the weight did not move, else 0."""
    observed = delta_W(window)
    stands = (predicted(window) != 0) & (observed == 0)
    return np.where(np.isnan(observed), np.nan, stands)


def rounding_bound(
    window: Window, update: np.ndarray, out: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Return the largest residual that rounding can leave, given the formula's update.

    It is computed in the arrays `out`, the first of which may be the update.
    """
    return adamw.rounding_bound(
        update,
        window.current("W"),
        window.previous("W"),
        window.of_rows(_rounding_scalars) or _rounding_scalars_of_elements(window),
        out,
    )


def _rounding_scalars(window: Window) -> adamw.RoundingScalars | None:
    """Return how rounding errors grow, None where epsilon is so small that elements decide it."""
    schema, eps = window.source.reader.schema, window.scalar("eps")
    if not (eps > 1e6 * least_positive(schema.dtypes["W"])).all():
        return None
    return _rounding_scalars_given(window, denominator=eps)


def _rounding_scalars_of_elements(window: Window) -> adamw.RoundingScalars:
    denominator = adamw.adam_denominator(
        window.current(window.source.second_moment),
        beta2=window.scalar("beta2"),
        eps=window.scalar("eps"),
        optimizer_step=window.scalar("optimizer_step"),
    )
    return _rounding_scalars_given(window, denominator=denominator)


def _rounding_scalars_given(window: Window, denominator: np.ndarray) -> adamw.RoundingScalars:
    schema = window.source.reader.schema
    native, float64 = schema.dtypes["W"], unit_roundoff("float64")
    ours = unit_roundoff(np.dtype(window.dtype).name)
    # These programs compute step size and bias corrections in float32, on the device.
    on_device = (
        schema.optimizer.capturable
        or schema.optimizer.differentiable
        or schema.optimizer.lr_dtype is not None
        or schema.optimizer.betas_dtype is not None
        or schema.optimizer.implementation == "fused"
    )
    return adamw.rounding_scalars(
        denominator=denominator,
        weight_decay=weight_decay(window),
        beta1=window.scalar("beta1"),
        beta2=window.scalar("beta2"),
        optimizer_step=window.scalar("optimizer_step"),
        unit_roundoff=unit_roundoff(native) + ours,  # torch's rounding and ours
        scalar_roundoff=4 * (unit_roundoff("float32") if on_device else float64),
        least=least_positive(native),
    )


def freeze_step(window: Window) -> np.ndarray:
    """Return the last step of the window at which any of a token's elements moved, or 0."""
    moved = (delta_W(window) != 0).any(axis=2) & window.follows[:, np.newaxis]
    last: np.ndarray = (moved * window.source.steps[window.rows, np.newaxis]).max(axis=0)
    return last


def _weights(schema: Schema) -> tuple[str, ...]:
    return ("W",)


def _moments(schema: Schema) -> tuple[str, ...]:
    return "exp_avg", "max_exp_avg_sq" if schema.optimizer.amsgrad else "exp_avg_sq"


def formula_inputs(schema: Schema) -> tuple[str, ...]:
    """Return the stored variables that AdamW's formula and the change it predicts need."""
    return *_weights(schema), *_moments(schema)


def replay_inputs(schema: Schema) -> tuple[str, ...]:
    """Return the stored variables that the exact replay needs."""
    return recorded_variables(schema.optimizer)


DERIVED: Mapping[str, Derived] = {
    "delta_W": Derived("observed change of the weight, W[t] - W[t-1]", _weights, delta_W),
    "adam_update": Derived("change predicted by the adaptive step", _moments, adam_update),
    "adam_decay": Derived("change predicted by decoupled weight decay", _weights, adam_decay),
    "adam_residual": Derived(
        "observed change minus update and decay", formula_inputs, adam_residual
    ),
    "rounding": Derived(
        "part of the residual that torch's rounding makes", replay_inputs, rounding
    ),
    "unexplained": Derived(
        "part of the residual that the exact replay leaves", replay_inputs, unexplained
    ),
    "ulp": Derived("spacing of the dtype at the weight", _weights, ulp),
    "displacement_ulp": Derived(
        "observed change in steps of the dtype's lattice", _weights, displacement_ulp
    ),
    "stalled": Derived(
        "1 where the formula moves the weight and it stays, else 0", formula_inputs, stalled
    ),
}


def long_name(name: str) -> str:
    """Return what a variable is, in words."""
    return DERIVED[name].long_name if name in DERIVED else VARIABLES[name]


def inputs(name: str, schema: Schema) -> tuple[str, ...]:
    """Return the stored variables that one is computed from; of a stored one itself."""
    return DERIVED[name].inputs(schema) if name in DERIVED else (name,)


def missing_inputs(name: str, schema: Schema) -> tuple[str, ...]:
    """Return the variables that were not recorded and without which there is not this one."""
    return tuple(needed for needed in inputs(name, schema) if needed not in schema.dtypes)


def how_to_record(missing: Sequence[str], schema: Schema) -> str:
    """Return what was not recorded, and how it would be."""
    others = (name for name in recorded_variables(schema.optimizer) if name in schema.dtypes)
    variables = ", ".join(f'"{name}"' for name in (*others, *missing))
    names = " and ".join(filter(None, [", ".join(missing[:-1]), missing[-1]]))
    were = "were" if len(missing) > 1 else "was"
    return f"{names} {were} not recorded; record with variables=({variables}), or with all of them"


def evaluate(name: str, window: Window) -> np.ndarray:
    """Return a variable on a window, shape `(step, token, dim)`.

    Derived variables are float32, without negative zeros, so that what adds up does so bit by bit.
    Stored ones are float64, exact.
    """
    if name not in DERIVED:
        return window.current(name)
    values: np.ndarray = DERIVED[name].compute(window).astype(np.float32) + np.float32(0)
    return values
