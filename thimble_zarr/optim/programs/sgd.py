"""SGD, in the operations of torch's programs for CPUs with vector instructions."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from thimble_zarr.optim.base import COUNT
from thimble_zarr.optim.programs.arithmetic import Arithmetic
from thimble_zarr.optim.programs.kernel import Kernel, Numbers, Rounder
from thimble_zarr.optim.sgd import SGD

_BUFFER = SGD.STATES[0].name

DECAYS = "decays"
"""The step has weight decay."""

MOMENTUM = "momentum"
"""Its momentum is not 0."""

FIRST = "first"
"""A buffer that is missing begins at this step, as the gradient."""


def _ways(optimizer: SGD, scalars: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return which branches the steps take."""
    return {
        DECAYS: scalars["weight_decay"] != 0,
        MOMENTUM: (scalars["momentum"] != 0) & optimizer.has_momentum,
        FIRST: scalars[COUNT] <= 1,
    }


def _coefficients(
    optimizer: SGD, scalars: Mapping[str, np.ndarray], rounder: Rounder
) -> dict[str, np.ndarray]:
    """Return the numbers that arrays are multiplied with."""
    plain, narrow = rounder.plain, rounder.narrow
    kept = plain if optimizer.implementation == "single" else narrow
    return {
        "decay": narrow(scalars["weight_decay"]),
        "kept": kept(scalars["momentum"]),
        "taken": narrow(1 - scalars["dampening"]),
        "momentum": narrow(scalars["momentum"]),
        "minus_rate": narrow(-scalars["learning_rate"]),
    }


def _compute(
    a: Arithmetic, optimizer: SGD, x: Numbers, c: Numbers, ways: frozenset[str]
) -> dict[str, Any]:
    """Take a step; what `fused` fuses is the same in 32 and 64 bits."""
    r = a.rounded
    W, grad = x["W"], -x["grad"] if optimizer.maximize else x["grad"]
    after = {_BUFFER: x[_BUFFER]} if optimizer.has_momentum else {}
    if DECAYS in ways:
        grad = r(a.fma(W, c["decay"], grad))
    if MOMENTUM in ways:
        buffer = r(a.fma(grad, c["taken"], r(x[_BUFFER] * c["kept"])))
        if FIRST in ways:
            buffer = a.select(a.is_nan(x[_BUFFER]), grad, buffer)
        after[_BUFFER] = buffer
        grad = r(a.fma(buffer, c["momentum"], grad)) if optimizer.nesterov else buffer
    return {"W": r(a.fma(grad, c["minus_rate"], W)), **after}


def sgd_kernel(optimizer: SGD) -> Kernel:
    """Return the newest kernel of an SGD."""
    return Kernel(f"sgd-{optimizer.implementation}/1", _ways, _coefficients, _compute)
