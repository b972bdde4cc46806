"""What an optimizer is: states, scalars and flags, formula, and how torch takes its step.

One class an optimizer, in a file of its own, which `registry.REGISTRY` lists. The class says what
all of its runs have in common; an instance is the optimizer of one run, with the flags that its
arithmetic depends on, and its fields are what a store keeps of it. Classes are abstract or final.

Outside this room and the readers of other people's files nothing knows a state or a hyper-parameter
by name. torch is imported only where a step is taken.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from thimble_zarr.bits import least_positive, unit_roundoff

if TYPE_CHECKING:
    from torch import Tensor

    from thimble_zarr.optim.programs.kernel import Kernel

Arrays = Mapping[str, np.ndarray]
"""Variables of a parameter, by name."""

Scalars = Mapping[str, Any]
"""Numbers of steps, by name, and `COUNT`: of shape `(step, 1, 1)`, or plain."""


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
    """

    name: str
    long_name: str
    first: float | None = 0.0
    decay: str | None = None


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
    """

    name: str
    long_name: str
    key: str
    index: int | None = None

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
    compute: Callable[[Any, Mapping[str, float]], float]


LEARNING_RATE = Scalar("learning_rate", "learning rate of the step", "lr")
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
    STEP_KEY
        Where torch's state has the count of steps. None where it has none and the recorder counts:
        from 0, or from 1 where a state is there already.
    ESTIMATES
        Every estimate that there can be; `estimates` are those of a run.
    ALIASES
        Names besides of the variables derived from the formula, and what those are, in words.
    ELEMENTWISE
        Whether an element's step depends on that element alone. If not, whole parameters are
        replayed.
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
    STEP_KEY: ClassVar[str | None] = "step"
    ESTIMATES: ClassVar[tuple[Estimate, ...]] = ()
    ALIASES: ClassVar[Mapping[str, tuple[str, str]]] = {}
    ELEMENTWISE: ClassVar[bool] = True
    PROGRAM_FLAGS: ClassVar[tuple[str, ...]] = ("implementation",)

    name: str
    implementation: str

    @classmethod
    @abstractmethod
    def from_group(cls, group: Mapping[str, object], kind: type) -> Self:
        """Return what would step a parameter group of a live optimizer of class `kind`."""

    @property
    def states(self) -> tuple[State, ...]:
        """The states that a run has."""
        return self.STATES

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


@dataclass(frozen=True)
class Precision:
    """How precise arithmetic is.

    Attributes
    ----------
    unit_roundoff
        Relative error of one rounding.
    scalar_roundoff
        Relative error of a scalar that is computed beforehand.
    least
        The least positive number, by which a rounding errs where numbers underflow.
    """

    unit_roundoff: float
    scalar_roundoff: float
    least: float

    @classmethod
    def of(cls, native: str, *, scalars: str, ours: float = 0.0) -> Self:
        """Return that of torch's arithmetic in dtype `native`, with scalars computed in another.

        `ours` is the relative error of what it is compared with.
        """
        return cls(unit_roundoff(native) + ours, 4 * unit_roundoff(scalars), least_positive(native))

    def gamma(self, n: int) -> float:
        """Return the relative error of n roundings (Higham, lemma 3.1)."""
        return n * self.unit_roundoff / (1 - n * self.unit_roundoff)


@dataclass(frozen=True)
class Rounding:
    """How far rounding can carry a step from the formula; each broadcasts to the weights.

    Attributes
    ----------
    update, after, before
        By so much of the formula's update, of the weight after and of that before the step.
    least
        And by this.
    """

    update: Any
    after: Any
    before: Any
    least: Any

    def bound(
        self,
        update: np.ndarray,
        W: np.ndarray,
        W_previous: np.ndarray,
        out: tuple[np.ndarray, np.ndarray] | tuple[None, None] = (None, None),
    ) -> np.ndarray:
        """Return how far rounding alone can carry a step from the formula: safe, not tight.

        It is computed in the arrays `out`, if they are given, and is in the first, which may be
        `update`, the formula's.
        """
        into, term_in = out
        bound: np.ndarray = np.abs(update, out=into)
        bound *= like(update, self.update)
        term: Any = np.abs(W, out=term_in)
        term *= like(W, self.after)
        bound += term
        if np.any(self.before):
            term = np.abs(W_previous, out=term_in)
            term *= like(W, self.before)
            bound += term
        bound += like(W, self.least)
        return bound


@dataclass(frozen=True)
class Consumed:
    """The gradient that explains what a step did to a variable.

    Attributes
    ----------
    gradient
        As the optimizer was given it, float64.
    variable
        What it was computed from.
    per_error
        By how much it is wrong, for each unit by which the variable is.
    """

    gradient: np.ndarray
    variable: str
    per_error: np.ndarray


class Formula(ABC):
    """What a step does, in real numbers. All functions broadcast."""

    @property
    @abstractmethod
    def update_inputs(self) -> tuple[str, ...]:
        """The variables after the step that `update` is computed from: one or two."""

    @property
    def scalar_dtype(self) -> str:
        """The dtype that torch computes scalars in."""
        return "float64"

    @property
    def cancels(self) -> bool:
        """Whether terms of the update may cancel, so that it is less precise than they are."""
        return False

    @abstractmethod
    def coefficients(self, scalars: Scalars) -> Sequence[Any]:
        """Return what `update` multiplies and adds, from the scalars of a step."""

    @abstractmethod
    def update(
        self, arrays: Arrays, coefficients: Sequence[Any], out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the change of the weights, without what weight decay does to them directly.

        `arrays` are the `update_inputs`, and it is as precise as they are. It is computed in `out`,
        if that is given; this may be the first of the arrays.
        """

    @abstractmethod
    def decay_factor(self, scalars: Scalars) -> Any:
        """Return what weight decay multiplies `W` before the step with to change it; 0 for none."""

    @abstractmethod
    def rounding(
        self, scalars: Scalars, precision: Precision, arrays: Arrays | None = None
    ) -> Rounding | None:
        """Return how far rounding can carry a step from the formula.

        None where that depends on the elements: then `arrays`, the `update_inputs`, are needed.
        """

    @abstractmethod
    def advance(self, before: Arrays, grad: np.ndarray, scalars: Scalars) -> dict[str, np.ndarray]:
        """Return the states (not `W`) after a step, from those before and the gradient."""

    @abstractmethod
    def bounds(
        self, before: Arrays, grad: np.ndarray, scalars: Scalars, precision: Precision
    ) -> dict[str, np.ndarray]:
        """Return how far two programs, given the same row and gradient, can end apart.

        `before` has `W` and the states, float64; what is returned has the largest distance of each.
        """

    @abstractmethod
    def consumed(self, before: Arrays, after: Arrays, scalars: Scalars) -> Consumed:
        """Return the gradient that led from one row to the next, up to rounding."""


def like(array: np.ndarray, scalar: Any) -> Any:
    """Return a scalar of a step in the array's precision, in which the arithmetic then is."""
    return scalar.astype(array.dtype, copy=False) if hasattr(scalar, "astype") else scalar


def coupled(
    grad: np.ndarray, W: np.ndarray, *, decay: Any, maximize: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradient with weight decay added, and a bound on the sizes of both together."""
    return (-grad if maximize else grad) + decay * W, abs(grad) + decay * abs(W)


def tensor_dtype(value: object) -> str | None:
    """Return the dtype of a tensor as a store names it, for example `float32`; None of a number."""
    return str(value.dtype).removeprefix("torch.") if hasattr(value, "dtype") else None


def chosen_program(group: Mapping[str, object], *, differentiable: bool) -> str:
    """Return which of its programs torch runs for a group, which may leave the choice to it."""
    from torch.optim.optimizer import _default_to_fused_or_foreach

    foreach, fused = group["foreach"], group["fused"]
    if foreach is None and fused is None:
        parameters: Any = group["params"]
        _, foreach = _default_to_fused_or_foreach(parameters, differentiable)
    return "fused" if fused else "foreach" if foreach else "single"
