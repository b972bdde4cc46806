"""The variables of a recording, stored and derived, as functions of a window.

A derived variable is a formula with a name. It is evaluated in float64 on the window it is asked
for and rounded once, to float32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from thimble_zarr.analysis.windows import Window
from thimble_zarr.format.bits import unit_roundoff
from thimble_zarr.format.schema import VARIABLES
from thimble_zarr.optim import adamw


@dataclass(frozen=True)
class Derived:
    """A variable that is computed from stored ones.

    Attributes
    ----------
    long_name
        What it is, in words.
    compute
        The formula: from a window to its values, float64, shape `(step, token, dim)`.
    """

    long_name: str
    compute: Callable[[Window], np.ndarray]


def delta_W(window: Window) -> np.ndarray:
    """Return the observed change of the weights."""
    previous = window.previous("W")
    change: np.ndarray = window.current("W") - previous
    return change


def adam_update(window: Window) -> np.ndarray:
    """Return the change that the adaptive step predicts."""
    return adamw.adam_update(
        window.current("exp_avg"),
        window.current(window.source.second_moment),
        learning_rate=window.scalar("learning_rate"),
        beta1=window.scalar("beta1"),
        beta2=window.scalar("beta2"),
        eps=window.scalar("eps"),
        optimizer_step=window.scalar("optimizer_step"),
    )


def weight_decay(window: Window) -> np.ndarray:
    """Return the coefficient that acts on the weights, shape `(step, 1, 1)`.

    Zero for Adam with L2 decay, which is in the gradient and so in the moments already.
    """
    coefficient = window.scalar("weight_decay")
    decoupled = window.source.reader.schema.optimizer.decoupled_weight_decay
    return coefficient if decoupled else np.zeros_like(coefficient)


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


def rounding_bound(window: Window, update: np.ndarray) -> np.ndarray:
    """Return the largest residual that rounding can leave, given the formula's update."""
    schema = window.source.reader.schema
    float64 = unit_roundoff("float64")
    # These programs compute step size and bias corrections in float32, on the device.
    on_device = (
        schema.optimizer.capturable
        or schema.optimizer.tensor_lr
        or schema.optimizer.implementation == "fused"
    )
    return adamw.rounding_bound(
        update,
        window.current("W"),
        window.previous("W"),
        weight_decay=weight_decay(window),
        beta1=window.scalar("beta1"),
        beta2=window.scalar("beta2"),
        optimizer_step=window.scalar("optimizer_step"),
        unit_roundoff=unit_roundoff(schema.dtypes["W"]) + float64,  # torch's rounding and ours
        scalar_roundoff=4 * (unit_roundoff("float32") if on_device else float64),
    )


DERIVED: Mapping[str, Derived] = {
    "delta_W": Derived("observed change of the weight, W[t] - W[t-1]", delta_W),
    "adam_update": Derived("change predicted by the adaptive step", adam_update),
    "adam_decay": Derived("change predicted by decoupled weight decay", adam_decay),
    "adam_residual": Derived("observed change minus update and decay", adam_residual),
}


def long_name(name: str) -> str:
    """Return what a variable is, in words."""
    return DERIVED[name].long_name if name in DERIVED else VARIABLES[name]


def evaluate(name: str, window: Window) -> np.ndarray:
    """Return a variable on a window, float64, shape `(step, token, dim)`."""
    return DERIVED[name].compute(window) if name in DERIVED else window.current(name)
