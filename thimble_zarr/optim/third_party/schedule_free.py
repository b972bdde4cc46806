r"""Schedule-Free AdamW, of the package `schedulefree`.

The weights are the point y at which gradients are taken, between the iterate z and its average.
What a step should do, in real numbers, given z and the second moment v after it:

.. math::

    g = \frac{g_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} + \lambda W_{t-1}, \qquad
    update_t = c_t (z_t + \eta_t g - W_{t-1}) - \eta_t (1 - \beta_1 (1 - c_t)) g

since :math:`z_t = z_{t-1} - \eta_t g` (Defazio et al., "The road less scheduled", 2024, algorithm
1, in the form of `AdamWScheduleFree`). :math:`\eta_t` is the learning rate with warm-up, and
:math:`c_t` the share of z in the average, which torch's `lerp` moves. Weight decay is in g.
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
    State,
)
from thimble_zarr.optim.elementwise import DECAYS, NEAR, Branches, Elementwise
from thimble_zarr.optim.formula import W_BEFORE, Arrays
from thimble_zarr.optim.live import Live
from thimble_zarr.optim.programs.arithmetic import Arithmetic
from thimble_zarr.optim.programs.kernel import Numbers

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FIRST = "first"
"""The branch of a first step, at which z begins as the weights."""


def _scheduled(optimizer: Any, scalars: Mapping[str, Any]) -> Any:
    warms_up = scalars["warmup_steps"] > 0 and not scalars["k"] > scalars["warmup_steps"]
    return scalars["learning_rate"] * (scalars["k"] / scalars["warmup_steps"] if warms_up else 1.0)


def _weight(scalars: Mapping[str, Any]) -> Any:
    return scalars["k"] ** scalars["r"] * scalars["lr_max"] ** scalars["weight_lr_power"]


def _share(optimizer: Any, scalars: Mapping[str, Any]) -> Any:
    return _weight(scalars) / scalars["weight_sum"] if scalars["weight_sum"] > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class ScheduleFree(Live, Elementwise):
    """`schedulefree.AdamWScheduleFree`."""

    CLASSES: ClassVar = ("schedulefree.adamw_schedulefree.AdamWScheduleFree",)
    FUNCTION: ClassVar = "schedulefree"
    FLAGS: ClassVar = ()
    ROUNDINGS_OF_W: ClassVar = 2
    STEP_KEY: ClassVar = None
    STATES: ClassVar = (
        State("z", "iterate after the step", first=None, of_weights=True),
        State("exp_avg_sq", "second moment after the step", decay=BETA2.name),
    )
    SCALARS: ClassVar = (
        LEARNING_RATE,
        BETA1,
        BETA2,
        EPS,
        WEIGHT_DECAY,
        Scalar("k", "steps of the group, after the step", "k"),
        Scalar("warmup_steps", "steps of the warm-up", "warmup_steps"),
        Scalar("r", "power of the count in the average's weights", "r"),
        Scalar("weight_lr_power", "power of the learning rate in them", "weight_lr_power"),
        Scalar("lr_max", "largest learning rate up to the step", "lr_max"),
        Scalar("weight_sum", "sum of the average's weights up to the step", "weight_sum"),
    )
    DERIVED: ClassVar = (
        Derived("scheduled_lr", "learning rate of the step, with warm-up", _scheduled),
        Derived(
            "bias_correction2",
            "1 - beta2 ** k, as Python computed it",
            lambda optimizer, scalars: 1 - scalars[BETA2.name] ** scalars["k"],
        ),
        Derived("ckp1", "share of z in the average", _share),
    )

    @property
    def changes_gradient(self) -> bool:
        """Whether a step overwrites the gradient: it divides it in place."""
        return True

    @property
    def update_inputs(self) -> tuple[str, ...]:
        """Both states, the gradient and the weight before."""
        return ("z", "exp_avg_sq", *self.direct_gradient)

    def make(self, weight: "torch.nn.Parameter") -> "torch.optim.Optimizer":
        """Return an `AdamWScheduleFree` that trains."""
        from schedulefree import AdamWScheduleFree

        made: Any = AdamWScheduleFree([weight], foreach=self.is_foreach)
        made.train()
        optimizer: torch.optim.Optimizer = made
        return optimizer

    def branches(self, scalars: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return which branches steps take."""
        near = np.asarray(scalars["ckp1"]).astype(np.float32) < 0.5
        return super().branches(scalars) | {NEAR: near, FIRST: scalars[COUNT] <= 1}

    def numbers(
        self,
        scalars: Mapping[str, Any],
        plain: Callable[[Any], Any],
        narrow: Callable[[Any], Any],
    ) -> dict[str, Any]:
        """Return the numbers of a step."""
        rate, share, beta1 = (scalars[name] for name in ("scheduled_lr", "ckp1", "beta1"))
        weight = plain(share)
        return {
            "added": narrow(scalars["weight_decay"]),
            "beta2": (narrow if self.is_foreach else plain)(scalars["beta2"]),
            "weight2": plain(1 - scalars["beta2"]),
            "correction": plain(scalars["bias_correction2"]),
            "eps": narrow(scalars["eps"]),
            "weight": weight,
            "weight_less_1": weight - 1.0,
            "of_grad": narrow(rate * (beta1 * (1 - share) - 1)),
            "rate": narrow(rate),
            "minus_rate": narrow(-rate),
        }

    def take(self, a: Arithmetic, x: Numbers, c: Numbers, ways: Branches) -> dict[str, Any]:
        """Take a step."""
        r, W, z, grad = a.rounded, x["W"], x["z"], x["grad"]
        if FIRST in ways:
            z = a.select(a.is_nan(z), W, z)
        second = r(a.fma(c["weight2"] * grad, grad, r(x["exp_avg_sq"] * c["beta2"])))
        normalized = r(grad / r(r(a.sqrt(r(second / c["correction"]))) + c["eps"]))
        if DECAYS in ways:
            normalized = r(a.fma(W, c["added"], normalized))
        W = r(a.fma(normalized, c["of_grad"], self.moved(a, W, z, c, ways)))
        z = r(a.fma(normalized, c["minus_rate"], z))
        return {"W": W, "z": z, "exp_avg_sq": second}

    def change(self, a: Arithmetic, x: Numbers, c: Numbers) -> Any:
        """Return the change of the weights."""
        normalized = x["grad"] / self._denominator(a, x, c) + c["added"] * x[W_BEFORE]
        towards = x["z"] + c["rate"] * normalized - x[W_BEFORE]
        return c["weight"] * towards + c["of_grad"] * normalized

    @staticmethod
    def _denominator(a: Arithmetic, after: Numbers, c: Numbers) -> Any:
        return a.sqrt(after["exp_avg_sq"] / c["correction"]) + c["eps"]

    def gradient_of(
        self, a: Arithmetic, x: Arrays, after: Arrays, c: Numbers
    ) -> tuple[str, Any, Any]:
        """Return it from z, which may begin as the weights."""
        per_error = self._denominator(a, after, c) / c["rate"]
        z = np.where(np.isnan(x["z"]), x["W"], x["z"])
        moved = z - after["z"] - c["rate"] * c["added"] * x["W"]
        return "z", moved * per_error, per_error

    def swapped(
        self, tensors: "Mapping[str, Tensor]", scalars: Mapping[str, float]
    ) -> "Tensor | None":
        """Return the weights after `eval()` and `train()`: to their average, and back."""
        beta1, z = scalars[BETA1.name], tensors["z"]
        return tensors["W"].lerp(z, 1 - 1 / beta1).lerp_(z, 1 - beta1)

    def step(
        self, tensors: "dict[str, Tensor | None]", scalars: Mapping[str, float], *, device: str
    ) -> None:
        """Let the class take the step, from numbers that become the recorded ones."""
        weight, after = _weight(scalars), scalars["weight_sum"]
        near = after - weight + np.spacing(after - weight) * np.arange(-4, 5)
        held = near[near + weight == after]
        before = {"k": scalars["k"] - 1, "weight_sum": float(held[0] if len(held) else after)}
        super().step(tensors, {**scalars, **before}, device=device)
