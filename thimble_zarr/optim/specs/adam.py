r"""Adam and AdamW.

What a step should do, in real numbers, given the states after it:

.. math::

    update_t = -\eta_t \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon}, \qquad
    decay_t = -\eta_t \lambda_t W_{t-1}

with :math:`\hat m_t = m_t / (1 - \beta_1^t)` and :math:`\hat v_t = v_t / (1 - \beta_2^t)`
(Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2, in the form of
`torch.optim.AdamW`, where the learning rate multiplies the decay). Adam's decay is in the gradient
and so in the moments already.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from thimble_zarr.optim.base import (
    BETA1,
    BETA2,
    COUNT,
    EPS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Derived,
    Estimate,
    Optimizer,
    State,
    chosen_program,
    tensor_dtype,
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
from thimble_zarr.optim.programs.adam import adam_kernel
from thimble_zarr.optim.programs.kernel import Kernel

if TYPE_CHECKING:
    from torch import Tensor


def _root_of_correction(optimizer: Optimizer, scalars: Mapping[str, Any]) -> Any:
    """Return the square root as torch's programs take it: the fused one is not in Python."""
    correction = 1 - scalars[BETA2.name] ** scalars[COUNT]
    return math.sqrt(correction) if optimizer.implementation == "fused" else correction**0.5


def _corrected(arrays: Arrays, scalars: Scalars, *, state: str, rate: str) -> np.ndarray:
    """Return a mean that decays, without its bias towards the 0 it began from."""
    corrected: np.ndarray = arrays[state] / (1 - scalars[rate] ** scalars[COUNT])
    return corrected


def moments(second: str) -> tuple[Estimate, ...]:
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


