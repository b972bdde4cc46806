"""What an optimizer is: states, scalars and flags, formula, and how torch takes its step.

One class an optimizer, in a file of its own, which `registry.REGISTRY` lists. The class says what
all of its runs have in common; an instance is the optimizer of one run, with the flags that its
arithmetic depends on, and its fields are what a store keeps of it. Classes are abstract or final.

Outside this room and the readers of other people's files nothing knows a state or a hyper-parameter
by name. torch is imported only where a step is taken.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from thimble_zarr.optim.formula import Arrays, Formula, Scalars

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from thimble_zarr.optim.programs.kernel import Kernel


@dataclass(frozen=True)
class State:
    """An array of the parameter's shape that an optimizer keeps between steps.

    Attributes
    ----------
    name
        In torch's state, and on disk.
    long_name
        What it is, in words.
    first
        What each element is before the first step. None where there is no state before it, which a
        store has as missing.
    decay
        The scalar that a step multiplies the state with before it adds anything, by name. None
        where a state does not fade.
    of_weights
        Whether a step makes it of the weights after it, or moves it as it moves them, so that with
        them it is wrong, too.
    single_along
        The axis along which torch keeps one element, which is recorded for each element that the
        parameter has there. None where a state has the parameter's shape.
    """

    name: str
    long_name: str
    first: float | None = 0.0
    decay: str | None = None
    of_weights: bool = False
    single_along: int | None = None


@dataclass(frozen=True)
class Estimate:
    """What states stand for, once what is known of their error is taken out.

    Attributes
    ----------
    name
        As a variable of a dataset.
    long_name
        What it is, in words.
    inputs
        The states that it is computed from.
    compute
        Returns it, from those as they are after the step, in float64, and from the scalars of the
        step. It broadcasts, and is NaN where nothing was estimated yet. Of states that are a times
        as large it is a times as large, so that a norm of it is the estimate of their norm.
    is_square
        Whether its square root, not itself, is in the unit of a gradient.
    """

    name: str
    long_name: str
    inputs: tuple[str, ...]
    compute: Callable[[Arrays, Scalars], np.ndarray]
    is_square: bool = False


@dataclass(frozen=True)
class Scalar:
    """A number that a step uses, the same for all elements of a parameter.

    Attributes
    ----------
    name
        On disk.
    long_name
        What it is, in words.
    key, index
        Where it lies in torch's parameter group: `group[key]`, or `group[key][index]`.
    held
        `before` or `after` where it lies in the parameter's state instead, under `key`, and the
        step uses what is there before or after it. None where it does not.
    first
        What such a number is while it is not there: from the group, as torch makes it.
    """

    name: str
    long_name: str
    key: str
    index: int | None = None
    held: str | None = None
    first: Callable[[Mapping[str, Any]], float] | None = None

    @property
    def keyword(self) -> str:
        """What torch's functions call it."""
        return self.key if self.index is None else self.name

    def read(self, group: Mapping[str, object]) -> "float | Tensor":
        """Return the number that is in a parameter group now."""
        value: Any = group[self.key]
        number: float | Tensor = value if self.index is None else value[self.index]
        return number


@dataclass(frozen=True)
class Derived:
    """A number that torch computes from the scalars of a step, and not by IEEE's operations alone.

    A power depends on the library that computes it, in its last bit. So whoever wants the same step
    on another machine, or in ten years, records what came out, and does not compute it again.

    Attributes
    ----------
    name
        On disk.
    long_name
        What it is, in words.
    compute
        Returns it as torch does on this machine, from the optimizer and the scalars of the step.
    """

    name: str
    long_name: str
    compute: Callable[[Any, Mapping[str, Any]], Any]


LEARNING_RATE = Scalar("learning_rate", "learning rate of the step", "lr")
BETA1 = Scalar("beta1", "decay rate of the first moment", "betas", 0)
BETA2 = Scalar("beta2", "decay rate of the second moment", "betas", 1)
EPS = Scalar("eps", "term added to the denominator", "eps")
WEIGHT_DECAY = Scalar("weight_decay", "weight decay coefficient", "weight_decay")

COUNT = "optimizer_step"
"""The scalar of every optimizer: its count of steps, after the step."""


