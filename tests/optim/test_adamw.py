"""The formula against torch.optim, and the bound on what rounding may add to it."""

import numpy as np
import pytest
import torch

from tests.support.runs import Loop
from thimble_zarr.bits import unit_roundoff
from thimble_zarr.optim.base import COUNT, Precision
from thimble_zarr.optim.registry import REGISTRY


def as_float64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy().copy()


class Steps:
    """Runs a loop; for each step what moved, and what the formula says."""

    def __init__(self, dtype: torch.dtype, **options: object) -> None:
        self.loop = Loop(dtype=dtype, n_tokens=101, n_dims=7, n_live=60, **options)
        self.native = str(dtype).removeprefix("torch.")

    def __call__(self, n_steps: int):
        for step in range(1, n_steps + 1):
            before = as_float64(self.loop.weight)
            self.loop.step()
            self.loop.optimizer.zero_grad()
            yield step, before, as_float64(self.loop.weight)

    def predict(self, step: int, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        group = self.loop.optimizer.param_groups[0]
        state = self.loop.optimizer.state[self.loop.weight]
        spec = REGISTRY["AdamW"].from_group(group, type(self.loop.optimizer))
        arrays = {name: as_float64(state[name]) for name in spec.update_inputs}
        scalars = self.scalars(step)
        update = spec.update(arrays, spec.coefficients(scalars))
        return update, spec.decay_factor(scalars) * before

    def scalars(self, step: int) -> dict[str, np.ndarray]:
        group = self.loop.optimizer.param_groups[0]
        scalars = {of.name: np.array(float(of.read(group))) for of in REGISTRY["AdamW"].SCALARS}
        return scalars | {COUNT: np.array(step)}

    def bound(self, step: int, update: np.ndarray, before: np.ndarray, after: np.ndarray):
        group = self.loop.optimizer.param_groups[0]
        spec = REGISTRY["AdamW"].from_group(group, type(self.loop.optimizer))
        precision = Precision.of(
            self.native, scalars=spec.scalar_dtype, ours=unit_roundoff("float64")
        )
        rounding = spec.rounding(self.scalars(step), precision)
        return rounding.bound(update, after, before)


OPTIONS = [{"weight_decay": 0.0}, {"weight_decay": 0.3}, {"weight_decay": 0.3, "maximize": True}]


@pytest.mark.parametrize("options", OPTIONS)
def test_in_float64_the_formula_is_torchs_step(options: dict[str, float]) -> None:
    steps = Steps(torch.float64, **options)
    for step, before, after in steps(20):
        update, decay = steps.predict(step, before)
        np.testing.assert_allclose(after - before, update + decay, rtol=1e-10, atol=1e-15)


def test_decay_has_the_learning_rate_in_it() -> None:
    """The original notebook left it out, which weight_decay = 0 hid."""
    steps = Steps(torch.float64, weight_decay=0.3)
    for step, before, after in steps(3):
        update, _ = steps.predict(step, before)
        notebook = update - 0.3 * before
        assert not np.allclose(after - before, notebook, rtol=1e-2, atol=0)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "implementation",
    [{}, {"foreach": True}, {"fused": True}, {"lr": torch.tensor(1e-2)}],
    ids=["single", "foreach", "fused", "tensor_lr"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rounding_stays_within_its_bound(
    dtype: torch.dtype, implementation: dict[str, bool], options: dict[str, float]
) -> None:
    steps = Steps(dtype, **implementation, **options)
    for step, before, after in steps(60):
        update, decay = steps.predict(step, before)
        residual = np.abs(after - before - update - decay)
        assert (residual <= steps.bound(step, update, before, after)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_bound_is_not_so_wide_that_it_hides_a_wrong_learning_rate(dtype: torch.dtype) -> None:
    steps = Steps(dtype, weight_decay=0.0)
    for step, before, after in steps(3):
        update, _ = steps.predict(step, before)
        residual = np.abs(after - before - 1.5 * update)
        assert (residual > steps.bound(step, 1.5 * update, before, after)).mean() > 0.9
