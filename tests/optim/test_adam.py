"""What the states of Adam stand for."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.runs import record
from thimble_zarr import Recorder, open_dataset
from thimble_zarr.optim.specs.adam import Adam


@pytest.fixture(params=[False, True], ids=["plain", "amsgrad"])
def adam(request: pytest.FixtureRequest) -> Adam:
    return Adam(
        name="AdamW",
        implementation="single",
        decoupled_weight_decay=True,
        amsgrad=request.param,
    )


def test_of_a_constant_gradient_the_estimates_are_it_and_its_square(adam: Adam) -> None:
    gradient = np.array([0.3, -1e-3, 0.0])
    first, second = np.zeros(3), np.zeros(3)
    m_hat, v_hat = adam.estimates
    assert (m_hat.is_square, v_hat.is_square) == (False, True)
    for count in range(1, 50):
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient**2
        arrays = {m_hat.inputs[0]: first, v_hat.inputs[0]: second}
        scalars = {"beta1": 0.9, "beta2": 0.99, "optimizer_step": count}
        np.testing.assert_allclose(m_hat.compute(arrays, scalars), gradient, rtol=1e-13)
        np.testing.assert_allclose(v_hat.compute(arrays, scalars), gradient**2, rtol=1e-13)


def test_every_run_s_estimates_are_among_those_there_can_be(adam: Adam) -> None:
    assert [of.name for of in adam.estimates] == [of.name for of in Adam.ESTIMATES]
    assert {of.long_name for of in adam.estimates} == {of.long_name for of in Adam.ESTIMATES}


@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_step_is_made_of_the_estimates(tmp_path: Path, amsgrad: bool) -> None:
    path = tmp_path / "run.zarr"
    record(path, amsgrad=amsgrad, betas=(0.9, 0.5), dtype=torch.float64)
    ds = open_dataset(path)
    for estimate in (ds.m_hat, ds.v_hat):
        assert np.isnan(estimate[0]).all()
    ds = ds.isel(step=slice(1, None))
    update = -ds.learning_rate * ds.m_hat / (ds.v_hat**0.5 + ds.eps)
    np.testing.assert_allclose(update, ds.adam_update, rtol=1e-6, atol=1e-12)
    second = ds.max_exp_avg_sq if amsgrad else ds.exp_avg_sq
    expected = second.astype(float) / (1 - 0.5 ** ds.step.astype(float))
    np.testing.assert_allclose(ds.v_hat, expected, rtol=2e-7)


def test_sgd_estimates_nothing(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.SGD([weight], momentum=0.9)
    with Recorder(tmp_path / "run.zarr", optimizer, parameter=weight):
        weight.grad = torch.ones(3, 2)
        optimizer.step()
    ds = open_dataset(tmp_path / "run.zarr")
    assert "momentum_buffer" in ds
    assert not {of.name for of in Adam.ESTIMATES} & {*ds.data_vars}


def test_a_run_that_goes_on_has_estimates_from_its_first_row(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.AdamW([weight])

    def step() -> None:
        weight.grad = torch.full((3, 2), 0.25)
        optimizer.step()

    step()
    with Recorder(tmp_path / "run.zarr", optimizer, parameter=weight):
        step()
    m_hat = open_dataset(tmp_path / "run.zarr").m_hat
    np.testing.assert_allclose(m_hat[1], 0.25, rtol=1e-6)


@pytest.mark.parametrize("implementation", ["single", "fused"])
def test_what_torch_could_not_compute_is_nan(implementation: str) -> None:
    adam = Adam(name="Adam", implementation=implementation, decoupled_weight_decay=False)
    beyond_1 = {"beta1": 0.9, "beta2": 1.001, "optimizer_step": 3.0}
    derived = adam.derived(beyond_1)
    assert derived["bias_correction1"] == pytest.approx(1 - 0.9**3)
    assert np.isnan(derived["bias_correction2_sqrt"])
