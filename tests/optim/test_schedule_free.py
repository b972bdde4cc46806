"""Schedule-Free AdamW against its own class, over dtypes and flags, and with planted faults."""

from pathlib import Path

import pytest
import torch
import zarr
from schedulefree import AdamWScheduleFree

from tests.support.optimizers import DTYPES
from thimble_zarr import Recorder, check, open_dataset

SHAPE = (11, 5)

FAR = 3.0
"""A learning rate that takes z so far that a swap rounds some of the weights otherwise."""


def record(
    path: Path, native: str, *, swaps: tuple[int, ...] = (), touched: int = 0, **options: object
) -> Path:
    generator, (dtype, eps) = torch.Generator().manual_seed(7), DTYPES[native]
    weight = torch.nn.Parameter(torch.randn(SHAPE, generator=generator).to(dtype))
    optimizer = AdamWScheduleFree([weight], **{"lr": 0.05, "eps": eps, **options})
    optimizer.train()
    with Recorder(path, optimizer, parameter=weight):
        for step in range(1, 14):
            if step in swaps:
                optimizer.eval()
                optimizer.train()
            if step == touched:
                weight.data[3] += 0.25
            weight.grad = torch.randn(SHAPE, generator=generator).to(dtype)
            optimizer.step()
    return path


@pytest.mark.parametrize("native", DTYPES)
@pytest.mark.parametrize("foreach", [False, True])
def test_it_is_replayed_to_the_bit(native: str, foreach: bool, tmp_path: Path) -> None:
    for index, options in enumerate(({}, {"weight_decay": 0.1, "warmup_steps": 4, "r": 0.5})):
        path = record(tmp_path / f"{index}.zarr", native, foreach=foreach, **options)
        by_torch = check(path, replay="torch", workers=1).verdict
        assert by_torch.startswith("HOLDS to the bit: replayed by torch"), by_torch
        result = check(path, workers=1)
        program = f"schedulefree-{'foreach' if foreach else 'single'}/1"
        if native.endswith("16"):
            assert f"replayed by {program}" in result.verdict
        assert "AdamWScheduleFree's formula agrees" in result.verdict
    if native == "float64":
        ds = open_dataset(path)
        assert float(abs(ds.residual[1:]).max()) < 1e-7


def test_the_recorded_gradient_is_the_one_that_was_consumed(tmp_path: Path) -> None:
    ds = open_dataset(record(tmp_path / "run.zarr", "float32"))
    generator = torch.Generator().manual_seed(7)
    torch.randn(SHAPE, generator=generator)
    assert (ds.grad[1].values == torch.randn(SHAPE, generator=generator).numpy()).all()
    assert ds.k.values.tolist()[1:] == list(range(1, 14))


@pytest.mark.parametrize("name", ["weight_sum", "k", "lr_max", "beta1"])
def test_a_wrong_number_is_found(name: str, tmp_path: Path) -> None:
    path = record(tmp_path / "run.zarr", "float32", warmup_steps=4)
    zarr.open_group(path)[name][2] *= 3
    assert not check(path, workers=1).holds


@pytest.mark.parametrize("native", ["bfloat16", "float32"])
@pytest.mark.parametrize("foreach", [False, True])
def test_a_swap_between_steps_is_known_and_no_fault(
    native: str, foreach: bool, tmp_path: Path
) -> None:
    swaps = (4, 5, 9)
    path = record(tmp_path / "run.zarr", native, swaps=swaps, lr=FAR, foreach=foreach)
    result = check(path, workers=1)
    assert result.holds
    (finding,) = result.findings
    assert finding.code == "schedule-free-swap"
    assert finding.step in swaps
    assert 1 <= finding.n_steps <= len(swaps)
    assert f"(schedule-free-swap), first at step {finding.step}" in result.verdict


def test_a_swap_hides_no_fault(tmp_path: Path) -> None:
    """Neither at another step nor at its own."""
    for touched in (4, 7):
        path = record(
            tmp_path / f"{touched}.zarr", "float32", swaps=(4, 9), lr=FAR, touched=touched
        )
        result = check(path, workers=1)
        assert not result.holds
        assert "external-change" in {finding.code for finding in result.findings}


def test_more_swaps_than_faults_are_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thimble_zarr.analysis.findings._MAX_FAILURES", 1)
    result = check(record(tmp_path / "run.zarr", "float32", swaps=(3, 5, 7, 9), lr=FAR), workers=1)
    assert result.holds
    assert result.findings[0].n_steps > 1
