"""A recorded model of parameters of every rank and dtype, and what really happened to them."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.runs import N_STEPS, History, token_labels
from thimble_zarr import Recorder

MEMORY = 120_000
"""Makes blocks of a few steps."""

NO_GRADIENT = 7
"""The step at which `norm` has no gradient."""

SHAPES = {
    "scale": (),
    "norm": (131,),
    "wte.weight": (11, 5),
    "query": (11, 5),
    "up": (3, 67),
    "filter": (5, 3, 2),
    "image": (3, 2, 5, 7),
}
DTYPES = {"norm": torch.float32, "scale": torch.float64, "image": torch.float32}
DIMS = {
    "scale": (),
    "norm": ("dim",),
    "wte.weight": ("token", "dim"),
    "query": ("row", "col"),
    "up": ("row", "col"),
    "filter": ("dim_0", "dim_1", "dim_2"),
    "image": ("dim_0", "dim_1", "dim_2", "dim_3"),
}
IN_SECOND_GROUP = ("norm", "scale", "query")


class Zoo(nn.Module):
    """Parameters of rank 0 to 4 in four dtypes; another hyper-parameter group for some."""

    def __init__(self, optimizer: type[torch.optim.Optimizer], **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(*SHAPES["wte.weight"], dtype=torch.bfloat16)
        for name in SHAPES:
            if name == "wte.weight":
                continue
            dtype = DTYPES.get(name, torch.bfloat16)
            setattr(self, name, nn.Parameter(torch.randn(SHAPES[name]).to(dtype)))
        known = dict(self.named_parameters())
        second = [known.pop(name) for name in IN_SECOND_GROUP]
        groups = [
            {"params": [*known.values()], "lr": 1e-2, "weight_decay": 0.1},
            {"params": second, "lr": 3e-3, "betas": (0.8, 0.99), "amsgrad": True},
        ]
        self.optimizer = optimizer(groups, **options)

    def step(self, step: int) -> None:
        for parameter in self.parameters():
            parameter.grad = torch.randn(parameter.shape).to(parameter.dtype)
        if step == NO_GRADIENT:
            self.norm.grad = None
        for index, group in enumerate(self.optimizer.param_groups):
            group["lr"] *= 0.9 - 0.1 * index
        self.optimizer.step()


@dataclass(frozen=True)
class Recorded:
    """A recorded zoo, and what really happened to each of its parameters."""

    path: Path
    histories: dict[str, History]


def record_zoo(
    path: Path,
    optimizer: type[torch.optim.Optimizer],
    *,
    coding: str = "plain",
    keep: str = "all",
    **options: object,
) -> Recorded:
    zoo, histories = Zoo(optimizer, **options), {name: History() for name in SHAPES}
    known = dict(zoo.named_parameters())
    for name, history in histories.items():
        zeros = torch.zeros_like(known[name])
        history.append(W=known[name], grad=zeros + torch.nan, exp_avg=zeros, exp_avg_sq=zeros)
    labels = {"wte.weight": token_labels()}
    with Recorder(
        path,
        zoo.optimizer,
        parameters="*",
        model=zoo,
        labels=labels,
        memory_bytes=MEMORY,
        coding=coding,
        keep=keep,
    ) as recorder:
        for step in range(1, N_STEPS + 1):
            missing = pytest.warns(UserWarning, match="no gradient at step [0-9]+ of norm:")
            with missing if step == NO_GRADIENT else nullcontext():
                zoo.step(step)
            recorder.log(loss=step)
            for name, history in histories.items():
                parameter = known[name]
                state = zoo.optimizer.state[parameter]
                missing = torch.full_like(parameter, torch.nan)
                grad = missing if parameter.grad is None else parameter.grad
                moments = {of: state[of] for of in ("exp_avg", "exp_avg_sq")}
                history.append(W=parameter, grad=grad, **moments)
                group = zoo.optimizer.param_groups[name in IN_SECOND_GROUP]
                history.learning_rates.append(group["lr"])
    return Recorded(path, histories)
