r"""Rprop.

What a step should do, in real numbers, given the states after it:

.. math::

    update_t = -sign(p_t) s_t

with the step size s of each element and its gradient p, which is 0 where its sign has changed
(Riedmiller and Braun, "A direct adaptive method for faster backpropagation learning", 1993, in the
form of `torch.optim.Rprop`, which does not take a step back there).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from thimble_zarr.optim.base import (
    COUNT,
    LEARNING_RATE,
    Scalar,
    State,
)
from thimble_zarr.optim.elementwise import Branches, Elementwise
from thimble_zarr.optim.formula import Arrays
from thimble_zarr.optim.programs.arithmetic import Arithmetic
from thimble_zarr.optim.programs.kernel import Numbers

if TYPE_CHECKING:
    from torch import Tensor


FIRST = "first"
"""The branch of a first step, which makes the step sizes."""


@dataclass(frozen=True, kw_only=True)
class Rprop(Elementwise):
    """`torch.optim.Rprop`."""

    FUNCTION: ClassVar = "rprop"
    LISTS: ClassVar = ("W", "grad", "prev", "step_size", "step")
    NOT_TAKEN: ClassVar = (LEARNING_RATE.name,)
    HAS_ROOT: ClassVar = False
    STATES: ClassVar = (
        State("prev", "gradient of the step, 0 where its sign changed"),
        State("step_size", "step size after the step", first=None),
    )
    SCALARS: ClassVar = (
        LEARNING_RATE,
        Scalar("etaminus", "factor of step sizes where the sign changed", "etas", 0),
        Scalar("etaplus", "factor of step sizes where it did not", "etas", 1),
        Scalar("step_size_min", "least step size", "step_sizes", 0),
        Scalar("step_size_max", "largest step size", "step_sizes", 1),
    )

    @property
    def update_inputs(self) -> tuple[str, ...]:
        """Both states."""
        return ("prev", "step_size")

    def branches(self, scalars: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return which branches steps take."""
        return super().branches(scalars) | {FIRST: scalars[COUNT] <= 1}

    def numbers(
        self,
        scalars: Mapping[str, Any],
        plain: Callable[[Any], Any],
        narrow: Callable[[Any], Any],
    ) -> dict[str, Any]:
        """Return the numbers of a step."""
        names = ("learning_rate", "etaminus", "etaplus", "step_size_min", "step_size_max")
        constants = {"zero": 0.0, "minus_zero": -0.0, "one": 1.0, "minus_one": -1.0}
        plain_ones = {name: plain(value) for name, value in constants.items()}
        return {name: narrow(scalars[name]) for name in names} | plain_ones

    def take(self, a: Arithmetic, x: Numbers, c: Numbers, ways: Branches) -> dict[str, Any]:
        """Take a step."""
        r, grad, size = a.rounded, self.gradient(a, x, c, ways), x["step_size"]
        if FIRST in ways:
            size = a.select(a.is_nan(size), c["learning_rate"], size)
        product = r(grad * x["prev"])
        turned = self._by_sign(a, product, c["etaplus"], c["etaminus"], c["one"])
        size = r(size * turned)
        size = a.select(a.greater(c["step_size_min"], size), c["step_size_min"], size)
        size = a.select(a.greater(size, c["step_size_max"]), c["step_size_max"], size)
        kept = self._by_sign(a, turned - c["etaminus"], grad, grad, c["zero"])
        kept = a.select(a.is_nan(turned), grad, kept)
        W = r(a.fma(self._minus_sign(a, kept, c), size, x["W"]))
        return {"W": W, "prev": kept, "step_size": size}

    @staticmethod
    def _by_sign(a: Arithmetic, number: Any, positive: Any, negative: Any, zero: Any) -> Any:
        nothing = number - number  # NaN of NaN
        signed = a.select(
            a.greater(nothing, number), negative, a.select(a.is_nan(number), number, zero)
        )
        return a.select(a.greater(number, nothing), positive, signed)

    def _minus_sign(self, a: Arithmetic, number: Any, c: Numbers) -> Any:
        return self._by_sign(a, number, c["minus_one"], c["one"], c["minus_zero"])

    def change(self, a: Arithmetic, x: Numbers, c: Numbers) -> Any:
        """Return the change of the weights."""
        zero = x["prev"] * 0.0
        minus_sign = self._by_sign(a, x["prev"], zero - 1.0, zero + 1.0, zero)
        return minus_sign * x["step_size"]

    def gradient_of(
        self, a: Arithmetic, x: Arrays, after: Arrays, c: Numbers
    ) -> tuple[str, Any, Any]:
        """Return what the step kept of it, which is not known where the sign changed."""
        kept = np.where(after["prev"] == 0, np.nan, after["prev"])
        return "prev", kept, np.ones_like(kept)

    def step(
        self, tensors: "dict[str, Tensor | None]", scalars: Mapping[str, float], *, device: str
    ) -> None:
        """Call torch's function, with step sizes that it would make at the first step."""
        import torch

        weight = tensors["W"]
        if tensors.get("step_size") is None and weight is not None:
            tensors["step_size"] = torch.full_like(weight, scalars["learning_rate"])
        super().step(tensors, scalars, device=device)
