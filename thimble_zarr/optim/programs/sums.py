"""Sums of what a formula predicts and of what it leaves, in one pass over stored bits.

The formula is traced as NumPy would compute it, and so is the bound of rounding: each number has
NumPy's bits. Only sums of a token's elements are added in another order than NumPy's, which depends
on its library: those of each lane first, and then one half of the lanes to the other.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from thimble_zarr.bits import storage_dtype
from thimble_zarr.optim.formula import W_BEFORE, Formula, Rounding
from thimble_zarr.optim.programs.arithmetic import arithmetic_of
from thimble_zarr.optim.programs.emit import LANES, Code, Value, splat, traced, widened
from thimble_zarr.optim.programs.loops import (
    Function,
    compiled,
    declaration,
    phi,
    pointer,
    source,
)

N_SUMS = 4
"""Squares of what was predicted, of what was observed, of their difference; products of the two."""


@dataclass(frozen=True)
class FormulaSums:
    """Sums over the elements of tokens, step by step.

    Attributes
    ----------
    formula
        What predicts a change from arrays and numbers of a step: the coefficients of its update,
        then the factor of the decay, then, if `is_bounded`, what a `Rounding` has.
    natives
        The dtype of `W` and of each array that the formula takes, `W_BEFORE` aside.
    dtype
        What is computed in, float32 or float64.
    n_coefficients
        Of the update.
    decays
        Whether weights decay.
    is_bounded
        Whether to count elements whose difference is more than rounding can make.
    shrinks
        Whether that depends on the weight before.
    """

    formula: Formula
    natives: tuple[tuple[str, str], ...]
    dtype: str
    n_coefficients: int
    decays: bool
    is_bounded: bool
    shrinks: bool

    @property
    def n_numbers(self) -> int:
        """Numbers of each step."""
        return self.n_coefficients + 1 + 4 * self.is_bounded

    def run(
        self, bits: Mapping[str, np.ndarray], first: np.ndarray, numbers: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Return sums, `(N_SUMS, step, token)`, and counts, `(step, token)`.

        None if the formula cannot be traced or has no hash, or elements of a token are not side by
        side.

        Parameters
        ----------
        bits
            Of each of `natives`, shape `(step, token, dim)`.
        first
            The bits of `W` before the first step, `(token, dim)`.
        numbers
            Of each step, in `dtype`, `(step, number)`.
        """
        try:
            function = _function(self)
        except TypeError:  # of a formula without a hash, as one with a list among its fields
            return None
        arrays = [*(bits[name] for name, _ in self.natives), first[np.newaxis]]
        if function is None or any(of.strides[-1] != of.itemsize for of in arrays):
            return None
        shape = arrays[0].shape
        sums = np.empty((N_SUMS, *shape[:2]), self.dtype)
        counts = np.zeros(shape[:2], np.int64)
        function.run(arrays, np.ascontiguousarray(numbers), sums, counts)
        return sums, counts


