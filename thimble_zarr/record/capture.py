"""Look at one optimizer step: which program runs, with which numbers, on which tensors."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from thimble_zarr.bits import patterns
from thimble_zarr.errors import OptimizerError, ResumeError, listed
from thimble_zarr.format.schema import Schema, array_path
from thimble_zarr.optim.base import COUNT, Optimizer
from thimble_zarr.optim.registry import REFUSED, spec_of
from thimble_zarr.record.counting import StepCounter, StepCounts, number
from thimble_zarr.record.trial import tried
from thimble_zarr.store.reader import StoreReader

Found = TypeVar("Found")


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


def optimizer_spec(optimizer: torch.optim.Optimizer) -> type[Optimizer] | None:
    """Return its spec, None if it is unknown; raise OptimizerError if it cannot be recorded."""
    name = type(optimizer).__name__
    # Lightning's wrapper says that it is an instance of the class it wraps.
    if isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        raise OptimizerError(
            f"{name} wraps torch's optimizer, whose steps are recorded; pass `optimizer.optimizer`"
        )
    for base in type(optimizer).__mro__:
        if why := REFUSED.get(base.__name__):
            raise OptimizerError(f"{name} cannot be recorded: {why}")
    return spec_of(type(optimizer))


class LiveOptimizer:
    """A live optimizer, and of its parameters those that are recorded, by their groups in a store.

    Looking changes nothing. The optimizer's own groups are looked up anew at every step, because
    `load_state_dict` replaces them. `schemas` has what is declared of the parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> None:
        self.optimizer = optimizer
        self.parameters = parameters
        self.schemas: Mapping[str, Schema] = {}
        self._has_warned = False
        spec = optimizer_spec(optimizer)
        self._tried = (
            {name: tried(optimizer, of) for name, of in parameters.items()} if spec is None else {}
        )
        self._spec = spec
        self._held_before: dict[str, dict[str, float | Tensor]] = {}
        keys = {self._kind(name).STEP_KEY for name in parameters}
        self._step_key = keys.pop() if len(keys) == 1 else None
        self.counter = StepCounter(optimizer, parameters, key=self._step_key)

    def _kind(self, name: str) -> type[Optimizer]:
        """Return the spec of the optimizer, as far as a parameter has to do with it."""
        return type(self._tried[name].optimizer) if self._spec is None else self._spec

    def specs(self) -> dict[str, Optimizer]:
        """Return what the arithmetic on each parameter depends on."""
        groups = self._by_parameter(dict)
        if self._spec is None:
            return {name: self._tried[name].optimizer for name in groups}
        spec = self._spec
        return {
            name: spec.of(self.optimizer, group).of_shape(tuple(self.parameters[name].shape))
            for name, group in groups.items()
        }

    def check_unchanged(self) -> None:
        """Raise OptimizerError unless the coming step is of the kind the recording started with."""
        for name, spec in self.specs().items():
            schema, parameter = self.schemas[name], self.parameters[name]
            was = {**vars(schema.optimizer), "dtype": schema.dtypes["W"], "device": schema.device}
            was["contiguous"] = schema.contiguous
            now = {**vars(spec), "dtype": dtype_name(parameter), "device": str(parameter.device)}
            now["contiguous"] = parameter.is_contiguous()
            if now != was:
                changed = [f"{key} {was[key]} -> {now[key]}" for key in now if now[key] != was[key]]
                raise OptimizerError(
                    f"optimizer or parameter{f' {name}' if name else ''} changed during the run "
                    f"({', '.join(changed)}); what was recorded is kept: close this recording and "
                    "start a new one (model.to(...) and a checkpoint of other settings belong "
                    "before the recorder is made)"
                )

    def states(self, name: str, spec: Optimizer) -> dict[str, Tensor | None]:
        """Return a parameter and its states by name, aliases: copy them before the next step.

        A state that is not there yet has the value that it begins with, or is None. One that is
        smaller than the parameter is spread over it.
        """
        parameter = self.parameters[name].detach()
        kept = self.optimizer.state.get(self.parameters[name], {})
        tensors: dict[str, Tensor | None] = {"W": parameter}
        for state in spec.states:
            tensor = kept.get(state.name)
            if tensor is None and state.first is not None:
                tensor = parameter.new_full((), state.first).expand(parameter.shape)
            if tensor is not None and state.single_along is not None:
                tensor = tensor.expand(parameter.shape)
            tensors[state.name] = tensor
        return tensors

    def dtypes(self, name: str, spec: Optimizer) -> dict[str, str]:
        """Return the dtype of each variable; of a state that is not there yet the parameter's."""
        native = dtype_name(self.parameters[name])
        known = dict(self._tried[name].dtypes) if self._spec is None else {}
        for one, held in self.states(name, spec).items():
            if held is not None:
                known[one] = dtype_name(held)
        return dict.fromkeys(spec.variables, native) | known

    def gradients(self) -> dict[str, Tensor | None]:
        """Return the gradients that are recorded."""
        recorded = (name for name in self.parameters if "grad" in self.schemas[name].dtypes)
        return {name: self.parameters[name].grad for name in recorded}

    def _warn_of_strides(self) -> None:
        """Warn, once, of a gradient whose elements a check may add in another order."""
        for name, schema in self.schemas.items():
            grad = self.parameters[name].grad
            if schema.optimizer.ELEMENTWISE or grad is None or self._has_warned:
                continue
            if not grad.is_contiguous():
                self._has_warned = True
                warnings.warn(
                    f"the gradient{f' of {name}' if name else ''} is not contiguous. A step of "
                    f"{schema.optimizer.name} may add its elements in another order than the check "
                    "will, which then finds that rows do not follow; before a step, set "
                    "parameter.grad = parameter.grad.contiguous()",
                    stacklevel=5,
                )

    def variables(self) -> dict[str, Tensor | None]:
        """Return what is recorded as it is now, but for gradients, by path; aliases."""
        tensors: dict[str, Tensor | None] = {}
        for name, schema in self.schemas.items():
            states = self.states(name, schema.optimizer)
            tensors |= {array_path(name, one): states.get(one) for one in schema.dtypes}
        return tensors

    def row(self, counts: StepCounts) -> tuple[dict[str, Tensor | None], dict[str, float | Tensor]]:
        """Return the variables and scalars of a step's row, by path; step 0 has fewer."""
        tensors = self.variables()
        scalars = {array_path(name, COUNT): count for name, count in counts.counts.items()}
        if counts.step:
            self._warn_of_strides()
            for name, grad in self.gradients().items():
                tensors[array_path(name, "grad")] = counts.consumed(name, grad, self.counter.last)
            for name, group in self._by_parameter(dict).items():
                numbers = self._scalars(name, group) | self._held(name, group, "after")
                numbers |= self._held_before.get(name, {})
                scalars |= {array_path(name, scalar): value for scalar, value in numbers.items()}
        return tensors, scalars

    def resume(self, readers: Sequence[StoreReader], n_rows: int) -> None:
        """Count on from the last of `n_rows` rows; ResumeError if this is not where we are.

        The wrong checkpoint is the likeliest mistake, and its rows would fit no arithmetic. So the
        live tensors must be those of the row, bit by bit, as far as they are recorded.
        """
        counts = {reader.group: reader.read_scalars()[COUNT] for reader in readers}

        def differences(row: int) -> Iterator[tuple[str, str]]:
            for reader in readers:
                yield from self._changes(reader, row, count=float(counts[reader.group][row]))

        if not (found := dict(differences(n_rows - 1))):
            steps = readers[0].read_steps()
            return self.counter.resume(StepCounts.at_row(n_rows - 1, steps, counts))
        last = readers[0].n_rows - 1
        stands_at = (row for row in range(last, -1, -1) if next(differences(row), None) is None)
        if (row := next(stands_at, None)) is not None:
            dropped = f"step{f's {row + 1} to' if row + 1 < last else ''} {last}"
            drops = f", which drops {dropped}" if row < last else ""
            other = f"or resume from where they are, with after_step={row}{drops}"
        else:
            other = "or that of an earlier one, and pass its step as after_step="
            if any(array_path(reader.group, "W") in found for reader in readers):
                other += "; or another parameter of that shape was passed than the one recorded"
        how = "; ".join(f"{name} {differs}" for name, differs in found.items())
        raise ResumeError(
            f"cannot resume {readers[0].path} after step {n_rows - 1}: model and optimizer are not "
            f"as they were after it ({how}); restore the checkpoint of that step before the "
            f"recorder is made, {other}"
        )

    def _changes(self, reader: StoreReader, row: int, *, count: float) -> Iterator[tuple[str, str]]:
        """Yield how a parameter, its states and their count differ from a row, by path."""
        group, schema, parameter = reader.group, reader.schema, self.parameters[reader.group]
        if self._step_key and (now := float(self.counter.count(group))) != count:
            yield array_path(group, COUNT), f"is {now:.0f}, not {count:.0f}"
        ids = None if schema.whole_tokens is None else torch.from_numpy(reader.read_token_ids())
        for name, state in self.states(group, schema.optimizer).items():
            if name not in schema.dtypes:
                continue
            missing = parameter.new_full((), torch.nan).expand(parameter.shape)
            tensor = (missing if state is None else state).detach()
            rows = tensor if ids is None else tensor[ids.to(tensor.device)]
            bits, recorded = as_rows(tensor_bits(rows[None])), reader.read(name, (row, row + 1))
            path = array_path(group, name)
            if bits.dtype != recorded.dtype:
                yield path, f"is {tensor.dtype}"
            elif n_differing := (patterns(bits) != patterns(recorded)).sum():
                yield path, f"differs in {n_differing:,} of {bits.size:,} elements"

    def _scalars(self, name: str, group: dict[str, Any]) -> dict[str, float | Tensor]:
        return {
            scalar.name: number(scalar.read(group))
            for scalar in self._kind(name).SCALARS
            if scalar.held is None
        }

    def note_numbers(self) -> None:
        """Note, before a step, the numbers that it uses and then replaces."""
        if self._spec is not None and any(of.held == "before" for of in self._spec.SCALARS):
            groups = self._by_parameter(dict)
            self._held_before = {
                name: self._held(name, group, "before") for name, group in groups.items()
            }

    def _held(self, name: str, group: dict[str, Any], when: str) -> dict[str, float | Tensor]:
        """Return the numbers that a parameter's state holds, copied."""
        state = self.optimizer.state.get(self.parameters[name], {})
        found: dict[str, float | Tensor] = {}
        for scalar in self._kind(name).SCALARS:
            if scalar.held == when and scalar.first is not None:
                value = number(state.get(scalar.key, scalar.first(group)))
                found[scalar.name] = value.clone() if isinstance(value, Tensor) else value
        return found

    def _by_parameter(self, look: Callable[[dict[str, Any]], Found]) -> dict[str, Found]:
        """Return what there is to see of the optimizer's group that owns each parameter."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        found: dict[str, Found] = {}
        for group in self.optimizer.param_groups:
            if owned := [names[id(own)] for own in group["params"] if id(own) in names]:
                found |= dict.fromkeys(owned, look(group))
        if foreign := [name for name in self.parameters if name not in found]:
            which = listed(foreign) or f"of shape {tuple(self.parameters[''].shape)}"
            raise OptimizerError(
                f"the optimizer does not own the parameter {which}; choose among those the "
                "optimizer was made with (after `model.to(...)`, not before)"
            )
        return found
