"""What a step was, of optimizers that keep no count, or that overwrite the gradient."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.runs import TINY_MEMORY, Loop
from thimble_zarr import Recorder, check, windows
from thimble_zarr.bits import decode
from thimble_zarr.errors import OptimizerError, RecordingError, ResumeError
from thimble_zarr.record.counting import StepCounts, judge_rows
from thimble_zarr.store.reader import StoreReader


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


def make_loop(**options: object) -> Loop:
    options = {"lr": 0.1, "momentum": 0.9, "foreach": False, **options}
    return Loop(dtype=torch.float32, optimizer=torch.optim.SGD, **options)


def read(path: Path, name: str) -> np.ndarray:
    reader = StoreReader.open(path)
    return decode(reader.read(name, (0, reader.n_rows)), "float32")


def counts(path: Path) -> list[float]:
    return StoreReader.open(path).read_scalars()["optimizer_step"].tolist()


PROGRAMS = {
    "single": {},
    "foreach": {"foreach": True},
    "foreach, nesterov": {"foreach": True, "nesterov": True},
    "fused": {"foreach": None, "fused": True},
    "fused, nesterov": {"foreach": None, "fused": True, "nesterov": True},
}


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("options", PROGRAMS.values(), ids=PROGRAMS)
def test_the_gradient_is_the_one_consumed(path: Path, options: dict, *, closure: bool) -> None:
    """Also where the step overwrites it, or makes it itself."""
    loop, grads = make_loop(**options), []

    def backward() -> Tensor:
        loop.optimizer.zero_grad()
        loss = loop.backward()
        grads.append(loop.weight.grad.clone().numpy())
        return loss

    with Recorder(path, loop.optimizer, parameter=loop.weight, memory_bytes=TINY_MEMORY):
        for _ in range(5):
            if closure:
                loop.optimizer.step(backward)
            else:
                backward()
                loop.optimizer.step()
    recorded = read(path, "grad")
    assert np.isnan(recorded[0]).all()
    np.testing.assert_array_equal(recorded[1:], grads)
    buffers = read(path, "momentum_buffer")
    assert np.isnan(buffers[0]).all()  # there is none yet
    np.testing.assert_array_equal(buffers[1], grads[0])
    assert counts(path) == [0, 1, 2, 3, 4, 5]


@pytest.mark.filterwarnings("ignore:no gradient at step:UserWarning")
@pytest.mark.parametrize("schedule", [None, windows((5, 6))])
def test_a_step_without_a_gradient_is_not_counted(
    path: Path, schedule: Callable[[int], bool] | None
) -> None:
    loop = make_loop()
    options = {"parameter": loop.weight, "schedule": schedule}
    with Recorder(path, loop.optimizer, **options) as recorder:
        for step in range(1, 7):
            if step not in (3, 4):
                loop.backward()
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        assert recorder.step == 6
    reader = StoreReader.open(path)
    taken = dict(zip(reader.read_steps().tolist(), counts(path), strict=True))
    expected = {0: 0, 1: 1, 2: 2, 3: 2, 4: 2, 5: 3, 6: 4}
    assert taken == {step: expected[step] for step in taken}


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": None, "fused": True}])
def test_a_step_that_a_scaler_skips_is_not_counted(path: Path, options: dict) -> None:
    loop = make_loop(**options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with Recorder(path, loop.optimizer, parameter=loop.weight):
        for step in range(1, 7):
            loss = loop.weight.pow(2).sum() * (torch.inf if step in (2, 5) else 1.0)
            scaler.scale(loss).backward()
            scaler.step(loop.optimizer)
            scaler.update()
            loop.optimizer.zero_grad()
    is_seen = "fused" in options  # others are not called for such a step
    assert counts(path) == ([0, 1, 1, 2, 3, 3, 4] if is_seen else [0, 1, 2, 3, 4])
    missing = np.isnan(read(path, "grad")).all(axis=(1, 2)).nonzero()[0].tolist()
    assert missing == ([0, 2, 5] if is_seen else [0])


def test_a_hook_that_may_change_the_gradient_still_is_refused(path: Path) -> None:
    loop = make_loop(foreach=True, nesterov=True)
    with Recorder(path, loop.optimizer, parameter=loop.weight):
        loop.step()
        loop.optimizer.register_step_pre_hook(lambda *args: None)
        with pytest.raises(OptimizerError, match="register yours"):
            loop.step()
    assert counts(path) == [0, 1]


def test_two_recorders_of_one_optimizer_see_the_same(tmp_path: Path) -> None:
    loop = make_loop(foreach=True, nesterov=True)
    paths = [tmp_path / "1.zarr", tmp_path / "2.zarr"]
    with (
        Recorder(paths[0], loop.optimizer, parameter=loop.weight),
        Recorder(paths[1], loop.optimizer, parameter=loop.weight),
    ):
        for _ in range(3):
            loop.step()
    first, second = (read(path, "grad") for path in paths)
    np.testing.assert_array_equal(first, second)


def test_a_run_that_is_resumed_counts_on(path: Path) -> None:
    loop = make_loop()
    with Recorder(path, loop.optimizer, parameter=loop.weight):
        for _ in range(3):
            loop.step()
    with Recorder(path, loop.optimizer, parameter=loop.weight, resume=True):
        loop.step()
    assert counts(path) == [0, 1, 2, 3, 4]
    loop.optimizer.state[loop.weight]["momentum_buffer"][3, 2] += 1
    with pytest.raises(ResumeError, match=r"momentum_buffer differs in 1 of 55"):
        Recorder(path, loop.optimizer, parameter=loop.weight, resume=True)


def test_a_recording_that_begins_late_counts_from_one(path: Path) -> None:
    loop = make_loop()
    loop.step()
    with Recorder(path, loop.optimizer, parameter=loop.weight):
        loop.step()
    assert counts(path) == [1, 2]


def test_rows_are_judged_by_their_counts() -> None:
    steps = np.array([0, 1, 2, 5, 6, 7])
    counted = np.array([0.0, 1, 1, 3, 5, 4])
    skipped, missed = judge_rows(counted, steps, before=(np.nan, -1))
    assert skipped.tolist() == [2]
    assert missed.tolist() == [4, 5]


def test_counts_on_a_device_are_not_looked_at() -> None:
    before = StepCounts(3, {"a": 3.0, "b": torch.tensor(3.0)})
    StepCounts(4, {"a": 4.0, "b": torch.tensor(9.0)}).check(before)
    with pytest.raises(RecordingError, match="counts 5 steps for a, and counted 3"):
        StepCounts(4, {"a": 5.0, "b": torch.tensor(4.0)}).check(before)


class Clearing(torch.optim.AdamW):
    """Clears the gradient within its step while `clears` is set."""

    clears = False

    def step(self, closure: Callable[[], float] | None = None) -> None:
        super().step(closure)
        if self.clears:
            self.zero_grad()


def test_after_a_step_that_could_not_be_recorded_none_is(path: Path) -> None:
    embedding = torch.nn.Embedding(20, 4)
    optimizer = Clearing(embedding.parameters(), lr=1e-2)

    def step(*, grad: bool = True) -> None:
        if grad:
            embedding(torch.arange(5)).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    with Recorder(path, optimizer, parameter=embedding.weight):
        step()
        step()
        optimizer.clears = True
        with pytest.raises(RecordingError, match="was gone"):
            step()
        optimizer.clears = False
        with pytest.raises(RecordingError):
            step(grad=False)
        with pytest.raises(RecordingError, match="was not recorded"):
            step()
    result = check(path)
    assert result.holds
    assert len(result.table) == 2
