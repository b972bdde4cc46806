r"""Lion, of the package `lion-pytorch`.

What a step should do, in real numbers, given the momentum m after it:

.. math::

    update_t = -\eta_t \, sign\Big(\frac{\beta_1}{\beta_2} m_t +
        \Big(1 - \frac{\beta_1}{\beta_2}\Big) g_t\Big), \qquad decay_t = -\eta_t \lambda_t W_{t-1}

since :math:`m_t = \beta_2 m_{t-1} + (1 - \beta_2) g_t`, and the sign is that of
:math:`\beta_1 m_{t-1} + (1 - \beta_1) g_t` (Chen et al., "Symbolic discovery of optimization
algorithms", 2023, program 1).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from thimble_zarr.optim.base import BETA1, BETA2, LEARNING_RATE, WEIGHT_DECAY, State, tensor_dtype
from thimble_zarr.optim.elementwise import Branches, Elementwise
from thimble_zarr.optim.formula import Arrays, Scalars
from thimble_zarr.optim.live import Live
from thimble_zarr.optim.programs.arithmetic import Arithmetic
from thimble_zarr.optim.programs.kernel import Numbers

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Lion(Live, Elementwise):
    """`lion_pytorch.Lion`, without `use_triton`.

    Attributes
    ----------
    initial_learning_rate
        What the weight decay is divided by: with `decoupled_weight_decay` the first learning rate,
        else 1.
    """

    CLASSES: ClassVar = ("lion_pytorch.lion_pytorch.Lion",)
    FUNCTION: ClassVar = "lion"
    FLAGS: ClassVar = ()
    IMPLEMENTATIONS: ClassVar = ("single",)
    HAS_ROOT: ClassVar = False
    ROUNDINGS_OF_W: ClassVar = 2
    STEP_KEY: ClassVar = None
    STATES: ClassVar = (State("exp_avg", "first moment after the step", decay=BETA2.name),)
    SCALARS: ClassVar = (LEARNING_RATE, BETA1, BETA2, WEIGHT_DECAY)

    initial_learning_rate: float = 1.0

    @classmethod
    def of(cls, optimizer: "torch.optim.Optimizer", group: Mapping[str, Any]) -> Self:
        """Return what would step a group of a live optimizer."""
        live: Any = optimizer
        return cls(
            name=type(optimizer).__name__,
            implementation="single",
            lr_dtype=tensor_dtype(group["lr"]),
            initial_learning_rate=float(live._init_lr) if live.decoupled_wd else 1.0,
        )

    def make(self, weight: "torch.nn.Parameter") -> "torch.optim.Optimizer":
        """Return a Lion."""
        from lion_pytorch import Lion as Class

        rate = self.initial_learning_rate
        optimizer: torch.optim.Optimizer = Class(
            [weight], lr=rate, decoupled_weight_decay=rate != 1
        )
        return optimizer

    @property
    def update_inputs(self) -> tuple[str, ...]:
        """The momentum, and the gradient."""
        return ("exp_avg", "grad")

    @property
    def cancels(self) -> bool:
        """Momentum and gradient may."""
        return True

    def numbers(
        self,
        scalars: Mapping[str, Any],
        plain: Callable[[Any], Any],
        narrow: Callable[[Any], Any],
    ) -> dict[str, Any]:
        """Return the numbers of a step."""
        rate, beta1, beta2 = (scalars[name] for name in ("learning_rate", "beta1", "beta2"))
        decay = scalars["weight_decay"] / self.initial_learning_rate
        return {
            "shrink": plain(1.0 - rate * decay),
            "beta1": plain(beta1),
            "weight1": narrow(1.0 - beta1),
            "beta2": plain(beta2),
            "weight2": narrow(1.0 - beta2),
            "share": plain(beta1 / beta2),
            "rate": narrow(rate),
            "minus_rate": narrow(-rate),
            "zero": plain(0.0),
        }

    def take(self, a: Arithmetic, x: Numbers, c: Numbers, ways: Branches) -> dict[str, Any]:
        """Take a step."""
        r, mean, grad = a.rounded, x["exp_avg"], x["grad"]
        towards = r(a.fma(grad, c["weight1"], r(mean * c["beta1"])))
        W = r(r(x["W"] * c["shrink"]) + self._step(a, towards, c))
        return {"W": W, "exp_avg": r(a.fma(grad, c["weight2"], r(mean * c["beta2"])))}

    @staticmethod
    def _step(a: Arithmetic, towards: Any, c: Numbers) -> Any:
        """Return the learning rate with the other sign; nothing of nothing, nor of NaN."""
        negative = a.select(a.greater(c["zero"], towards), c["rate"], c["zero"])
        return a.select(a.greater(towards, c["zero"]), c["minus_rate"], negative)

    def change(self, a: Arithmetic, x: Numbers, c: Numbers) -> Any:
        """Return the change of the weights."""
        share = c["share"]
        return self._step(a, share * x["exp_avg"] + (1.0 - share) * x["grad"], c)

    def decay_factor(self, scalars: Scalars) -> Any:
        """Return what weight decay multiplies `W` with."""
        decay = np.asarray(scalars["weight_decay"]) / self.initial_learning_rate
        return -scalars["learning_rate"] * decay

    def gradient_of(
        self, a: Arithmetic, x: Arrays, after: Arrays, c: Numbers
    ) -> tuple[str, Any, Any]:
        """Return it from the momentum."""
        added = after["exp_avg"] - c["beta2"] * x["exp_avg"]
        return "exp_avg", added / c["weight2"], 1 / c["weight2"]
