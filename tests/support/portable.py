"""Portable programs of the optimizers in `optimizers`."""

import pytest

from tests.support.optimizers import Kind, steps
from thimble_zarr.optim.programs.program import PortableProgram
from thimble_zarr.optim.programs.registry import program_of


def program(kind: Kind) -> PortableProgram:
    step = next(steps(kind, 1))
    found = program_of(step.spec, dict.fromkeys(step.before, kind.native))
    if found is None:
        pytest.skip("it has no program")
    assert isinstance(found, PortableProgram)
    return found
