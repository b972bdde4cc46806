"""A small run of every elementwise optimizer, with drawn gradients of about one size."""

import importlib
from pathlib import Path

import torch

from tests.support.draws import draw
from thimble_zarr import Recorder
from thimble_zarr.optim.base import Optimizer
from thimble_zarr.optim.registry import OTHERS, REGISTRY

WITH_MOMENTUM = {"SGD", "RMSprop"}
"""Those that have a state, or one more, only then."""


RATES = {"Adadelta": 30.0}
"""Learning rates with which a step moves weights of bfloat16, where that is not 0.1."""


def elementwise() -> dict[str, type[torch.optim.Optimizer]]:
    """The class of each optimizer that is known, by its name, if its package is here."""
    known: dict[str, type[Optimizer]] = {f"torch.optim.{name}": of for name, of in REGISTRY.items()}
    found = {}
    for path, spec in (known | OTHERS).items():
        module, _, name = path.rpartition(".")
        if spec.ELEMENTWISE:
            found[name] = getattr(importlib.import_module(module), name)
    return found


def make(name: str, weight: torch.nn.Parameter) -> torch.optim.Optimizer:
    """Make an optimizer with its own numbers but for the learning rate, and weight decay."""
    kind = elementwise()[name]
    has = kind([torch.nn.Parameter(torch.ones(1))]).param_groups[0]
    options = {"lr": RATES.get(name, 0.1), "foreach": False, "weight_decay": 0.1}
    options = {option: value for option, value in options.items() if option in has}
    optimizer = kind([weight], **options, **({"momentum": 0.9} if name in WITH_MOMENTUM else {}))
    if hasattr(optimizer, "train"):
        optimizer.train()  # Schedule-Free
    return optimizer


def record(
    path: Path, name: str, native: str, *, n_steps: int = 30, shape: tuple[int, int] = (61, 7)
) -> Path:
    """Record a run."""
    generator, dtype = torch.Generator().manual_seed(7), getattr(torch, native)
    weight = torch.nn.Parameter(draw(shape, generator).to(dtype))
    optimizer = make(name, weight)
    with Recorder(path, optimizer, parameter=weight):
        for _ in range(n_steps):
            weight.grad = draw(shape, generator).to(dtype)
            optimizer.step()
    return path
