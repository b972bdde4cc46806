"""Portable programs of the optimizers in `optimizers`, and bits to run them on."""

import numpy as np
import pytest

from tests.support.optimizers import Kind, steps
from thimble_zarr.bits import patterns, storage_dtype
from thimble_zarr.optim.programs.compiled import is_available
from thimble_zarr.optim.programs.program import PortableProgram
from thimble_zarr.optim.programs.registry import program_of

N_STEPS, N_ELEMENTS = 6, 331
"""The last eleven do not fill a vector, and are taken one at a time."""

UNUSUAL = (0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1e-38, 6e-8, 1e38, 3e4, 1.0, -1.0)

needs_compiler = pytest.mark.skipif(not is_available(), reason="kernels cannot be compiled here")


def drawn(native: str, generator: np.random.Generator) -> np.ndarray:
    """Bits of all kinds: of numbers of all sizes, of any pattern at all, of unusual numbers."""
    dtype, shape = storage_dtype(native), (N_STEPS, N_ELEMENTS)
    unsigned = f"u{dtype.itemsize}"
    bits = generator.integers(0, 2 ** (8 * dtype.itemsize) - 1, shape, unsigned, endpoint=True)
    values = generator.standard_normal(shape) * 10 ** generator.uniform(-12, 3, shape)
    values[generator.random(shape) < 0.1] = generator.choice(UNUSUAL)
    with np.errstate(over="ignore"):
        if native == "bfloat16":
            ordinary = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        else:
            ordinary = values.astype(dtype)
    return np.where(generator.random(shape) < 0.2, bits, patterns(ordinary)).view(dtype)


def program(kind: Kind) -> PortableProgram:
    step = next(steps(kind, 1))
    found = program_of(step.spec, dict.fromkeys(step.before, kind.native))
    if found is None:
        pytest.skip("it has no program")
    assert isinstance(found, PortableProgram)
    return found
