"""Rows from a device, with streams that do everything as late as they may.

A stream beside the current one does its work only when somebody waits for it. Whatever the recorder
does not wait for is then not there, or is there from the wrong step.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.runs import N_STEPS, TINY_MEMORY, Loop, record
from thimble_zarr import Recorder, accounting, every, open_dataset, windows
from thimble_zarr.bits import decode
from thimble_zarr.errors import OptimizerError, RecordingError
from thimble_zarr.record import capture, counting, transfer
from thimble_zarr.record import writer_thread as writer_module
from thimble_zarr.record.transfer import SideStream
from thimble_zarr.store.reader import StoreReader


class LateEvent:
    def __init__(self, stream: "LateStream") -> None:
        self.stream, self.n_before = stream, len(stream.work)

    def synchronize(self) -> None:
        self.stream.run(self.n_before)


class LateStream:
    """A stream whose work is done when it is waited for, in order."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.work: list[tuple[Any, tuple]] = []
        self.n_done = 0
        self.lock = threading.Lock()

    def run(self, n: int) -> None:
        with self.lock:
            for function, arguments in self.work[self.n_done : n]:
                function(*arguments)
            self.n_done = max(self.n_done, n)

    def wait_event(self, event: LateEvent) -> None:
        self.log.append("training waits for the last row")
        event.synchronize()

    def wait_stream(self, stream: "LateStream") -> None:
        self.log.append("side waits for training")

    def record_event(self) -> LateEvent:
        self.log.append("mark")
        return LateEvent(self)


class Later(TorchDispatchMode):
    """Put copies off."""

    def __init__(self, stream: LateStream) -> None:
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        assert function is torch.ops.aten.copy_.default, function
        assert args[2] is True, "a copy that blocks"
        self.stream.log.append("copy")
        self.stream.work.append((function, args))
        return args[0]


class LateCuda:
    """As much of `torch.cuda` as is needed, on the CPU."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.main, self.side = LateStream(self.log), LateStream(self.log)

    def Stream(self, device: str) -> LateStream:
        return self.side

    def current_stream(self, device: str) -> LateStream:
        return self.main

    @contextmanager
    def stream(self, stream: LateStream) -> Iterator[None]:
        assert stream is self.side
        with Later(stream):
            yield


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> LateCuda:
    """Tensors of the CPU are copied as those of a GPU are; counts and numbers stay there, too."""
    late = LateCuda()
    copies = SideStream("cpu", late, pinned=False)
    monkeypatch.setattr(writer_module, "side_stream", lambda device: copies)

    def number(value: float | torch.Tensor) -> float | torch.Tensor:
        return value if isinstance(value, torch.Tensor) else float(value)

    for module in (capture, counting):
        monkeypatch.setattr(module, "number", number)
    return late


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


def recorded(path: Path, name: str) -> np.ndarray:
    reader = StoreReader.open(path)
    return decode(reader.read(name, (0, reader.n_rows)), reader.schema.dtypes[name], np.float64)


def differences(path: Path, history: Any) -> list[str]:
    """Return the variables of which a row is not what the loop saw."""
    names = StoreReader.open(path).schema.dtypes
    return [
        name
        for name in names
        if not np.array_equal(recorded(path, name), history[name], equal_nan=True)
    ]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {}),
        (torch.bfloat16, {"fused": True}),
        (torch.float32, {"lr": torch.tensor(1e-2)}),
    ],
)
def test_rows_are_those_of_their_steps(
    cuda: LateCuda, dtype: torch.dtype, options: dict, path: Path
) -> None:
    history = record(path, dtype=dtype, **options)
    assert differences(path, history) == []
    assert open_dataset(path).optimizer_step.values.tolist() == [*range(N_STEPS + 1)]
    np.testing.assert_array_equal(open_dataset(path).learning_rate[1:], history.learning_rates)
    assert int(accounting(open_dataset(path), replay=True).n_different.sum()) == 0
    assert cuda.side.n_done == len(cuda.side.work) > 0


def test_events_are_in_order(cuda: LateCuda, path: Path) -> None:
    record(path, n_steps=2)
    first = ["side waits for training", *["copy"] * 3, "mark"]  # no gradient and no count yet
    later = ["training waits for the last row", "side waits for training", *["copy"] * 5, "mark"]
    assert cuda.log == first + 2 * later


@pytest.fixture
def numbers_at_hand(cuda: LateCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tensors are copied, so that a wrong count does not end the record before."""
    for module in (capture, counting):
        monkeypatch.setattr(module, "number", float)
    # Memory that is used again may hold the rows of an equal run.
    monkeypatch.setattr(
        SideStream, "empty", lambda copies, shape, *, dtype: torch.zeros(*shape, dtype=dtype)
    )


