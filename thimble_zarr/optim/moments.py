"""What optimizers have in common that keep Adam's two moments."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from thimble_zarr.optim.base import BETA1, BETA2, COUNT, Derived, Estimate, Optimizer, State
from thimble_zarr.optim.elementwise import DECAYS, Branches, Elementwise
from thimble_zarr.optim.formula import Arrays, Scalars
from thimble_zarr.optim.programs.arithmetic import Arithmetic
from thimble_zarr.optim.programs.kernel import Numbers


def _root_of_correction(optimizer: Optimizer, scalars: Mapping[str, Any]) -> Any:
    """Return the square root as torch's programs take it: the fused one is not in Python."""
    correction = 1 - scalars[BETA2.name] ** scalars[COUNT]
    if optimizer.implementation == "fused" and isinstance(correction, float):
        return math.sqrt(correction)
    return correction**0.5


BIAS_CORRECTION1 = Derived(
    "bias_correction1",
    "1 - beta1 ** count, as torch computed it",
    lambda optimizer, scalars: 1 - scalars[BETA1.name] ** scalars[COUNT],
)

BIAS_CORRECTION2_SQRT = Derived(
    "bias_correction2_sqrt",
    "square root of 1 - beta2 ** count, as torch computed it",
    _root_of_correction,
)


def _corrected(arrays: Arrays, scalars: Scalars, *, state: str, rate: str) -> np.ndarray:
    """Return a mean that decays, without its bias towards the 0 it began from."""
    corrected: np.ndarray = arrays[state] / (1 - scalars[rate] ** scalars[COUNT])
    return corrected


def estimates(second: str) -> tuple[Estimate, ...]:
    """Return what the moments stand for, where a state of this name is the second."""
    return (
        Estimate(
            "m_hat",
            "first moment, corrected for its bias",
            ("exp_avg",),
            partial(_corrected, state="exp_avg", rate=BETA1.name),
        ),
        Estimate(
            "v_hat",
            "second moment that the step uses, corrected for its bias",
            (second,),
            partial(_corrected, state=second, rate=BETA2.name),
            is_square=True,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Moments(Elementwise):
    """An optimizer that moves two means, of gradients and of their squares.

    Attributes
    ----------
    decoupled_weight_decay
        True where weight decay acts on the weights (AdamW), False where it is added to the
        gradient (Adam).
    """

    LISTS: ClassVar[tuple[str, ...]] = ("W", "grad", "exp_avg", "exp_avg_sq", "step")
    FLAGS: ClassVar = (*Elementwise.FLAGS, "decoupled_weight_decay")
    MEAN: ClassVar = BETA1.name
    STATES: ClassVar[tuple[State, ...]] = (
        State("exp_avg", "first moment after the step", decay=BETA1.name),
        State("exp_avg_sq", "second moment after the step", decay=BETA2.name),
    )
    ESTIMATES: ClassVar = estimates("exp_avg_sq")

    decoupled_weight_decay: bool = False

    @property
    def update_inputs(self) -> tuple[str, ...]:
        """Both moments."""
        return ("exp_avg", "exp_avg_sq")

    def numbers_of_moments(
        self,
        scalars: Mapping[str, Any],
        plain: Callable[[Any], Any],
        narrow: Callable[[Any], Any],
    ) -> dict[str, Any]:
        """Return the numbers that `moved_moments` needs, and epsilon."""
        of_tensor = narrow if self.is_foreach else plain
        added = plain if self.implementation == "fused" else narrow
        rate, decay = scalars["learning_rate"], scalars["weight_decay"]
        return {
            "shrink": of_tensor(1 - rate * decay),
            "decay": added(0.0 if self.decoupled_weight_decay else decay),
            **self.weights(scalars["beta1"], plain),
            "beta2": of_tensor(scalars["beta2"]),
            "weight2": plain(1 - scalars["beta2"]),
            "eps": added(scalars["eps"]),
        }

    def moved_moments(
        self, a: Arithmetic, x: Numbers, c: Numbers, ways: Branches
    ) -> tuple[Any, Any, Any, Any]:
        """Return weight and gradient, with weight decay in one of them, and the moments after."""
        r, W = a.rounded, x["W"]
        if DECAYS in ways and self.decoupled_weight_decay:
            W, ways = r(W * c["shrink"]), ways - {DECAYS}
        grad = self.gradient(a, x, c, ways)
        first = self.moved(a, x["exp_avg"], grad, c, ways)
        second = r(a.fma(c["weight2"] * grad, grad, r(x["exp_avg_sq"] * c["beta2"])))
        return W, grad, first, second

    def decay_factor(self, scalars: Scalars) -> Any:
        """Return what decoupled weight decay multiplies `W` with; 0 for that in the gradient."""
        factor = -np.asarray(scalars["learning_rate"]) * scalars["weight_decay"]
        return factor * self.decoupled_weight_decay

    def gradient_of(
        self, a: Arithmetic, x: Arrays, after: Arrays, c: Numbers
    ) -> tuple[str, Any, Any]:
        """Return it from the first moment."""
        return self.gradient_of_mean("exp_avg", x, after, c)
