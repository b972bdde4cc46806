r"""AdamW's formula, in real numbers: what a step should do, given the states after it.

.. math::

    update_t = -\eta_t \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon}, \qquad
    decay_t = -\eta_t \lambda_t W_{t-1}

with :math:`\hat m_t = m_t / (1 - \beta_1^t)` and :math:`\hat v_t = v_t / (1 - \beta_2^t)`
(Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2, in the form of
`torch.optim.AdamW`, where the learning rate multiplies the decay). The functions take anything that
broadcasts: NumPy, xarray or Dask arrays; they are as precise as what they are given.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
    import xarray as xr

Array = TypeVar("Array", np.ndarray, "xr.DataArray")


class UpdateScalars(NamedTuple):
    """What `adam_update` multiplies and adds at some steps; both broadcast to the moments."""

    scale: Any
    eps: Any


def update_scalars(
    *, learning_rate: Array, beta1: Array, beta2: Array, eps: Array, optimizer_step: Array
) -> UpdateScalars:
    """Return the coefficients of the adaptive step.

    Quotient and denominator of the formula are divided by what corrects the second moment, so that
    arrays have an operation less.

    Parameters
    ----------
    learning_rate, beta1, beta2, eps
        Hyper-parameters of step t.
    optimizer_step
        The optimizer's count of steps after step t, which the bias correction uses.
    """
    correction = (1 - beta2**optimizer_step) ** 0.5
    step_size = learning_rate / (1 - beta1**optimizer_step)
    return UpdateScalars(scale=-step_size * correction, eps=eps * correction)


def adam_update(
    exp_avg: Array, exp_avg_sq: Array, scalars: UpdateScalars, out: np.ndarray | None = None
) -> Array:
    """Return the change of the weights by the adaptive step alone.

    Parameters
    ----------
    exp_avg, exp_avg_sq
        First and second moment after step t; with amsgrad the running maximum of the second.
    scalars
        Of step t.
    out
        A NumPy array to compute in, of the shape and dtype of the moments, which are then NumPy's.

    Returns
    -------
    array
        Shape of the moments.
    """
    denominator: Any = np.sqrt(exp_avg_sq, out=out)
    denominator += _like(exp_avg, scalars.eps)
    update: Array = np.divide(exp_avg, denominator, out=out)
    update *= _like(exp_avg, scalars.scale)
    return update


def adam_denominator(
    exp_avg_sq: Array, *, beta2: Array, eps: Array, optimizer_step: Array
) -> Array:
    """Return what the adaptive step divides by; parameters as those of `update_scalars`."""
    correction = (1 - beta2**optimizer_step) ** 0.5
    denominator: Array = exp_avg_sq**0.5 / correction + eps
    return denominator


def adam_decay(W_previous: Array, *, learning_rate: Array, weight_decay: Array) -> Array:
    """Return the change of the weights by decoupled weight decay.

    Parameters
    ----------
    W_previous
        The weights before step t.
    learning_rate, weight_decay
        Hyper-parameters of step t.

    Returns
    -------
    array
        Shape of the weights.
    """
    decay: Array = _like(W_previous, -learning_rate * weight_decay) * W_previous
    return decay


def _like(array: Array, scalar: Array) -> Array:
    """Return a scalar of a step in the array's precision, in which the arithmetic then is."""
    return scalar.astype(array.dtype, copy=False) if hasattr(scalar, "astype") else scalar


class RoundingScalars(NamedTuple):
    """What `rounding_bound` multiplies update and weights by at some steps, and adds."""

    of_update: Any
    of_after: float
    of_before: Any
    least: float


def rounding_scalars(
    *,
    denominator: Array,
    weight_decay: Array,
    beta1: Array,
    beta2: Array,
    optimizer_step: Array,
    unit_roundoff: float,
    scalar_roundoff: float,
    least: float,
) -> RoundingScalars:
    r"""Return how rounding errors grow with update and weights.

    With :math:`\gamma_n = n u / (1 - n u)` for n roundings of relative error u (Higham, "Accuracy
    and Stability of Numerical Algorithms", lemma 3.1) torch's programs differ from the formula by
    at most :math:`\gamma_{10} |update| + \gamma_1 |W_t|`, and with weight decay
    :math:`\gamma_2 |W_{t-1}|` more: ten roundings make the update (square root, the two bias
    corrections, epsilon, quotient, step size, and their scalars), one adds it to the weight, two
    shrink the weight. Besides, scalars are computed beforehand, with a relative error c, and
    :math:`1 - \beta^t` cancels: there it becomes :math:`c / (1 - \beta^t)`. Where numbers underflow
    a rounding errs by the least number of the dtype instead, and relative to the denominator if it
    happens there: in float16, where :math:`\epsilon` itself underflows, the bound may be infinite.

    Parameters
    ----------
    denominator
        The formula's denominator, or anything positive below it.
    weight_decay, beta1, beta2, optimizer_step
        Hyper-parameters of the step.
    unit_roundoff
        Relative error u of one rounding in the dtype of the weights.
    scalar_roundoff
        Relative error c of a scalar, both torch's and that of `update_scalars`.
    least
        The least positive number of the dtype of the weights.
    """
    cancellation = 1 / (1 - beta1**optimizer_step) + 0.5 / (1 - beta2**optimizer_step)
    underflow = 4 * least / denominator
    underflow = underflow / np.maximum(1 - underflow, 0)  # of the quotient; infinite from 1 on
    decaying = weight_decay != 0
    return RoundingScalars(
        of_update=gamma(10, unit_roundoff) + scalar_roundoff * cancellation + underflow,
        of_after=gamma(1, unit_roundoff),
        of_before=decaying * (gamma(2, unit_roundoff) + scalar_roundoff),
        least=4 * least,
    )


