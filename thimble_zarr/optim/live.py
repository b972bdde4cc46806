"""A step taken by an optimizer's own class, on recorded tensors: a replay that knows no formula.

Each step gets a new optimizer, which takes 5 us to make. torch 2.13 can put other tensors into an
existing one instead (`torch.optim.swap_in_optimizer_params_and_state`). That takes 8 us, and needs
an optimizer that has already stepped and complete `state_dict`s.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from thimble_zarr.errors import OptimizerError
from thimble_zarr.optim.base import COUNT, Optimizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Live(Optimizer):
    """An optimizer whose steps are taken by its own class, which `make` makes one of."""

    @abstractmethod
    def make(self, weight: "torch.nn.Parameter") -> "torch.optim.Optimizer":
        """Return an optimizer of this parameter alone, with the flags of the run.

        Its numbers do not matter, as those of the step are put in their place.
        """

    def step(
        self, tensors: "dict[str, Tensor | None]", scalars: Mapping[str, float], *, device: str
    ) -> None:
        """Make the optimizer, and let it take the step."""
        import torch

        held = tensors["W"]
        if held is None:
            raise ValueError("a step needs a weight")
        weight = torch.nn.Parameter(held)
        try:
            optimizer = self.make(weight)
        except ImportError as error:
            raise OptimizerError(
                f"steps of {self.name} are taken by its own class, and that is not installed here "
                f"({error})"
            ) from error
        live_step(optimizer, self, tensors, scalars)


def live_step(
    optimizer: "torch.optim.Optimizer",
    spec: Optimizer,
    tensors: "dict[str, Tensor | None]",
    scalars: Mapping[str, float],
) -> None:
    """Let an optimizer take a step of its only parameter, which is on the memory of `W`.

    Arguments are those of `Optimizer.step`: the states after the step are put in `tensors`.
    """
    import torch

    group: dict[str, Any] = optimizer.param_groups[0]
    (weight,) = group["params"]
    names = [state.name for state in spec.states]
    kept: dict[str, Any] = {
        name: tensor for name in names if (tensor := tensors.get(name)) is not None
    }
    is_first = len(kept) < len(names)  # and then the optimizer makes its states
    for scalar in spec.SCALARS:
        value = scalars[scalar.name]
        if scalar.held is not None:
            kept[scalar.key] = torch.tensor(value, dtype=torch.float32)
        elif scalar.index is None:
            group[scalar.key] = _as(group[scalar.key], value)
        else:
            numbers = [*group[scalar.key]]
            numbers[scalar.index] = _as(numbers[scalar.index], value)
            group[scalar.key] = tuple(numbers)
    if spec.STEP_KEY is not None:
        kept[spec.STEP_KEY] = torch.tensor(scalars[COUNT] - 1, dtype=torch.float32)
    if not is_first:
        optimizer.state[weight] |= kept
    weight.grad = tensors["grad"]
    step: Any = type(optimizer).step
    # Without torch's wrapper of it, which calls the hooks that training has for all optimizers.
    (step.__wrapped__ if hasattr(step, "hooked") else step)(optimizer)
    tensors["W"] = weight.detach()
    for name in names:
        tensors[name] = optimizer.state[weight][name]


def _as(number: Any, value: float) -> Any:
    """Return a recorded number as the group has it: a whole one, or a tensor, if that is one."""
    if hasattr(number, "new_tensor"):
        return number.new_tensor(value)
    # What is a whole number by default need not be one in a run: a weight decay of 0.
    return int(value) if isinstance(number, int) and value.is_integer() else value
