r"""Adadelta.

A step multiplies the gradient with a quotient of two means: of squared changes, before the step,
and of squared gradients, after it (Zeiler, "Adadelta: an adaptive learning rate method", 2012,
algorithm 1). Given both means after it, u and v, and :math:`g = g_t + \lambda W_{t-1}`, that is

.. math::

    update_t = -\eta_t g
        \sqrt{\frac{u_t + \rho \epsilon}{\rho (v_t + \epsilon) + (1 - \rho) g^2}}

since :math:`u_t = \rho u_{t-1} + (1 - \rho) \Delta^2`, where the change is
:math:`\Delta^2 = g^2 (u_{t-1} + \epsilon) / (v_t + \epsilon)`. Weight decay is in the gradient.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from thimble_zarr.optim.base import (
    EPS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Scalar,
    State,
)
from thimble_zarr.optim.elementwise import Branches, Elementwise
from thimble_zarr.optim.formula import Arrays
from thimble_zarr.optim.programs.arithmetic import Arithmetic
from thimble_zarr.optim.programs.kernel import Numbers


@dataclass(frozen=True, kw_only=True)
class Adadelta(Elementwise):
    """`torch.optim.Adadelta`."""

    FUNCTION: ClassVar = "adadelta"
    LISTS: ClassVar = ("W", "grad", "square_avg", "acc_delta", "step")
    STATES: ClassVar = (
        State("square_avg", "mean of squared gradients after the step", decay="rho"),
        State("acc_delta", "mean of squared changes after the step", decay="rho"),
    )
    SCALARS: ClassVar = (
        LEARNING_RATE,
        Scalar("rho", "decay rate of the means", "rho"),
        EPS,
        WEIGHT_DECAY,
    )

    @property
    def update_inputs(self) -> tuple[str, ...]:
        """Both means, and the gradient."""
        return ("square_avg", "acc_delta", *self.direct_gradient)

    def numbers(
        self,
        scalars: Mapping[str, Any],
        plain: Callable[[Any], Any],
        narrow: Callable[[Any], Any],
    ) -> dict[str, Any]:
        """Return the numbers of a step."""
        rho = scalars["rho"]
        return {
            "decay": narrow(scalars["weight_decay"]),
            "rho": (narrow if self.is_foreach else plain)(rho),
            "weight": plain(1 - rho),
            "eps": narrow(scalars["eps"]),
            "minus_rate": narrow(-scalars["learning_rate"]),
        }

    def take(self, a: Arithmetic, x: Numbers, c: Numbers, ways: Branches) -> dict[str, Any]:
        """Take a step."""
        r, grad = a.rounded, self.gradient(a, x, c, ways)
        square = r(a.fma(c["weight"] * grad, grad, r(x["square_avg"] * c["rho"])))
        denominator = r(a.sqrt(r(square + c["eps"])))
        root = r(a.sqrt(r(x["acc_delta"] + c["eps"])))
        delta = r(r(root / denominator) * grad)
        changes = r(a.fma(c["weight"] * delta, delta, r(x["acc_delta"] * c["rho"])))
        W = r(a.fma(delta, c["minus_rate"], x["W"]))
        return {"W": W, "square_avg": square, "acc_delta": changes}

    def change(self, a: Arithmetic, x: Numbers, c: Numbers) -> Any:
        """Return the change of the weights."""
        r, grad = a.rounded, self.real_gradient(a, x, c)
        changes = r(r(x["acc_delta"]))  # so often it was rounded when it was made
        return c["minus_rate"] * grad * self._factor(a, {**x, "acc_delta": changes}, grad, c)

    @staticmethod
    def _factor(a: Arithmetic, after: Numbers, grad: Any, c: Numbers) -> Any:
        """Return what a step multiplies the gradient with."""
        square = c["rho"] * (after["square_avg"] + c["eps"]) + c["weight"] * grad * grad
        return a.sqrt((after["acc_delta"] + c["rho"] * c["eps"]) / square)

    def gradient_of(
        self, a: Arithmetic, x: Arrays, after: Arrays, c: Numbers
    ) -> tuple[str, Any, Any]:
        """Return it from the weights, and the quotient from the means."""
        quotient = (x["acc_delta"] + c["eps"]) / (after["square_avg"] + c["eps"])
        per_error = 1 / (c["minus_rate"] * a.sqrt(quotient))
        return "W", (after["W"] - x["W"]) * per_error, per_error
