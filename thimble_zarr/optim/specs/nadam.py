r"""NAdam.

What a step should do, in real numbers, given the states after it:

.. math::

    update_t = -\eta_t \frac{
        \frac{1 - \mu_t}{1 - \prod_i^t \mu_i} g_t + \frac{\mu_{t+1}}{1 - \prod_i^{t+1} \mu_i} m_t
    }{\sqrt{\hat v_t} + \epsilon}, \qquad \mu_t = \beta_1 (1 - 0.96^{t \psi} / 2)

(Dozat, "Incorporating Nesterov momentum into Adam", 2016, in the form of `torch.optim.NAdam`).
The product up to the step is `mu_product`. Weight decay is in the gradient, or decoupled as that of
AdamW.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from thimble_zarr.optim.base import (
    BETA1,
    BETA2,
    COUNT,
    EPS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Derived,
    Scalar,
)
from thimble_zarr.optim.elementwise import Branches
from thimble_zarr.optim.moments import BIAS_CORRECTION2_SQRT, Moments
from thimble_zarr.optim.programs.arithmetic import Arithmetic
from thimble_zarr.optim.programs.kernel import Numbers

if TYPE_CHECKING:
    from torch import Tensor


_PRODUCT = "mu_product"


def _mu(scalars: Mapping[str, Any], ahead: int) -> Any:
    power = 0.96 ** ((scalars[COUNT] + ahead) * scalars["momentum_decay"])
    return scalars[BETA1.name] * (1.0 - 0.5 * power)


@dataclass(frozen=True, kw_only=True)
class NAdam(Moments):
    """`torch.optim.NAdam`."""

    FUNCTION: ClassVar = "nadam"
    LISTS: ClassVar = ("W", "grad", "exp_avg", "exp_avg_sq", _PRODUCT, "step")
    ROUNDINGS_OF_W: ClassVar = 2
    SCALARS: ClassVar = (
        LEARNING_RATE,
        BETA1,
        BETA2,
        EPS,
        Scalar("momentum_decay", "how fast the momentum grows", "momentum_decay"),
        WEIGHT_DECAY,
        Scalar(
            *(_PRODUCT, "product of the momenta up to the step", _PRODUCT),
            held="after",
            first=lambda group: 1.0,
        ),
    )
    DERIVED: ClassVar = (
        Derived(
            "bias_correction2",
            "1 - beta2 ** count, as torch computed it",
            lambda optimizer, scalars: 1 - scalars[BETA2.name] ** scalars[COUNT],
        ),
        BIAS_CORRECTION2_SQRT,
        Derived("mu", "momentum of the step", lambda optimizer, scalars: _mu(scalars, 0)),
        Derived("mu_next", "that of the next", lambda optimizer, scalars: _mu(scalars, 1)),
    )

    @property
    def update_inputs(self) -> tuple[str, ...]:
        """Both moments, and the gradient."""
        return ("exp_avg", "exp_avg_sq", *self.direct_gradient)

    def numbers(
        self,
        scalars: Mapping[str, Any],
        plain: Callable[[Any], Any],
        narrow: Callable[[Any], Any],
    ) -> dict[str, Any]:
        """Return the numbers of a step."""
        rate, product = scalars["learning_rate"], scalars[_PRODUCT]
        mu, mu_next = scalars["mu"], scalars["mu_next"]
        corrected = "bias_correction2_sqrt" if self.is_foreach else "bias_correction2"
        return {
            **self.numbers_of_moments(scalars, plain, narrow),
            "correction": plain(scalars[corrected]),
            "of_grad": plain(-rate * (1.0 - mu) / (1.0 - product)),
            "of_first": plain(-rate * mu_next / (1.0 - product * mu_next)),
        }

    def take(self, a: Arithmetic, x: Numbers, c: Numbers, ways: Branches) -> dict[str, Any]:
        """Take a step."""
        r = a.rounded
        W, grad, first, second = self.moved_moments(a, x, c, ways)
        denominator = r(r(self._root(a, second, c)) + c["eps"])
        W = r(W + c["of_grad"] * grad / denominator)
        W = r(W + c["of_first"] * first / denominator)
        return {"W": W, "exp_avg": first, "exp_avg_sq": second}

    def _root(self, a: Arithmetic, second: Any, c: Numbers) -> Any:
        """Return the square root of the second moment, without its bias."""
        if self.is_foreach:
            return a.rounded(a.sqrt(second)) / c["correction"]
        return a.sqrt(a.rounded(second / c["correction"]))

    def change(self, a: Arithmetic, x: Numbers, c: Numbers) -> Any:
        """Return the change of the weights."""
        denominator = self._root(a, x["exp_avg_sq"], c) + c["eps"]
        grad = c["of_grad"] * self.real_gradient(a, x, c)
        return (grad + c["of_first"] * x["exp_avg"]) / denominator

    def step(
        self, tensors: "dict[str, Tensor | None]", scalars: Mapping[str, float], *, device: str
    ) -> None:
        """Call torch's function, with a product before the step that becomes the recorded one.

        Only that enters the step. Several numbers may become it, as each is multiplied with
        something smaller than 1, in float32: any of them will do.
        """
        mu, after = _mu(scalars, 0), np.float32(scalars[_PRODUCT])
        before = np.float32(after / mu) if mu else after
        near = before + np.spacing(before) * np.arange(-4, 5, dtype=np.float32)
        held = near[near * np.float32(mu) == after]
        before = held[0] if len(held) else before
        super().step(tensors, {**scalars, _PRODUCT: float(before)}, device=device)
