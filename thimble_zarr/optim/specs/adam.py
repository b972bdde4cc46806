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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from thimble_zarr.optim.base import (
    BETA1,
    BETA2,
    COUNT,
    EPS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Estimate,
    State,
    tensor_dtype,
)
from thimble_zarr.optim.elementwise import Branches, Elementwise
from thimble_zarr.optim.formula import Arrays, Precision, Rounding, Scalars, like
from thimble_zarr.optim.moments import BIAS_CORRECTION1, BIAS_CORRECTION2_SQRT, Moments, estimates
from thimble_zarr.optim.programs.arithmetic import Arithmetic
from thimble_zarr.optim.programs.kernel import Numbers


@dataclass(frozen=True, kw_only=True)
class Adam(Moments):
    """`torch.optim.Adam` and `torch.optim.AdamW`.

    Attributes
    ----------
    amsgrad
        torch's flag of this name.
    betas_dtype
        Dtype of the betas where they are tensors, which makes their arithmetic that of tensors;
        None where they are Python numbers.
    """

    FUNCTION: ClassVar = "adam"
    LISTS: ClassVar = ("W", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")
    FLAGS: ClassVar = (*Moments.FLAGS, "amsgrad")
    IMPLEMENTATIONS: ClassVar = ("single", "foreach", "fused")
    ROUNDINGS_OF_W: ClassVar = 2
    STATES: ClassVar = (
        *Moments.STATES,
        State("max_exp_avg_sq", "running maximum of the second moment after the step (amsgrad)"),
    )
    SCALARS: ClassVar = (LEARNING_RATE, BETA1, BETA2, EPS, WEIGHT_DECAY)
    DERIVED: ClassVar = (BIAS_CORRECTION1, BIAS_CORRECTION2_SQRT)
    PROGRAM_FLAGS: ClassVar = (*Elementwise.PROGRAM_FLAGS, "betas_dtype")
    ALIASES: ClassVar = {
        "adam_update": ("update", "change predicted by the adaptive step"),
        "adam_decay": ("decay", "change predicted by decoupled weight decay"),
        "adam_residual": ("residual", "observed change minus update and decay"),
    }

    amsgrad: bool = False
    betas_dtype: str | None = None

    @classmethod
    def from_group(cls, group: Mapping[str, Any], kind: type) -> Self:
        """Return what would step a parameter group of a live optimizer of class `kind`."""
        is_adamw = any(base.__name__ == "AdamW" for base in kind.__mro__)
        group = {"decoupled_weight_decay": is_adamw, **group}  # not in groups of torch 2.6
        found = super().from_group(group, kind)
        chosen, rate = group["foreach"] is None and not group["fused"], found.lr_dtype
        if chosen and rate is not None and not found.capturable:
            found = replace(found, implementation="single")  # as torch decides
        return replace(found, betas_dtype=tensor_dtype(BETA1.read(group)))

    @property
    def tensors(self) -> Mapping[str, str]:
        """Dtypes of the numbers that are tensors, by name."""
        betas = () if self.betas_dtype is None else (BETA1.name, BETA2.name)
        return {**super().tensors, **dict.fromkeys(betas, self.betas_dtype or "")}

    @property
    def states(self) -> tuple[State, ...]:
        """The states that a run has: the maximum only with amsgrad."""
        return self.STATES if self.amsgrad else self.STATES[:2]

    @property
    def estimates(self) -> tuple[Estimate, ...]:
        """Both moments, corrected; with amsgrad the second is of the running maximum."""
        return estimates(self.states[-1].name)

    @property
    def update_inputs(self) -> tuple[str, ...]:
        """Both moments; with amsgrad the second is the running maximum."""
        return self.states[-1].name, "exp_avg"

    @property
    def program(self) -> str:
        """The program of AdamW has a name of its own."""
        return "adamw" if self.decoupled_weight_decay else "adam"

    def numbers(
        self,
        scalars: Mapping[str, Any],
        plain: Callable[[Any], Any],
        narrow: Callable[[Any], Any],
    ) -> dict[str, Any]:
        """Return the numbers of a step."""
        return {
            **self.numbers_of_moments(scalars, plain, narrow),
            "root": plain(scalars["bias_correction2_sqrt"]),
            "minus_step_size": plain(-(scalars["learning_rate"] / scalars["bias_correction1"])),
        }

    def take(self, a: Arithmetic, x: Numbers, c: Numbers, ways: Branches) -> dict[str, Any]:
        """Take a step."""
        r = a.rounded
        W, _, first, second = self.moved_moments(a, x, c, ways)
        after = {"exp_avg": first, "exp_avg_sq": second}
        if self.amsgrad:
            second = after["max_exp_avg_sq"] = a.maximum(x["max_exp_avg_sq"], second)
        denominator = r(r(r(a.sqrt(second)) / c["root"]) + c["eps"])
        return {"W": r(W + c["minus_step_size"] * first / denominator), **after}

    def change(self, a: Arithmetic, x: Numbers, c: Numbers) -> Any:
        """Return the change of the weights."""
        second, first = (x[name] for name in self.update_inputs)
        return c["minus_step_size"] * first / (a.sqrt(second) / c["root"] + c["eps"])

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
        """Return the change of the weights by the adaptive step alone, made in one array."""
        second, first = (arrays[name] for name in self.update_inputs)
        scale, eps = coefficients
        denominator: Any = np.sqrt(second, out=out)
        denominator += like(first, eps)
        update: np.ndarray = np.divide(first, denominator, out=out)
        update *= like(first, scale)
        return update

    def rounding(
        self, scalars: Scalars, precision: Precision, arrays: Arrays | None = None
    ) -> Rounding | None:
        r"""Return how rounding errors grow; elements decide where epsilon is very small.

        With :math:`\gamma_n = n u / (1 - n u)` for n roundings of relative error u (Higham,
        "Accuracy and Stability of Numerical Algorithms", lemma 3.1) torch's programs differ from
        the formula by at most :math:`\gamma_{10} |update| + \gamma_1 |W_t|`, and with weight decay
        :math:`\gamma_2 |W_{t-1}|` more: ten roundings make the update (square root, the two bias
        corrections, epsilon, quotient, step size, and their scalars), one adds it to the weight,
        two shrink the weight. Besides, scalars are computed beforehand, with a relative error c,
        and :math:`1 - \beta^t` cancels: there it becomes :math:`c / (1 - \beta^t)`. Where numbers
        underflow a rounding errs by the least number of the dtype instead. An epsilon that is not
        much larger than that does not hide it: then elements decide, and in float16, where
        :math:`\epsilon` itself underflows, the bound may be infinite.
        """
        if arrays is not None:
            return super().rounding(scalars, precision, arrays)
        if not (scalars["eps"] > 1e6 * precision.least).all():
            return None
        c, count = precision.scalar_roundoff, scalars[COUNT]
        of_first, of_second = (1 - scalars[beta] ** count for beta in ("beta1", "beta2"))
        underflow = 4 * precision.least / scalars["eps"]
        cancelled = c * (1 / of_first + 0.5 / of_second)
        decaying = (scalars["weight_decay"] != 0) & self.decoupled_weight_decay
        return Rounding(
            update=precision.gamma(10) + cancelled + underflow / (1 - underflow),
            after=precision.gamma(1),
            before=decaying * (precision.gamma(2) + c),
            least=4 * precision.least,
        )
