"""Random rows and gradients, of every dtype and size that a program treats in its own way."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

from thimble_zarr import Recorder

ADAMW, ADAM = torch.optim.AdamW, torch.optim.Adam
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
FLOAT32, FLOAT64 = torch.float32, torch.float64

SHAPE = (211, 13)
"""Primes; 2743 elements, of which torch takes the last 55 in another way than the rest."""


N_STEPS = 5


Options = dict[str, object]


def no_change(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Leave the hyper-parameters as they are."""


@dataclass(frozen=True)
class Cell:
    """One way to run Adam."""

    dtype: torch.dtype
    optimizer: type[torch.optim.Optimizer] = ADAMW
    options: Options = field(default_factory=dict)
    change: Callable[[torch.optim.Optimizer, int], None] = no_change
    shape: tuple[int, int] = SHAPE
    n_steps: int = N_STEPS

    def record(self, path: Path) -> Path:
        generator = torch.Generator().manual_seed(7)
        weight = nn.Parameter(draw(self.shape, generator, size=0.02).to(self.dtype))
        optimizer = self.optimizer([weight], **{"lr": 1e-2, **self.options})
        with Recorder(path, optimizer, parameter=weight):
            for step in range(1, self.n_steps + 1):
                weight.grad = gradient(self.shape, generator).to(self.dtype)
                optimizer.step()
                self.change(optimizer, step)
        return path


def draw(shape: tuple[int, ...], generator: torch.Generator, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(shape, generator=generator)


def gradient(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    grad = draw(shape, generator) * 10 ** (6 * torch.rand(shape, generator=generator) - 4)
    grad[::17], grad[5::17] = 0.0, -0.0
    return grad


LANE_SENSITIVE = {
    "fused float32": Cell(FLOAT32, options={"fused": True}),
    "fused float64": Cell(FLOAT64, options={"fused": True}),
    "L2 in bfloat16": Cell(BFLOAT16, ADAM, {"weight_decay": 0.1, "foreach": False}),
    "L2 in bfloat16, foreach": Cell(BFLOAT16, ADAM, {"weight_decay": 0.1, "foreach": True}),
    "L2 in float16": Cell(FLOAT16, ADAM, {"weight_decay": 0.1, "eps": 1e-4, "foreach": False}),
}
"""Programs that round differently in vectors than one at a time."""


needs_vectors = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="without these instructions torch rounds one way only",
)
