r"""SGD, with momentum or without.

What a step should do, in real numbers, given the momentum buffer b after it:

.. math::

    update_t = -\eta_t b_t, \qquad decay_t = 0

Weight decay is in the gradient, and so in the buffer already. With Nesterov's momentum, and without
any, the gradient acts on the weights directly, and so does the decay:

.. math::

    update_t = -\eta_t (g_t + \mu_t b_t), \qquad decay_t = -\eta_t \lambda_t W_{t-1}

(Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013, in the
form of `torch.optim.SGD`, where the buffer begins as the first gradient.)

Two faults of torch (2.13) make a check fail, and should: the fused program for the CPU skips most
elements in 16 bits (pytorch#191763), and a fused first step that a `GradScaler` skips leaves a
buffer of whatever lay in memory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from thimble_zarr.optim.base import COUNT, LEARNING_RATE, WEIGHT_DECAY, Scalar, State
from thimble_zarr.optim.elementwise import Branches, Elementwise
from thimble_zarr.optim.formula import Arrays, Precision, Rounding, Scalars
from thimble_zarr.optim.programs.arithmetic import Arithmetic
from thimble_zarr.optim.programs.kernel import Kernel, Numbers

_MOMENTUM = Scalar("momentum", "factor of the momentum buffer", "momentum")
_DAMPENING = Scalar("dampening", "dampening of the gradient in the buffer", "dampening")

_BUFFER = "momentum_buffer"

MOMENTUM = "momentum"
"""The branch of steps whose momentum is not 0."""

FIRST = "first"
"""That of steps at which a buffer that is missing begins, as the gradient."""


@dataclass(frozen=True, kw_only=True)
class SGD(Elementwise):
    """`torch.optim.SGD`.

    Attributes
    ----------
    has_momentum
        Whether the momentum is not 0, so that there is a buffer.
    nesterov
        torch's flag of this name.
    """

    FUNCTION: ClassVar = "sgd"
    LISTS: ClassVar = ("W", "grad", _BUFFER)
    FLAGS: ClassVar = ("maximize", "nesterov")
    IMPLEMENTATIONS: ClassVar = ("single", "foreach", "fused")
    HAS_ROOT: ClassVar = False
    STATES: ClassVar = (
        State(_BUFFER, "momentum buffer after the step", first=None, decay=_MOMENTUM.name),
    )
    SCALARS: ClassVar = (LEARNING_RATE, _MOMENTUM, _DAMPENING, WEIGHT_DECAY)
    STEP_KEY: ClassVar = None

    has_momentum: bool = False
    nesterov: bool = False

    @classmethod
    def from_group(cls, group: Mapping[str, Any], kind: type) -> Self:
        """Return what would step a parameter group of a live optimizer of class `kind`."""
        found = super().from_group(group, kind)
        return replace(found, lr_dtype=None)  # of a tensor torch takes the number

    @classmethod
    def choices(cls, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return whether there is momentum."""
        return {"has_momentum": bool(_MOMENTUM.read(group) != 0)}

    @property
    def states(self) -> tuple[State, ...]:
        """The states that a run has: the buffer only with momentum."""
        return self.STATES if self.has_momentum else ()

    @property
    def changes_gradient(self) -> bool:
        """Whether a step overwrites the gradient, as `foreach` does with Nesterov's momentum."""
        return self.nesterov and self.implementation == "foreach"

    @property
    def _is_direct(self) -> bool:
        """Whether the gradient acts on the weights beside the buffer, or alone."""
        return self.nesterov or not self.has_momentum

    @property
    def update_inputs(self) -> tuple[str, ...]:
        """The buffer, and the gradient where that acts on the weights directly."""
        return (_BUFFER,) * self.has_momentum + ("grad",) * self._is_direct

    @property
    def cancels(self) -> bool:
        """Buffer and gradient may."""
        return len(self.update_inputs) > 1

    @property
    def scalar_dtype(self) -> str:
        """Nothing is computed of numbers but a difference."""
        return "float64"

    def branches(self, scalars: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return which branches steps take."""
        moves = (scalars["momentum"] != 0) & self.has_momentum
        return super().branches(scalars) | {MOMENTUM: moves, FIRST: scalars[COUNT] <= 1}

    def numbers(
        self,
        scalars: Mapping[str, Any],
        plain: Callable[[Any], Any],
        narrow: Callable[[Any], Any],
    ) -> dict[str, Any]:
        """Return the numbers of a step."""
        kept = plain if self.implementation == "single" else narrow
        return {
            "decay": narrow(scalars["weight_decay"]),
            "kept": kept(scalars["momentum"]),
            "taken": narrow(1 - scalars["dampening"]),
            "momentum": narrow(scalars["momentum"]),
            "minus_rate": narrow(-scalars["learning_rate"]),
        }

    def take(self, a: Arithmetic, x: Numbers, c: Numbers, ways: Branches) -> dict[str, Any]:
        """Take a step."""
        r, grad = a.rounded, self.gradient(a, x, c, ways)
        after = {_BUFFER: x[_BUFFER]} if self.has_momentum else {}
        if MOMENTUM in ways:
            buffer = r(a.fma(grad, c["taken"], r(x[_BUFFER] * c["kept"])))
            if FIRST in ways:
                buffer = a.select(a.is_nan(x[_BUFFER]), grad, buffer)
            after[_BUFFER] = buffer
            grad = r(a.fma(buffer, c["momentum"], grad)) if self.nesterov else buffer
        return {"W": r(a.fma(grad, c["minus_rate"], x["W"])), **after}

    def change(self, a: Arithmetic, x: Numbers, c: Numbers) -> Any:
        """Return the change of the weights by buffer and gradient."""
        if not self._is_direct:
            return c["minus_rate"] * x[_BUFFER]
        grad = -x["grad"] if self.maximize else x["grad"]
        return c["minus_rate"] * (grad + c["momentum"] * x[_BUFFER] if self.nesterov else grad)

    def decay_factor(self, scalars: Scalars) -> Any:
        """Return what weight decay multiplies `W` with, where it is not in the buffer alone."""
        return -np.asarray(scalars["learning_rate"]) * scalars["weight_decay"] * self._is_direct

    def rounding(
        self, scalars: Scalars, precision: Precision, arrays: Arrays | None = None
    ) -> Rounding | None:
        r"""Return how rounding errors grow: by :math:`\gamma_8` of each term of the sum.

        The terms may cancel with Nesterov's momentum. Then their sizes decide, not the update's.
        """
        if self.nesterov and arrays is None:
            return None
        rate, error = scalars["learning_rate"], precision.gamma(8) + precision.scalar_roundoff
        least = 8 * precision.least * (1 + rate)
        if self.nesterov and arrays is not None:
            of_buffer = scalars["momentum"] * abs(arrays[_BUFFER])
            least = least + error * rate * (of_buffer + abs(arrays["grad"]))
        return Rounding(
            update=0.0 if self.nesterov else error,
            after=precision.gamma(1),
            before=error * abs(self.decay_factor(scalars)),
            least=least,
        )

    def gradient_of(
        self, a: Arithmetic, x: Arrays, after: Arrays, c: Numbers
    ) -> tuple[str, Any, Any]:
        """Return it from the buffer, which may begin as the gradient, or else from the weights."""
        if not self.has_momentum:
            return "W", (after["W"] - x["W"]) / c["minus_rate"], 1 / c["minus_rate"]
        begins = np.isnan(x[_BUFFER])
        kept = np.where(begins, 0.0, c["kept"] * x[_BUFFER])
        taken = np.where(begins, 1.0, c["taken"])
        return _BUFFER, (after[_BUFFER] - kept) / taken, 1 / taken

    def kernel(self, native: str) -> Kernel | None:
        """Return the newest kernel, but where torch's program skips elements."""
        is_wrong = self.implementation == "fused" and native.endswith("16")
        return None if is_wrong else super().kernel(native)