@dataclass(frozen=True, kw_only=True)
class Optimizer(ABC):
    """An optimizer, as far as its arithmetic depends on it.

    Attributes
    ----------
    STATES
        Every state that there can be, in the order of a store; `states` are those of a run.
    SCALARS
        The numbers that a step uses, in the order of a store.
    DERIVED
        Numbers that a step computes from those by functions that are not the same everywhere.
    RATE
        The scalar that a step is proportional to, by name.
    STEP_KEY
        Where torch's state has the count of steps. None where it has none and the recorder counts:
        from 0, or from 1 where a state is there already.
    ESTIMATES
        Every estimate that there can be; `estimates` are those of a run.
    ALIASES
        Names besides of the variables derived from the formula, and what those are, in words.
    ELEMENTWISE
        Whether an element's step depends on that element alone. If not, whole parameters are
        replayed (`whole.Whole`).
    CLASSES
        The classes of other packages that it is, with their modules; of torch's `REGISTRY` knows.
    CAN_BE_REPLAYED
        Whether its steps can be taken again.
    PROGRAM_FLAGS
        The fields that choose one of torch's programs, which compute the same otherwise.
    name
        Class name, for example `AdamW`; of a subclass its own.
    implementation
        Which of torch's programs runs: `single`, `foreach` or `fused`.
    """

    STATES: ClassVar[tuple[State, ...]]
    SCALARS: ClassVar[tuple[Scalar, ...]]
    DERIVED: ClassVar[tuple[Derived, ...]] = ()
    RATE: ClassVar[str] = LEARNING_RATE.name
    STEP_KEY: ClassVar[str | None] = "step"
    ESTIMATES: ClassVar[tuple[Estimate, ...]] = ()
    ALIASES: ClassVar[Mapping[str, tuple[str, str]]] = {}
    ELEMENTWISE: ClassVar[bool] = True
    CLASSES: ClassVar[tuple[str, ...]] = ()
    CAN_BE_REPLAYED: ClassVar[bool] = True
    PROGRAM_FLAGS: ClassVar[tuple[str, ...]] = ("implementation",)

    name: str
    implementation: str

    @classmethod
    @abstractmethod
    def from_group(cls, group: Mapping[str, object], kind: type) -> Self:
        """Return what would step a parameter group of a live optimizer of class `kind`."""

    @classmethod
    def of(cls, optimizer: "torch.optim.Optimizer", group: Mapping[str, Any]) -> Self:
        """Return what would step a group of a live optimizer: `from_group`, if that says it all."""
        return cls.from_group(group, type(optimizer))

    def of_shape(self, shape: tuple[int, ...]) -> Self:
        """Return what steps a parameter of a shape: the same, but for states that depend on it."""
        return self

    @property
    def states(self) -> tuple[State, ...]:
        """The states that a run has."""
        return self.STATES

    def elementwise(self, dtypes: Mapping[str, str]) -> tuple[str, ...]:
        """Return which of `W` and the states a step takes element by element, in these dtypes."""
        return ("W", *(state.name for state in self.states)) if self.ELEMENTWISE else ()

    @property
    def of_weights(self) -> frozenset[str]:
        """The states that are wrong where a number makes the weights wrong."""
        return frozenset(state.name for state in self.states if state.of_weights)

    @property
    def estimates(self) -> tuple[Estimate, ...]:
        """What the states of a run stand for, once corrected."""
        return self.ESTIMATES

    @property
    def variables(self) -> tuple[str, ...]:
        """The arrays of the parameter's shape that a run has, in the order of a store."""
        return ("W", "grad", *(state.name for state in self.states))

    @property
    def scalars(self) -> tuple[str, ...]:
        """The names of the numbers that a step uses, without `COUNT`."""
        return tuple(scalar.name for scalar in self.SCALARS)

    def derived(self, scalars: Mapping[str, float]) -> dict[str, float]:
        """Return the `DERIVED` numbers of a step as torch computes them on this machine.

        They are NaN where torch could not take such a step.
        """
        numbers = {}
        for of in self.DERIVED:
            try:
                number = of.compute(self, scalars)
            except (ArithmeticError, ValueError):
                number = float("nan")
            numbers[of.name] = number if isinstance(number, float) else float("nan")
        return numbers

    @property
    def changes_gradient(self) -> bool:
        """Whether a step overwrites the gradient, which must then be recorded before it."""
        return False

    @property
    def formula(self) -> "Formula | None":
        """What a step should do, in real numbers; None if there is no formula."""
        return self if isinstance(self, Formula) else None

    def swapped(
        self, tensors: "Mapping[str, Tensor]", scalars: Mapping[str, float]
    ) -> "Tensor | None":
        """Return `W` as the optimizer itself may move it before a step; None if it never does.

        Arguments are as those of `step`.
        """
        return None

    def kernel(self, native: str) -> "Kernel | None":
        """Return the newest kernel of a portable program, for arrays of one dtype; None if none."""
        return None

    @abstractmethod
    def step(
        self, tensors: "dict[str, Tensor | None]", scalars: Mapping[str, float], *, device: str
    ) -> None:
        """Take a step with torch's own code.

        Parameters
        ----------
        tensors
            `W`, `grad` and the states before the step, None for one that is not there yet. Those
            after the step are put in their place.
        scalars
            The numbers of the step, by name, and `COUNT`.
        device
            Where the tensors are, as torch names it.
        """


def tensor_dtype(value: object) -> str | None:
    """Return the dtype of a tensor as a store names it, for example `float32`; None of a number."""
    return str(value.dtype).removeprefix("torch.") if hasattr(value, "dtype") else None


def chosen_program(group: Mapping[str, object], *, differentiable: bool) -> str:
    """Return which of its programs torch runs for a group, which may leave the choice to it."""
    foreach, fused = group["foreach"], group.get("fused")  # not every optimizer has that
    if foreach is None and fused is None:
        from torch.optim.optimizer import _default_to_fused_or_foreach

        parameters: Any = group["params"]
        _, foreach = _default_to_fused_or_foreach(parameters, differentiable)
    return "fused" if fused else "foreach" if foreach else "single"