def rounding_bound(
    update: Array,
    W: Array,
    W_previous: Array,
    scalars: RoundingScalars,
    out: tuple[np.ndarray, np.ndarray] | tuple[None, None] = (None, None),
) -> Array:
    """Return how far rounding alone can carry a step from the formula, element by element.

    The bound is safe, not tight.

    Parameters
    ----------
    update
        The formula's update.
    W, W_previous
        The weights after and before the step.
    scalars
        Of the step.
    out
        Two NumPy arrays to compute in, of the shape and dtype of the weights, which are then
        NumPy's. The first may be `update`; what is returned is in it.

    Returns
    -------
    array
        Not negative, shape of the weights.
    """
    into, term_in = out
    bound: Array = np.abs(update, out=into)  # type: ignore[assignment]
    bound *= _like(update, scalars.of_update)
    term: Any = np.abs(W, out=term_in)
    term *= scalars.of_after
    bound += term
    if np.any(scalars.of_before):
        term = np.abs(W_previous, out=term_in)
        term *= _like(W, scalars.of_before)
        bound += term
    bound += scalars.least
    return bound


def gamma(n: int, unit_roundoff: float) -> float:
    """Return the relative error of n roundings (Higham, lemma 3.1)."""
    return n * unit_roundoff / (1 - n * unit_roundoff)


def recurrence_bounds(
    before: Mapping[str, np.ndarray],
    grad: np.ndarray,
    *,
    decoupled_weight_decay: bool,
    hyperparameters: Mapping[str, np.ndarray],
    unit_roundoff: float,
    scalar_roundoff: float,
    least: float,
) -> dict[str, np.ndarray]:
    r"""Return how far two programs of Adam's, given the same row and gradient, can end apart.

    Each program's rounding carries it from the real-number recurrences by at most, for the moments,

    .. math::

        B_m = \gamma_8 (\max(\beta_1, 1 - \beta_1) |m| + (1 - \beta_1) G), \qquad
        B_v = \gamma_{14} (\beta_2 v + (1 - \beta_2) G^2)

    with :math:`G = |g| + \lambda |W|` where weight decay is added to the gradient, else
    :math:`|g|`: three roundings make that gradient, three a `lerp`, one each its scalars; the
    second moment has the gradient's twice. The weight inherits both through the update, which grows
    with :math:`|m|` and falls with v, and adds `rounding_bound`. Two programs differ by at most
    twice the sum.

    Parameters
    ----------
    before
        `W`, `exp_avg`, `exp_avg_sq` (and `max_exp_avg_sq` with amsgrad) before the step.
    grad
        The gradient, negated with maximize.
    decoupled_weight_decay
        Whether weight decay acts on the weights.
    hyperparameters
        The scalars of the step, by their names in a store.
    unit_roundoff, scalar_roundoff, least
        As in `rounding_scalars`.

    Returns
    -------
    dict of str to array
        For each variable of `before` the largest distance, not negative.
    """
    h = hyperparameters
    beta1, beta2, count = h["beta1"], h["beta2"], h["optimizer_step"]
    coupled = 0 * h["weight_decay"] if decoupled_weight_decay else h["weight_decay"]
    decoupled = h["weight_decay"] - coupled
    m, v, W = before["exp_avg"], before["exp_avg_sq"], before["W"]
    size = abs(grad) + coupled * abs(W)
    error_m = (gamma(8, unit_roundoff) + scalar_roundoff) * (
        np.maximum(beta1, 1 - beta1) * abs(m) + (1 - beta1) * size
    ) + 8 * least
    error_v = (gamma(14, unit_roundoff) + scalar_roundoff) * (
        beta2 * v + (1 - beta2) * size**2
    ) + 8 * least
    gradient = grad + coupled * W  # of either sign: only its size and square count below
    m_after = abs(beta1 * m + (1 - beta1) * gradient)
    v_after = beta2 * v + (1 - beta2) * gradient**2
    if "max_exp_avg_sq" in before:
        v_after = np.maximum(v_after, before["max_exp_avg_sq"])
    scalars = {"beta2": beta2, "eps": h["eps"], "optimizer_step": count}
    step_size = h["learning_rate"] / (1 - beta1**count)
    least_denominator = adam_denominator(np.maximum(v_after - error_v, 0), **scalars)
    update = step_size * m_after / adam_denominator(v_after, **scalars)
    largest = step_size * (m_after + error_m) / least_denominator
    rounding = rounding_scalars(
        denominator=least_denominator,
        weight_decay=decoupled,
        beta1=beta1,
        beta2=beta2,
        optimizer_step=count,
        unit_roundoff=unit_roundoff,
        scalar_roundoff=scalar_roundoff,
        least=least,
    )
    W_after = abs(W) + largest + h["learning_rate"] * decoupled * abs(W)
    error_W = (largest - update) + rounding_bound(largest, W_after, W, rounding)
    errors = {"W": error_W, "exp_avg": error_m, "exp_avg_sq": error_v, "max_exp_avg_sq": error_v}
    return {name: 2 * errors[name] for name in before}
