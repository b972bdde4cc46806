"""Portable programs against torch's own, bit for bit."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.optimizers import Kind, kinds, steps
from tests.support.portable import program
from thimble_zarr.bits import patterns
from thimble_zarr.errors import UnsupportedFormatError
from thimble_zarr.optim.programs.arithmetic import arithmetic_of
from thimble_zarr.optim.programs.registry import program_named, program_of

SHAPE = (32, 64)
"""Whole vectors, so that torch takes no element alone (`optim.lanes`)."""


def n_different(kind: Kind, n_steps: int) -> dict[str, float]:
    """Share of the elements that torch gets otherwise."""
    of, counts, n_elements = program(kind), {}, 0
    for step in steps(kind, n_steps, SHAPE):
        got = of.step(step.before, step.before["grad"], step.scalars)
        assert {*got} == {*step.after}
        n_elements += step.after["W"].size
        for name, bits in step.after.items():
            assert got[name].dtype == bits.dtype
            counts[name] = counts.get(name, 0) + int((patterns(got[name]) != patterns(bits)).sum())
    return {name: count / n_elements for name, count in counts.items()}


@pytest.mark.parametrize("kind", kinds())
def test_a_program_gives_torchs_bits(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind.native in program(kind).kernel.apart_in:
        # Their only cause: MKL's square roots, of which some are rounded otherwise, and how many
        # depends on the processor. With torch's own there must be no difference.
        arithmetic = replace(arithmetic_of(kind.native), sqrt=sqrt_of_torch)
        monkeypatch.setattr(
            "thimble_zarr.optim.programs.kernel.arithmetic_of", lambda _: arithmetic
        )
        monkeypatch.setattr("thimble_zarr.optim.programs.program.is_available", lambda: False)
    assert n_different(kind, 4) == dict.fromkeys(program(kind).variables, 0)


def sqrt_of_torch(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.array(values)).sqrt().numpy()


def test_a_learning_rate_that_decays_is_fused_as_torchs_compiler_does() -> None:
    kind = Kind("Adagrad", "float64", {"fused": True, "lr_decay": 0.1})
    assert n_different(kind, 12) == {"W": 0, "sum": 0}


@pytest.mark.parametrize("kind", kinds(natives=("bfloat16", "float64"))[::3])
def test_many_steps_are_the_same_as_one_after_the_other(kind: Kind) -> None:
    of, rows = program(kind), list(steps(kind, 5, SHAPE))
    grads = np.stack([step.before["grad"] for step in rows])
    scalars = {name: np.array([row.scalars[name] for row in rows]) for name in rows[0].scalars}
    own = {name: np.stack([row.before[name] for row in rows]) for name in of.variables}
    out = {name: np.zeros((5, 2, *SHAPE), bits.dtype)[:, 1] for name, bits in own.items()}
    taken = np.array([True, True, False, True, True])
    predicted = of.predict(own, grads, scalars, taken=taken, out=out)
    scanned = of.steps(rows[0].before, grads, scalars, taken=taken)
    held = {name: rows[0].before[name] for name in of.variables}
    for index, row in enumerate(rows):
        alone = of.step(row.before, grads[index], row.scalars) if taken[index] else row.before
        held = of.step(held, grads[index], row.scalars) if taken[index] else held
        for name in of.variables:
            assert (patterns(predicted[name][index]) == patterns(alone[name])).all()
            assert (patterns(scanned[name][index]) == patterns(held[name])).all()
            assert predicted[name] is out[name]


def test_a_program_has_a_name_and_a_version() -> None:
    kind = Kind("AdamW", "bfloat16", {"foreach": False})
    spec = next(steps(kind, 1)).spec
    dtypes = dict.fromkeys(spec.variables, "bfloat16")
    assert program_named("adamw-single/1", spec, dtypes).name == "adamw-single/1"
    for other in ("adamw-single/2", "adam-single/1", "adamw-fused/1"):
        with pytest.raises(UnsupportedFormatError, match=other):
            program_named(other, spec, dtypes)
    assert program_of(spec, dtypes | {"exp_avg": "float32"}) is None
    assert program_of(spec, dict.fromkeys(dtypes, "float8_e4m3fn")) is None


def test_a_program_needs_no_torch() -> None:
    code = (
        "import sys, thimble_zarr.optim.programs.registry; "
        "sys.exit(any(name.split('.')[0] in ('torch', 'numba') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
