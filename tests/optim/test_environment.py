"""Programs give the same bits in a thread that flushes denormals to zero."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.runs import Loop
from thimble_zarr import Recorder
from thimble_zarr.errors import StoreError
from thimble_zarr.optim.programs import environment
from thimble_zarr.optim.programs.program import PortableProgram
from thimble_zarr.optim.programs.registry import program_of
from thimble_zarr.optim.specs.adam import Adam
from thimble_zarr.store.reader import StoreReader

ADAMW = Adam(name="AdamW", implementation="fused", decoupled_weight_decay=True)
SCALARS = {
    **{"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
    **{"weight_decay": 1e-2, "optimizer_step": 3.0},
}


@contextmanager
def flushing() -> Iterator[None]:
    """Let this thread take numbers below the normal ones for 0."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def step_of(native: str, *, compiled: bool) -> dict[str, bytes]:
    """Take a step whose second moment is below the normal numbers."""
    found = program_of(ADAMW, dict.fromkeys(ADAMW.variables, native))
    assert isinstance(found, PortableProgram)
    dtype = np.dtype(native)
    grad = np.full(20, np.sqrt(np.finfo(dtype).tiny), dtype)
    before = {name: np.zeros(20, dtype) for name in found.variables}
    after = replace(found, compiled=compiled).step(before, grad, SCALARS)
    return {name: bits.tobytes() for name, bits in after.items()}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("native", ["float32", "float64"])
def test_a_step_has_the_same_bits(native: str, compiled: bool) -> None:
    expected = step_of(native, compiled=compiled)
    assert any(expected["exp_avg_sq"])
    with flushing():
        assert step_of(native, compiled=compiled) == expected
        assert sys.float_info.min * torch.tensor(0.5, dtype=torch.float64) == 0  # it still does


def test_what_a_run_that_flushes_predicted_is_read_by_one_that_does_not(tmp_path: Path) -> None:
    path, seen = tmp_path / "run.zarr", []
    with flushing():
        loop = Loop(foreach=False)
        options = {"parameter": loop.weight, "coding": "predicted", "memory_bytes": 20_000}
        with Recorder(path, loop.optimizer, **options):
            for _ in range(6):
                loop.backward()
                loop.weight.grad *= 1e-16
                loop.optimizer.step()
                seen.append(loop.optimizer.state[loop.weight]["exp_avg_sq"].clone())
    reader = StoreReader.open(path)
    bits = reader.read("exp_avg_sq", (1, reader.n_rows))
    np.testing.assert_array_equal(bits, torch.stack(seen).view(torch.uint16).numpy())


def test_a_thread_that_cannot_be_changed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_library", lambda: None)
    with flushing(), pytest.raises(StoreError, match=r"call torch\.set_flush_denormal\(False\)"):
        step_of("float32", compiled=True)
