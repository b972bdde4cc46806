r"""Adafactor, whose step needs the whole parameter.

.. math::

    R_t &= (1 - t^\tau) R_{t-1} + t^\tau \, \text{mean over columns of } g_t^2, \qquad
    C_t = (1 - t^\tau) C_{t-1} + t^\tau \, \text{mean over rows of } g_t^2 \\
    U_t &= g_t \Big/ \sqrt{R_t C_t / \text{mean}(R_t)} \\
    W_t &= (1 - \eta_t \lambda_t) W_{t-1} - \max(\epsilon_2, \text{RMS}(W_{t-1}))
        \min(\eta_t, 1 / \sqrt t) \, U_t / \max(1, \text{RMS}(U_t) / d)

(Shazeer and Stern, "Adafactor: Adaptive learning rates with sublinear memory cost", 2018, in the
form of `torch.optim.Adafactor`). A vector has one second moment, `variance`, instead of the factors
R and C. These are recorded spread over the parameter's shape, as they enter the step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from thimble_zarr.optim.base import LEARNING_RATE, WEIGHT_DECAY, Scalar, State
from thimble_zarr.optim.whole import Whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class _FirstEpsilon(Scalar):
    """An epsilon that need not be in the group: torch then takes a dtype's spacing at 1.

    That is the dtype of the group's first parameter, also for the parameters of other dtypes.
    """

    def read(self, group: Mapping[str, Any]) -> "float | Tensor":
        """Return the number that a step uses."""
        import torch

        given: float | None = group["eps"][0]
        if given is not None:
            return given
        stepped = [of for of in group["params"] if of.grad is not None] or group["params"]
        dtype: torch.dtype = stepped[0].dtype
        if group["foreach"]:
            by_dtype: Any = torch.optim.Optimizer._group_tensors_by_device_and_dtype([stepped])
            dtype = next(iter(by_dtype))[1]
        return float(torch.finfo(dtype).eps)


_FACTORS = (
    State("row_var", "row factor of the second moment after the step", single_along=-1),
    State("col_var", "column factor of the second moment after the step", single_along=-2),
)
_VARIANCE = State("variance", "second moment of a vector after the step")


@dataclass(frozen=True, kw_only=True)
class Adafactor(Whole):
    """`torch.optim.Adafactor`.

    Attributes
    ----------
    maximize
        torch's flag of this name.
    factored
        Whether the parameter has two axes or more, and the second moment two factors.
    """

    STATES: ClassVar = (*_FACTORS, _VARIANCE)
    SCALARS: ClassVar = (
        LEARNING_RATE,
        Scalar("beta2_decay", "power of the decay of the second moment", "beta2_decay"),
        _FirstEpsilon("eps1", "least root of the second moment", "eps", 0),
        Scalar("eps2", "least size of the weights, which a step is in proportion to", "eps", 1),
        Scalar("clipping_threshold", "size from which an update is clipped", "d"),
        WEIGHT_DECAY,
    )

    maximize: bool = False
    factored: bool = True

    @classmethod
    def choices(cls, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return torch's flags; it takes each tensor by itself unless it is told not to."""
        implementation = "foreach" if group["foreach"] else "single"
        return {"implementation": implementation, "maximize": bool(group["maximize"])}

    def of_shape(self, shape: tuple[int, ...]) -> Self:
        """Return what steps a parameter of a shape."""
        return replace(self, factored=len(shape) > 1)

    @property
    def states(self) -> tuple[State, ...]:
        """The states that a run has."""
        return _FACTORS if self.factored else (_VARIANCE,)

    def make(self, weight: "torch.nn.Parameter") -> "torch.optim.Optimizer":
        """Return such an optimizer of a parameter."""
        import torch

        options: dict[str, Any] = {"foreach": self.implementation == "foreach"}
        options |= {"lr": self.learning_rate, "maximize": self.maximize}
        return torch.optim.Adafactor([weight], **options)
