r"""RAdam.

What a step should do, in real numbers, given the states after it:

.. math::

    update_t = -\eta_t \hat m_t r_t \frac{\sqrt{1 - \beta_2^t}}{\sqrt{v_t} + \epsilon},
    \qquad r_t = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2) \rho_\infty}
        {(\rho_\infty - 4)(\rho_\infty - 2) \rho_t}}

and :math:`-\eta_t \hat m_t` while :math:`\rho_t \le 5`, with
:math:`\rho_\infty = 2 / (1 - \beta_2) - 1` and
:math:`\rho_t = \rho_\infty - 2 t \beta_2^t / (1 - \beta_2^t)` (Liu et al., "On the variance of the
adaptive learning rate and beyond", 2020, algorithm 2). Weight decay is in the gradient, or
decoupled as that of AdamW.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from thimble_zarr.optim.base import (
    BETA1,
    BETA2,
    COUNT,
    EPS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Derived,
    State,
)
from thimble_zarr.optim.elementwise import DECAYS, Branches, Elementwise
from thimble_zarr.optim.formula import Arrays, Scalars
from thimble_zarr.optim.programs.arithmetic import Arithmetic
from thimble_zarr.optim.programs.kernel import Numbers
from thimble_zarr.optim.specs.adam import BIAS_CORRECTION1, BIAS_CORRECTION2_SQRT, moments

RECTIFIED = "rectified"
"""The branch of steps that are divided by the second moment."""


def _rectification(optimizer: Any, scalars: Mapping[str, Any]) -> Any:
    """Return r, 0 where nothing is rectified, in the order in which torch computes it."""
    beta2, count = scalars[BETA2.name], scalars[COUNT]
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * count * (beta2**count) / (1 - beta2**count)
    if not length > 5.0:
        return 0.0
    quotient = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return quotient**0.5


@dataclass(frozen=True, kw_only=True)
class RAdam(Elementwise):
    """`torch.optim.RAdam`.

    Attributes
    ----------
    decoupled_weight_decay
        torch's flag of this name.
    """

    FUNCTION: ClassVar = "radam"
    LISTS: ClassVar = ("W", "grad", "exp_avg", "exp_avg_sq", "step")
    FLAGS: ClassVar = (*Elementwise.FLAGS, "decoupled_weight_decay")
    MEAN: ClassVar = BETA1.name
    STATES: ClassVar = (
        State("exp_avg", "first moment after the step", decay=BETA1.name),
        State("exp_avg_sq", "second moment after the step", decay=BETA2.name),
    )
    SCALARS: ClassVar = (LEARNING_RATE, BETA1, BETA2, EPS, WEIGHT_DECAY)
    DERIVED: ClassVar = (
        BIAS_CORRECTION1,
        BIAS_CORRECTION2_SQRT,
        Derived("rectification", "r, 0 where nothing is rectified", _rectification),
    )
    ESTIMATES: ClassVar = moments("exp_avg_sq")

    decoupled_weight_decay: bool = False

    def branches(self, scalars: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return which branches steps take."""
        return super().branches(scalars) | {RECTIFIED: scalars["rectification"] > 0}

    @property
    def update_inputs(self) -> tuple[str, ...]:
        """Both moments."""
        return ("exp_avg", "exp_avg_sq")

    def numbers(
        self,
        scalars: Mapping[str, Any],
        plain: Callable[[Any], Any],
        narrow: Callable[[Any], Any],
    ) -> dict[str, Any]:
        """Return the numbers of a step."""
        of_tensor = narrow if self.is_foreach else plain
        rate, decay = scalars["learning_rate"], scalars["weight_decay"]
        correction, root = scalars["bias_correction1"], scalars["bias_correction2_sqrt"]
        rectification = scalars["rectification"]
        unrectified = 1.0 - (rectification > 0)
        return {
            "shrink": of_tensor(1 - rate * decay),
            "decay": narrow(0.0 if self.decoupled_weight_decay else decay),
            **self.weights(scalars["beta1"], plain),
            "beta2": of_tensor(scalars["beta2"]),
            "weight2": plain(1 - scalars["beta2"]),
            "eps": narrow(scalars["eps"]),
            "one": plain(1.0),
            "rate": plain(rate),
            "correction": plain(correction),
            "root": plain(root),
            "rectification": plain(rectification),
            "of_first": narrow(-(rate * unrectified / correction)),
            "of_quotient": plain(-(root * (rate * rectification / correction))),
        }

    def take(self, a: Arithmetic, x: Numbers, c: Numbers, ways: Branches) -> dict[str, Any]:
        """Take a step."""
        r, W = a.rounded, x["W"]
        if DECAYS in ways and self.decoupled_weight_decay:
            W, ways = r(W * c["shrink"]), ways - {DECAYS}
        grad = self.gradient(a, x, c, ways)
        first = self.moved(a, x["exp_avg"], grad, c, ways)
        second = r(a.fma(c["weight2"] * grad, grad, r(x["exp_avg_sq"] * c["beta2"])))
        after = {"exp_avg": first, "exp_avg_sq": second}
        denominator = r(r(a.sqrt(second)) + c["eps"])
        if self.is_foreach:
            factor = r(r(c["one"] / r(denominator / c["of_quotient"])) + c["of_first"])
            return {"W": r(a.fma(first, factor, W)), **after}
        update = r(r(first / c["correction"]) * c["rate"])
        if RECTIFIED in ways:
            adaptive = r(r(c["one"] / denominator) * c["root"])
            update = r(r(update * adaptive) * c["rectification"])
        return {"W": r(W - update), **after}

    def change(self, a: Arithmetic, x: Numbers, c: Numbers) -> Any:
        """Return the change of the weights."""
        denominator = a.sqrt(x["exp_avg_sq"]) + c["eps"]
        return x["exp_avg"] * (c["of_quotient"] / denominator + c["of_first"])

    def decay_factor(self, scalars: Scalars) -> Any:
        """Return what decoupled weight decay multiplies `W` with."""
        factor = -np.asarray(scalars["learning_rate"]) * scalars["weight_decay"]
        return factor * self.decoupled_weight_decay

    def gradient_of(
        self, a: Arithmetic, x: Arrays, after: Arrays, c: Numbers
    ) -> tuple[str, Any, Any]:
        """Return it from the first moment."""
        return self.gradient_of_mean("exp_avg", x, after, c)
