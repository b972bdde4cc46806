"""Machine code that goes over arrays: over each token, over its steps, over the elements of a step.

Pointers, loops and the compiler are here, once for all functions. What is done with the elements of
a step is a `Loop`'s: one that takes several at once, and one that takes the rest.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from thimble_zarr.optim.programs.emit import LANES, Code


class Loop(Protocol):
    """What is done with the elements of a token at a step, `code.lanes` of them at once."""

    @property
    def code(self) -> Code:
        """Where instructions are noted."""

    def body(self) -> list[str]:
        """Note what is done with some elements; return what is done once before the loop."""

    def carried(self, suffix: str = "") -> list[str]:
        """Return what was computed so far: in the loop, or, with a suffix, after it."""

    def ended(self) -> list[str]:
        """Return what is done after the loop."""

    def declarations(self) -> list[str]:
        """Return the functions of LLVM that may be called."""


@dataclass(frozen=True)
class Function:
    """A function of machine code, and what holds that."""

    call: Any
    engine: Any

    def run(self, arrays: Sequence[np.ndarray], *tables: np.ndarray | None) -> None:
        """Call it with arrays of the shape `(step, group, element)`, all alike, and its tables.

        Elements have no gaps between them; tables have none at all.
        """
        pointers = np.array([array.ctypes.data for array in arrays], np.uint64)
        strides = np.array([array.strides[:2] for array in arrays], np.int64)
        addresses = (None if of is None else of.ctypes.data for of in (pointers, strides, *tables))
        self.call(*arrays[0].shape, *addresses)


def compiled(text: str, n_tables: int) -> Function:
    """Return the function whose source a text is, with so many tables (`source`)."""
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
    addresses = [ctypes.c_void_p] * (2 + n_tables)
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3, *addresses)
    return Function(kind(engine.get_function_address("run")), engine)


def source(
    loops: Sequence[Loop],
    n_arrays: int,
    n_numbers: int,
    tables: Sequence[str],
    step: Sequence[str] = (),
) -> str:
    """Return the source of the function that runs loops, one of each of `LANES`.

    It takes arrays, and as tables the numbers of each step (`%c0` and so on) and those that are
    named, to write to. `step` is done at the beginning of each step. There `%g` is the group, `%t`
    the step, and `%group0`, `%step0` and so on point to the group of an array and to its step.

    What a step leaves of a group is still in the cache when the next one takes it.
    """
    pointers = ", ".join(f"ptr %{name}" for name in ("arrays", "strides", "c", *tables))
    arrays = range(n_arrays)
    head = [
        f"define void @run(i64 %n_steps, i64 %n_groups, i64 %n, {pointers}) {{",
        "entry:",
        *(line for index in arrays for line in _table(index)),
        f"  %n{LANES[0]} = and i64 %n, -{LANES[0]}",
        "  %n1 = add i64 %n, 0",
        "  %no_step = icmp eq i64 %n_steps, 0",
        "  %no_group = icmp eq i64 %n_groups, 0",
        "  %nothing = or i1 %no_step, %no_group",
        "  br i1 %nothing, label %end, label %group",
        "group:",
        "  %g = phi i64 [0, %entry], [%g_next, %group_end]",
        *(line for index in arrays for line in _at("group", "g", "p", index)),
        "  br label %step",
        "step:",
        "  %t = phi i64 [0, %group], [%t_next, %step_end]",
        *(line for index in arrays for line in _at("step", "t", "group", index)),
        *step,
        *_numbers(loops[-1].code.float, n_numbers),
    ]
    body = [line for loop in loops for line in _loop(loop)]
    declared = {line for loop in loops for line in loop.declarations()}
    return "\n".join([*head, *body, *_TAIL, *sorted(declared)])


_TAIL = (
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
)
"""What follows what is done at the end of each step."""


def _table(index: int) -> list[str]:
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


def _at(axis: str, number: str, start: str, index: int) -> list[str]:
    """Return what makes the pointer to a group of an array, or to a step of it."""
    return [
        f"  %{axis}_o{index} = mul i64 %{number}, %{axis}_s{index}",
        f"  %{axis}{index} = getelementptr i8, ptr %{start}{index}, i64 %{axis}_o{index}",
    ]


def _numbers(kind: str, n_numbers: int) -> list[str]:
    """Return what reads the numbers of a step, of a type."""
    lines = [f"  %c_first = mul i64 %t, {n_numbers}"]
    for index in range(n_numbers):
        lines += [
            f"  %c_at{index} = add i64 %c_first, {index}",
            f"  %c_p{index} = getelementptr {kind}, ptr %c, i64 %c_at{index}",
            f"  %c{index} = load {kind}, ptr %c_p{index}",
        ]
    return lines


def _loop(loop: Loop) -> list[str]:
    """Return the blocks of a loop, from the one that goes before it to the one after it."""
    code, lanes = loop.code, loop.code.lanes
    is_last = lanes == LANES[-1]
    start, after = f"%n{LANES[0]}" if is_last else "0", "step_end" if is_last else f"after{lanes}"
    before = loop.body()
    body = code.taken()
    return [
        *before,
        f"  %any{lanes} = icmp ult i64 {start}, %n{lanes}",
        f"  br i1 %any{lanes}, label %loop{lanes}, label %{after}",
        f"loop{lanes}:",
        f"  %i{lanes} = phi i64 [{start}, %{_begin(code)}], [%i{lanes}_next, %loop{lanes}]",
        *loop.carried(),
        *body,
        f"  %i{lanes}_next = add i64 %i{lanes}, {lanes}",
        f"  %more{lanes} = icmp ult i64 %i{lanes}_next, %n{lanes}",
        f"  br i1 %more{lanes}, label %loop{lanes}, label %{after}",
        f"{after}:",
        *loop.ended(),
    ]


def phi(code: Code, name: str, kind: str, first: str, suffix: str) -> str:
    """Return what a loop has computed so far under a name, and what it begins with."""
    loop = f"%loop{code.lanes}"
    return f"  %{name}{suffix} = phi {kind} [{first}, %{_begin(code)}], [%{name}_next, {loop}]"


def _begin(code: Code) -> str:
    """Return the block that goes before the loop."""
    return "step" if code.lanes == LANES[0] else f"after{LANES[0]}"


def pointer(code: Code, native: str, row: str) -> str:
    """Note the pointer to some elements of a row of a dtype."""
    return code.emit(f"getelementptr {Code(native, 1).stored}, ptr {row}, i64 %i{code.lanes}")


def declaration(code: Code, name: str, n_operands: int = 1) -> str:
    """Return that of a function of LLVM on numbers."""
    scalar = "f64" if code.native == "float64" else "f32"
    suffix = scalar if code.lanes == 1 else f"v{code.lanes}{scalar}"
    operands = ", ".join([code.float] * n_operands)
    return f"declare {code.float} @llvm.{name}.{suffix}({operands})"
