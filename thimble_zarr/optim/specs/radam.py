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
from dataclasses import dataclass, replace
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
)
from thimble_zarr.optim.elementwise import Branches
from thimble_zarr.optim.formula import Arrays, Precision, Rounding, Scalars
from thimble_zarr.optim.inexact import RUNNING, Inexact
from thimble_zarr.optim.moments import BIAS_CORRECTION1, BIAS_CORRECTION2_SQRT, Moments
from thimble_zarr.optim.programs.arithmetic import Arithmetic
from thimble_zarr.optim.programs.kernel import Numbers

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
class RAdam(Moments):
    """`torch.optim.RAdam`."""

    FUNCTION: ClassVar = "radam"
    SCALARS: ClassVar = (LEARNING_RATE, BETA1, BETA2, EPS, WEIGHT_DECAY)
    DERIVED: ClassVar = (
        BIAS_CORRECTION1,
        BIAS_CORRECTION2_SQRT,
        Derived("rectification", "r, 0 where nothing is rectified", _rectification),
    )

    def branches(self, scalars: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return which branches steps take."""
        return super().branches(scalars) | {RECTIFIED: scalars["rectification"] > 0}

    def numbers(
        self,
        scalars: Mapping[str, Any],
        plain: Callable[[Any], Any],
        narrow: Callable[[Any], Any],
    ) -> dict[str, Any]:
        """Return the numbers of a step."""
        rate, rectification = scalars["learning_rate"], scalars["rectification"]
        correction, root = scalars["bias_correction1"], scalars["bias_correction2_sqrt"]
        unrectified = 1.0 - (rectification > 0)
        return {
            **self.numbers_of_moments(scalars, plain, narrow),
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
        r = a.rounded
        W, _, first, second = self.moved_moments(a, x, c, ways)
        after = {"exp_avg": first, "exp_avg_sq": second}
        denominator = r(r(a.sqrt(second)) + c["eps"])
        # Where nothing is rectified, torch divides by 0, then 1 by infinity, which makes exactly 0:
        # errors of that cannot be bounded. The other program rounds more often there.
        if self.is_foreach and (RECTIFIED in ways or a is not RUNNING):
            factor = r(r(c["one"] / r(denominator / c["of_quotient"])) + c["of_first"])
            return {"W": r(a.fma(first, factor, W)), **after}
        update = r(r(first / c["correction"]) * c["rate"])
        if RECTIFIED in ways:
            adaptive = r(r(c["one"] / denominator) * c["root"])
            update = r(r(update * adaptive) * c["rectification"])
        return {"W": r(W - update), **after}

    def change(self, a: Arithmetic, x: Numbers, c: Numbers) -> Any:
        """Return the change of the weights."""
        return x["exp_avg"] * (c["of_quotient"] / self._denominator(a, x, c) + c["of_first"])

    @staticmethod
    def _denominator(a: Arithmetic, x: Numbers, c: Numbers) -> Any:
        return a.sqrt(x["exp_avg_sq"]) + c["eps"]

    def rounding(
        self, scalars: Scalars, precision: Precision, arrays: Arrays | None = None
    ) -> Rounding | None:
        """Return the error of the formula, and of what the foreach program makes of large numbers.

        It divides the denominator by the step size, then 1 by that. The first may overflow where
        the formula does not (in float16): then the second is 0, and the whole update is lost.
        """
        found = super().rounding(scalars, precision, arrays)
        if arrays is None or found is None or not self.is_foreach:
            return found
        numbers = self._numbers(scalars, precision)
        second = {"exp_avg_sq": Inexact.exact(arrays["exp_avg_sq"], precision).rounded()}
        with np.errstate(all="ignore"):
            inverse = self._denominator(RUNNING, second, numbers) / numbers["of_quotient"]
        is_lost = np.isinf(inverse.error) & (numbers["rectification"].value > 0)
        return replace(found, update=1.0 * is_lost)