@dataclass(frozen=True, kw_only=True)
class Adam(Optimizer, Formula):
    """`torch.optim.Adam` and `torch.optim.AdamW`.

    Attributes
    ----------
    decoupled_weight_decay
        True where weight decay acts on the weights (AdamW), False where it is added to the
        gradient (Adam).
    amsgrad, maximize, capturable, differentiable
        torch's flags of these names.
    lr_dtype, betas_dtype
        Dtype of the learning rate and of the betas where they are tensors, which makes their
        arithmetic that of tensors; None where they are Python numbers.
    """

    STATES: ClassVar = (
        State("exp_avg", "first moment after the step", decay=BETA1.name),
        State("exp_avg_sq", "second moment after the step", decay=BETA2.name),
        State("max_exp_avg_sq", "running maximum of the second moment after the step (amsgrad)"),
    )
    SCALARS: ClassVar = (LEARNING_RATE, BETA1, BETA2, EPS, WEIGHT_DECAY)
    DERIVED: ClassVar = (
        BIAS_CORRECTION1,
        BIAS_CORRECTION2_SQRT,
    )
    ESTIMATES: ClassVar = moments("exp_avg_sq")
    PROGRAM_FLAGS: ClassVar = (
        *Optimizer.PROGRAM_FLAGS,
        *("capturable", "differentiable", "lr_dtype", "betas_dtype"),
    )
    ALIASES: ClassVar = {
        "adam_update": ("update", "change predicted by the adaptive step"),
        "adam_decay": ("decay", "change predicted by decoupled weight decay"),
        "adam_residual": ("residual", "observed change minus update and decay"),
    }

    decoupled_weight_decay: bool
    amsgrad: bool = False
    maximize: bool = False
    capturable: bool = False
    differentiable: bool = False
    lr_dtype: str | None = None
    betas_dtype: str | None = None

    @classmethod
    def from_group(cls, group: Mapping[str, object], kind: type) -> Self:
        """Return what would step a parameter group of a live optimizer of class `kind`."""
        is_adamw = any(base.__name__ == "AdamW" for base in kind.__mro__)
        program = chosen_program(group, differentiable=bool(group["differentiable"]))
        lr_dtype = tensor_dtype(LEARNING_RATE.read(group))
        if program == "foreach" and group["foreach"] is None and lr_dtype is not None:
            program = "foreach" if group["capturable"] else "single"  # as torch decides
        return cls(
            name=kind.__name__,
            implementation=program,
            decoupled_weight_decay=bool(group.get("decoupled_weight_decay", is_adamw)),
            amsgrad=bool(group["amsgrad"]),
            maximize=bool(group["maximize"]),
            capturable=bool(group["capturable"]),
            differentiable=bool(group["differentiable"]),
            lr_dtype=lr_dtype,
            betas_dtype=tensor_dtype(BETA1.read(group)),
        )

    @property
    def states(self) -> tuple[State, ...]:
        """The states that a run has: the maximum only with amsgrad."""
        return self.STATES if self.amsgrad else self.STATES[:2]

    @property
    def estimates(self) -> tuple[Estimate, ...]:
        """Both moments, corrected; with amsgrad the second is of the running maximum."""
        return moments(self.states[-1].name)

    @property
    def update_inputs(self) -> tuple[str, ...]:
        """Both moments; with amsgrad the second is the running maximum."""
        return self.states[-1].name, "exp_avg"

    @property
    def scalar_dtype(self) -> str:
        """These programs compute step size and bias corrections in float32, on the device."""
        on_device = self.capturable or self.differentiable or self.implementation == "fused"
        are_tensors = self.lr_dtype is not None or self.betas_dtype is not None
        return "float32" if on_device or are_tensors else "float64"

    def coefficients(self, scalars: Scalars) -> Sequence[Any]:
        """Return what the first moment is multiplied with, and what is added to the denominator.

        Both of the quotient are divided by what corrects the second moment, so that arrays have an
        operation less.
        """
        count = scalars[COUNT]
        correction = (1 - scalars["beta2"] ** count) ** 0.5
        step_size = scalars["learning_rate"] / (1 - scalars["beta1"] ** count)
        return -step_size * correction, scalars["eps"] * correction

    def update(
        self, arrays: Arrays, coefficients: Sequence[Any], out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the change of the weights by the adaptive step alone."""
        second, first = (arrays[name] for name in self.update_inputs)
        scale, eps = coefficients
        denominator: Any = np.sqrt(second, out=out)
        denominator += like(first, eps)
        update: np.ndarray = np.divide(first, denominator, out=out)
        update *= like(first, scale)
        return update

    def decay_factor(self, scalars: Scalars) -> Any:
        """Return what decoupled weight decay multiplies `W` with; 0 for that in the gradient."""
        factor = -scalars["learning_rate"] * scalars["weight_decay"]
        return factor if self.decoupled_weight_decay else 0 * factor

    def rounding(
        self, scalars: Scalars, precision: Precision, arrays: Arrays | None = None
    ) -> Rounding | None:
        """Return how rounding errors grow; None where epsilon is so small that elements decide."""
        denominator = scalars["eps"]
        if arrays is not None:
            denominator = _denominator(arrays[self.update_inputs[0]], scalars)
        elif not (denominator > 1e6 * precision.least).all():
            return None
        return self._rounding(denominator, scalars, precision)

    def _rounding(self, denominator: Any, scalars: Scalars, precision: Precision) -> Rounding:
        r"""Return how rounding errors grow, given the denominator or anything positive below it.

        With :math:`\gamma_n = n u / (1 - n u)` for n roundings of relative error u (Higham,
        "Accuracy and Stability of Numerical Algorithms", lemma 3.1) torch's programs differ from
        the formula by at most :math:`\gamma_{10} |update| + \gamma_1 |W_t|`, and with weight decay
        :math:`\gamma_2 |W_{t-1}|` more: ten roundings make the update (square root, the two bias
        corrections, epsilon, quotient, step size, and their scalars), one adds it to the weight,
        two shrink the weight. Besides, scalars are computed beforehand, with a relative error c,
        and :math:`1 - \beta^t` cancels: there it becomes :math:`c / (1 - \beta^t)`. Where numbers
        underflow a rounding errs by the least number of the dtype instead, and relative to the
        denominator if it happens there: in float16, where :math:`\epsilon` itself underflows, the
        bound may be infinite.
        """
        c, count = precision.scalar_roundoff, scalars[COUNT]
        cancellation = 1 / (1 - scalars["beta1"] ** count) + 0.5 / (1 - scalars["beta2"] ** count)
        underflow = 4 * precision.least / denominator
        underflow = underflow / np.maximum(1 - underflow, 0)  # of the quotient; infinite from 1 on
        decaying = (scalars["weight_decay"] != 0) & self.decoupled_weight_decay
        return Rounding(
            update=precision.gamma(10) + c * cancellation + underflow,
            after=precision.gamma(1),
            before=decaying * (precision.gamma(2) + c),
            least=4 * precision.least,
        )

    def _gradient(
        self, grad: np.ndarray, W: np.ndarray, scalars: Scalars
    ) -> tuple[np.ndarray, np.ndarray]:
        decay = 0 if self.decoupled_weight_decay else scalars["weight_decay"]
        return coupled(grad, W, decay=decay, maximize=self.maximize)

    def advance(self, before: Arrays, grad: np.ndarray, scalars: Scalars) -> dict[str, np.ndarray]:
        """Return the moments after a step, from those before and the gradient."""
        beta1, beta2 = scalars["beta1"], scalars["beta2"]
        gradient, _ = self._gradient(grad, before["W"], scalars)
        after = {
            "exp_avg": beta1 * before["exp_avg"] + (1 - beta1) * gradient,
            "exp_avg_sq": beta2 * before["exp_avg_sq"] + (1 - beta2) * gradient**2,
        }
        if self.amsgrad:
            after["max_exp_avg_sq"] = np.maximum(after["exp_avg_sq"], before["max_exp_avg_sq"])
        return after

    def bounds(
        self, before: Arrays, grad: np.ndarray, scalars: Scalars, precision: Precision
    ) -> dict[str, np.ndarray]:
        r"""Return how far two programs of Adam's, given the same row and gradient, can end apart.

        Each program's rounding carries it from the real-number recurrences by at most, for the
        moments,

        .. math::

            B_m = \gamma_8 (\max(\beta_1, 1 - \beta_1) |m| + (1 - \beta_1) G), \qquad
            B_v = \gamma_{14} (\beta_2 v + (1 - \beta_2) G^2)

        with :math:`G = |g| + \lambda |W|` where weight decay is added to the gradient, else
        :math:`|g|`: three roundings make that gradient, three a `lerp`, one each its scalars; the
        second moment has the gradient's twice. The weight inherits both through the update, which
        grows with :math:`|m|` and falls with v, and adds the formula's rounding. Two programs
        differ by at most twice the sum.
        """
        beta1, beta2 = scalars["beta1"], scalars["beta2"]
        m, v, W = before["exp_avg"], before["exp_avg_sq"], before["W"]
        _, size = self._gradient(grad, W, scalars)
        c, least = precision.scalar_roundoff, precision.least
        error_m = (precision.gamma(8) + c) * (
            np.maximum(beta1, 1 - beta1) * abs(m) + (1 - beta1) * size
        ) + 8 * least
        error_v = (precision.gamma(14) + c) * (beta2 * v + (1 - beta2) * size**2) + 8 * least
        after = self.advance(before, grad, scalars)
        m_after, v_after = abs(after["exp_avg"]), after[self.update_inputs[0]]
        step_size = scalars["learning_rate"] / (1 - beta1 ** scalars[COUNT])
        least_denominator = _denominator(np.maximum(v_after - error_v, 0), scalars)
        update = step_size * m_after / _denominator(v_after, scalars)
        largest = step_size * (m_after + error_m) / least_denominator
        W_after = abs(W) + largest + abs(self.decay_factor(scalars)) * abs(W)
        rounding = self._rounding(least_denominator, scalars, precision)
        error_W = (largest - update) + rounding.bound(largest, W_after, W)
        errors = {"W": error_W, "exp_avg": error_m}
        return {name: 2 * errors.get(name, error_v) for name in before}

    def consumed(self, before: Arrays, after: Arrays, scalars: Scalars) -> Consumed:
        """Return the gradient that made the first moment, up to rounding."""
        beta1 = scalars["beta1"]
        gradient = (after["exp_avg"] - beta1 * before["exp_avg"]) / (1 - beta1)
        if not self.decoupled_weight_decay:
            gradient -= scalars["weight_decay"] * before["W"]
        return Consumed(-gradient if self.maximize else gradient, "exp_avg", 1 / (1 - beta1))

    def kernel(self, native: str) -> Kernel | None:
        """Return that of `programs.adam`."""
        return adam_kernel(self)

    def step(
        self, tensors: "dict[str, Tensor | None]", scalars: Mapping[str, float], *, device: str
    ) -> None:
        """Call torch's functional Adam; it changes the states in place."""
        import torch
        from torch.optim.adam import adam

        on_device = self.capturable and device != "cpu"  # no CPU can be captured
        counts_on = device if on_device or self.implementation == "fused" else "cpu"
        numbers_on = device if on_device else "cpu"

        def number(name: str, dtype: str | None) -> "float | Tensor":
            if dtype is None:
                return scalars[name]
            return torch.tensor(scalars[name], dtype=getattr(torch, dtype), device=numbers_on)

        W, grad, first, second, largest = (
            [tensor] if (tensor := tensors.get(name)) is not None else []
            for name in ("W", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        )
        adam(
            *(W, grad, first, second, largest),
            [torch.tensor(scalars[COUNT] - 1, dtype=torch.float32, device=counts_on)],
            foreach=self.implementation == "foreach",
            fused=self.implementation == "fused",
            capturable=on_device,
            differentiable=self.differentiable,
            decoupled_weight_decay=self.decoupled_weight_decay,
            amsgrad=self.amsgrad,
            maximize=self.maximize,
            lr=number("learning_rate", self.lr_dtype),
            beta1=number("beta1", self.betas_dtype),
            beta2=number("beta2", self.betas_dtype),
            eps=scalars["eps"],
            weight_decay=scalars["weight_decay"],
        )


def _denominator(second: np.ndarray, scalars: Scalars) -> np.ndarray:
    """Return what the adaptive step divides by."""
    correction = (1 - scalars["beta2"] ** scalars[COUNT]) ** 0.5
    denominator: np.ndarray = second**0.5 / correction + scalars["eps"]
    return denominator