@pytest.mark.usefixtures("numbers_at_hand")
def test_a_row_that_training_does_not_wait_for_would_be_seen(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LateStream, "wait_event", lambda stream, event: None)
    assert differences(path, record(path)) != []


@pytest.mark.usefixtures("numbers_at_hand")
def test_a_block_that_the_writer_does_not_wait_for_would_be_seen(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = SideStream.send

    def send_only(copies: SideStream) -> Any:
        send(copies)
        return lambda: None

    monkeypatch.setattr(SideStream, "send", send_only)
    assert differences(path, record(path)) != []


@pytest.mark.usefixtures("numbers_at_hand")
def test_tensors_that_are_not_staged_would_be_seen(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied from the tensors themselves, rows would be those of a later step."""

    def stage(copies: SideStream, name: str, row: torch.Tensor, *tensor: torch.Tensor) -> None:
        copies._sending.append((row, tensor[0]))

    monkeypatch.setattr(SideStream, "stage", stage)
    monkeypatch.setattr(LateStream, "wait_event", lambda stream, event: None)
    assert differences(path, record(path)) != []


@pytest.mark.usefixtures("cuda")
def test_a_skipped_step_whose_count_is_on_the_device(path: Path) -> None:
    loop = Loop(dtype=torch.float32, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with Recorder(path, loop.optimizer, parameter=loop.weight, memory_bytes=TINY_MEMORY):
        for step in range(7):
            loss = loop.weight.pow(2).sum() * (torch.inf if step in (0, 4) else 1.0)
            scaler.scale(loss).backward()
            scaler.step(loop.optimizer)
            scaler.update()
            loop.optimizer.zero_grad()
    ds = open_dataset(path)
    assert ds.optimizer_step.values.tolist() == [0, 0, 1, 2, 3, 3, 4, 5]
    assert np.isnan(ds.grad).all(["token", "dim"]).values.nonzero()[0].tolist() == [0, 1, 5]
    assert int(accounting(ds, replay=True).n_different.sum()) == 0


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("missed", [2, 4, 5])
def test_a_missed_step_whose_count_is_on_the_device_ends_the_record(
    path: Path, missed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop()  # blocks of four rows

    def run() -> None:
        with Recorder(path, loop.optimizer, parameter=loop.weight, memory_bytes=TINY_MEMORY):
            for step in range(1, 30):
                if step == missed:
                    loop.optimizer.state[loop.weight]["step"] += 1
                loop.step()

    with pytest.raises(
        RecordingError, match=f"counts {missed + 1} steps, and counted {missed - 1}"
    ):
        run()
    assert StoreReader.open(path).n_rows == missed


CHOSEN = [2, 7, 10]


def record_chosen(path: Path, *, skipped: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    """Record some rows at some steps; return the true weights and gradients of all."""
    loop = Loop(dtype=torch.float32, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    weights, grads = [loop.weight.detach().clone()], [torch.full_like(loop.weight, torch.nan)]
    options = {"tokens": CHOSEN, "schedule": every(5), "memory_bytes": TINY_MEMORY}
    with Recorder(path, loop.optimizer, parameter=loop.weight, **options):
        for step in range(1, N_STEPS + 1):
            loss = loop.weight.pow(2).sum() * (torch.inf if step in skipped else 1.0)
            scaler.scale(loss).backward()
            scaler.step(loop.optimizer)
            scaler.update()
            weights.append(loop.weight.detach().clone())
            grads.append(loop.weight.grad.clone() if step not in skipped else grads[0])
            loop.optimizer.zero_grad()
    return {"W": torch.stack(weights).double().numpy(), "grad": torch.stack(grads).double().numpy()}


def chosen_differences(path: Path, truth: dict[str, np.ndarray]) -> list[str]:
    rows = [4, 5, 9, 10]
    assert open_dataset(path).step.values.tolist() == rows
    return [
        name
        for name, values in truth.items()
        if not np.array_equal(recorded(path, name), values[rows][:, CHOSEN], equal_nan=True)
    ]


@pytest.mark.parametrize("skipped", [(), (5,), (2, 3, 10)])
def test_chosen_rows_of_chosen_steps(cuda: LateCuda, skipped: tuple[int, ...], path: Path) -> None:
    assert chosen_differences(path, record_chosen(path, skipped=skipped)) == []
    ds = open_dataset(path)
    assert int(accounting(ds, replay=True).n_different.sum()) == 0
    counts = [step - sum(one <= step for one in skipped) for step in (4, 5, 9, 10)]
    assert ds.optimizer_step.values.tolist() == counts
    staged = writer_module.side_stream("cpu")._staged
    assert staged["W"].shape == (len(CHOSEN), 5)


@pytest.mark.usefixtures("numbers_at_hand")
def test_other_rows_than_the_chosen_ones_would_be_seen(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = SideStream.stage

    def stage_first(copies: SideStream, name: str, row: torch.Tensor, *of: torch.Tensor) -> None:
        stage(copies, name, row, of[0], torch.arange(len(CHOSEN)))

    monkeypatch.setattr(SideStream, "stage", stage_first)
    assert chosen_differences(path, record_chosen(path)) != []


@pytest.mark.usefixtures("cuda")
def test_steps_missed_between_rows_end_the_record_when_their_count_arrives(path: Path) -> None:
    loop = Loop()
    options = {"parameter": loop.weight, "schedule": every(6)}
    recording = Recorder(path, loop.optimizer, **options)
    for step in range(1, 12):
        if step == 8:
            loop.optimizer.state[loop.weight]["step"] += 1
        loop.step()
    with pytest.raises(RecordingError, match="counts 12 steps, and counted 6 at the last row"):
        recording.close()
    assert open_dataset(path).step.values.tolist() == [5, 6]


def test_flushes_and_blocks_count_on(cuda: LateCuda, path: Path) -> None:
    loop = Loop()
    with Recorder(
        path, loop.optimizer, parameter=loop.weight, memory_bytes=TINY_MEMORY
    ) as recording:
        for step in range(1, 14):
            loop.step()
            if step in (1, 3, 4, 7, 8, 9):
                recording.flush()
    assert open_dataset(path).optimizer_step.values.tolist() == [*range(14)]


def test_a_captured_step_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop()
    recording = Recorder(path, loop.optimizer, parameter=loop.weight)
    monkeypatch.setattr(capture.LiveOptimizer, "check_unchanged", lambda *args: None)

    recording._on_cuda = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(OptimizerError, match="captured in a CUDA graph"):
        loop.step()
    recording.close()
    assert not path.exists()


def test_a_captured_step_is_refused_also_where_it_is_not_recorded(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop()
    with Recorder(path, loop.optimizer, parameter=loop.weight, schedule=windows((0, 2))) as running:
        for _ in range(4):
            loop.step()
        running._on_cuda = True
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(OptimizerError, match="captured in a CUDA graph"):
            loop.step()
    assert open_dataset(path).step.values.tolist() == [0, 1, 2]


def test_only_cuda_has_a_stream_of_its_own() -> None:
    assert transfer.side_stream("cpu") is None
    assert transfer.side_stream("mps:0") is None


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@needs_cuda
@pytest.mark.parametrize(
    "options",
    [
        {"foreach": False},
        {"foreach": True},
        {"fused": True},
        {"foreach": True, "capturable": True, "lr": torch.tensor(1e-2)},
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_from_a_gpu_with_no_synchronisation(
    dtype: torch.dtype, options: dict, path: Path
) -> None:
    """Long rows, gradients cleared in place at once, and a training thread that never waits."""
    options = {name: v.cuda() if torch.is_tensor(v) else v for name, v in options.items()}
    weight = torch.nn.Parameter(torch.randn(10_007, 64, device="cuda", dtype=dtype))
    optimizer = torch.optim.AdamW([weight], **{"lr": 1e-2, **options})
    weight.grad = torch.randn_like(weight)
    optimizer.step()  # what is made at the first step may wait
    expected = {"W": [], "grad": []}
    with Recorder(path, optimizer, parameter=weight, memory_bytes=2**26):
        for _ in range(20):
            weight.grad.normal_()
            expected["grad"].append(weight.grad.clone())
            torch.cuda.set_sync_debug_mode("error")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            weight.grad.zero_()
            expected["W"].append(weight.detach().clone())
    for name, rows in expected.items():
        np.testing.assert_array_equal(recorded(path, name)[1:], torch.stack(rows).double().cpu())
    assert int(accounting(open_dataset(path), replay=True).n_different.sum()) == 0
