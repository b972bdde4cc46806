r"""AdamW's formula, in real numbers: what a step should do, given the states after it.

.. math::

    update_t = -\eta_t \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon}, \qquad
    decay_t = -\eta_t \lambda_t W_{t-1}

with :math:`\hat m_t = m_t / (1 - \beta_1^t)` and :math:`\hat v_t = v_t / (1 - \beta_2^t)`
(Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2, in the form of
`torch.optim.AdamW`, where the learning rate multiplies the decay). The functions take anything that
broadcasts: NumPy, xarray or Dask arrays; they are as precise as what they are given.
"""

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import xarray as xr

Array = TypeVar("Array", np.ndarray, "xr.DataArray")


def adam_update(
    exp_avg: Array,
    exp_avg_sq: Array,
    *,
    learning_rate: Array,
    beta1: Array,
    beta2: Array,
    eps: Array,
    optimizer_step: Array,
) -> Array:
    """Return the change of the weights by the adaptive step alone.

    Parameters
    ----------
    exp_avg, exp_avg_sq
        First and second moment after step t; with amsgrad the running maximum of the second.
    learning_rate, beta1, beta2, eps
        Hyper-parameters of step t.
    optimizer_step
        The optimizer's count of steps after step t, which the bias correction uses.

    Returns
    -------
    array
        Shape of the moments.
    """
    step_size = learning_rate / (1 - beta1**optimizer_step)
    denominator = exp_avg_sq**0.5 * (1 - beta2**optimizer_step) ** -0.5 + eps
    update: Array = -step_size * exp_avg / denominator
    return update


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
    decay: Array = -learning_rate * weight_decay * W_previous
    return decay


def rounding_bound(
    update: Array,
    W: Array,
    W_previous: Array,
    *,
    weight_decay: Array,
    beta1: Array,
    beta2: Array,
    optimizer_step: Array,
    unit_roundoff: float,
    scalar_roundoff: float,
) -> Array:
    r"""Return how far rounding alone can carry a step from the formula, element by element.

    With :math:`\gamma_n = n u / (1 - n u)` for n roundings of relative error u (Higham, "Accuracy
    and Stability of Numerical Algorithms", lemma 3.1) torch's programs differ from the formula by
    at most :math:`\gamma_{10} |update| + \gamma_1 |W_t|`, and with weight decay
    :math:`\gamma_2 |W_{t-1}|` more: ten roundings make the update (square root, the two bias
    corrections, epsilon, quotient, step size, and their scalars), one adds it to the weight, two
    shrink the weight. Besides, scalars are computed beforehand, with a relative error c, and
    :math:`1 - \beta^t` cancels: there it becomes :math:`c / (1 - \beta^t)`. The bound is safe, not
    tight.

    Parameters
    ----------
    update
        The formula's update.
    W, W_previous
        The weights after and before the step.
    weight_decay, beta1, beta2, optimizer_step
        Hyper-parameters of the step.
    unit_roundoff
        Relative error u of one rounding in the dtype of the weights.
    scalar_roundoff
        Relative error c of a scalar, both torch's and that of `update`.

    Returns
    -------
    array
        Not negative, shape of the weights.
    """

    def gamma(n: int) -> float:
        return n * unit_roundoff / (1 - n * unit_roundoff)

    cancellation = 1 / (1 - beta1**optimizer_step) + 0.5 / (1 - beta2**optimizer_step)
    relative = gamma(10) + scalar_roundoff * cancellation
    decaying = (weight_decay != 0) * (gamma(2) + scalar_roundoff)
    bound: Array = relative * abs(update) + gamma(1) * abs(W) + decaying * abs(W_previous)
    return bound
