"""Machine code has the bits of NumPy, also of numbers that no run should have."""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from tests.support.optimizers import Kind, Step, kinds, steps
from tests.support.portable import N_ELEMENTS, N_STEPS, drawn, needs_compiler, program
from thimble_zarr.bits import patterns
from thimble_zarr.optim.base import COUNT
from thimble_zarr.optim.programs.arithmetic import fma32, fma64
from thimble_zarr.optim.programs.compiled import CompiledEngine
from thimble_zarr.optim.programs.kernel import NumpyEngine


def rows(step: Step, native: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Rows of drawn bits, and scalars that take every branch."""
    generator = np.random.default_rng(7)
    arrays = {name: drawn(native, generator) for name in step.before}
    scalars = {name: np.full(N_STEPS, value) for name, value in step.scalars.items()}
    scalars[COUNT] = np.arange(1.0, N_STEPS + 1)
    if "weight_decay" in scalars:
        scalars["weight_decay"][::2] = 0.0
    if "beta1" in scalars:
        scalars["beta1"][1] = 0.3
    if "momentum" in scalars:
        scalars["momentum"][3] = 0.0
    return arrays, scalars


@needs_compiler
@pytest.mark.parametrize("kind", kinds())
def test_machine_code_has_the_bits_of_numpy(kind: Kind) -> None:
    compiled = program(kind)
    plain = replace(compiled, compiled=False)
    assert isinstance(compiled.engine, CompiledEngine)
    assert isinstance(plain.engine, NumpyEngine)
    arrays, scalars = rows(next(steps(kind, 1)), kind.native)
    grads = arrays.pop("grad")
    for one, other in (
        (plain.predict(arrays, grads, scalars), compiled.predict(arrays, grads, scalars)),
        (
            plain.steps({name: of[0] for name, of in arrays.items()}, grads, scalars),
            compiled.steps({name: of[0] for name, of in arrays.items()}, grads, scalars),
        ),
    ):
        for name, bits in one.items():
            assert (patterns(bits) == patterns(other[name])).all(), name


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize("kind", kinds(natives=("bfloat16", "float64"))[::5])
def test_a_flipped_bit_is_seen_at_its_step_and_variable(kind: Kind, *, compiled: bool) -> None:
    of = replace(program(kind), compiled=compiled)
    arrays, scalars = rows(next(steps(kind, 1)), kind.native)
    grads = arrays.pop("grad")
    taken = np.arange(N_STEPS) != 4
    after = of.predict(arrays, grads, scalars, taken=taken)
    found = of.differs(arrays, grads, scalars, after, taken=taken)
    assert not any(differs.any() for differs in found.values())
    for name, step, element in (("W", 2, 3), (of.variables[-1], 4, N_ELEMENTS - 1)):
        patterns(after[name])[step, element] ^= 1
        found = of.differs(arrays, grads, scalars, after, taken=taken)
        seen = {(of, int(at)) for of, differs in found.items() for at in np.flatnonzero(differs)}
        assert seen == {(name, step)}
        patterns(after[name])[step, element] ^= 1


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize("kind", kinds()[::9])
def test_rows_with_the_steps_of_a_token_side_by_side(kind: Kind, *, compiled: bool) -> None:
    """They are as in a chunk, and the bits those of rows without gaps, also where none is taken."""
    of = replace(program(kind), compiled=compiled)
    arrays, scalars = rows(next(steps(kind, 1)), kind.native)
    arrays = {name: bits[:, :330].reshape(N_STEPS, 11, 30) for name, bits in arrays.items()}
    in_chunks = {name: by_token(bits) for name, bits in arrays.items()}
    grads, grads_in_chunks = arrays.pop("grad"), in_chunks.pop("grad")
    taken = np.arange(N_STEPS) != 4
    want = of.predict(arrays, grads, scalars, taken=taken)
    out = {name: by_token(np.zeros_like(bits)) for name, bits in want.items()}
    of.predict(in_chunks, grads_in_chunks, scalars, taken=taken, out=out)
    differs = of.differs(in_chunks, grads_in_chunks, scalars, want, taken=taken)
    assert not any(found.any() for found in differs.values())
    for name, bits in want.items():
        assert (patterns(bits) == patterns(out[name])).all(), name
        patterns(out[name])[4, 10, 29] ^= 1
        differs = of.differs(in_chunks, grads_in_chunks, scalars, out, taken=taken)
        assert {one for one, found in differs.items() if found.any()} == {name}
        assert np.flatnonzero(differs[name]).tolist() == [4]
        patterns(out[name])[4, 10, 29] ^= 1
    # The row after a step may be the one before the next.
    chain = {name: by_token(np.repeat(bits[:1], N_STEPS + 1, 0)) for name, bits in arrays.items()}
    before, after = ({name: bits[at] for name, bits in chain.items()} for at in (_UP, _DOWN))
    of.predict(before, grads_in_chunks, scalars, taken=taken, out=after)
    first = {name: bits[0] for name, bits in arrays.items()}
    for name, bits in of.steps(first, grads, scalars, taken=taken).items():
        assert (patterns(bits) == patterns(after[name])).all(), name


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize("kind", kinds(natives=("bfloat16", "float32", "float64"))[::7])
def test_bits_that_a_row_has_otherwise_are_turned_before_the_next_step(
    kind: Kind, *, compiled: bool
) -> None:
    of = replace(program(kind), compiled=compiled)
    arrays, scalars = rows(next(steps(kind, 1)), kind.native)
    grads = arrays.pop("grad")
    taken = np.arange(N_STEPS) != 4
    turned = np.zeros(grads.shape, patterns(grads).dtype)
    turned[0, 5] = turned[2, N_ELEMENTS - 1] = turned[4, 0] = 5
    chain = {name: np.repeat(bits[:1], N_STEPS + 1, 0) for name, bits in arrays.items()}
    before, after = ({name: bits[at] for name, bits in chain.items()} for at in (_UP, _DOWN))
    of.predict(before, grads, scalars, taken=taken, out=after, left={"W": turned})
    row = {name: bits[:1] for name, bits in arrays.items()}
    for step in range(N_STEPS):
        at = slice(step, step + 1)
        numbers = {name: values[at] for name, values in scalars.items()}
        row = of.predict(row, grads[at], numbers, taken=taken[at])
        patterns(row["W"])[...] ^= turned[at]
        for name, bits in row.items():
            assert (patterns(bits[0]) == patterns(after[name][step])).all(), (name, step)


_UP, _DOWN = slice(0, N_STEPS), slice(1, N_STEPS + 1)


def by_token(bits: np.ndarray) -> np.ndarray:
    """The same, with all steps of a token in one piece of memory."""
    return np.ascontiguousarray(bits.transpose(1, 0, 2)).transpose(1, 0, 2)


def wrong(
    fma: Callable[..., np.ndarray], dtype: type[np.floating], *factors: np.ndarray
) -> list[int]:
    """Where a multiply-add is not the number next to the exact one."""
    found = []
    got = fma(*factors).tolist()
    terms = zip(*(of.tolist() for of in factors), got, strict=True)
    for index, (a, b, c, result) in enumerate(terms):
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        ends = [float(np.nextafter(dtype(result), dtype(way))) for way in (-np.inf, np.inf)]
        if any(abs(exact - Fraction(result)) > abs(exact - Fraction(end)) for end in ends):
            found.append(index)
    return found


def factors(dtype: type[np.floating]) -> list[np.ndarray]:
    """Sums of all kinds, also of numbers that cancel, and all but halfway, and that underflow."""
    generator, n, digits = np.random.default_rng(3), 4000, np.finfo(dtype).nmant + 1
    a, b = (generator.integers(2 ** (digits - 1), 2**digits, n) * 2.0**-digits for _ in "ab")
    c = generator.choice([1.0, -1.0], n) * 2.0 ** generator.integers(-2 * digits, digits + 2, n)
    c[::3] = -(a * b)[::3]
    # Their product is 2 ** 24 + 1, halfway between two numbers of float32.
    a[1::7], b[1::7] = 24929.0, 673.0
    c[1::7] = np.where(c[1::7] > 0, 1.0, -1.0) * 2.0**-40
    scale = np.where(np.arange(n) % 5 == 0, 2.0 * float(np.finfo(dtype).tiny), 1.0)
    return [of.astype(dtype) for of in (a * scale, b, c * scale)]


def test_a_multiply_add_is_rounded_once() -> None:
    assert wrong(fma32, np.float32, *factors(np.float32)) == []
    assert wrong(fma64, np.float64, *factors(np.float64)) == []


def test_others_are_not() -> None:
    def in_float64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)

    assert len(wrong(in_float64, np.float32, *factors(np.float32))) > 100
    assert len(wrong(lambda a, b, c: a * b + c, np.float64, *factors(np.float64))) > 100
