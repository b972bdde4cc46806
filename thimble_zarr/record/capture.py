"""Look at one optimizer step: which program runs, with which numbers, on which tensors."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from thimble_zarr.errors import OptimizerError
from thimble_zarr.format.schema import Schema, array_path
from thimble_zarr.optim.base import COUNT, Optimizer
from thimble_zarr.optim.registry import REGISTRY, spec_of
from thimble_zarr.record.counting import StepCounter, number

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


def as_rows(bits: np.ndarray) -> np.ndarray:
    """Return rows of a parameter of any rank as `(step, token, dim)`, a view."""
    n_steps, n_tokens = (*bits.shape, 1)[:2]
    return bits.reshape(n_steps, n_tokens, -1)


def tensor_bits(tensor: Tensor) -> np.ndarray:
    """Return a tensor as an array, a view if it is on the CPU; bfloat16 as its bits."""
    stored = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    return stored.numpy(force=True)


def optimizer_spec(optimizer: torch.optim.Optimizer) -> type[Optimizer]:
    """Return its spec, or raise OptimizerError if neither it nor a base class has one."""
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


class LiveOptimizer:
    """A live optimizer, and of its parameters those that are recorded, by their groups in a store.

    Looking changes nothing. The optimizer's own groups are looked up anew at every step, because
    `load_state_dict` replaces them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> None:
        self.optimizer = optimizer
        self.parameters = parameters
        self.spec = optimizer_spec(optimizer)
        self.counter = StepCounter(optimizer, parameters, key=self.spec.STEP_KEY)

    def specs(self) -> dict[str, Optimizer]:
        """Return what the arithmetic on each parameter depends on."""
        kind = type(self.optimizer)
        return self._by_parameter(lambda group: self.spec.from_group(group, kind))

    def check_unchanged(self, schemas: Mapping[str, Schema]) -> None:
        """Raise OptimizerError unless the coming step is of the kind the recording started with."""
        for name, spec in self.specs().items():
            schema, parameter = schemas[name], self.parameters[name]
            then = {**vars(schema.optimizer), "dtype": schema.dtypes["W"], "device": schema.device}
            then["contiguous"] = schema.contiguous
            now = {**vars(spec), "dtype": dtype_name(parameter), "device": str(parameter.device)}
            now["contiguous"] = parameter.is_contiguous()
            if now != then:
                changed = [
                    f"{key} {then[key]} -> {now[key]}" for key in now if now[key] != then[key]
                ]
                raise OptimizerError(
                    f"optimizer or parameter{f' {name}' if name else ''} changed during the run "
                    f"({', '.join(changed)}); what was recorded is kept: close this recording and "
                    "start a new one (model.to(...) and a checkpoint of other settings belong "
                    "before the recorder is made)"
                )

    def states(self, name: str, spec: Optimizer) -> dict[str, Tensor | None]:
        """Return a parameter and its states, by the names of the store's variables.

        They alias the optimizer's own: copy them before the next step. A state that is not there
        yet has the value that it begins with, or is None.
        """
        parameter = self.parameters[name].detach()
        kept = self.optimizer.state.get(self.parameters[name], {})
        tensors: dict[str, Tensor | None] = {"W": parameter}
        for state in spec.states:
            tensor = kept.get(state.name)
            if tensor is None and state.first is not None:
                tensor = parameter.new_full((), state.first).expand(parameter.shape)
            tensors[state.name] = tensor
        return tensors

    def gradients(self, schemas: Mapping[str, Schema]) -> dict[str, Tensor | None]:
        """Return the gradients that are recorded."""
        recorded = (name for name in self.parameters if "grad" in schemas[name].dtypes)
        return {name: self.parameters[name].grad for name in recorded}

    def row(
        self, schemas: Mapping[str, Schema], step: int
    ) -> tuple[dict[str, Tensor | None], dict[str, float | Tensor]]:
        """Return the variables and scalars of the row of a step, by their paths in the store.

        That of step 0 has no gradient, nor any numbers of a step.
        """
        before, counts = self.counter.look(step), self.counter.last
        tensors: dict[str, Tensor | None] = {}
        scalars = {array_path(name, COUNT): count for name, count in counts.counts.items()}
        for name, schema in schemas.items():
            states = self.states(name, schema.optimizer)
            tensors |= {
                array_path(name, variable): states.get(variable) for variable in schema.dtypes
            }
        if step:
            for name, grad in self.gradients(schemas).items():
                tensors[array_path(name, "grad")] = counts.consumed(name, grad, before)
            for name, numbers in self._by_parameter(self._scalars).items():
                scalars |= {array_path(name, scalar): value for scalar, value in numbers.items()}
        return tensors, scalars

    def _scalars(self, group: dict[str, Any]) -> dict[str, float | Tensor]:
        return {scalar.name: number(scalar.read(group)) for scalar in self.spec.SCALARS}

    def _by_parameter(self, look: Callable[[dict[str, Any]], Found]) -> dict[str, Found]:
        """Return what there is to see of the optimizer's group that owns each parameter."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        found: dict[str, Found] = {}
        for group in self.optimizer.param_groups:
            if owned := [names[id(own)] for own in group["params"] if id(own) in names]:
                found |= dict.fromkeys(owned, look(group))
        foreign = [
            name or f"of shape {tuple(parameter.shape)}"
            for name, parameter in self.parameters.items()
            if name not in found
        ]
        if foreign:
            raise OptimizerError(
                f"the optimizer does not own the parameter {listed(foreign)}; choose among those "
                "the optimizer was made with (after `model.to(...)`, not before)"
            )
        return found
