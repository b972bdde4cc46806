"""Kernels as machine code, where llvmlite is installed (`pip install thimble-zarr[fast]`).

Compiling takes some hundredths of a second, so that nothing needs to be kept between processes. A
multiply-add must be an instruction of the processor. Where it is none, NumPy runs the kernels.
"""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, ClassVar

import numpy as np

from thimble_zarr.bits import storage_dtype
from thimble_zarr.optim.programs.arithmetic import Arithmetic
from thimble_zarr.optim.programs.emit import LANES, Code, Value, narrowed, splat, traced, widened
from thimble_zarr.optim.programs.kernel import Bits, Kernel, StepNumbers

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

    def run(self, before: Bits, grads: np.ndarray, after: Bits, numbers: StepNumbers) -> None:
        """Take steps, each from its own row, all by the same branches."""
        self._call(before, grads, after, numbers, None)

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
        compares, keeps = found is not None, left is not None
        shape = _Shape(tuple(before), numbers.names, self.native, compares, keeps)
        function = _function(self.kernel, self.optimizer, numbers.ways[0], shape)
        arrays = [*before.values(), grads, *after.values(), *(left or {}).values()]
        pointers = np.array([array.ctypes.data for array in arrays], np.uint64)
        strides = np.array([array.strides[:2] for array in arrays], np.int64)
        tables = (pointers, strides, numbers.table, found)
        addresses = [None if table is None else table.ctypes.data for table in tables]
        function.call(*grads.shape, *addresses)


@dataclass(frozen=True)
class _Shape:
    """What a function takes: names of variables and of coefficients.

    Whether it compares rows, or makes them; and whether it keeps which bits differ.
    """

    variables: tuple[str, ...]
    coefficients: tuple[str, ...]
    native: str
    compares: bool
    keeps: bool

    @property
    def n_arrays(self) -> int:
        """Rows before and after, gradients, and bits that differ."""
        return (2 + self.keeps) * len(self.variables) + 1


@dataclass(frozen=True)
class Function:
    """A function of sizes and addresses, and what holds its code."""

    call: Any
    engine: Any


def compiled(text: str, *, n_sizes: int, n_tables: int) -> Function:
    """Return the function `run` that a text for LLVM defines, of sizes and of addresses."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    module = binding.parse_assembly(text)
    module.verify()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(),
        features=binding.get_host_cpu_features().flatten(),
        opt=3,
        jit=True,
    )
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    sizes, tables = [ctypes.c_int64] * n_sizes, [ctypes.c_void_p] * n_tables
    function = ctypes.CFUNCTYPE(None, *sizes, *tables)(engine.get_function_address("run"))
    return Function(function, engine)


@lru_cache(maxsize=256)
def _function(kernel: Kernel, optimizer: Any, ways: frozenset[str], shape: _Shape) -> Function:
    """Return a compiled function of numbers of steps, groups and elements, and of tables."""
    return compiled(_text(kernel, optimizer, ways, shape), n_sizes=3, n_tables=4)


def _text(kernel: Kernel, optimizer: Any, ways: frozenset[str], shape: _Shape) -> str:
    """Return the source of the function: for each group, for each step, loops over elements.

    So what a step leaves of a group is still in the cache when the next one takes it.
    """
    loops = [_Loop(Code(shape.native, lanes), shape, kernel, optimizer, ways) for lanes in LANES]
    n_arrays = shape.n_arrays
    head = [
        "define void @run(i64 %n_steps, i64 %n_groups, i64 %n, ptr %arrays, ptr %strides, ptr %c, "
        "ptr %found) {",
        "entry:",
        *(line for index in range(n_arrays) for line in table_lines(index)),
        f"  %n{LANES[0]} = and i64 %n, -{LANES[0]}",
        "  %n1 = add i64 %n, 0",
        "  %no_step = icmp eq i64 %n_steps, 0",
        "  %no_group = icmp eq i64 %n_groups, 0",
        "  %nothing = or i1 %no_step, %no_group",
        "  br i1 %nothing, label %end, label %group",
        "group:",
        "  %g = phi i64 [0, %entry], [%g_next, %group_end]",
        *(line for index in range(n_arrays) for line in pointer_lines("group", "g", "p", index)),
        "  br label %step",
        "step:",
        "  %t = phi i64 [0, %group], [%t_next, %step_end]",
        *(line for index in range(n_arrays) for line in pointer_lines("step", "t", "group", index)),
        *coefficient_lines(Code(shape.native, 1).float, len(shape.coefficients)),
    ]
    tail = [
        "step_end:",
        *(loops[-1].found() if shape.compares else ()),
        "  %t_next = add i64 %t, 1",
        "  %more_steps = icmp ult i64 %t_next, %n_steps",
        "  br i1 %more_steps, label %step, label %group_end",
        "group_end:",
        "  %g_next = add i64 %g, 1",
        "  %more_groups = icmp ult i64 %g_next, %n_groups",
        "  br i1 %more_groups, label %group, label %end",
        "end:",
        "  ret void",
        "}",
    ]
    body = [line for loop in loops for line in loop.lines()]
    declared = {line for loop in loops for line in loop.declarations()}
    return "\n".join([*head, *body, *tail, *sorted(declared)])


def table_lines(index: int) -> list[str]:
    """Return what reads an array's pointer, and how far its steps and groups are apart."""
    lines = [
        f"  %pp{index} = getelementptr i64, ptr %arrays, i64 {index}",
        f"  %p{index} = load ptr, ptr %pp{index}",
    ]
    for offset, axis in enumerate(("step", "group")):
        lines += [
            f"  %{axis}_sp{index} = getelementptr i64, ptr %strides, i64 {2 * index + offset}",
            f"  %{axis}_s{index} = load i64, ptr %{axis}_sp{index}",
        ]
    return lines


