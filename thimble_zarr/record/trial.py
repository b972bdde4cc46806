"""What an optimizer keeps of a parameter, found out by a step of a copy of it on a copy of that."""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thimble_zarr.errors import OptimizerError
from thimble_zarr.optim.unknown import Unknown, found


@dataclass(frozen=True)
class Tried:
    """What an optimizer keeps of a parameter, and the dtypes of its states, by name."""

    optimizer: Unknown
    dtypes: Mapping[str, str]


def tried(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tried:
    """Return what an optimizer keeps of a parameter.

    The copy takes two steps, with some gradient. It needs the memory of one more parameter
    with its states for as long. The optimizer itself, its parameters and torch's random numbers
    stay as they are. Raises OptimizerError if the copy cannot step.
    """
    name = type(optimizer).__name__
    group = next(
        (of for of in optimizer.param_groups if any(one is parameter for one in of["params"])), None
    )
    if group is None:
        raise OptimizerError(
            f"the optimizer does not own the parameter of shape {tuple(parameter.shape)}; choose "
            "among those the optimizer was made with (after `model.to(...)`, not before)"
        )
    weight = torch.nn.Parameter(parameter.detach().clone())
    other = _copy(optimizer, group, parameter, weight)
    numbers = torch.arange(1, weight.numel() + 1, device=weight.device) % 7 - 2.5
    some = numbers.reshape(weight.shape).to(weight.dtype)
    devices = [parameter.device] if parameter.is_cuda else []
    overwrites = False
    try:
        with torch.random.fork_rng(devices):
            for _ in range(2):
                weight.grad = some.clone()
                type(optimizer).step(other)  # not what a scheduler made of it
                grad = weight.grad
                overwrites |= grad is None or not torch.equal(grad, some)
    except Exception as error:
        raise OptimizerError(
            f"{name} cannot be recorded: what it keeps was to be found out by a step of a copy, "
            f"which failed ({type(error).__name__}: {error}); put it into the state in which it "
            "can step before the recorder is made"
        ) from error
    state = other.state[weight]
    spec = found(name, group, state, tuple(weight.shape), overwrites=overwrites)
    dtypes = {of: str(state[of].dtype).removeprefix("torch.") for of in spec.kept}
    return Tried(spec, dtypes)


def _copy(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor, weight: Tensor
) -> torch.optim.Optimizer:
    """Return an optimizer of the same class with a single parameter, and without hooks."""
    other: torch.optim.Optimizer = object.__new__(type(optimizer))
    other.__dict__ |= {name: of for name, of in vars(optimizer).items() if name != "step"}
    other.__dict__ |= {
        "_optimizer_step_pre_hooks": OrderedDict(),
        "_optimizer_step_post_hooks": OrderedDict(),
    }
    numbers = {key: value for key, value in group.items() if key != "params"}
    other.param_groups = [copy.deepcopy(numbers) | {"params": [weight]}]
    other.state = defaultdict(dict)
    if held := optimizer.state.get(parameter):
        other.state[weight] = copy.deepcopy(held)
    return other
