"""Look at one optimizer step: which program runs, with which numbers, on which tensors.

The functions read a live `torch.optim` optimizer by its spec and change nothing. The recorder
decides when to look and where the rows go.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor

from thimble_zarr.errors import OptimizerError
from thimble_zarr.format.schema import Schema, array_path
from thimble_zarr.optim.base import COUNT, Optimizer
from thimble_zarr.optim.registry import REGISTRY, spec_of
from thimble_zarr.record.counting import StepCounts, number

Group = dict[str, Any]
"""A parameter group of torch's: parameters, and what they are stepped with."""

Found = TypeVar("Found")

MOST_NAMED = 8
"""Names that an error lists."""


def listed(names: Iterable[str]) -> str:
    """Return names for an error, of many the first."""
    names = list(names)
    rest = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + rest


def dtype_name(tensor: Tensor) -> str:
    """Return the dtype as the store names it, for example `bfloat16`."""
    return str(tensor.dtype).removeprefix("torch.")


def optimizer_spec(optimizer: torch.optim.Optimizer) -> type[Optimizer]:
    """Return what this optimizer is.

    Raises
    ------
    OptimizerError
        If it is neither registered nor a subclass of one that is.
    """
    name = type(optimizer).__name__
    # Lightning's wrapper says that it is an instance of the class it wraps.
    if isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        raise OptimizerError(
            f"{name} wraps torch's optimizer, whose steps are what is recorded; pass that one: "
            "`optimizer.optimizer`"
        )
    spec = spec_of(type(optimizer))
    if spec is None:
        known = " and ".join(f"torch.optim.{known}" for known in REGISTRY)
        raise OptimizerError(f"{name} cannot be recorded: only {known} (and their subclasses) can")
    return spec


def by_parameter(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    look: Callable[[Group], Found],
) -> dict[str, Found]:
    """Return what there is to see of the parameter group that owns each parameter.

    Groups are looked up anew at every step, because `load_state_dict` replaces them.

    Raises
    ------
    OptimizerError
        If a parameter has no owner.
    """
    owners = {id(owned): group for group in optimizer.param_groups for owned in group["params"]}
    foreign = [
        name or f"of shape {tuple(parameter.shape)}"
        for name, parameter in parameters.items()
        if id(parameter) not in owners
    ]
    if foreign:
        raise OptimizerError(
            f"the optimizer does not own the parameter {listed(foreign)}; choose among those the "
            "optimizer was made with (after `model.to(...)`, not before)"
        )
    groups = {name: owners[id(parameter)] for name, parameter in parameters.items()}
    distinct = {id(group): group for group in groups.values()}  # many parameters have few
    found = {key: look(group) for key, group in distinct.items()}
    return {name: found[id(group)] for name, group in groups.items()}


def optimizers_by_parameter(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]
) -> dict[str, Optimizer]:
    """Return what the arithmetic on each parameter depends on."""
    spec, kind = optimizer_spec(optimizer), type(optimizer)
    return by_parameter(optimizer, parameters, lambda group: spec.from_group(group, kind))


def scalars_by_parameter(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]
) -> dict[str, dict[str, float | Tensor]]:
    """Return the numbers that a step uses on each parameter, by their names in the store."""
    scalars = optimizer_spec(optimizer).SCALARS
    return by_parameter(
        optimizer,
        parameters,
        lambda group: {scalar.name: number(scalar.read(group)) for scalar in scalars},
    )


def check_unchanged(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    recorded: Mapping[str, Schema],
) -> None:
    """Raise OptimizerError unless the coming step is of the kind the recording started with."""
    for name, stepped in optimizers_by_parameter(optimizer, parameters).items():
        schema, parameter = recorded[name], parameters[name]
        memory = (dtype_name(parameter), str(parameter.device), parameter.is_contiguous())
        declared = (schema.dtypes["W"], schema.device, schema.contiguous)
        if (stepped, memory) != (schema.optimizer, declared):
            fields = ("dtype", "device", "contiguous")
            now = asdict(stepped) | dict(zip(fields, memory, strict=True))
            then = asdict(schema.optimizer) | dict(zip(fields, declared, strict=True))
            changed = [f"{key} {then[key]} -> {now[key]}" for key in now if now[key] != then[key]]
            raise OptimizerError(
                f"optimizer or parameter{f' {name}' if name else ''} changed during the run "
                f"({', '.join(changed)}); what was recorded is kept: close this recording and "
                "start a new one (model.to(...) and a checkpoint of other settings belong before "
                "the recorder is made)"
            )


def state_tensors(
    optimizer: torch.optim.Optimizer, parameter: Tensor, spec: Optimizer
) -> dict[str, Tensor | None]:
    """Return the parameter and its states, by the names of the store's variables.

    The tensors alias the optimizer's own: copy them before the next step. A state that is not there
    yet has the value that it begins with, or is None.
    """
    kept = optimizer.state.get(parameter, {})
    tensors: dict[str, Tensor | None] = {"W": parameter.detach()}
    for state in spec.states:
        tensor = kept.get(state.name)
        if tensor is None and state.first is not None:
            tensor = parameter.detach().new_full((), state.first).expand(parameter.shape)
        tensors[state.name] = tensor
    return tensors


def gradients(
    parameters: Mapping[str, Tensor], schemas: Mapping[str, Schema], *, early: bool = False
) -> dict[str, Tensor | None]:
    """Return the gradients that are recorded, or those that the step will overwrite, by group."""
    return {
        group: parameter.grad
        for group, parameter in parameters.items()
        if "grad" in schemas[group].dtypes
        and (schemas[group].optimizer.changes_gradient or not early)
    }


def read_row(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    *,
    schemas: Mapping[str, Schema],
    counts: StepCounts,
    last: StepCounts,
) -> tuple[dict[str, Tensor | None], dict[str, float | Tensor]]:
    """Return the variables and scalars of a row, by their paths in the store.

    That of step 0 has no gradient, nor any numbers of a step. `last` are the counts at the row
    before.
    """
    tensors: dict[str, Tensor | None] = {}
    scalars = {array_path(group, COUNT): count for group, count in counts.counts.items()}
    for group, parameter in parameters.items():
        states = state_tensors(optimizer, parameter, schemas[group].optimizer)
        for name in schemas[group].dtypes:
            tensors[array_path(group, name)] = states.get(name)
    if counts.step:
        for group, grad in gradients(parameters, schemas).items():
            tensors[array_path(group, "grad")] = counts.consumed(group, grad, last)
        for group, numbers in scalars_by_parameter(optimizer, parameters).items():
            scalars |= {array_path(group, name): value for name, value in numbers.items()}
    return tensors, scalars