def sums_in_order(products: np.ndarray) -> np.ndarray:
    """Return the sums over the last axis, added up by NumPy as `FormulaSums` adds them."""
    n_dims, lanes = products.shape[-1], LANES[0]
    n_whole = n_dims - n_dims % lanes
    total = np.zeros(products.shape[:-1], products.dtype)
    if n_whole:
        held = products[..., :lanes].copy()
        for first in range(lanes, n_whole, lanes):
            held += products[..., first : first + lanes]
        while (half := held.shape[-1] // 2) > 0:
            held = held[..., :half] + held[..., half:]
        total += held[..., 0]
    for element in range(n_whole, n_dims):
        total += products[..., element]
    return total


@lru_cache(maxsize=64)
def _function(sums: FormulaSums) -> Function | None:
    loops, n_arrays = [_Loop(sums, Code(sums.dtype, lanes)) for lanes in LANES], len(sums.natives)
    weights = [name for name, _ in sums.natives].index("W")
    step, tables = _row_before(weights, first=n_arrays), ("sums", "counts")
    try:
        text = source(loops, n_arrays + 1, sums.n_numbers, tables, step)
    except TypeError:  # of an operation that cannot be traced
        return None
    return compiled(text, n_tables=3)


def _row_before(weights: int, first: int) -> list[str]:
    """Return what makes the pointer to the weights before a step, given the numbers of arrays."""
    return [
        "  %t_before = sub i64 %t, 1",
        f"  %back = mul i64 %t_before, %step_s{weights}",
        f"  %row_before = getelementptr i8, ptr %group{weights}, i64 %back",
        "  %is_first = icmp eq i64 %t, 0",
        f"  %before = select i1 %is_first, ptr %group{first}, ptr %row_before",
    ]


@dataclass(frozen=True)
class _Loop:
    """The loop over elements of a token at a step, some at a time."""

    sums: FormulaSums
    code: Code

    def body(self) -> list[str]:
        """Note the sums of some elements; return what is done once before the loop."""
        numbers = [splat(self.code, f"%c{index}") for index in range(self.sums.n_numbers)]
        before = self.code.taken()
        self._body(numbers)
        return before

    def ended(self) -> list[str]:
        """Return what adds up lanes, or stores what the last of them adds up to."""
        return [
            *self.carried("_all"),
            *(self._folded() if self.code.lanes > 1 else self._results()),
        ]

    def _results(self) -> list[str]:
        """Return what stores the sums of a token at a step."""
        kind = self.code.float
        lines = [
            "  %row = mul i64 %t, %n_groups",
            "  %at = add i64 %row, %g",
            "  %n_rows = mul i64 %n_steps, %n_groups",
        ]
        for index in range(N_SUMS):
            lines += [
                f"  %sum_row{index} = mul i64 %n_rows, {index}",
                f"  %sum_at{index} = add i64 %sum_row{index}, %at",
                f"  %sum_p{index} = getelementptr {kind}, ptr %sums, i64 %sum_at{index}",
                f"  store {kind} %s1.{index}_all, ptr %sum_p{index}",
            ]
        return [
            *lines,
            "  %count_p = getelementptr i64, ptr %counts, i64 %at",
            "  %count = zext i32 %b1_all to i64",
            "  store i64 %count, ptr %count_p",
        ]

    def carried(self, suffix: str = "") -> list[str]:
        """Return the sums and the count so far: in the loop, or, with a suffix, after it."""
        code = self.code
        zero = "zeroinitializer" if code.lanes > 1 else ""
        sums = (
            phi(code, f"s{code.lanes}.{i}", code.float, zero or f"%folded.{i}", suffix)
            for i in range(N_SUMS)
        )
        return [*sums, phi(code, f"b{code.lanes}", code.of("i32"), zero or "%folded.b", suffix)]

    def _folded(self) -> list[str]:
        """Return what adds the lanes up: one half to the other, until there is one."""
        code, lines = self.code, list[str]()
        of_sums = [(f"s{code.lanes}.{i}_all", "fadd", f"folded.{i}") for i in range(N_SUMS)]
        for name, add, result in [*of_sums, (f"b{code.lanes}_all", "add", "folded.b")]:
            scalar = "i32" if add == "add" else Code(code.native, 1).float
            lanes, held = code.lanes, name
            while lanes > 1:
                kind, lanes = f"<{lanes} x {scalar}>", lanes // 2
                halves = []
                for half in range(2):
                    mask = ", ".join(f"i32 {half * lanes + lane}" for lane in range(lanes))
                    part = f"{result}.{lanes}.{half}"
                    lines.append(
                        f"  %{part} = shufflevector {kind} %{held}, {kind} poison, "
                        f"<{lanes} x i32> <{mask}>"
                    )
                    halves.append(f"%{part}")
                held = f"{result}.{lanes}"
                lines.append(f"  %{held} = {add} <{lanes} x {scalar}> {', '.join(halves)}")
            lines.append(f"  %{result} = extractelement <1 x {scalar}> %{held}, i64 0")
        return lines

    def _body(self, numbers: Sequence[Value]) -> None:
        """Note the sums of some elements."""
        code, sums, lanes = self.code, self.sums, self.code.lanes
        arrays: dict[str, Any] = {
            name: self._number(native, f"%step{index}")
            for index, (name, native) in enumerate(sums.natives)
        }
        before: Any = self._number(dict(sums.natives)["W"], "%before")
        given: list[Any] = [_Number(value) for value in numbers]
        n, inputs = sums.n_coefficients, {**arrays, W_BEFORE: before}
        found: object = sums.formula.update(inputs, given[:n])
        if not isinstance(found, _Number):
            raise TypeError(f"the formula of {type(sums.formula).__name__} cannot be traced")
        update: Any = found
        predicted: Any = given[n] * before + update if sums.decays else update
        observed: Any = arrays["W"] - before
        difference: Any = observed - predicted
        pairs = [(predicted,) * 2, (observed,) * 2, (difference,) * 2, (predicted, observed)]
        for index, (left, right) in enumerate(pairs):
            product = left.value * right.value
            code.lines.append(
                f"  %s{lanes}.{index}_next = fadd {code.float} %s{lanes}.{index}, {product.name}"
            )
        kind, beyond = code.of("i32"), code.constant(code.of("i32"), 0)
        if sums.is_bounded:
            of_update, of_after, of_before, least = given[n + 1 :]
            of_before = of_before if sums.shrinks else 0.0
            rounding = Rounding(of_update, of_after, of_before, least)
            bound: Any = rounding.bound(update, arrays["W"], before)
            size: Any = np.abs(difference)
            text = f"fcmp ugt {code.float} {size.value.name}, {bound.value.name}"
            beyond = code.cast("zext", code.emit(text), code.of("i1"), kind)
        code.lines.append(f"  %b{lanes}_next = add {kind} %b{lanes}, {beyond}")

    def _number(self, native: str, row: str) -> "_Number":
        """Return some elements of a row."""
        code = self.code
        of_native = Code(native, code.lanes, code.lines, code.numbers)
        of, size = pointer(code, native, row), storage_dtype(native).itemsize
        bits = code.emit(f"load {of_native.stored}, ptr {of}, align {size}")
        value = widened(of_native, bits)
        if of_native.float != code.float:
            cast = "fpext" if code.native == "float64" else "fptrunc"
            value = Value(code, code.cast(cast, value.name, of_native.float, code.float))
        return _Number(Value(code, value.name))

    def declarations(self) -> list[str]:
        """Return the functions of LLVM that the loop may call."""
        return [declaration(self.code, name) for name in ("sqrt", "fabs")]


@dataclass(frozen=True, eq=False)
class _Number(NDArrayOperatorsMixin):
    """Stands for an array: what NumPy would compute with it is noted."""

    value: Value

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: "_Number | float", out: object = None
    ) -> Any:
        operation = _OPERATIONS.get(ufunc)
        if operation is None or method != "__call__":
            return NotImplemented
        code = self.value.code
        values = [of.value if isinstance(of, _Number) else _constant(code, of) for of in inputs]
        return _Number(operation(*values))

    def __bool__(self) -> bool:
        raise TypeError("a formula that asks for the truth of a number cannot be traced")

    def any(self, **options: object) -> bool:
        """Say that not all elements are 0 (`np.any`)."""
        return True


_OPERATIONS: Mapping[np.ufunc, Callable[..., Value]] = {
    np.add: operator.add,
    np.subtract: operator.sub,
    np.multiply: operator.mul,
    np.divide: operator.truediv,
    np.negative: operator.neg,
    np.square: lambda a: a * a,
    np.sqrt: lambda a: traced(a.code).sqrt(a),
    np.abs: lambda a: traced(a.code).abs(a),
}


def _constant(code: Code, number: object) -> Value:
    """Return a number of Python's in every lane; a TypeError if it is anything else."""
    if type(number) not in (int, float):
        raise TypeError(f"{number!r} cannot be traced")
    exact = np.float64(np.dtype(arithmetic_of(code.native).dtype).type(number))
    return splat(code, f"0x{exact.view(np.uint64):016X}")
