"""Recorded runs that are unlike the usual one."""

from collections.abc import Callable
from pathlib import Path

import torch

from tests.support.runs import Loop, record
from thimble_zarr import Recorder
from thimble_zarr.record.schedule import every


def record_sgd(path: Path, **options: float) -> Path:
    loop = Loop(optimizer=torch.optim.SGD, **options)
    with Recorder(path, loop.optimizer, parameter=loop.weight):
        for _ in range(5):
            loop.step()
    return path


def record_diverging(path: Path) -> Path:
    loop = Loop()
    with Recorder(path, loop.optimizer, parameter=loop.weight):
        for step in range(5):
            loop.backward()
            loop.weight.grad[2] = torch.nan if step == 3 else torch.inf if step == 2 else 1.0
            loop.optimizer.step()
            loop.optimizer.zero_grad()
    return path


def record_with(n_steps: int = 5, **options: object) -> Callable[[Path], Path]:
    def recorded(path: Path) -> Path:
        record(path, n_steps=n_steps, **options)
        return path

    return recorded


RUNS: dict[str, Callable[[Path], Path]] = {
    "SGD": lambda path: record_sgd(path, momentum=0.9),
    "SGD without a state": record_sgd,
    "not finite": record_diverging,
    "float32": record_with(dtype=torch.float32),
    "every other step": record_with(recorder_options={"schedule": every(2)}),
    "without labels": record_with(recorder_options={"labels": None}),
    "one step": record_with(n_steps=1),
    "weights alone": record_with(recorder_options={"variables": ["W"]}),
}
