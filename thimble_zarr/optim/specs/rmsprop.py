r"""RMSprop, centered or not, with momentum or without.

What a step should do, in real numbers, given the states after it:

.. math::

    update_t = -\eta_t \frac{g_t + \lambda W_{t-1}}{\sqrt{v_t - m_t^2} + \epsilon}

with v the mean of the squared gradients and m that of the gradients, which is 0 if it is not
centered (Hinton, "Lecture 6e", 2012; Graves, "Generating sequences with recurrent neural networks",
2013, section 4.2). With momentum it is :math:`-\eta_t b_t`, with b the buffer, in which the
quotients are summed. Weight decay is in the gradient already.
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
class RMSprop(Elementwise):
    """`torch.optim.RMSprop`.

    Attributes
    ----------
    has_momentum
        Whether the momentum is not 0, so that there is a buffer.
    centered
        torch's flag of this name.
    """

    FUNCTION: ClassVar = "rmsprop"
    LISTS: ClassVar = ("W", "grad", "square_avg", "grad_avg", "momentum_buffer", "step")
    FLAGS: ClassVar = (*Elementwise.FLAGS, "centered")
    MEAN: ClassVar = "alpha"
    STATES: ClassVar = (
        State("square_avg", "mean of squared gradients after the step", decay="alpha"),
        State("momentum_buffer", "momentum buffer after the step", decay="momentum"),
        State("grad_avg", "mean of gradients after the step (centered)", decay="alpha"),
    )
    SCALARS: ClassVar = (
        LEARNING_RATE,
        Scalar("alpha", "decay rate of the means", "alpha"),
        EPS,
        Scalar("momentum", "factor of the momentum buffer", "momentum"),
        WEIGHT_DECAY,
    )

    has_momentum: bool = False
    centered: bool = False

    @classmethod
    def choices(cls, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return whether there is momentum."""
        return {"has_momentum": bool(group["momentum"] > 0)}

    @property
    def states(self) -> tuple[State, ...]:
        """The states that a run has."""
        square, buffer, mean = self.STATES
        return (square, *([buffer] * self.has_momentum), *([mean] * self.centered))

    @property
    def update_inputs(self) -> tuple[str, ...]:
        """The buffer; without one the gradient and what divides it."""
        if self.has_momentum:
            return ("momentum_buffer",)
        return ("square_avg", *(["grad_avg"] * self.centered), *self.direct_gradient)

    def numbers(
        self,
        scalars: Mapping[str, Any],
        plain: Callable[[Any], Any],
        narrow: Callable[[Any], Any],
    ) -> dict[str, Any]:
        """Return the numbers of a step."""
        kept = narrow if self.is_foreach else plain
        rate, alpha = scalars["learning_rate"], scalars["alpha"]
        return {
            "decay": narrow(scalars["weight_decay"]),
            "alpha": kept(alpha),
            **self.weights(alpha, plain),
            "eps": narrow(scalars["eps"]),
            "momentum": kept(scalars["momentum"]),
            "minus_rate": (narrow if self.has_momentum else plain)(-rate),
        }

    def take(self, a: Arithmetic, x: Numbers, c: Numbers, ways: Branches) -> dict[str, Any]:
        """Take a step."""
        r, grad = a.rounded, self.gradient(a, x, c, ways)
        square = r(a.fma(c["weight"] * grad, grad, r(x["square_avg"] * c["alpha"])))
        after = {"square_avg": square}
        if self.centered:
            mean = after["grad_avg"] = self.moved(a, x["grad_avg"], grad, c, ways)
            square = r(a.fma(-mean, mean, square))
        denominator = r(r(a.sqrt(square)) + c["eps"])
        if self.has_momentum:
            kept = r(x["momentum_buffer"] * c["momentum"])
            buffer = after["momentum_buffer"] = r(kept + grad / denominator)
            return {"W": r(a.fma(buffer, c["minus_rate"], x["W"])), **after}
        return {"W": r(x["W"] + c["minus_rate"] * grad / denominator), **after}

    def change(self, a: Arithmetic, x: Numbers, c: Numbers) -> Any:
        """Return the change of the weights."""
        if self.has_momentum:
            return c["minus_rate"] * x["momentum_buffer"]
        return c["minus_rate"] * self.real_gradient(a, x, c) / self._denominator(a, x, c)

    def _denominator(self, a: Arithmetic, after: Numbers, c: Numbers) -> Any:
        square = after["square_avg"]
        if self.centered:
            square = square - after["grad_avg"] * after["grad_avg"]
        return a.sqrt(square) + c["eps"]

    def gradient_of(
        self, a: Arithmetic, x: Arrays, after: Arrays, c: Numbers
    ) -> tuple[str, Any, Any]:
        """Return it from the buffer, or else from the weights."""
        denominator = self._denominator(a, after, c)
        if self.has_momentum:
            added = after["momentum_buffer"] - c["momentum"] * x["momentum_buffer"]
            return "momentum_buffer", added * denominator, denominator
        per_error = denominator / c["minus_rate"]
        return "W", (after["W"] - x["W"]) * per_error, per_error
