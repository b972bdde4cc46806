"""What optimizers have in common whose step needs the whole parameter: norms, matrix products.

Their steps are taken again by their own class, on whole rows. Sums of many terms depend on the
order in which a library adds them, which it chooses by the processor and by how many threads it
has. So bits can be expected only where both are the same as when the run was recorded.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from thimble_zarr.optim.base import LEARNING_RATE, Optimizer, State, tensor_dtype
from thimble_zarr.optim.formula import Arrays, Precision, Scalars
from thimble_zarr.optim.live import Live

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_INSTRUCTIONS = ("avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")
"""By which libraries choose a program for matrix products."""

_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS")
"""Of the environment, by which one tells them which to choose."""


@dataclass(frozen=True, kw_only=True)
class Whole(Live):
    """An optimizer whose step needs the whole parameter.

    Attributes
    ----------
    processor
        What computed: the model, and what libraries choose their programs by.
    lr_dtype
        Dtype of the learning rate where it is a tensor; None where it is a Python number.
    """

    ELEMENTWISE: ClassVar[bool] = False
    PROGRAM_FLAGS: ClassVar[tuple[str, ...]] = (
        *Optimizer.PROGRAM_FLAGS,
        *("processor", "lr_dtype"),
    )

    implementation: str = "single"
    processor: str = ""
    lr_dtype: str | None = None

    @classmethod
    def from_group(cls, group: Mapping[str, Any], kind: type) -> Self:
        """Return what would step a parameter group of a live optimizer of class `kind`."""
        return cls(
            name=kind.__name__,
            processor=processor_of(next((of.device for of in group.get("params", ())), None)),
            lr_dtype=tensor_dtype(LEARNING_RATE.read(group)),
            **cls.choices(group),
        )

    @classmethod
    def choices(cls, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of its own, from a parameter group."""
        return {}

    @property
    def learning_rate(self) -> "float | Tensor":
        """Some learning rate, of the type that those of the run have."""
        import torch

        dtype = self.lr_dtype
        return 0.0 if dtype is None else torch.tensor(0.0, dtype=getattr(torch, dtype))

    def step(
        self, tensors: "dict[str, Tensor | None]", scalars: Mapping[str, float], *, device: str
    ) -> None:
        """Take the step with the optimizer's own class; states are as large as torch has them."""
        spread = [state for state in self.states if state.single_along is not None]
        for state in spread:
            if (tensor := tensors[state.name]) is not None:
                tensors[state.name] = tensor.narrow(state.single_along or 0, 0, 1).contiguous()
        super().step(tensors, scalars, device=device)
        for state in spread:
            if (tensor := tensors[state.name]) is not None and (weight := tensors["W"]) is not None:
                tensors[state.name] = tensor.expand(weight.shape).contiguous()

    def bounds(
        self, before: Arrays, grad: np.ndarray, scalars: Scalars, precision: Precision
    ) -> dict[str, np.ndarray]:
        """Return how far two programs, given the same row and gradient, can end apart.

        That is of what is stepped element by element (`elementwise`): nothing by default.
        """
        return {}


@dataclass(frozen=True, kw_only=True)
class Elements(Optimizer):
    """What a step of an optimizer does element by element, of any elements.

    Attributes
    ----------
    whole
        The optimizer. It steps the elements as if they were a parameter, with one row.
    names
        The states that do not depend on what the parameter is.
    """

    STATES: ClassVar[tuple[State, ...]] = ()
    SCALARS: ClassVar = ()

    whole: Optimizer
    names: tuple[str, ...]

    @classmethod
    def from_group(cls, group: Mapping[str, object], kind: type) -> Self:
        """Return nothing: it is a part of an optimizer."""
        raise NotImplementedError

    @property
    def states(self) -> tuple[State, ...]:
        """Those states."""
        return tuple(state for state in self.whole.states if state.name in self.names)

    def step(
        self, tensors: "dict[str, Tensor | None]", scalars: Mapping[str, float], *, device: str
    ) -> None:
        """Have the optimizer take the step, and take the states from it."""
        rows = {
            name: None if tensor is None else tensor.clone().reshape(1, -1)
            for name, tensor in tensors.items()
        }
        self.whole.step(rows, scalars, device=device)
        for state in self.states:
            if (row := rows[state.name]) is not None:
                tensors[state.name] = row.reshape(-1)


def processor_of(device: "torch.device | None") -> str:
    """Return what computes on a device, as `Whole.processor` has it; on the CPU if None."""
    import torch

    words = [_processor(device)]
    words += [f"{name} {os.environ[name]}" for name in _VARIABLES if name in os.environ]
    backends: Any = torch.backends
    backend = backends.cuda if device is not None and device.type == "cuda" else backends.mkldnn
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", "none")
    if precision not in ("none", "ieee"):
        words.append(f"matmul.fp32_precision {precision}")
    if not backends.mkldnn.enabled:
        words.append("without oneDNN")
    return ", ".join(words)


@lru_cache
def _processor(device: "torch.device | None") -> str:
    import torch

    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    ask: Any = getattr(torch.cpu, "get_capabilities", None)  # not every version has it
    known: Mapping[str, Any] = {} if ask is None else ask()
    name = known.get("cpu_name") or "unknown"
    words = [name, *(of for of in _INSTRUCTIONS if known.get(of))]
    caches = [f"{of} {known[of]}" for of in ("l1d_cache_size", "l2_cache_size") if known.get(of)]
    return ", ".join([*words, *caches])
