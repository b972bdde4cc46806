"""Adam and AdamW, in the operations of torch's programs for CPUs with vector instructions.

Which multiply-adds are fused was found by comparing with torch, operation by operation: all that a
compiler can fuse. The program of single tensors calls an operation of torch's after the other and
so rounds each to the dtype of the arrays; the fused one rounds only what it stores.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from thimble_zarr.optim.programs.arithmetic import Arithmetic
from thimble_zarr.optim.programs.kernel import Kernel, Numbers, Rounder

DECAYS = "decays"
"""The step has weight decay."""

NEAR = "near"
"""The first moment moves by less than half of the way to the gradient."""


def _ways(optimizer: Any, scalars: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return which branches the steps take."""
    weight = (1 - scalars["beta1"]).astype(np.float32)
    return {DECAYS: scalars["weight_decay"] != 0, NEAR: np.abs(weight) < 0.5}


def _coefficients(
    optimizer: Any, scalars: Mapping[str, np.ndarray], rounder: Rounder
) -> dict[str, np.ndarray]:
    """Return the numbers that arrays are multiplied with and so on.

    In 16 bits torch rounds some of them to the dtype of the arrays, the more of them in `foreach`.
    """
    plain, narrow = rounder.plain, rounder.narrow
    fused, foreach = (optimizer.implementation == name for name in ("fused", "foreach"))
    of_tensor = narrow if foreach else plain
    added = plain if fused else narrow
    rate, decay = scalars["learning_rate"], scalars["weight_decay"]
    weight = plain(1 - scalars["beta1"])
    with np.errstate(all="ignore"):
        step_size = rate / scalars["bias_correction1"]
    return {
        "shrink": of_tensor(1 - rate * decay),
        "decay": added(decay),
        "weight": weight,
        "weight_less_1": weight - weight.dtype.type(1),
        "beta2": of_tensor(scalars["beta2"]),
        "weight2": plain(1 - scalars["beta2"]),
        "bias_correction2_sqrt": plain(scalars["bias_correction2_sqrt"]),
        "eps": added(scalars["eps"]),
        "minus_step_size": plain(-step_size),
    }


def _gradient(
    a: Arithmetic, optimizer: Any, x: Numbers, c: Numbers, ways: frozenset[str]
) -> tuple[Any, Any]:
    """Return weight and gradient with weight decay in one of them, not rounded."""
    W, grad = x["W"], -x["grad"] if optimizer.maximize else x["grad"]
    if DECAYS not in ways:
        return W, grad
    if optimizer.decoupled_weight_decay:
        return W * c["shrink"], grad
    return W, a.fma(W, c["decay"], grad)


def _lerp(a: Arithmetic, start: Any, end: Any, c: Numbers, ways: frozenset[str]) -> Any:
    """Return the first moment on its way to the gradient, from the nearer end."""
    if NEAR in ways:
        return a.fma(c["weight"], end - start, start)
    return a.fma(c["weight_less_1"], end - start, end)


def _single(
    a: Arithmetic, optimizer: Any, x: Numbers, c: Numbers, ways: frozenset[str]
) -> dict[str, Any]:
    """Take a step as `single` and `foreach` do."""
    r = a.rounded
    W, grad = (r(of) for of in _gradient(a, optimizer, x, c, ways))
    first = r(_lerp(a, x["exp_avg"], grad, c, ways))
    second = r(a.fma(c["weight2"] * grad, grad, r(x["exp_avg_sq"] * c["beta2"])))
    after = {"exp_avg": first, "exp_avg_sq": second}
    if optimizer.amsgrad:
        second = after["max_exp_avg_sq"] = a.maximum(x["max_exp_avg_sq"], second)
    denominator = r(r(r(a.sqrt(second)) / c["bias_correction2_sqrt"]) + c["eps"])
    return {"W": r(W + c["minus_step_size"] * first / denominator), **after}


def _fused(
    a: Arithmetic, optimizer: Any, x: Numbers, c: Numbers, ways: frozenset[str]
) -> dict[str, Any]:
    """Take a step as `fused` does."""
    W, grad = _gradient(a, optimizer, x, c, ways)
    first = _lerp(a, x["exp_avg"], grad, c, ways)
    second = a.fma(c["weight2"] * grad, grad, x["exp_avg_sq"] * c["beta2"])
    after = {"exp_avg": first, "exp_avg_sq": second}
    if optimizer.amsgrad:
        second = after["max_exp_avg_sq"] = a.maximum(x["max_exp_avg_sq"], second)
    denominator = a.sqrt(second) / c["bias_correction2_sqrt"] + c["eps"]
    after["W"] = W + c["minus_step_size"] * first / denominator
    return {name: a.rounded(values) for name, values in after.items()}


def adam_kernel(optimizer: Any) -> Kernel | None:
    """Return the newest kernel of an Adam; None if its arithmetic is that of tensors."""
    tensors = optimizer.lr_dtype is not None or optimizer.betas_dtype is not None
    if tensors or optimizer.capturable or optimizer.differentiable:
        return None
    family = "adamw" if optimizer.decoupled_weight_decay else "adam"
    name = f"{family}-{optimizer.implementation}/1"
    if optimizer.implementation == "fused":
        return Kernel(name, _ways, _coefficients, _fused)
    # There torch leaves the square root to MKL, which does not always round it to the nearest.
    return Kernel(name, _ways, _coefficients, _single, apart_in=("float32", "float64"))
