"""What optimizers of torch have in common that work element by element: all but a few lines.

A spec says which states and numbers there are, and writes two pieces of arithmetic in the
operations of `programs.arithmetic`: how a step is taken (`take`), as torch takes it, and what
change of the weights the states after a step mean (`change`). Everything else follows: the portable
program and the recurrences from the first, the formula from the second, and from both, computed
with numbers that carry their errors (`inexact`), how far rounding can carry a step.
"""

import importlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from thimble_zarr.optim.base import (
    COUNT,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Optimizer,
    Scalar,
    chosen_program,
    tensor_dtype,
)
from thimble_zarr.optim.formula import (
    W_BEFORE,
    Arrays,
    Consumed,
    Formula,
    Precision,
    Rounding,
    Scalars,
    like,
)
from thimble_zarr.optim.inexact import REAL, RUNNING, Inexact
from thimble_zarr.optim.programs.arithmetic import Arithmetic
from thimble_zarr.optim.programs.kernel import Kernel, Numbers

if TYPE_CHECKING:
    from torch import Tensor

DECAYS = "decays"
"""The branch of steps with weight decay."""

NEAR = "near"
"""That of steps that move a mean by less than half of the way to the gradient."""

Branches = frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Elementwise(Optimizer, Formula):
    """An optimizer of torch that takes each element's step from that element alone.

    Attributes
    ----------
    FUNCTION
        The module and the function of `torch.optim` that take a step: both have this name.
    LISTS
        What the function takes first: variables, numbers that are kept as tensors, `step`.
    NOT_TAKEN
        Scalars that it does not take.
    FLAGS
        Fields that are torch's flags of these names, in a group and for the function.
    IMPLEMENTATIONS
        The programs that torch has.
    HAS_ROOT
        Whether a step takes a square root, which torch has from MKL, unless it is fused.
    MEAN
        The decay rate of a mean that torch's `lerp` moves, by name; None if there is none.
    ROUNDINGS_OF_W
        How often a step rounds the weights.
    VERSION
        Of the portable programs.
    function
        `FUNCTION`, which tells a store what a subclass is.
    maximize, capturable, differentiable
        torch's flags of these names.
    lr_dtype
        Dtype of the learning rate where it is a tensor; None where it is a Python number.
    """

    FUNCTION: ClassVar[str]
    LISTS: ClassVar[tuple[str, ...]]
    NOT_TAKEN: ClassVar[tuple[str, ...]] = ()
    FLAGS: ClassVar[tuple[str, ...]] = ("maximize", "capturable", "differentiable")
    IMPLEMENTATIONS: ClassVar[tuple[str, ...]] = ("single", "foreach")
    HAS_ROOT: ClassVar[bool] = True
    MEAN: ClassVar[str | None] = None
    ROUNDINGS_OF_W: ClassVar[int] = 1
    VERSION: ClassVar[int] = 1
    PROGRAM_FLAGS: ClassVar[tuple[str, ...]] = (
        *Optimizer.PROGRAM_FLAGS,
        *("capturable", "differentiable", "lr_dtype"),
    )

    function: str = ""
    maximize: bool = False
    capturable: bool = False
    differentiable: bool = False
    lr_dtype: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "function", self.FUNCTION)  # stores of before have none

    @classmethod
    def from_group(cls, group: Mapping[str, Any], kind: type) -> Self:
        """Return what would step a parameter group of a live optimizer of class `kind`."""
        flags: dict[str, Any] = {name: bool(group[name]) for name in cls.FLAGS}
        return cls(
            name=kind.__name__,
            implementation=chosen_program(group, differentiable=flags.get("differentiable", False)),
            lr_dtype=tensor_dtype(LEARNING_RATE.read(group)),
            **flags,
            **cls.choices(group),
        )

    @classmethod
    def choices(cls, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of its own, from a parameter group."""
        return {}

    def branches(self, scalars: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return which branches of `take` steps take."""
        found = {DECAYS: np.asarray(scalars[COUNT]) > np.inf}
        if WEIGHT_DECAY.name in self.scalars:
            found[DECAYS] = scalars[WEIGHT_DECAY.name] != 0
        if self.MEAN is not None:
            found[NEAR] = np.abs((1 - scalars[self.MEAN]).astype(np.float32)) < 0.5
        return found

    @abstractmethod
    def numbers(
        self,
        scalars: Mapping[str, Any],
        plain: Callable[[Any], Any],
        narrow: Callable[[Any], Any],
    ) -> dict[str, Any]:
        """Return what arrays are multiplied with and so on, by name, from the scalars of steps.

        `plain` makes a scalar a number to compute with, `narrow` rounds it to the dtype of the
        arrays besides: torch does the one here and the other there.
        """

    @abstractmethod
    def take(self, a: Arithmetic, x: Numbers, c: Numbers, ways: Branches) -> dict[str, Any]:
        """Take a step, as torch does: return `W` and the states after it.

        `x` has those before it and `grad`, `c` the `numbers` of the step. Of a fused program
        `a.rounded` rounds nothing, and what is returned is rounded.
        """

    @abstractmethod
    def change(self, a: Arithmetic, x: Numbers, c: Numbers) -> Any:
        """Return the change of the weights, from the `update_inputs`: the formula."""

    @abstractmethod
    def gradient_of(
        self, a: Arithmetic, x: Arrays, after: Arrays, c: Numbers
    ) -> tuple[str, Any, Any]:
        """Return a variable, and the gradient that made it, before sign and decay are taken out.

        And by how much that is wrong, for each unit by which the variable is.
        """

    @staticmethod
    def gradient_of_mean(name: str, x: Arrays, after: Arrays, c: Numbers) -> tuple[str, Any, Any]:
        """Return what `gradient_of` does, from the state that is moved towards it."""
        return name, (after[name] - x[name]) / c["weight"] + x[name], 1 / c["weight"]

    def gradient(self, a: Arithmetic, x: Numbers, c: Numbers, ways: Branches) -> Any:
        """Return the gradient, with weight decay added to it."""
        grad = -x["grad"] if self.maximize else x["grad"]
        return a.rounded(a.fma(x["W"], c["decay"], grad)) if DECAYS in ways else grad

    @staticmethod
    def weights(rate: Any, plain: Callable[[Any], Any]) -> dict[str, Any]:
        """Return what moves a mean with a decay rate (`moved`)."""
        weight = plain(1 - rate)
        return {"weight": weight, "weight_less_1": weight - 1.0}

    @staticmethod
    def moved(a: Arithmetic, mean: Any, grad: Any, c: Numbers, ways: Branches) -> Any:
        """Return a mean on its way to the gradient, as torch's `lerp` moves it: from the nearer."""
        weight, start = (c["weight"], mean) if NEAR in ways else (c["weight_less_1"], grad)
        return a.rounded(a.fma(weight, grad - mean, start))

    @property
    def direct_gradient(self) -> tuple[str, ...]:
        """What `change` needs where it needs the gradient itself."""
        return ("grad", W_BEFORE)

    def real_gradient(self, a: Arithmetic, x: Numbers, c: Numbers) -> Any:
        """Return the gradient, with weight decay added to it, for `change`."""
        grad = -x["grad"] if self.maximize else x["grad"]
        return grad + c["decay"] * x[W_BEFORE]

    @property
    def is_foreach(self) -> bool:
        """Whether torch takes all tensors at once."""
        return self.implementation == "foreach"

    @property
    def tensors(self) -> Mapping[str, str]:
        """Dtypes of the numbers that are tensors, by name."""
        return {} if self.lr_dtype is None else {LEARNING_RATE.name: self.lr_dtype}

    @property
    def program(self) -> str:
        """What portable programs are called, before implementation and version."""
        return self.FUNCTION

    def kernel(self, native: str) -> Kernel | None:
        """Return the newest kernel; None if the arithmetic is that of tensors."""
        if self.tensors or self.capturable or self.differentiable:
            return None
        # There torch leaves the square root to MKL, which does not always round it to the nearest.
        by_library = self.HAS_ROOT and self.implementation != "fused"
        return Kernel(
            f"{self.program}-{self.implementation}/{self.VERSION}",
            type(self).branches,
            _coefficients,
            _compute,
            apart_in=("float32", "float64") if by_library else (),
        )

    @property
    def scalar_dtype(self) -> str:
        """These programs compute numbers in float32, on the device."""
        on_device = self.capturable or self.differentiable or self.implementation == "fused"
        return "float32" if on_device or self.tensors else "float64"

    @property
    def cancels(self) -> bool:
        """Whether terms of the update may cancel."""
        return W_BEFORE in self.update_inputs

    def coefficients(self, scalars: Scalars) -> Sequence[Any]:
        """Return the `numbers` of steps."""
        return [number.value for number in self._numbers(scalars).values()]

    def update(
        self, arrays: Arrays, coefficients: Sequence[Any], out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the change of the weights by the formula."""
        first = arrays[self.update_inputs[0]]
        cast = (like(first, number) for number in coefficients)
        with np.errstate(all="ignore"):
            change: np.ndarray = self.change(
                REAL, arrays, dict(zip(_number_names(self), cast, strict=True))
            )
        if out is None:
            return change
        out[...] = change
        return out

    def decay_factor(self, scalars: Scalars) -> Any:
        """Return what weight decay multiplies `W` with where it is not in the gradient: nothing."""
        return 0.0 * np.asarray(scalars[LEARNING_RATE.name])

    def rounding(
        self, scalars: Scalars, precision: Precision, arrays: Arrays | None = None
    ) -> Rounding | None:
        """Return the error of the formula, whose inputs are rounded, element by element."""
        if arrays is None:
            return None
        names = self.update_inputs
        given = {name: Inexact.exact(arrays[name], precision) for name in names}
        stored = {
            name: x if name in ("grad", W_BEFORE) else x.rounded() for name, x in given.items()
        }
        with np.errstate(all="ignore"):
            change = self.change(RUNNING, stored, self._numbers(scalars, precision))
        factor, n = np.abs(self.decay_factor(scalars)), self.ROUNDINGS_OF_W
        shrunk = precision.gamma(2) + precision.scalar_roundoff
        before = (factor != 0) * shrunk * (1 + 4 * factor)
        return Rounding(
            update=0.0,
            after=precision.gamma(1),
            before=before + (precision.gamma(n - 1) if n > 1 else 0.0),
            least=n * change.error + 4 * n * precision.least,
        )

    def advance(self, before: Arrays, grad: np.ndarray, scalars: Scalars) -> dict[str, np.ndarray]:
        """Return the states after a step: what a step leaves, if nothing is rounded."""
        numbers = {name: number.value for name, number in self._numbers(scalars).items()}
        after = self._taken(REAL, {**before, "grad": grad}, numbers, scalars)
        return {state.name: after[state.name] for state in self.states}

    def bounds(
        self, before: Arrays, grad: np.ndarray, scalars: Scalars, precision: Precision
    ) -> dict[str, np.ndarray]:
        """Return how far two programs, given the same row and gradient, can end apart.

        Each may end as far from what real numbers would make as the running error says; together
        twice as far, by whichever program errs most.
        """
        arrays = {
            name: Inexact.exact(of, precision) for name, of in {**before, "grad": grad}.items()
        }
        found: dict[str, np.ndarray] = {}
        for implementation in self.IMPLEMENTATIONS:
            program = replace(self, implementation=implementation)
            numbers = program._numbers(scalars, precision)
            after = program._taken(RUNNING, arrays, numbers, scalars)
            for name in before:
                error = 2 * after[name].error
                found[name] = np.maximum(found.get(name, 0.0), error)
        return found

    def consumed(self, before: Arrays, after: Arrays, scalars: Scalars) -> Consumed:
        """Return the gradient that led from one row to the next, up to rounding."""
        numbers = {name: number.value for name, number in self._numbers(scalars).items()}
        with np.errstate(all="ignore"):
            name, gradient, per_error = self.gradient_of(REAL, before, after, numbers)
            gradient = gradient - numbers.get("decay", 0.0) * before["W"]
        return Consumed(-gradient if self.maximize else gradient, name, abs(per_error))

    def _taken(
        self, a: Arithmetic, x: Mapping[str, Any], c: Mapping[str, Any], scalars: Scalars
    ) -> dict[str, Any]:
        """Take steps, each by its branches, with their axis first."""
        known = {name: of.value for name, of in self._known(scalars, 0.0).items()}
        ways = {name: np.atleast_1d(of).ravel() for name, of in self.branches(known).items()}
        kinds = [
            frozenset(name for name, of in ways.items() if of[index])
            for index in range(max(len(of) for of in ways.values()))
        ]
        with np.errstate(all="ignore"):
            if len({*kinds}) == 1:
                return _compute(a, self, x, c, kinds[0])
            at = [slice(index, index + 1) for index in range(len(kinds))]
            parts = [
                _compute(a, self, _at(x, of_step), _at(c, of_step), kind)
                for of_step, kind in zip(at, kinds, strict=True)
            ]
        join = Inexact.joined if a is RUNNING else np.concatenate
        return {name: join([part[name] for part in parts]) for name in parts[0]}

    def _numbers(self, scalars: Scalars, precision: Precision | None = None) -> dict[str, Inexact]:
        """Return the `numbers` of steps, with their errors."""
        known = self._known(scalars, 0.0 if precision is None else precision.scalar_roundoff)

        def rounded(scalar: Any) -> Inexact:
            number = Inexact.like(scalar, known[COUNT].value)
            if precision is None:
                return number
            native = Inexact.exact(number.value, precision)
            return replace(native, error=number.error).rounded()

        with np.errstate(all="ignore"):
            return self.numbers(known, rounded, rounded)

    def _known(self, scalars: Scalars, unit: float) -> dict[str, Inexact]:
        """Return the scalars of steps, and those that are derived from them, with their errors."""
        names = (*self.scalars, COUNT)
        given = np.broadcast_arrays(*(np.asarray(scalars[name], np.float64) for name in names))
        known = {name: Inexact(of, 0.0 * of, unit) for name, of in zip(names, given, strict=True)}
        if not self.DERIVED:
            return known
        found: dict[str, list[Inexact]] = {of.name: [] for of in self.DERIVED}
        with np.errstate(all="ignore"):
            for row in zip(*(of.ravel().tolist() for of in given), strict=True):
                exact = {
                    name: Inexact(np.float64(value), np.float64(0), unit)
                    for name, value in zip(names, row, strict=True)
                }
                for of in self.DERIVED:  # step by step, as they may branch
                    found[of.name].append(Inexact.like(of.compute(self, exact), exact[COUNT].value))
        return known | {
            name: Inexact(
                np.array([number.value for number in numbers]).reshape(given[0].shape),
                np.array([number.error for number in numbers]).reshape(given[0].shape),
                unit,
            )
            for name, numbers in found.items()
        }

    def step(
        self, tensors: "dict[str, Tensor | None]", scalars: Mapping[str, float], *, device: str
    ) -> None:
        """Call torch's function; it changes the states in place, or makes them."""
        import torch

        on_device = self.capturable and device != "cpu"  # no CPU can be captured
        counts_on = device if on_device or self.implementation == "fused" else "cpu"

        def number(scalar: Scalar) -> "float | Tensor":
            value, dtype = scalars[scalar.name], self.tensors.get(scalar.name)
            if dtype is None:
                return value
            where = device if on_device else "cpu"
            return torch.tensor(value, dtype=getattr(torch, dtype), device=where)

        numbers: dict[str, Any] = {
            scalar.keyword: number(scalar)
            for scalar in self.SCALARS
            if scalar.held is None and scalar.name not in self.NOT_TAKEN
        }
        numbers_held = {**scalars, "step": scalars[COUNT] - 1}
        lists: dict[str, list[Tensor | None]] = {
            name: [tensors[name]] if name in tensors else [] for name in self.LISTS
        }
        for name in lists.keys() & numbers_held.keys():
            value = torch.tensor(numbers_held[name], dtype=torch.float32, device=counts_on)
            lists[name] = [value]
        flags = {name: getattr(self, name) for name in self.FLAGS}
        if "capturable" in flags:
            flags["capturable"] = on_device
        if "fused" in self.IMPLEMENTATIONS:
            flags["fused"] = self.implementation == "fused"
        module = importlib.import_module(f"torch.optim.{self.FUNCTION}")
        take = getattr(module, self.FUNCTION)
        take(*lists.values(), foreach=self.is_foreach, **flags, **numbers)
        tensors.update({name: of[0] for name, of in lists.items() if name in tensors})


def _at(numbers: Mapping[str, Any], steps: slice) -> dict[str, Any]:
    return {name: of[steps] for name, of in numbers.items()}


@lru_cache
def _number_names(optimizer: Elementwise) -> tuple[str, ...]:
    ones = {name: np.ones(()) for name in (*optimizer.scalars, COUNT)}
    return tuple(optimizer._numbers(ones))


def _coefficients(
    optimizer: Elementwise, scalars: Mapping[str, np.ndarray], rounder: Any
) -> dict[str, np.ndarray]:
    like = scalars[COUNT]
    with np.errstate(all="ignore"):
        return optimizer.numbers(
            scalars,
            lambda scalar: rounder.plain(np.broadcast_to(scalar, like.shape)),
            lambda scalar: rounder.narrow(np.broadcast_to(scalar, like.shape)),
        )


def _compute(
    a: Arithmetic, optimizer: Elementwise, x: Numbers, c: Numbers, ways: Branches
) -> dict[str, Any]:
    """Take a step: a fused program rounds only what it stores."""
    if optimizer.implementation != "fused":
        return optimizer.take(a, x, c, ways)
    after = optimizer.take(replace(a, rounded=lambda number: number), x, c, ways)
    return {name: a.rounded(of) for name, of in after.items()}
