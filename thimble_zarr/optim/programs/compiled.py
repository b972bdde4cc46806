"""Kernels as machine code, where llvmlite is installed (`pip install thimble-zarr[fast]`).

Compiling takes some hundredths of a second, so that nothing needs to be kept between processes. A
multiply-add must be an instruction of the processor. Where it is none, NumPy runs the kernels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, ClassVar

import numpy as np

from thimble_zarr.bits import storage_dtype
from thimble_zarr.optim.programs.arithmetic import Arithmetic
from thimble_zarr.optim.programs.emit import LANES, Code, Value, narrowed, splat, traced, widened
from thimble_zarr.optim.programs.kernel import Bits, Kernel, StepNumbers
from thimble_zarr.optim.programs.loops import (
    Function,
    compiled,
    declaration,
    phi,
    pointer,
    source,
)

_NEEDED = {"x86_64": {"fma", "f16c"}, "AMD64": {"fma", "f16c"}, "arm64": set(), "aarch64": set()}
"""Features of processors without which a kernel would call functions of a library."""


@cache
def is_available() -> bool:
    """Return whether kernels can be compiled here."""
    import platform

    try:
        from llvmlite import binding
    except ImportError:
        return False
    needed = _NEEDED.get(platform.machine())
    if needed is None or binding.llvm_version_info < (15,):
        return False
    features = binding.get_host_cpu_features()
    return all(features.get(name) for name in needed)


@dataclass(frozen=True)
class CompiledEngine:
    """Runs a kernel as machine code."""

    piece_elements: ClassVar[int] = 2**15

    kernel: Kernel
    optimizer: Any
    native: str

    def run(
        self,
        before: Bits,
        grads: np.ndarray,
        after: Bits,
        numbers: StepNumbers,
        left: Bits | None = None,
    ) -> None:
        """Take steps, each from its own row, all by the same branches."""
        self._call(before, grads, after, numbers, None, left)

    def differs(
        self,
        before: Bits,
        grads: np.ndarray,
        after: Bits,
        numbers: StepNumbers,
        left: Bits | None = None,
    ) -> dict[str, np.ndarray]:
        """Return for each variable at which steps a bit is not that of the row after it."""
        found = np.zeros((len(grads), len(after)), np.int64)
        self._call(before, grads, after, numbers, found, left)
        return {name: found[:, index] != 0 for index, name in enumerate(after)}

    def _call(
        self,
        before: Bits,
        grads: np.ndarray,
        after: Bits,
        numbers: StepNumbers,
        found: np.ndarray | None,
        left: Bits | None = None,
    ) -> None:
        shape = _Shape(
            tuple(before), numbers.names, self.native, found is not None, tuple(left or ())
        )
        function = _function(self.kernel, self.optimizer, numbers.ways[0], shape)
        arrays = [*before.values(), grads, *after.values(), *(left or {}).values()]
        function.run(arrays, numbers.table, found)


@dataclass(frozen=True)
class _Shape:
    """What a function takes: names of variables and of coefficients.

    Whether it compares rows, or makes them; and of which variables the bits are kept that differ,
    or are turned when a row is made.
    """

    variables: tuple[str, ...]
    coefficients: tuple[str, ...]
    native: str
    compares: bool
    left: tuple[str, ...]

    @property
    def n_arrays(self) -> int:
        """Rows before and after, gradients, and bits that differ."""
        return 2 * len(self.variables) + 1 + len(self.left)


@lru_cache(maxsize=256)
def _function(kernel: Kernel, optimizer: Any, ways: frozenset[str], shape: _Shape) -> Function:
    """Return a compiled function of arrays, the numbers of steps, and what was found."""
    loops = [_Loop(Code(shape.native, lanes), shape, kernel, optimizer, ways) for lanes in LANES]
    text = source(loops, shape.n_arrays, len(shape.coefficients), ("found",))
    return compiled(text, n_tables=2)


@dataclass(frozen=True)
class _Loop:
    """The loop over elements of a row, some at a time."""

    code: Code
    shape: _Shape
    kernel: Kernel
    optimizer: Any
    ways: frozenset[str]

    def body(self) -> list[str]:
        """Note what is done with some elements; return what is done before the loop."""
        splats = {
            name: splat(self.code, f"%c{index}")
            for index, name in enumerate(self.shape.coefficients)
        }
        before = self.code.taken()
        self._body(splats)
        return before

    def _body(self, coefficients: Mapping[str, Value]) -> None:
        code, shape = self.code, self.shape
        names = (*shape.variables, "grad")
        x = {name: widened(code, self._load(index)) for index, name in enumerate(names)}
        arithmetic: Arithmetic = traced(code)
        after = self.kernel.compute(arithmetic, self.optimizer, x, coefficients, self.ways)
        of_left = {name: 2 * len(names) - 1 + index for index, name in enumerate(shape.left)}
        for index, name in enumerate(shape.variables):
            bits, at = narrowed(after[name]), len(names) + index
            if not shape.compares:
                if name in of_left:
                    bits = code.emit(f"xor {code.stored} {bits}, {self._load(of_left[name])}")
                self._store(bits, at)
                continue
            other = code.emit(f"xor {code.stored} {bits}, {self._load(at)}")
            accumulated = f"%d{code.lanes}.{index}"
            code.lines.append(f"  {accumulated}_next = or {code.stored} {accumulated}, {other}")
            if name in of_left:
                self._store(other, of_left[name])

    @property
    def _size(self) -> int:
        return storage_dtype(self.shape.native).itemsize

    def _store(self, bits: str, index: int) -> None:
        to = pointer(self.code, self.shape.native, f"%step{index}")
        self.code.lines.append(f"  store {self.code.stored} {bits}, ptr {to}, align {self._size}")

    def _load(self, index: int) -> str:
        of = pointer(self.code, self.shape.native, f"%step{index}")
        return self.code.emit(f"load {self.code.stored}, ptr {of}, align {self._size}")

    def carried(self, suffix: str = "") -> list[str]:
        """Return what has differed so far."""
        if not self.shape.compares:
            return []
        code, n_variables = self.code, len(self.shape.variables)
        none = code.constant(code.stored, 0)
        names = (f"d{code.lanes}.{index}" for index in range(n_variables))
        return [phi(code, name, code.stored, none, suffix) for name in names]

    def ended(self) -> list[str]:
        """Return what notes, after the loop, whether anything differed."""
        if not self.shape.compares:
            return []
        code, lanes, lines = self.code, self.code.lanes, self.carried("_all")
        n_variables, scalar = len(self.shape.variables), Code(self.shape.native, 1).stored
        for index in range(n_variables):
            name = f"%d{lanes}.{index}_all"
            if lanes > 1:
                function = f"@llvm.vector.reduce.or.v{lanes}{scalar}"
                lines.append(
                    f"  %any{lanes}.{index} = call {scalar} {function}({code.stored} {name})"
                )
                name = f"%any{lanes}.{index}"
            wide = f"%w{lanes}.{index}"
            widens = f"add i64 {name}, 0" if scalar == "i64" else f"zext {scalar} {name} to i64"
            lines.append(f"  {wide} = {widens}")
            lines += [
                f"  %f{lanes}.{index}_row = mul i64 %t, {n_variables}",
                f"  %f{lanes}.{index}_at = add i64 %f{lanes}.{index}_row, {index}",
                f"  %f{lanes}.{index} = getelementptr i64, ptr %found, i64 %f{lanes}.{index}_at",
                f"  %f{lanes}.{index}_old = load i64, ptr %f{lanes}.{index}",
                f"  %f{lanes}.{index}_new = or i64 %f{lanes}.{index}_old, {wide}",
                f"  store i64 %f{lanes}.{index}_new, ptr %f{lanes}.{index}",
            ]
        return lines

    def declarations(self) -> list[str]:
        """Return the functions of LLVM that the loop may call."""
        code, stored = self.code, Code(self.shape.native, 1).stored
        of_numbers = (("fma", 3), ("sqrt", 1), ("fabs", 1))
        declared = [declaration(code, name, n_operands) for name, n_operands in of_numbers]
        if code.lanes > 1:
            function = f"@llvm.vector.reduce.or.v{code.lanes}{stored}"
            declared.append(f"declare {stored} {function}({code.stored})")
        return declared
