r"""Adagrad.

What a step should do, in real numbers, given the sum s of squared gradients after it:

.. math::

    update_t = -\frac{\eta_t}{1 + (t - 1) \delta}
        \frac{g_t + \lambda W_{t-1}}{\sqrt{s_t} + \epsilon}

(Duchi, Hazan and Singer, "Adaptive subgradient methods", 2011, in the form of
`torch.optim.Adagrad`, whose learning rate decays with :math:`\delta`). Weight decay is in the
gradient.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from thimble_zarr.optim.base import (
    COUNT,
    EPS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Scalar,
    State,
)
from thimble_zarr.optim.elementwise import DECAYS, Branches, Elementwise
from thimble_zarr.optim.formula import Arrays
from thimble_zarr.optim.programs.arithmetic import Arithmetic, fma64
from thimble_zarr.optim.programs.kernel import Numbers


@dataclass(frozen=True, kw_only=True)
class Adagrad(Elementwise):
    """`torch.optim.Adagrad`.

    Attributes
    ----------
    initial_accumulator_value
        What the sum begins with.
    """

    FUNCTION: ClassVar = "adagrad"
    LISTS: ClassVar = ("W", "grad", "sum", "step")
    FLAGS: ClassVar = ("maximize", "differentiable")
    IMPLEMENTATIONS: ClassVar = ("single", "foreach", "fused")
    STATES: ClassVar = (State("sum", "sum of squared gradients after the step"),)
    SCALARS: ClassVar = (
        LEARNING_RATE,
        Scalar("lr_decay", "decay of the learning rate", "lr_decay"),
        EPS,
        WEIGHT_DECAY,
    )

    initial_accumulator_value: float = 0.0

    @classmethod
    def choices(cls, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the sum begins with."""
        return {"initial_accumulator_value": float(group["initial_accumulator_value"])}

    @property
    def states(self) -> tuple[State, ...]:
        """The sum, as it begins in this run."""
        return (replace(self.STATES[0], first=self.initial_accumulator_value),)

    @property
    def update_inputs(self) -> tuple[str, ...]:
        """The sum, and the gradient."""
        return ("sum", *self.direct_gradient)

    def numbers(
        self,
        scalars: Mapping[str, Any],
        plain: Callable[[Any], Any],
        narrow: Callable[[Any], Any],
    ) -> dict[str, Any]:
        """Return the numbers of a step."""
        waited, decay = scalars[COUNT] - 1, scalars["lr_decay"]
        passed = 1 + waited * decay
        if self.implementation == "fused" and isinstance(waited, np.ndarray):
            passed = fma64(waited, decay, np.ones_like(waited))  # as its compiler fuses it
        minus_rate = -scalars["learning_rate"] / passed
        return {
            "decay": narrow(scalars["weight_decay"]),
            "eps": narrow(scalars["eps"]),
            "minus_rate": plain(minus_rate),
            "minus_rate_narrow": narrow(minus_rate),
        }

    def take(self, a: Arithmetic, x: Numbers, c: Numbers, ways: Branches) -> dict[str, Any]:
        """Take a step."""
        r, grad = a.rounded, self.gradient(a, x, c, ways)
        total = r(a.fma(grad, grad, x["sum"]))
        denominator = r(r(a.sqrt(total)) + c["eps"])
        # In place, torch multiplies with another number than otherwise.
        in_place = self.is_foreach and (DECAYS in ways or self.maximize)
        is_narrow = in_place or self.implementation == "fused"
        scaled = c["minus_rate_narrow" if is_narrow else "minus_rate"] * grad
        if self.is_foreach:
            scaled = r(scaled)
        return {"W": r(x["W"] + scaled / denominator), "sum": total}

    def change(self, a: Arithmetic, x: Numbers, c: Numbers) -> Any:
        """Return the change of the weights."""
        denominator = a.sqrt(x["sum"]) + c["eps"]
        return c["minus_rate"] * self.real_gradient(a, x, c) / denominator

    def gradient_of(
        self, a: Arithmetic, x: Arrays, after: Arrays, c: Numbers
    ) -> tuple[str, Any, Any]:
        """Return it from the weights."""
        per_error = (a.sqrt(after["sum"]) + c["eps"]) / c["minus_rate"]
        return "W", (after["W"] - x["W"]) * per_error, per_error
