"""An optimizer that nobody wrote a spec of: what it keeps is found out, how it steps is not.

Its steps cannot be taken again. But weights, gradients, its numbers and its states are recorded,
and which they are is kept with the run: to read it nobody needs the optimizer's class.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Self

from thimble_zarr.optim.base import (
    BETA1,
    BETA2,
    COUNT,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Optimizer,
    Scalar,
    State,
)

if TYPE_CHECKING:
    from torch import Tensor

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
"""What a state or number can be called in a store."""

_TAKEN = {
    "W",
    "grad",
    "loss",
    "step",
    "token",
    "row",
    "dim",
    "count",
    "live",
    "dead",
    "text",
    COUNT,
}
"""What a store calls other things."""

_KNOWN = {(of.key, of.index): of.name for of in (LEARNING_RATE, WEIGHT_DECAY, BETA1, BETA2)}
"""Numbers of groups that have a name already."""


@dataclass(frozen=True)
class _Number(Scalar):
    """A number that need not be there at every step."""

    def read(self, group: Mapping[str, object]) -> "float | Tensor":
        """Return the number that is in a parameter group now, NaN where there is none."""
        try:
            value = super().read(group)
        except (KeyError, IndexError, TypeError):
            return math.nan
        return value if is_number(value) else math.nan


@dataclass(frozen=True, kw_only=True)
class Unknown(Optimizer):
    """What an optimizer of any class keeps. Each kind of it has a class of its own (`unknown`).

    Attributes
    ----------
    kept
        Names of its states of the parameter's shape, as its state has them.
    held
        Names of numbers that its state has.
    numbers
        Names of numbers that its parameter group has, and `name.index` of those in sequences.
    counts
        Under which name its state counts steps; empty where it does not.
    overwrites
        Whether a step overwrites the gradient.
    """

    STATES: ClassVar[tuple[State, ...]] = ()
    SCALARS: ClassVar[tuple[Scalar, ...]] = ()
    CAN_BE_REPLAYED: ClassVar[bool] = False

    implementation: str = "unknown"
    kept: Sequence[str]
    held: Sequence[str]
    numbers: Sequence[str]
    counts: str
    overwrites: bool

    def __new__(cls, **content: Any) -> Self:
        """Make it of the class that has its states and numbers."""
        names = (*(tuple(content[name]) for name in ("kept", "held", "numbers")), content["counts"])
        made: Any = object.__new__(_class_of(*names))
        found: Self = made
        return found

    def __post_init__(self) -> None:
        for name in ("kept", "held", "numbers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def changes_gradient(self) -> bool:
        """Whether a step overwrites the gradient."""
        return self.overwrites

    @classmethod
    def from_group(cls, group: Mapping[str, object], kind: type) -> Self:
        """Return nothing: it is found out from more than a group (`found`)."""
        raise NotImplementedError

    def step(
        self, tensors: "dict[str, Tensor | None]", scalars: Mapping[str, float], *, device: str
    ) -> None:
        """Take no step, for nobody knows how."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle it by its fields, as its class is made when it is needed."""
        return _made, ({field.name: getattr(self, field.name) for field in fields(self)},)


def _made(content: dict[str, Any]) -> Unknown:
    return Unknown(**content)


@lru_cache
def _class_of(
    kept: tuple[str, ...], held: tuple[str, ...], numbers: tuple[str, ...], counts: str
) -> type[Unknown]:
    """Return the class of all optimizers that keep this.

    Raises TypeError if that cannot be in a store.
    """
    states = [State(_name(name, "state"), f"{name} after the step", first=None) for name in kept]
    names = [state.name for state in states]
    scalars = list[Scalar]()
    for of, kind in (
        *((_scalar(name), "group") for name in numbers),
        *((_held(name), "state") for name in held),
    ):
        scalars.append(replace(of, name=f"{of.name}_of_{kind}") if of.name in names else of)
        names.append(scalars[-1].name)
    if len({*names}) < len(names):
        raise TypeError(f"several states or numbers have one name among {', '.join(names)}")
    content = {
        "STATES": tuple(states),
        "SCALARS": tuple(scalars),
        "STEP_KEY": counts or None,
        "__module__": __name__,
    }
    return type("Unknown", (Unknown,), content)


def _held(name: str) -> Scalar:
    called = _name(name, "state")
    return Scalar(called, f"{name} after the step", name, held="after", first=_nothing)


def _nothing(group: Mapping[str, Any]) -> float:
    return math.nan


def _name(name: str, kind: str) -> str:
    """Return what a state or number is called in a store."""
    name = f"{name}_of_{kind}" if name in _TAKEN else name
    if not is_name(name):
        raise TypeError(f"a {kind} cannot be called {name!r} in a store")
    return name


def is_name(name: str) -> bool:
    """Return whether a state or number can be called so in a store."""
    is_taken = name in _TAKEN or name.endswith(("_keyframe", "_residual"))
    return _NAME.fullmatch(name) is not None and not is_taken


def _scalar(name: str) -> Scalar:
    key, _, index = name.partition(".")
    place = int(index) if index else None
    called = _KNOWN.get((key, place)) or _name(f"{key}_{index}" if index else key, "group")
    return _Number(called, f"{name} of the parameter group", key, place)


def is_number(value: object) -> bool:
    """Return whether something is one number, and no flag."""
    if isinstance(value, bool):
        return False
    numel = getattr(value, "numel", None)
    is_tensor = numel is not None and numel() == 1 and not value.is_complex()  # type: ignore[attr-defined]
    return is_tensor or isinstance(value, int | float)


def found(
    name: str,
    group: Mapping[str, object],
    state: Mapping[str, object],
    shape: tuple[int, ...],
    *,
    overwrites: bool,
) -> Unknown:
    """Return what an optimizer keeps, from a group and the state of a parameter of a shape.

    What cannot be called by its name in a store is left out.
    """
    kept, held, counts = [], [], ""
    for key, value in state.items():
        if getattr(value, "shape", None) == shape and shape and _is_floating(value):
            kept += [key] * (key not in _TAKEN)
        elif is_number(value):
            if key == "step":
                counts = key
            else:
                held.append(key)
    numbers = ["lr"]
    for key, value in group.items():
        if "." in str(key):
            continue  # it would be taken for a number in a sequence
        if is_number(value):
            numbers.append(key)
        elif isinstance(value, list | tuple) and key != "params":
            numbers += [f"{key}.{index}" for index, of in enumerate(value) if is_number(of)]
    return Unknown(
        name=name,
        kept=_callable(kept, "state"),
        held=_callable(held, "state"),
        numbers=_callable(dict.fromkeys(numbers), "group"),
        counts=counts,
        overwrites=overwrites,
    )


def _is_floating(value: Any) -> bool:
    return str(value.dtype).removeprefix("torch.") in ("bfloat16", "float16", "float32", "float64")


def _callable(names: Any, kind: str) -> tuple[str, ...]:
    kept = []
    for name in names:
        try:
            _name(str(name).replace(".", "_") if kind == "group" else str(name), kind)
        except TypeError:
            continue
        kept.append(name)
    return tuple(kept)
