r"""Muon, whose step needs the whole parameter, a matrix.

.. math::

    m_t = \mu m_{t-1} + (1 - \mu) g_t, \qquad
    W_t = (1 - \eta_t \lambda_t) W_{t-1} - \eta_t r \, NS\big((1 - \mu) g_t + \mu m_t\big)

(Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, in the form of
`torch.optim.Muon`). NS makes a matrix nearly orthogonal by a few Newton-Schulz iterations, in
bfloat16 whatever the parameter's dtype; r depends on the shape. Without Nesterov's momentum NS is
of :math:`m_t`. The momentum is computed element by element, W is not.

No bound is known that rounding keeps NS within: each iteration multiplies what is small by 3.4.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from thimble_zarr.optim.base import EPS, LEARNING_RATE, WEIGHT_DECAY, Scalar, State
from thimble_zarr.optim.elementwise import NEAR, Elementwise
from thimble_zarr.optim.formula import Arrays, Precision, Scalars
from thimble_zarr.optim.inexact import RUNNING, Inexact
from thimble_zarr.optim.whole import Whole

if TYPE_CHECKING:
    import torch

_MOMENTUM = "momentum_buffer"


@dataclass(frozen=True, kw_only=True)
class Muon(Whole):
    """`torch.optim.Muon`.

    Attributes
    ----------
    nesterov, adjust_lr_fn
        torch's options of these names.
    """

    STEP_KEY: ClassVar = None
    STATES: ClassVar = (State(_MOMENTUM, "momentum buffer after the step", decay="momentum"),)
    SCALARS: ClassVar = (
        LEARNING_RATE,
        Scalar("momentum", "factor of the momentum buffer", "momentum"),
        WEIGHT_DECAY,
        EPS,
        Scalar("ns_steps", "Newton-Schulz iterations", "ns_steps"),
        *(
            Scalar(f"ns_{name}", f"coefficient {name} of them", "ns_coefficients", index)
            for index, name in enumerate("abc")
        ),
    )

    nesterov: bool = True
    adjust_lr_fn: str | None = None

    @classmethod
    def choices(cls, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return torch's options."""
        adjusts: str | None = group["adjust_lr_fn"]
        return {"nesterov": bool(group["nesterov"]), "adjust_lr_fn": adjusts}

    def make(self, weight: "torch.nn.Parameter") -> "torch.optim.Optimizer":
        """Return such an optimizer of a parameter."""
        import torch

        options: dict[str, Any] = {"lr": self.learning_rate, "nesterov": self.nesterov}
        return torch.optim.Muon([weight], adjust_lr_fn=self.adjust_lr_fn, **options)

    def elementwise(self, dtypes: Mapping[str, str]) -> tuple[str, ...]:
        """Return the momentum, but where torch normalizes the buffer itself.

        In bfloat16 without Nesterov's momentum that is no copy (pytorch#194664).
        """
        is_normalized = dtypes.get(_MOMENTUM) == "bfloat16" and not self.nesterov
        return () if is_normalized else (_MOMENTUM,)

    def bounds(
        self, before: Arrays, grad: np.ndarray, scalars: Scalars, precision: Precision
    ) -> dict[str, np.ndarray]:
        """Return that of the momentum, which `lerp` moves."""
        start, end = (Inexact.exact(of, precision) for of in (before[_MOMENTUM], grad))
        rate = np.asarray(scalars["momentum"], np.float64)

        def plain(weight: np.ndarray) -> Inexact:
            error = precision.scalar_roundoff * np.abs(weight)
            return replace(Inexact.exact(weight, precision), error=error).rounded()

        numbers = Elementwise.weights(rate, plain)
        ways = (frozenset({NEAR}), frozenset[str]())  # a version may go from the other end
        errors = [Elementwise.moved(RUNNING, start, end, numbers, way).error for way in ways]
        return {_MOMENTUM: 2 * np.maximum(*errors)}
