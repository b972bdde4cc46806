"""Live optimizers of every kind that can be recorded, and what each of their steps did."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations, product

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.draws import SHAPE, Options, draw, gradient, no_change
from thimble_zarr.bits import decode
from thimble_zarr.optim.base import COUNT, Optimizer
from thimble_zarr.optim.lanes import Lanes
from thimble_zarr.optim.registry import REGISTRY
from thimble_zarr.optim.replay import Program

ELEMENTWISE = tuple(name for name, spec in REGISTRY.items() if spec.ELEMENTWISE)
"""Those of torch that are replayed on any elements; `tests/optim/test_whole.py` has the others."""

IMPLEMENTATIONS = {
    "single": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}

DTYPES = {
    "bfloat16": (torch.bfloat16, 1e-8),
    "float16": (torch.float16, 1e-4),
    "float32": (torch.float32, 1e-8),
    "float64": (torch.float64, 1e-8),
}
"""Each with an epsilon that does not underflow in it."""


def change_learning_rate(optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.param_groups[0]["lr"] *= 0.83


def change_betas(optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.param_groups[0]["betas"] = (0.9 - step / 37, 0.999 - step / 211)


TENSORS = {"lr": torch.tensor(1e-2), "betas": (torch.tensor(0.9), torch.tensor(0.99))}

OF_ADAM = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "decay": {"weight_decay": 0.1},
    "scheduler": {"weight_decay": 0.1, "change": change_learning_rate},
    "betas": {"change": change_betas},
    "tensor lr": {"lr": torch.tensor(1e-2)},
    "tensor betas": {**TENSORS, "weight_decay": 0.1},
}


def change_decay(optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.param_groups[0]["weight_decay"] = 0.1 * (step % 2)


DECAYED = {"weight_decay": 0.1}

OF_MOMENTS = {
    "plain": {},
    "decay": DECAYED,
    "maximize": {"maximize": True, "change": change_decay},
    "scheduler": {"weight_decay": 0.1, "change": change_learning_rate},
    "betas": {"change": change_betas},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
}

VARIANTS: dict[str, dict[str, Options]] = {
    # Decay the L2 way; without it Adam is AdamW.
    "Adam": {name: {**options, "weight_decay": 0.1} for name, options in OF_ADAM.items()},
    "AdamW": {name: {"weight_decay": 0.0, **options} for name, options in OF_ADAM.items()},
    "ASGD": {
        "plain": {},
        "decay": {"weight_decay": 0.1, "lambd": 0.1},
        "averaged": {"t0": 1.0, "change": change_learning_rate},
        "maximize": {"maximize": True, "t0": 2.0},
    },
    "Adadelta": {
        "plain": {"lr": 30.0},
        "decay": {"lr": 30.0, "weight_decay": 0.1},
        "maximize": {"maximize": True, "lr": 30.0, "change": change_decay},
        "scheduler": {"lr": 30.0, "rho": 0.5, "change": change_learning_rate},
    },
    "Adagrad": {
        "plain": {},
        "decay": {"weight_decay": 0.1, "initial_accumulator_value": 0.1},
        "maximize": {"maximize": True, "lr_decay": 0.3},
        "scheduler": {"weight_decay": 0.1, "change": change_learning_rate},
        "changing decay": {"lr_decay": 0.1, "maximize": True, "change": change_decay},
    },
    "Adamax": {name: OF_MOMENTS[name] for name in list(OF_MOMENTS)[:5]},
    "NAdam": OF_MOMENTS,
    "RAdam": OF_MOMENTS | {"rectified": {"betas": (0.9, 0.5)}},
    "Rprop": {
        "plain": {},
        "other": {"etas": (0.45, 1.3), "step_sizes": (1e-3, 0.04), "lr": 1e-2},
        "maximize": {"maximize": True},
    },
    "RMSprop": {
        "plain": {},
        "decay": {"weight_decay": 0.1},
        "momentum": {"momentum": 0.9, "weight_decay": 0.1},
        "centered": {"centered": True, "alpha": 0.9},
        "all": {"centered": True, "alpha": 0.3, "momentum": 0.8, "maximize": True},
        "scheduler": {"weight_decay": 0.1, "change": change_learning_rate},
        "tensor lr": {"lr": torch.tensor(1e-2)},
    },
    "SGD": {
        "plain": {},
        "decay": {"weight_decay": 0.1},
        "momentum": {"momentum": 0.9},
        "momentum, decay": {"momentum": 0.9, "weight_decay": 0.1},
        "dampening": {"momentum": 0.9, "dampening": 0.3, "maximize": True},
        "nesterov": {"momentum": 0.9, "nesterov": True},
        "nesterov, decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        "scheduler": {"momentum": 0.8, "change": change_learning_rate},
        "maximize": {"maximize": True, "weight_decay": 0.1},
        "tensor lr": {"lr": torch.tensor(1e-2), "momentum": 0.9},
    },
}
"""Options of each optimizer that make torch compute otherwise; an optimizer may have none here."""


FUSED = {"Adam", "AdamW", "Adagrad", "SGD"}
"""Those that have a fused program."""

WRONG = {"SGD"}
"""Those whose fused program for the CPU does not do what it should in 16 bits."""


@dataclass(frozen=True)
class Kind:
    """One way to run an optimizer."""

    name: str
    native: str
    options: Options = field(default_factory=dict)
    change: Callable[[torch.optim.Optimizer, int], None] = no_change

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.native][0]

    def make(self, parameter: nn.Parameter) -> torch.optim.Optimizer:
        options = {"lr": 1e-2, **self.options}
        if any(scalar.key == "eps" for scalar in REGISTRY[self.name].SCALARS):
            options = {"eps": DTYPES[self.native][1], **options}
        return getattr(torch.optim, self.name)([parameter], **options)


def runnable(kind: Kind) -> list[str]:
    """Return the implementations that run these options, and do what they should."""
    wrong = kind.name in WRONG and kind.native.endswith("16")
    tensors = any(isinstance(value, torch.Tensor) for value in kind.options.values())
    is_fused = kind.name in FUSED and not wrong
    programs = {"single": True, "foreach": not tensors, "fused": is_fused}
    return [program for program, runs in programs.items() if runs]


def every_kind(name: str, natives: tuple[str, ...]) -> dict[str, Kind]:
    """Every implementation, dtype and variant of an optimizer that a CPU has, with a name each."""
    variants = VARIANTS.get(name, {"plain": {}})
    found = {}
    for program, native, variant in product(IMPLEMENTATIONS, natives, variants):
        options = variants[variant] | IMPLEMENTATIONS[program]
        change = options.pop("change", no_change)
        kind = Kind(name, native, options, change)
        if program in runnable(kind):
            found[f"{name}-{program}-{native}-{variant}"] = kind
    return found


def states_of(kind: Kind) -> str:
    optimizer = kind.make(nn.Parameter(torch.zeros(1, dtype=kind.dtype)))
    spec = REGISTRY[kind.name].from_group(optimizer.param_groups[0], type(optimizer))
    return ",".join(state.name for state in spec.states)


def kinds(
    *names: str, natives: tuple[str, ...] = tuple(DTYPES), flags: bool = True
) -> list[object]:
    """Ways to run registered optimizers, few that have every pair which matters.

    These are an optimizer and an implementation, a dtype, a variant; and, of those with a fused
    program, an implementation and a dtype. Without `flags` one of the
    variants that have the same states is enough. With `EVERY_KIND` in the environment the rest is
    there too, marked `soak`.
    """
    found, used = [], Counter[tuple[str, ...]]()
    for name in names or ELEMENTWISE:
        ways = every_kind(name, natives)
        pairs = {}
        for way, kind in ways.items():
            _, program, native, variant = way.split("-", 3)
            pairs[way] = {program, native, f"of {variant if flags else states_of(kind)}"}
            if name in FUSED:
                pairs[way].add(f"{program}-{native}")
        missing = set().union(*pairs.values())
        chosen = []
        while missing:
            best = max(ways, key=lambda way: (len(pairs[way] & missing), -used_by(way, used)))
            chosen.append(best)
            missing -= pairs[best]
            used.update(combinations(best.split("-", 3)[1:], 2))
        found += [pytest.param(ways[way], id=way) for way in chosen]
        if "EVERY_KIND" in os.environ:
            rest = [way for way in ways if way not in chosen]
            found += [pytest.param(ways[way], id=way, marks=pytest.mark.soak) for way in rest]
    return found


def used_by(way: str, used: Counter[tuple[str, ...]]) -> int:
    """How often pairs of implementation, dtype and variant of a kind are there already."""
    return sum(used[pair] for pair in combinations(way.split("-", 3)[1:], 2))


@dataclass(frozen=True)
class Step:
    """One step that torch took."""

    spec: Optimizer
    native: str
    before: Mapping[str, np.ndarray]
    after: Mapping[str, np.ndarray]
    scalars: Mapping[str, float]
    shape: tuple[int, ...]

    def numbers(self, bits: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: decode(of, self.native, np.float64) for name, of in bits.items()}

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Scalars as the formula takes them."""
        return {name: np.array(value) for name, value in self.scalars.items()}

    def replay(
        self, positions: np.ndarray | None = None, **scalars: float
    ) -> dict[str, np.ndarray]:
        """Take the step again, on some elements."""
        n_elements = int(np.prod(self.shape))
        lanes = Lanes.of(self.spec.implementation, n_elements=n_elements, n_threads=1)
        positions = np.arange(n_elements) if positions is None else positions
        program = Program(self.spec, dict.fromkeys(self.before, self.native), "cpu")
        bits = {name: of.reshape(-1)[positions] for name, of in self.before.items()}
        return program.step(bits, lanes.split(positions), {**self.scalars, **scalars})


