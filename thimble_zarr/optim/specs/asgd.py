r"""ASGD, averaged stochastic gradient descent.

What a step should do, in real numbers:

.. math::

    update_t = -\eta_t g_t, \qquad decay_t = -\eta_t (\lambda + \omega) W_{t-1}

with :math:`\lambda` torch's `lambd` and :math:`\omega` the weight decay (Polyak and Juditsky,
"Acceleration of stochastic approximation by averaging", 1992, in the form of `torch.optim.ASGD`).
:math:`\eta_t` is `eta`, which torch makes of the learning rate at the end of the step before. `ax`
is the mean of the weights, into which the share :math:`\mu_t` of the new ones enters.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from thimble_zarr.optim.base import (
    LEARNING_RATE,
    WEIGHT_DECAY,
    Scalar,
    State,
)
from thimble_zarr.optim.elementwise import Branches, Elementwise
from thimble_zarr.optim.formula import Arrays, Scalars
from thimble_zarr.optim.programs.arithmetic import Arithmetic
from thimble_zarr.optim.programs.kernel import Numbers

REPLACES = "replaces"
"""The branch of steps whose weights replace their mean."""


@dataclass(frozen=True, kw_only=True)
class ASGD(Elementwise):
    """`torch.optim.ASGD`."""

    FUNCTION: ClassVar = "asgd"
    LISTS: ClassVar = ("W", "grad", "ax", "mu", "eta", "step")
    HAS_ROOT: ClassVar = False
    ROUNDINGS_OF_W: ClassVar = 2
    RATE: ClassVar = "eta"
    STATES: ClassVar = (State("ax", "mean of the weights after the step", of_weights=True),)
    SCALARS: ClassVar = (
        LEARNING_RATE,
        Scalar("lambd", "decay term", "lambd"),
        Scalar("alpha", "power of the decay of eta", "alpha"),
        Scalar("t0", "step from which weights are averaged", "t0"),
        WEIGHT_DECAY,
        Scalar(
            *("eta", "learning rate that the step used", "eta"),
            held="before",
            first=lambda group: float(np.float32(group["lr"])),
        ),
        Scalar(
            *("mu", "share of the weights that entered their mean", "mu"),
            held="before",
            first=lambda group: 1.0,
        ),
    )

    @property
    def update_inputs(self) -> tuple[str, ...]:
        """The gradient."""
        return ("grad",)

    def branches(self, scalars: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return which branches steps take."""
        return super().branches(scalars) | {REPLACES: scalars["mu"] == 1}

    def numbers(
        self,
        scalars: Mapping[str, Any],
        plain: Callable[[Any], Any],
        narrow: Callable[[Any], Any],
    ) -> dict[str, Any]:
        """Return the numbers of a step."""
        eta, lambd = scalars["eta"], scalars["lambd"]
        of_tensor = narrow if self.is_foreach else plain
        return {
            "decay": narrow(scalars["weight_decay"]),
            "lambd": narrow(lambd),
            "shrink": plain(1 - lambd * eta),
            "minus_rate": narrow(-eta),
            "mu": of_tensor(scalars["mu"]),
        }

    def take(self, a: Arithmetic, x: Numbers, c: Numbers, ways: Branches) -> dict[str, Any]:
        """Take a step."""
        r, grad = a.rounded, self.gradient(a, x, c, ways)
        if self.is_foreach:
            W = r(a.fma(r(a.fma(x["W"], c["lambd"], grad)), c["minus_rate"], x["W"]))
            return {"W": W, "ax": r(a.fma(r(W - x["ax"]), c["mu"], x["ax"]))}
        W = r(a.fma(grad, c["minus_rate"], r(x["W"] * c["shrink"])))
        mean = W if REPLACES in ways else r(x["ax"] + r(r(W - x["ax"]) * c["mu"]))
        return {"W": W, "ax": mean}

    def change(self, a: Arithmetic, x: Numbers, c: Numbers) -> Any:
        """Return the change of the weights."""
        return c["minus_rate"] * (-x["grad"] if self.maximize else x["grad"])

    def decay_factor(self, scalars: Scalars) -> Any:
        """Return what both decays multiply `W` with."""
        return -np.asarray(scalars["eta"]) * (scalars["lambd"] + scalars["weight_decay"])

    def gradient_of(
        self, a: Arithmetic, x: Arrays, after: Arrays, c: Numbers
    ) -> tuple[str, Any, Any]:
        """Return it from the weights."""
        kept = x["W"] * c["shrink"]
        return "W", (after["W"] - kept) / c["minus_rate"], 1 / c["minus_rate"]
