"""A kernel as text for LLVM: its arithmetic, traced once, becomes a loop.

The kernel is called with values that note what is done with them. Every operation is one that IEEE
754 defines, without the flags that would let LLVM compute otherwise, and a multiply-add is rounded
once by definition. So the compiled kernel has the bits of the one that NumPy runs.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from thimble_zarr.bits import storage_dtype
from thimble_zarr.optim.programs.arithmetic import NAN, Arithmetic, arithmetic_of

_LANES = 16
"""Elements that an iteration takes; LLVM divides them among the registers of the machine."""


@dataclass
class Code:
    """Instructions in the order in which they were noted.

    Attributes
    ----------
    native
        Dtype of the arrays.
    lanes
        Elements that each value has; 1 for a plain number.
    """

    native: str
    lanes: int
    lines: list[str] = field(default_factory=list)
    numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    @property
    def float(self) -> str:
        """The type that is computed in."""
        return self.of("double" if self.native == "float64" else "float")

    @property
    def bits(self) -> str:
        """The integers of that size."""
        return self.of("i64" if self.native == "float64" else "i32")

    @property
    def stored(self) -> str:
        """The integers of the size of an array's elements."""
        return self.of(f"i{8 * storage_dtype(self.native).itemsize}")

    def of(self, scalar: str) -> str:
        """Return the type of a value whose elements are of one."""
        return scalar if self.lanes == 1 else f"<{self.lanes} x {scalar}>"

    def constant(self, kind: str, number: int) -> str:
        """Return an integer in every lane, of a type."""
        scalar = kind.rpartition("x ")[2].rstrip(">")
        return (
            str(number)
            if self.lanes == 1
            else f"<{', '.join([f'{scalar} {number}'] * self.lanes)}>"
        )

    def emit(self, instruction: str) -> str:
        """Note an instruction and return the name of its result."""
        name = f"%v{self.lanes}.{next(self.numbers)}"
        self.lines.append(f"  {name} = {instruction}")
        return name

    def taken(self) -> list[str]:
        """Return what was noted, and forget it."""
        lines = [*self.lines]
        self.lines.clear()
        return lines

    def integer(self, operation: str, kind: str, a: str, number: int) -> str:
        """Note an operation of integers of a type with a constant."""
        return self.emit(f"{operation} {kind} {a}, {self.constant(kind, number)}")

    def cast(self, operation: str, a: str, kind: str, to: str) -> str:
        """Note a conversion."""
        return self.emit(f"{operation} {kind} {a} to {to}")


@dataclass(frozen=True)
class Value:
    """A number of the kernel, known by the name of the instruction that makes it."""

    code: Code
    name: str

    def _with(self, operation: str, other: "Value") -> "Value":
        text = f"{operation} {self.code.float} {self.name}, {other.name}"
        return Value(self.code, self.code.emit(text))

    def __add__(self, other: "Value") -> "Value":
        return self._with("fadd", other)

    def __sub__(self, other: "Value") -> "Value":
        return self._with("fsub", other)

    def __mul__(self, other: "Value") -> "Value":
        return self._with("fmul", other)

    def __truediv__(self, other: "Value") -> "Value":
        return self._with("fdiv", other)

    def __neg__(self) -> "Value":
        return Value(self.code, self.code.emit(f"fneg {self.code.float} {self.name}"))


def traced(code: Code) -> Arithmetic:
    """Return the operations of `arithmetic_of` on values."""
    kind = code.float

    def call(function: str, *values: Value) -> Value:
        suffix = kind.strip("<>").replace(" x float", "f32").replace(" x double", "f64")
        suffix = {"float": "f32", "double": "f64"}.get(suffix, f"v{suffix}")
        operands = ", ".join(f"{kind} {value.name}" for value in values)
        return Value(code, code.emit(f"call {kind} @llvm.{function}.{suffix}({operands})"))

    def select(chosen: str, a: Value, b: Value) -> Value:
        text = f"select {code.of('i1')} {chosen}, {kind} {a.name}, {kind} {b.name}"
        return Value(code, code.emit(text))

    def is_nan(a: Value) -> str:
        return code.emit(f"fcmp uno {kind} {a.name}, {a.name}")

    def greater(a: Value, b: Value) -> str:
        return code.emit(f"fcmp ogt {kind} {a.name}, {b.name}")

    def maximum(a: Value, b: Value) -> Value:
        either = code.emit(f"or {code.of('i1')} {greater(a, b)}, {is_nan(a)}")
        return select(either, a, b)

    return Arithmetic(
        arithmetic_of(code.native).dtype,
        rounded=_rounded,
        fma=lambda a, b, c: call("fma", a, b, c),
        sqrt=lambda a: call("sqrt", a),
        maximum=maximum,
        select=select,
        is_nan=is_nan,
        greater=greater,
        abs=lambda a: call("fabs", a),
    )


def _rounded(value: Value) -> Value:
    """Round to the dtype of the arrays."""
    code = value.code
    if code.native == "float16":
        half = code.cast("fptrunc", value.name, code.float, code.of("half"))
        return Value(code, code.cast("fpext", half, code.of("half"), code.float))
    if code.native != "bfloat16":
        return value
    kind = code.bits
    bits = code.cast("bitcast", value.name, code.float, kind)
    even = code.integer("and", kind, code.integer("lshr", kind, bits, 16), 1)
    half_way = code.integer("add", kind, even, 0x7FFF)
    carried = code.emit(f"add {kind} {bits}, {half_way}")
    cut = code.integer("and", kind, carried, -0x10000)
    return Value(code, code.cast("bitcast", cut, kind, code.float))


def widened(code: Code, bits: str) -> Value:
    """Return the number of stored bits."""
    if code.native == "bfloat16":
        wide = code.cast("zext", bits, code.stored, code.bits)
        shifted = code.integer("shl", code.bits, wide, 16)
        return Value(code, code.cast("bitcast", shifted, code.bits, code.float))
    if code.native == "float16":
        half = code.cast("bitcast", bits, code.stored, code.of("half"))
        return Value(code, code.cast("fpext", half, code.of("half"), code.float))
    return Value(code, code.cast("bitcast", bits, code.stored, code.float))


def narrowed(value: Value) -> str:
    """Return the stored bits of a number that is rounded already."""
    code = value.code
    if code.native == "bfloat16":
        bits = code.cast("bitcast", value.name, code.float, code.bits)
        upper = code.integer("lshr", code.bits, bits, 16)
        stored = code.cast("trunc", upper, code.bits, code.stored)
    elif code.native == "float16":
        half = code.cast("fptrunc", value.name, code.float, code.of("half"))
        stored = code.cast("bitcast", half, code.of("half"), code.stored)
    else:
        stored = code.cast("bitcast", value.name, code.float, code.stored)
    is_nan = traced(code).is_nan(value)
    nan = code.constant(code.stored, int(NAN[code.native]))
    return code.emit(
        f"select {code.of('i1')} {is_nan}, {code.stored} {nan}, {code.stored} {stored}"
    )


def splat(code: Code, number: str) -> Value:
    """Return a plain number in every lane."""
    if code.lanes == 1:
        return Value(code, number)
    scalar = code.float.rpartition("x ")[2].rstrip(">")
    one = code.emit(f"insertelement {code.float} poison, {scalar} {number}, i64 0")
    mask = f"<{code.lanes} x i32> zeroinitializer"
    every = code.emit(f"shufflevector {code.float} {one}, {code.float} poison, {mask}")
    return Value(code, every)


LANES: Sequence[int] = (_LANES, 1)
"""The loops of a function: one takes several elements at once, the next the rest."""
