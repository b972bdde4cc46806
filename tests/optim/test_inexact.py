"""Bounds of the running error analysis, against the worst that rounding can do."""

from pathlib import Path

import numpy as np
import torch

from tests.support.optimizers import Kind, Step, steps
from thimble_zarr import Recorder, check
from thimble_zarr.optim.formula import Precision
from thimble_zarr.optim.inexact import RUNNING, Inexact

BFLOAT16 = Precision.of("bfloat16", scalars="float32")


def test_a_root_of_less_than_its_error_is_bounded() -> None:
    p = BFLOAT16
    for value, error in ((0.0, 1.0), (0.1, 1.0), (0.0, p.least), (p.least, p.least), (3.0, 1.0)):
        number = Inexact(np.array(value), np.array(error), p.unit_roundoff, p.least, p.largest)
        root = RUNNING.sqrt(number)
        for other in (max(value - error, 0.0), value + error):
            assert abs(np.sqrt(other) - root.value) <= root.error


def test_roundings_of_what_cancelled_are_bounded() -> None:
    def bfloat16(value: float) -> float:
        return float(torch.tensor(value, dtype=torch.float64).to(torch.bfloat16))

    generator = np.random.default_rng(0)
    worst = 0.0
    for _ in range(300):  # nothing is left of the numbers, and of the others -1, by rounding alone
        number = Inexact.exact(256.0, BFLOAT16) + 1.0 - 257.0
        other = bfloat16(bfloat16(256.0 + 1.0) - 257.0)
        for factor in map(bfloat16, generator.uniform(0.5, 1, size=12)):
            number, other = number * factor, bfloat16(other * factor)
        worst = max(worst, abs(other - float(number.value)) / float(number.error))
    assert 0.9 < worst <= 1


def test_a_root_that_may_be_0_is_not_taken_for_negative() -> None:
    p = Precision.of("float16", scalars="float32")
    number = Inexact(np.array(0.0), np.array(3 * p.least), p.unit_roundoff, p.least, p.largest)
    divisor = RUNNING.sqrt(number) / 0.7 + 1e-4
    quotient = Inexact.exact(1e-3, p) / divisor
    for other in (0.0, 3 * p.least):
        apart = abs(1e-3 / (np.sqrt(other) / 0.7 + 1e-4) - quotient.value)
        assert apart <= quotient.error < 100
    with np.errstate(divide="ignore"):
        unknown = Inexact.exact(1e-3, p) / (RUNNING.sqrt(number) - 1e-4)
    assert not np.isfinite(unknown.error)


def bounds_of(step: Step) -> dict[str, np.ndarray]:
    before, precision = step.numbers(step.before), Precision.of(step.native, scalars="float32")
    return step.spec.bounds(before, before.pop("grad"), step.arrays, precision)


def test_every_step_of_adam_is_bounded_where_moments_underflow() -> None:
    for step in steps(Kind("Adam", "float16", {"foreach": False}), 2):
        assert (step.numbers(step.after)["exp_avg_sq"] == 0).mean() > 0.1
        assert all(np.isfinite(error).all() for error in bounds_of(step).values())


def test_steps_of_radam_that_are_not_rectified_are_bounded() -> None:
    for step in steps(Kind("RAdam", "float32", {"foreach": True}), 7):
        sizes = np.abs(step.numbers(step.before)["W"]) + np.abs(step.numbers(step.after)["W"])
        assert (bounds_of(step)["W"] < 1e-3 * sizes + 1e-6).mean() > 0.9


def test_an_update_of_radam_is_lost_where_its_foreach_program_overflows() -> None:
    """It divides a denominator of 3 by a step size of 4e-5, which float16 cannot hold."""
    n_lost = 0
    for step in steps(Kind("RAdam", "float16", {"foreach": True}), 9, (250, 64)):
        spec, scalars = step.spec, step.arrays
        x = step.numbers({**step.before, **step.after})
        before, precision = (
            step.numbers(step.before)["W"],
            Precision.of("float16", scalars="float64"),
        )
        inputs = {name: x[name] for name in spec.update_inputs}
        update = spec.update(inputs, spec.coefficients(scalars))
        rounding = spec.rounding(scalars, precision, inputs)
        bound = rounding.bound(update, x["W"], before)
        assert (abs(x["W"] - before - update) <= bound).all()
        assert np.isfinite(bound).all()
        may_be_lost = np.broadcast_to(rounding.update, update.shape) > 0
        assert may_be_lost.mean() < 0.1  # with some margin
        n_lost += (abs(x["W"] - before - update) > bound - abs(update)).sum()
    assert n_lost > 100


def test_a_sound_run_of_radam_agrees_with_its_formula_in_float16(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    weight = torch.nn.Parameter((torch.randn(250, 64, generator=generator) * 0.02).half())
    optimizer = torch.optim.RAdam([weight], lr=1e-2, eps=1e-4, foreach=True)
    with Recorder(tmp_path / "run.zarr", optimizer, parameter=weight):
        for _ in range(9):
            weight.grad = (100 * torch.randn(250, 64, generator=generator)).half()
            optimizer.step()
    result = check(tmp_path / "run.zarr", replay=False)
    assert result.holds, result.verdict
