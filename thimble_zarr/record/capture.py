"""Look at one optimizer step: which program runs, with which numbers, on which tensors.

The functions read a live `torch.optim` optimizer and change nothing. The recorder decides when to
look and where the rows go.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _default_to_fused_or_foreach

from thimble_zarr.errors import OptimizerError
from thimble_zarr.format.schema import OptimizerInfo


def dtype_name(tensor: Tensor) -> str:
    """Return the dtype as the store names it, for example `bfloat16`."""
    return str(tensor.dtype).removeprefix("torch.")


def param_group(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    """Return the parameter group that owns `parameter`.

    Looked up anew at every step: `load_state_dict` replaces the groups.

    Raises
    ------
    OptimizerError
        If no group owns it.
    """
    for group in optimizer.param_groups:
        if any(owned is parameter for owned in group["params"]):
            return group
    raise OptimizerError(
        f"the optimizer does not own the parameter of shape {tuple(parameter.shape)}; pass one of "
        "the parameters the optimizer was made with (after `model.to(...)`, not before)"
    )


def hyperparameters_of(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]
) -> list[dict[str, float]]:
    """Return the numbers that the coming step will use on each parameter, those of its group."""
    owners = {id(owned): group for group in optimizer.param_groups for owned in group["params"]}
    numbers: dict[int, dict[str, float]] = {}
    found = []
    for parameter in parameters:
        group = owners.get(id(parameter)) or param_group(optimizer, parameter)
        if id(group) not in numbers:  # a tensor on a GPU is waited for
            numbers[id(group)] = hyperparameters(group)
        found.append(numbers[id(group)])
    return found


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise OptimizerError unless this is torch's Adam or AdamW, or a subclass."""
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        raise OptimizerError(
            f"{type(optimizer).__name__} cannot be recorded: only torch.optim.Adam and "
            "torch.optim.AdamW (and their subclasses) keep the states this format records"
        )


def optimizer_info(optimizer: torch.optim.Optimizer, parameter: Tensor) -> OptimizerInfo:
    """Return what the optimizer's arithmetic on `parameter` depends on."""
    group = param_group(optimizer, parameter)
    return OptimizerInfo(
        name=type(optimizer).__name__,
        implementation=_implementation(group),
        decoupled_weight_decay=bool(
            group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
        ),
        amsgrad=bool(group["amsgrad"]),
        maximize=bool(group["maximize"]),
        capturable=bool(group["capturable"]),
        differentiable=bool(group["differentiable"]),
        lr_dtype=_tensor_dtype(group["lr"]),
        betas_dtype=_tensor_dtype(group["betas"][0]),
    )


def _tensor_dtype(value: float | Tensor) -> str | None:
    return dtype_name(value) if isinstance(value, Tensor) else None


def _implementation(group: Mapping[str, Any]) -> str:
    """Decide as `torch.optim.adam.adam` does which of its three programs runs."""
    foreach, fused = group["foreach"], group["fused"]
    if foreach is None and fused is None:
        _, foreach = _default_to_fused_or_foreach(group["params"], group["differentiable"])
        if foreach and isinstance(group["lr"], Tensor) and not group["capturable"]:
            foreach = False
    return "fused" if fused else "foreach" if foreach else "single"


def hyperparameters(group: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers the coming step will use, by the names of the store's scalars."""
    beta1, beta2 = group["betas"]
    return {
        "learning_rate": float(group["lr"]),
        "beta1": float(beta1),
        "beta2": float(beta2),
        "eps": float(group["eps"]),
        "weight_decay": float(group["weight_decay"]),
    }


def state_tensors(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return the parameter and its moments, by the names of the store's variables.

    The tensors alias the optimizer's own: copy them before the next step. Before the first step
    there are no moments yet.
    """
    state = optimizer.state.get(parameter, {})
    moments = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    return {"W": parameter.detach()} | {name: state[name] for name in moments if name in state}


def optimizer_step(optimizer: torch.optim.Optimizer, parameter: Tensor) -> float:
    """Return the optimizer's own count of steps for `parameter`."""
    return float(optimizer.state.get(parameter, {}).get("step", 0.0))
