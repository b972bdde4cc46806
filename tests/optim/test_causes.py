"""Faults planted in a run of every optimizer, and called by their names."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.draws import draw
from tests.support.faults import Arrays, flip_bit, rewrite
from tests.support.optimizers import ELEMENTWISE, VARIANTS, Kind, no_change
from tests.support.planted import numbers, put
from thimble_zarr import Recorder, check
from thimble_zarr.optim.base import Optimizer
from thimble_zarr.store.reader import StoreReader

N_TOKENS, N_STEPS, STEP = 37, 13, 6

OTHERS = sorted({*ELEMENTWISE} - {"Adam", "AdamW"})
"""Of those there are faults in `tests/analysis/test_findings.py`."""


def recorded(path: Path, name: str, native: str = "float32") -> Path:
    """A run with drawn gradients of about one size."""
    variant = "momentum" if name in ("SGD", "RMSprop") else "plain"
    options = {"lr": 0.1, **VARIANTS[name][variant], "foreach": False}
    options.pop("change", no_change)
    if name == "ASGD":
        options["lambd"] = 0.0  # its learning rate changes else, and nobody guesses all its bits
    kind = Kind(name, native, options)
    generator = torch.Generator().manual_seed(7)
    weight = nn.Parameter(draw((N_TOKENS, 5), generator).to(kind.dtype))
    optimizer = kind.make(weight)
    with Recorder(path, optimizer, parameter=weight):
        for _ in range(N_STEPS):
            weight.grad = draw((N_TOKENS, 5), generator).to(kind.dtype)
            optimizer.step()
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    directory, known = tmp_path_factory.mktemp("sound"), {}

    def run(name: str) -> Path:
        if name not in known:
            known[name] = recorded(directory / f"{name}.zarr", name)
        return known[name]

    return run


Plant = Callable[[Arrays, Arrays, Optimizer], None]


def scaled(bits: Arrays, scalars: Arrays, optimizer: Optimizer) -> None:
    put(bits["grad"][1:], numbers(bits["grad"][1:]).double() * 2.0**10)


def flipped(bits: Arrays, scalars: Arrays, optimizer: Optimizer) -> None:
    flip_bit(bits["W"], (STEP, 11, 3), 14)


def late(bits: Arrays, scalars: Arrays, optimizer: Optimizer) -> None:
    bits["W"][2:] = bits["W"][1:-1].copy()


def other_rate(bits: Arrays, scalars: Arrays, optimizer: Optimizer) -> None:
    scalars[optimizer.RATE][STEP:] *= 3


def missing(bits: Arrays, scalars: Arrays, optimizer: Optimizer) -> None:
    put(bits["W"][STEP], torch.full(bits["W"].shape[1:], torch.nan))


def wrong(bits: Arrays, scalars: Arrays, optimizer: Optimizer) -> None:
    noise = np.random.default_rng(0).normal(size=bits["grad"].shape[1:])
    put(bits["grad"][STEP], torch.from_numpy(noise))


def changed(bits: Arrays, scalars: Arrays, optimizer: Optimizer) -> None:
    """A few weights of the last row, which no step takes up."""
    put(bits["W"][-1, :3], numbers(bits["W"][-1, :3]).double() + 0.25)


PLANTED: dict[str, Plant] = {
    "scaled-gradient": scaled,
    "bit-flip": flipped,
    "shifted-rows": late,
    "other-learning-rate": other_rate,
    "missing-row": missing,
    "wrong-gradient": wrong,
    "external-change": changed,
}


NOT_IN_RPROP = {"other-learning-rate", "wrong-gradient"}
"""Only its first step takes the learning rate, and it forgets gradients whose sign has changed."""


@pytest.mark.parametrize(
    ("name", "code"),
    [
        (name, code)
        for name in OTHERS
        for code in PLANTED
        if name != "Rprop" or code not in NOT_IN_RPROP
    ],
)
def test_it_is_called_by_its_name(
    name: str, code: str, runs: Callable[[str], Path], tmp_path: Path
) -> None:
    path = runs(name)
    optimizer = StoreReader.open(path).schema.optimizer

    def plant(bits: Arrays, scalars: Arrays) -> None:
        PLANTED[code](bits, scalars, optimizer)

    rewrite(path, tmp_path / "fault.zarr", plant)
    result = check(tmp_path / "fault.zarr", workers=1)
    assert not result.holds
    assert result.findings[0].code == code, [one.message for one in result.findings]
    shutil.rmtree(tmp_path / "fault.zarr")


@pytest.mark.parametrize("name", OTHERS)
def test_of_a_sound_run_nothing_is_said(name: str, runs: Callable[[str], Path]) -> None:
    result = check(runs(name), workers=1)
    assert result.holds
    assert result.findings == ()