def pointer_lines(axis: str, number: str, start: str, index: int) -> list[str]:
    """Return what makes the pointer to a group of an array, or to a step of it."""
    return [
        f"  %{axis}_o{index} = mul i64 %{number}, %{axis}_s{index}",
        f"  %{axis}{index} = getelementptr i8, ptr %{start}{index}, i64 %{axis}_o{index}",
    ]


def coefficient_lines(kind: str, n_coefficients: int) -> list[str]:
    """Return what reads the numbers of a step, of a type."""
    lines = [f"  %c_first = mul i64 %t, {n_coefficients}"]
    for index in range(n_coefficients):
        lines += [
            f"  %c_at{index} = add i64 %c_first, {index}",
            f"  %c_p{index} = getelementptr {kind}, ptr %c, i64 %c_at{index}",
            f"  %c{index} = load {kind}, ptr %c_p{index}",
        ]
    return lines


@dataclass(frozen=True)
class _Loop:
    """The loop over elements of a row, some at a time."""

    code: Code
    shape: _Shape
    kernel: Kernel
    optimizer: Any
    ways: frozenset[str]

    def lines(self) -> list[str]:
        """Return the blocks of the loop, from the one that goes before it to the one after it."""
        code, lanes = self.code, self.code.lanes
        is_first = lanes == LANES[0]
        begin, first = ("step", "0") if is_first else (f"after{LANES[0]}", f"%n{LANES[0]}")
        after = f"after{lanes}" if is_first else "step_end"
        splats = {
            name: splat(code, f"%c{index}") for index, name in enumerate(self.shape.coefficients)
        }
        before_loop = [*code.lines]
        code.lines.clear()
        body = self._body(splats)
        return [
            *before_loop,
            f"  %any{lanes} = icmp ult i64 {first}, %n{lanes}",
            f"  br i1 %any{lanes}, label %loop{lanes}, label %{after}",
            f"loop{lanes}:",
            f"  %i{lanes} = phi i64 [{first}, %{begin}], [%i{lanes}_next, %loop{lanes}]",
            *self._carried(begin, f"%loop{lanes}", "", "_next"),
            *body,
            f"  %i{lanes}_next = add i64 %i{lanes}, {lanes}",
            f"  %more{lanes} = icmp ult i64 %i{lanes}_next, %n{lanes}",
            f"  br i1 %more{lanes}, label %loop{lanes}, label %{after}",
            *((f"{after}:", *self.found()) if is_first else ()),
        ]

    def _body(self, coefficients: Mapping[str, Value]) -> list[str]:
        code, shape = self.code, self.shape
        names = (*shape.variables, "grad")
        x = {name: widened(code, self._load(index)) for index, name in enumerate(names)}
        arithmetic: Arithmetic = traced(code)
        after = self.kernel.compute(arithmetic, self.optimizer, x, coefficients, self.ways)
        for index, name in enumerate(shape.variables):
            bits, at = narrowed(after[name]), len(names) + index
            if not shape.compares:
                self._store(bits, at)
                continue
            other = code.emit(f"xor {code.stored} {bits}, {self._load(at)}")
            accumulated = f"%d{code.lanes}.{index}"
            code.lines.append(f"  {accumulated}_next = or {code.stored} {accumulated}, {other}")
            if shape.keeps:
                self._store(other, at + len(shape.variables))
        return code.lines

    @property
    def _size(self) -> int:
        return storage_dtype(self.shape.native).itemsize

    def _store(self, bits: str, index: int) -> None:
        pointer = self._pointer(index)
        self.code.lines.append(
            f"  store {self.code.stored} {bits}, ptr {pointer}, align {self._size}"
        )

    def _pointer(self, index: int) -> str:
        scalar = Code(self.shape.native, 1).stored
        return self.code.emit(f"getelementptr {scalar}, ptr %step{index}, i64 %i{self.code.lanes}")

    def _load(self, index: int) -> str:
        pointer = self._pointer(index)
        return self.code.emit(f"load {self.code.stored}, ptr {pointer}, align {self._size}")

    def _carried(self, begin: str, end: str, suffix: str, of_end: str) -> list[str]:
        """Return what has differed so far."""
        if not self.shape.compares:
            return []
        code, lanes = self.code, self.code.lanes
        none = code.constant(code.stored, 0)
        return [
            f"  %d{lanes}.{index}{suffix} = phi {code.stored} "
            f"[{none}, %{begin}], [%d{lanes}.{index}{of_end}, {end}]"
            for index in range(len(self.shape.variables))
        ]

    def found(self) -> list[str]:
        """Return what notes, after the loop, whether anything differed."""
        code, lanes, lines = self.code, self.code.lanes, []
        if not self.shape.compares:
            return []
        n_variables, scalar = len(self.shape.variables), Code(self.shape.native, 1).stored
        begin = "step" if lanes == LANES[0] else f"after{LANES[0]}"
        lines += self._carried(begin, f"%loop{lanes}", "_all", "_next")
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
        code = self.code
        scalar = "f64" if self.shape.native == "float64" else "f32"
        suffix = scalar if code.lanes == 1 else f"v{code.lanes}{scalar}"
        kind, stored = code.float, Code(self.shape.native, 1).stored
        return [
            f"declare {kind} @llvm.fma.{suffix}({kind}, {kind}, {kind})",
            f"declare {kind} @llvm.sqrt.{suffix}({kind})",
            f"declare {kind} @llvm.fabs.{suffix}({kind})",
            *(
                [f"declare {stored} @llvm.vector.reduce.or.v{code.lanes}{stored}({code.stored})"]
                if code.lanes > 1
                else []
            ),
        ]