def numbers_of(
    spec: Optimizer, group: Mapping[str, object], state: Mapping[str, object], when: str
) -> dict[str, float]:
    """The numbers of a step: of the group, and of the parameter's state before or after it."""
    found = {}
    for scalar in spec.SCALARS:
        if scalar.held is None:
            found[scalar.name] = float(scalar.read(group))
        elif scalar.held == when:
            found[scalar.name] = float(state.get(scalar.key, scalar.first(group)))
    return found


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().clone()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def steps(kind: Kind, n_steps: int = 5, shape: tuple[int, int] = SHAPE) -> Iterator[Step]:
    """Take steps with drawn gradients; `before` has the gradient too."""
    generator = torch.Generator().manual_seed(7)
    parameter = nn.Parameter(draw(shape, generator, size=0.02).to(kind.dtype))
    optimizer = kind.make(parameter)
    group = optimizer.param_groups[0]

    def row(spec: Optimizer) -> dict[str, np.ndarray]:
        state = optimizer.state.get(parameter, {})
        found = {"W": bits_of(parameter)}
        for of in spec.states:
            first = torch.nan if of.first is None else of.first
            held = state.get(of.name)
            found[of.name] = bits_of(torch.full_like(parameter, first) if held is None else held)
        return found

    for count in range(1, n_steps + 1):
        spec = REGISTRY[kind.name].from_group(group, type(optimizer))
        before = row(spec)
        parameter.grad = gradient(shape, generator).to(kind.dtype)
        before["grad"] = bits_of(parameter.grad)
        scalars = numbers_of(spec, group, optimizer.state.get(parameter, {}), "before")
        optimizer.step()
        scalars |= numbers_of(spec, group, optimizer.state[parameter], "after")
        assert spec.changes_gradient or (bits_of(parameter.grad) == before["grad"]).all()
        yield Step(spec, kind.native, before, row(spec), scalars | {COUNT: count}, shape)
        kind.change(optimizer, count)
