"""What an optimizer keeps of a parameter, found out by a step of a copy of it on a copy of that."""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

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
    with its states, and of what else the optimizer has, for as long. The optimizer itself, its
    parameters and torch's random numbers stay as they are, and no hook is called. Raises
    OptimizerError if the copy cannot step, or if the optimizer has others that step for it.
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
    if inner := _inner(optimizer):
        raise OptimizerError(
            f"{name} cannot be recorded: {inner} takes its steps, and what it keeps is in there; "
            "record that one"
        )
    weight = torch.nn.Parameter(parameter.detach().clone())
    numbers = torch.arange(1, weight.numel() + 1, device=weight.device) % 7 - 2.5
    some = numbers.reshape(weight.shape).to(weight.dtype)
    devices = [parameter.device] if parameter.is_cuda else []
    overwrites = False
    try:
        other = _copy(optimizer, group, parameter, weight)
        with torch.random.fork_rng(devices), _no_global_hooks():
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


def _inner(optimizer: torch.optim.Optimizer) -> str:
    """Return the class of an optimizer that an optimizer has; empty if it has none."""
    for held in vars(optimizer).values():
        several = held.values() if isinstance(held, dict) else held
        for one in several if isinstance(held, dict | list | tuple) else [held]:
            if isinstance(one, torch.optim.Optimizer):
                return type(one).__name__
    return ""


def _copy(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor, weight: Tensor
) -> torch.optim.Optimizer:
    """Return an optimizer of the same class with a single parameter, and without hooks.

    Whatever it has of its own is copied. Where it has other parameters, those are empty.
    """
    other: torch.optim.Optimizer = object.__new__(type(optimizer))
    empty = torch.nn.Parameter(weight.detach().new_empty(0))
    known: dict[int, Any] = {
        id(own): empty for of in optimizer.param_groups for own in of["params"]
    }
    known |= {id(parameter): weight, id(optimizer): other}
    for name, held in vars(optimizer).items():
        if name not in ("step", "state", "param_groups") and not name.endswith("_hooks"):
            vars(other)[name] = copy.deepcopy(held, known)
    for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        vars(other)[name] = OrderedDict()
    numbers = {key: value for key, value in group.items() if key != "params"}
    other.param_groups = [copy.deepcopy(numbers, known) | {"params": [weight]}]
    other.state = defaultdict(dict)
    if held := optimizer.state.get(parameter):
        other.state[weight] = copy.deepcopy(held, known)
    return other


@contextmanager
def _no_global_hooks() -> Iterator[None]:
    """Have no hooks that are called for the steps of every optimizer."""
    every: tuple[Any, ...] = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)
    held = [dict(hooks) for hooks in every]
    for hooks in every:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, were in zip(every, held, strict=True):
            hooks.update(were)
