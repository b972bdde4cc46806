"""Look at one optimizer step: which program runs, with which numbers, on which tensors.

The functions read a live `torch.optim` optimizer and change nothing. The recorder decides when to
look and where the rows go.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from thimble_zarr.errors import OptimizerError, RecordingError
from thimble_zarr.format.schema import Schema
from thimble_zarr.optim.base import Optimizer
from thimble_zarr.optim.registry import spec_of


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


def groups_of(
    optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]
) -> list[dict[str, Any]]:
    """Return the parameter group of each parameter, as `param_group` does, of many at once."""
    owners = {id(owned): group for group in optimizer.param_groups for owned in group["params"]}
    return [owners.get(id(one)) or param_group(optimizer, one) for one in parameters]


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise OptimizerError unless this is torch's Adam or AdamW, or a subclass."""
    name = type(optimizer).__name__
    # Lightning's wrapper says that it is an instance of the class it wraps.
    if isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        raise OptimizerError(
            f"{name} wraps torch's optimizer, whose steps are what is recorded; pass that one: "
            "`optimizer.optimizer`"
        )
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        raise OptimizerError(
            f"{name} cannot be recorded: only torch.optim.Adam and torch.optim.AdamW (and their "
            "subclasses) keep the states this format records"
        )


def check_parameter(parameter: Tensor) -> None:
    """Raise OptimizerError unless the parameter is one whole tensor in memory that can train."""
    name = type(parameter).__name__
    if not isinstance(parameter, Tensor):
        raise OptimizerError(
            f"the parameter is a {name}; pass its tensor, for example `embedding.weight`"
        )
    if is_traceable_wrapper_subclass(parameter) or name == "FlatParameter":
        raise OptimizerError(
            f"the parameter is a {name}, of which this process holds a part or another form (FSDP, "
            "tensor parallelism, quantization); only whole, plain tensors can be recorded, as in "
            "DistributedDataParallel"
        )
    if parameter.is_meta or parameter.layout != torch.strided:
        raise OptimizerError(
            f"the parameter has no plain memory: its layout is {parameter.layout}, on "
            f"{parameter.device}; make the recorder when the model has its weights"
        )
    if isinstance(parameter, torch.nn.Parameter) and not parameter.requires_grad:
        raise OptimizerError(
            "the parameter is frozen (requires_grad is False), so no step will change it; choose "
            "one that trains, or unfreeze it before the recorder is made"
        )


def check_unchanged(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    recorded: Mapping[str, Schema],
) -> None:
    """Raise OptimizerError unless the coming step is of the kind the recording started with.

    Parameters
    ----------
    optimizer
        As it is now.
    parameters
        As they are now, by the store's groups.
    recorded
        What was known of each when the recording started.
    """
    groups = groups_of(optimizer, parameters.values())
    distinct = {id(group): group for group in groups}  # many parameters have few
    infos = {key: _info(optimizer, group) for key, group in distinct.items()}
    for (name, parameter), group in zip(parameters.items(), groups, strict=True):
        schema, info = recorded[name], infos[id(group)]
        now = {
            "dtype": dtype_name(parameter),
            "device": str(parameter.device),
            "contiguous": parameter.is_contiguous(),
        }
        then = {
            "dtype": schema.dtypes["W"],
            "device": schema.device,
            "contiguous": schema.contiguous,
        }
        if (info, now) != (schema.optimizer, then):
            raise _changed(name, asdict(info) | now, asdict(schema.optimizer) | then)


def _changed(name: str, now: Mapping[str, object], then: Mapping[str, object]) -> OptimizerError:
    changed = [f"{key} {then[key]} -> {now[key]}" for key in now if now[key] != then[key]]
    return OptimizerError(
        f"optimizer or parameter{f' {name}' if name else ''} changed during the run "
        f"({', '.join(changed)}); what was recorded is kept: close this recording and start a new "
        "one (model.to(...) and a checkpoint of other settings belong before the recorder is made)"
    )


def optimizer_info(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Optimizer:
    """Return what the optimizer's arithmetic on `parameter` depends on."""
    return _info(optimizer, param_group(optimizer, parameter))


def _info(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> Optimizer:
    spec = spec_of(type(optimizer))
    if spec is None:
        raise OptimizerError(f"{type(optimizer).__name__} cannot be recorded")
    return spec.from_group(group, type(optimizer))


def hyperparameters(group: Mapping[str, Any]) -> dict[str, float | Tensor]:
    """Return the numbers of the step, by the names of the store's scalars.

    Those that lie on a CUDA device stay there: to read them would be to wait for it.
    """
    beta1, beta2 = group["betas"]
    return {
        "learning_rate": _number(group["lr"]),
        "beta1": _number(beta1),
        "beta2": _number(beta2),
        "eps": _number(group["eps"]),
        "weight_decay": _number(group["weight_decay"]),
    }


def state_tensors(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return the parameter and its moments, by the names of the store's variables.

    The tensors alias the optimizer's own: copy them before the next step. Before the first step
    there are no moments yet.
    """
    state = optimizer.state.get(parameter, {})
    moments = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    return {"W": parameter.detach()} | {name: state[name] for name in moments if name in state}


def optimizer_step(optimizer: torch.optim.Optimizer, parameter: Tensor) -> float | Tensor:
    """Return the optimizer's own count of steps for `parameter`, on its device if that is CUDA."""
    return _number(optimizer.state.get(parameter, {}).get("step", 0.0))


def missed_step(count: float, before: float, name: str = "") -> RecordingError:
    """Return the error of a row whose count is not that of the row before or the next."""
    of = f" for {name}" if name else ""
    return RecordingError(
        f"the optimizer counts {count:.0f} steps{of}, and counted {before:.0f} at the last row: a "
        "step was not recorded, or a state was loaded; start a new recording"
    )


def _number(value: float | Tensor) -> float | Tensor:
    return value if isinstance(value, Tensor) and value.is_cuda else float(value)
