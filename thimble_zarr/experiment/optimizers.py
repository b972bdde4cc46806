"""The optimizers that a run can have: the settings of each, and their defaults.

The defaults are torch's, but those of AdamW are the original notebook's, which has no weight decay.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Setting = float | bool | str | None


@dataclass(frozen=True)
class Choice:
    """An optimizer that can be chosen.

    Attributes
    ----------
    kind
        The name of its class in `torch.optim`.
    defaults
        Its settings, and what they are where they are not given; None leaves it to torch.
    implementations
        Those that torch has.
    takes_matrices_only
        AdamW then takes the other parameters, with the same learning rate and weight decay.
    """

    kind: str
    defaults: Mapping[str, Setting]
    implementations: tuple[str, ...] = ("single", "foreach")
    takes_matrices_only: bool = False

    def options(self, settings: Mapping[str, Setting], implementation: str) -> dict[str, object]:
        """Return what the class is made with, besides the parameters."""
        own = dict(settings)
        options: dict[str, object] = {
            pair: tuple(own.pop(name) for name in names)
            for pair, names in _PAIRS.items()
            if names[0] in own
        }
        options |= {_TORCHS.get(name, name): of for name, of in own.items() if of is not None}
        return options | {
            flag: flag == implementation for flag in self.implementations if flag != "single"
        }


_PAIRS = {
    "betas": ("beta1", "beta2"),
    "eps": ("eps1", "eps2"),
    "etas": ("etaminus", "etaplus"),
    "step_sizes": ("step_size_min", "step_size_max"),
}
"""What torch takes two settings as."""

_TORCHS = {"clipping_threshold": "d"}
"""What torch calls a setting otherwise."""

_FUSED = ("single", "foreach", "fused")

_BETAS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}

OPTIMIZERS: Mapping[str, Choice] = {
    "adadelta": Choice("Adadelta", {"lr": 1.0, "rho": 0.9, "eps": 1e-6, "weight_decay": 0.0}),
    "adafactor": Choice(
        "Adafactor",
        {
            **{"lr": 1e-2, "beta2_decay": -0.8, "eps1": None, "eps2": 1e-3},
            **{"clipping_threshold": 1.0, "weight_decay": 0.0},
        },
    ),
    "adagrad": Choice(
        "Adagrad", {"lr": 1e-2, "lr_decay": 0.0, "eps": 1e-10, "weight_decay": 0.0}, _FUSED
    ),
    "adam": Choice("Adam", {"lr": 1e-3, **_BETAS, "amsgrad": False}, _FUSED),
    "adamax": Choice("Adamax", {"lr": 2e-3, **_BETAS}),
    "adamw": Choice("AdamW", {"lr": 1e-3, **_BETAS, "amsgrad": False}, _FUSED),
    "asgd": Choice(
        "ASGD", {"lr": 1e-2, "lambd": 1e-4, "alpha": 0.75, "t0": 1e6, "weight_decay": 0.0}
    ),
    "muon": Choice(
        "Muon",
        {
            **{"lr": 1e-3, "momentum": 0.95, "nesterov": True, "eps": 1e-7, "ns_steps": 5},
            **{"adjust_lr_fn": None, "weight_decay": 0.1},
        },
        ("single",),
        takes_matrices_only=True,
    ),
    "nadam": Choice("NAdam", {"lr": 2e-3, **_BETAS, "momentum_decay": 0.004}),
    "radam": Choice("RAdam", {"lr": 1e-3, **_BETAS}),
    "rmsprop": Choice(
        "RMSprop",
        {
            **{"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "momentum": 0.0},
            **{"weight_decay": 0.0, "centered": False},
        },
    ),
    "rprop": Choice(
        "Rprop",
        {
            **{"lr": 1e-2, "etaminus": 0.5, "etaplus": 1.2},
            **{"step_size_min": 1e-6, "step_size_max": 50.0},
        },
    ),
    "sgd": Choice(
        "SGD",
        {"lr": 1e-3, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False},
        _FUSED,
    ),
}
"""What `--optimizer` takes."""

OWN = frozenset(name for choice in OPTIMIZERS.values() for name in choice.defaults)
"""The settings that depend on the optimizer."""

Range = tuple[Callable[[float], bool], str]

FROM_0: Range = (lambda value: 0 <= value < math.inf, "a number from 0 up")

RANGES: Mapping[str, Range] = {
    "beta1": (lambda value: 0 <= value < 1, "in [0, 1)"),
    "beta2": (lambda value: 0 <= value < 1, "in [0, 1)"),
    "beta2_decay": (lambda value: -math.inf < value <= 0, "a number up to 0"),
    "ns_steps": (lambda value: 1 <= value < 100, "from 1 to 99"),
    "clipping_threshold": (lambda value: 1 <= value < math.inf, "at least 1"),
    "rho": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "etaminus": (lambda value: 0 < value < 1, "between 0 and 1"),
    "etaplus": (lambda value: 1 < value < math.inf, "more than 1"),
}
"""What the settings can be that cannot be anything from 0 up, in words too."""


def owners(setting: str) -> list[str]:
    """Return which optimizers have a setting."""
    return [name for name, choice in OPTIMIZERS.items() if setting in choice.defaults]


def without_others(settings: Mapping[str, Any], optimizer: object) -> dict[str, Any]:
    """Return settings without those that this optimizer does not have."""
    choice = OPTIMIZERS.get(str(optimizer))
    own = () if choice is None else choice.defaults
    return {name: value for name, value in settings.items() if name in own or name not in OWN}


def default_in_words(setting: str) -> str:
    """Return the default of a setting, such as `1e-06 of adadelta; else 1e-08`, or ""."""
    names = defaultdict[Setting, list[str]](list)
    for name in owners(setting):
        names[OPTIMIZERS[name].defaults[setting]].append(name)
    usual = max(names, key=lambda value: len(names[value]))
    if isinstance(usual, bool):
        return f"on for {', '.join(names[True])}" if True in names else ""
    if len(names) == 1:
        return "" if usual is None else str(usual)
    parts = [f"{value} of {', '.join(of)}" for value, of in names.items() if value != usual]
    return "; ".join([*parts, f"else {usual}"])
