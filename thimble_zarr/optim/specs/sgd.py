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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from thimble_zarr.optim.base import (
    COUNT,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Optimizer,
    Scalar,
    State,
    chosen_program,
)
from thimble_zarr.optim.formula import (
    Arrays,
    Consumed,
    Formula,
    Precision,
    Rounding,
    Scalars,
    coupled,
    like,
)
from thimble_zarr.optim.programs.arithmetic import Arithmetic
from thimble_zarr.optim.programs.kernel import Kernel, Numbers, Rounder

if TYPE_CHECKING:
    from torch import Tensor

_MOMENTUM = Scalar("momentum", "factor of the momentum buffer", "momentum")
_DAMPENING = Scalar("dampening", "dampening of the gradient in the buffer", "dampening")

_BUFFER = "momentum_buffer"


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer, Formula):
    """`torch.optim.SGD`.

    Attributes
    ----------
    has_momentum
        Whether the momentum is not 0, so that there is a buffer.
    nesterov, maximize
        torch's flags of these names.
    """

    STATES: ClassVar = (
        State(_BUFFER, "momentum buffer after the step", first=None, decay=_MOMENTUM.name),
    )
    SCALARS: ClassVar = (LEARNING_RATE, _MOMENTUM, _DAMPENING, WEIGHT_DECAY)
    STEP_KEY: ClassVar = None

    has_momentum: bool
    nesterov: bool = False
    maximize: bool = False

    @classmethod
    def from_group(cls, group: Mapping[str, object], kind: type) -> Self:
        """Return what would step a parameter group of a live optimizer of class `kind`."""
        return cls(
            name=kind.__name__,
            implementation=chosen_program(group, differentiable=False),
            has_momentum=bool(_MOMENTUM.read(group) != 0),
            nesterov=bool(group["nesterov"]),
            maximize=bool(group["maximize"]),
        )

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

    def coefficients(self, scalars: Scalars) -> Sequence[Any]:
        """Return what each of the inputs is multiplied with."""
        rate = scalars["learning_rate"]
        factors = {
            _BUFFER: -rate * (scalars["momentum"] if self.nesterov else 1),
            "grad": rate if self.maximize else -rate,
        }
        return [factors[name] for name in self.update_inputs]

    def update(
        self, arrays: Arrays, coefficients: Sequence[Any], out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the change of the weights by buffer and gradient."""
        first, *others = (arrays[name] for name in self.update_inputs)
        update: np.ndarray = np.multiply(first, like(first, coefficients[0]), out=out)
        for array, factor in zip(others, coefficients[1:], strict=True):
            update += array * like(array, factor)
        return update

    def decay_factor(self, scalars: Scalars) -> Any:
        """Return what weight decay multiplies `W` with, where it is not in the buffer alone."""
        return -scalars["learning_rate"] * scalars["weight_decay"] * self._is_direct

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
            factors = zip(self.update_inputs, self.coefficients(scalars), strict=True)
            least = least + error * sum(abs(arrays[name] * factor) for name, factor in factors)
        return Rounding(
            update=0.0 if self.nesterov else error,
            after=precision.gamma(1),
            before=error * abs(self.decay_factor(scalars)),
            least=least,
        )

    def _gradient(
        self, grad: np.ndarray, W: np.ndarray, scalars: Scalars
    ) -> tuple[np.ndarray, np.ndarray]:
        return coupled(grad, W, decay=scalars["weight_decay"], maximize=self.maximize)

    def advance(self, before: Arrays, grad: np.ndarray, scalars: Scalars) -> dict[str, np.ndarray]:
        """Return the buffer after a step, from that before and the gradient."""
        if not self.has_momentum:
            return {}
        gradient, _ = self._gradient(grad, before["W"], scalars)
        kept, taken = self._factors(scalars)
        return {_BUFFER: _times(kept, before[_BUFFER]) + taken * gradient}

    def _factors(self, scalars: Scalars) -> tuple[Any, Any]:
        """Return what buffer and gradient are multiplied with; the first step has no buffer."""
        is_first = np.asarray(scalars[COUNT]) <= 1
        return (
            np.where(is_first, 0.0, scalars["momentum"]),
            np.where(is_first, 1.0, 1 - scalars["dampening"]),
        )

    def bounds(
        self, before: Arrays, grad: np.ndarray, scalars: Scalars, precision: Precision
    ) -> dict[str, np.ndarray]:
        r"""Return how far two programs of SGD's, given the same row and gradient, can end apart.

        Each sum errs by :math:`\gamma_8` of the sizes of its terms, and the weight inherits the
        errors of all.
        """
        gamma, least, W = (
            precision.gamma(8) + precision.scalar_roundoff,
            precision.least,
            before["W"],
        )
        _, size = self._gradient(grad, W, scalars)
        errors, error, largest = {}, gamma * size + 8 * least, size
        if self.has_momentum:
            kept, taken = self._factors(scalars)
            of_buffer = abs(_times(kept, before[_BUFFER])) + abs(taken) * size
            errors[_BUFFER] = gamma * of_buffer + 8 * least
            share = scalars["momentum"] if self.nesterov else 1.0
            direct = 1.0 if self.nesterov else 0.0
            error = direct * error + share * errors[_BUFFER]
            largest = direct * size + share * of_buffer
        rate = scalars["learning_rate"]
        rounded = rate * gamma * largest + precision.gamma(1) * (abs(W) + rate * largest)
        errors["W"] = rate * error + rounded + 8 * least
        return {name: 2 * errors[name] for name in before}

    def consumed(self, before: Arrays, after: Arrays, scalars: Scalars) -> Consumed:
        """Return the gradient that made the buffer, or else the weights, up to rounding."""
        if self.has_momentum:
            kept, taken = self._factors(scalars)
            name, gradient = _BUFFER, after[_BUFFER] - _times(kept, before[_BUFFER])
        else:
            name, gradient, taken = "W", before["W"] - after["W"], scalars["learning_rate"]
        gradient = gradient / taken - scalars["weight_decay"] * before["W"]
        return Consumed(-gradient if self.maximize else gradient, name, 1 / abs(taken))

    def kernel(self, native: str) -> Kernel | None:
        """Return it, but where torch's program skips elements."""
        if self.implementation == "fused" and native.endswith("16"):
            return None
        return Kernel(f"sgd-{self.implementation}/1", _ways, _coefficients, _compute)

    def step(
        self, tensors: "dict[str, Tensor | None]", scalars: Mapping[str, float], *, device: str
    ) -> None:
        """Call torch's functional SGD; it changes the buffer in place, or makes it."""
        from torch.optim.sgd import sgd

        W, grad = ([tensor] for name in ("W", "grad") if (tensor := tensors[name]) is not None)
        buffers = [tensors.get(_BUFFER)]
        sgd(
            *(W, grad, buffers),
            foreach=self.implementation == "foreach",
            fused=self.implementation == "fused",
            weight_decay=scalars["weight_decay"],
            momentum=scalars["momentum"],
            lr=scalars["learning_rate"],
            dampening=scalars["dampening"],
            nesterov=self.nesterov,
            maximize=self.maximize,
        )
        if self.has_momentum:
            tensors[_BUFFER] = buffers[0]


def _times(factor: np.ndarray, array: np.ndarray) -> np.ndarray:
    """Return the product; 0 where the factor is, also of what is missing."""
    product: np.ndarray = np.where(factor == 0, 0.0, factor * array)
    return product


DECAYS = "decays"
"""The step has weight decay."""

MOMENTUM = "momentum"
"""Its momentum is not 0."""

FIRST = "first"
"""A buffer that is missing begins at this step, as the gradient."""


def _ways(optimizer: SGD, scalars: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return which branches the steps take."""
    return {
        DECAYS: scalars["weight_decay"] != 0,
        MOMENTUM: (scalars["momentum"] != 0) & optimizer.has_momentum,
        FIRST: scalars[COUNT] <= 1,
    }


def _coefficients(
    optimizer: SGD, scalars: Mapping[str, np.ndarray], rounder: Rounder
) -> dict[str, np.ndarray]:
    """Return the numbers that arrays are multiplied with."""
    plain, narrow = rounder.plain, rounder.narrow
    kept = plain if optimizer.implementation == "single" else narrow
    return {
        "decay": narrow(scalars["weight_decay"]),
        "kept": kept(scalars["momentum"]),
        "taken": narrow(1 - scalars["dampening"]),
        "momentum": narrow(scalars["momentum"]),
        "minus_rate": narrow(-scalars["learning_rate"]),
    }


def _compute(
    a: Arithmetic, optimizer: SGD, x: Numbers, c: Numbers, ways: frozenset[str]
) -> dict[str, Any]:
    """Take a step; what `fused` fuses is the same in 32 and 64 bits."""
    r = a.rounded
    W, grad = x["W"], -x["grad"] if optimizer.maximize else x["grad"]
    after = {_BUFFER: x[_BUFFER]} if optimizer.has_momentum else {}
    if DECAYS in ways:
        grad = r(a.fma(W, c["decay"], grad))
    if MOMENTUM in ways:
        buffer = r(a.fma(grad, c["taken"], r(x[_BUFFER] * c["kept"])))
        if FIRST in ways:
            buffer = a.select(a.is_nan(x[_BUFFER]), grad, buffer)
        after[_BUFFER] = buffer
        grad = r(a.fma(buffer, c["momentum"], grad)) if optimizer.nesterov else buffer
    return {"W": r(a.fma(grad, c["minus_rate"], W)), **after}
