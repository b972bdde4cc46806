r"""Adamax.

What a step should do, in real numbers, given the first moment m and the norm n after it:

.. math::

    update_t = -\frac{\eta_t}{1 - \beta_1^t} \frac{m_t}{n_t}

(Kingma and Ba, "Adam: a method for stochastic optimization", 2015, algorithm 2, in the form of
`torch.optim.Adamax`, where :math:`\epsilon` is in the norm). Weight decay is in the gradient, and
so in both already.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from thimble_zarr.optim.base import (
    BETA1,
    BETA2,
    EPS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    State,
)
from thimble_zarr.optim.elementwise import Branches, Elementwise
from thimble_zarr.optim.formula import Arrays
from thimble_zarr.optim.moments import BIAS_CORRECTION1, estimates
from thimble_zarr.optim.programs.arithmetic import Arithmetic
from thimble_zarr.optim.programs.kernel import Numbers


@dataclass(frozen=True, kw_only=True)
class Adamax(Elementwise):
    """`torch.optim.Adamax`."""

    FUNCTION: ClassVar = "adamax"
    LISTS: ClassVar = ("W", "grad", "exp_avg", "exp_inf", "step")
    MEAN: ClassVar = BETA1.name
    HAS_ROOT: ClassVar = False
    STATES: ClassVar = (
        State("exp_avg", "first moment after the step", decay=BETA1.name),
        State("exp_inf", "decaying maximum of gradients after the step", decay=BETA2.name),
    )
    SCALARS: ClassVar = (LEARNING_RATE, BETA1, BETA2, EPS, WEIGHT_DECAY)
    DERIVED: ClassVar = (BIAS_CORRECTION1,)
    ESTIMATES: ClassVar = estimates("exp_avg_sq")[:1]

    @property
    def update_inputs(self) -> tuple[str, ...]:
        """The moment, and the norm."""
        return ("exp_avg", "exp_inf")

    def numbers(
        self,
        scalars: Mapping[str, Any],
        plain: Callable[[Any], Any],
        narrow: Callable[[Any], Any],
    ) -> dict[str, Any]:
        """Return the numbers of a step."""
        return {
            "decay": narrow(scalars["weight_decay"]),
            **self.weights(scalars["beta1"], plain),
            "beta2": (narrow if self.is_foreach else plain)(scalars["beta2"]),
            "eps": narrow(scalars["eps"]),
            "minus_step_size": plain(-(scalars["learning_rate"] / scalars["bias_correction1"])),
        }

    def take(self, a: Arithmetic, x: Numbers, c: Numbers, ways: Branches) -> dict[str, Any]:
        """Take a step."""
        r, grad = a.rounded, self.gradient(a, x, c, ways)
        first = self.moved(a, x["exp_avg"], grad, c, ways)
        norm = a.maximum(r(x["exp_inf"] * c["beta2"]), r(a.abs(grad) + c["eps"]))
        W = r(x["W"] + c["minus_step_size"] * first / norm)
        return {"W": W, "exp_avg": first, "exp_inf": norm}

    def change(self, a: Arithmetic, x: Numbers, c: Numbers) -> Any:
        """Return the change of the weights."""
        return c["minus_step_size"] * x["exp_avg"] / x["exp_inf"]

    def gradient_of(
        self, a: Arithmetic, x: Arrays, after: Arrays, c: Numbers
    ) -> tuple[str, Any, Any]:
        """Return it from the first moment."""
        return self.gradient_of_mean("exp_avg", x, after, c)
