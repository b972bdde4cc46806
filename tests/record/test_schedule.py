"""Which steps are recorded: a scheduled store is the full one at some of its rows."""

import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
import zarr

from tests.support.faults import Arrays, flip_bit, rewrite
from tests.support.runs import TINY_MEMORY, Loop, record, token_labels
from thimble_zarr import (
    Recorder,
    accounting,
    every,
    log_spaced,
    open_dataset,
    open_datasets,
    windows,
)
from thimble_zarr.analysis.audit.accounting import selected
from thimble_zarr.analysis.findings import find_causes
from thimble_zarr.analysis.selection import select_steps
from thimble_zarr.analysis.verdict import verdict
from thimble_zarr.bits import decode
from thimble_zarr.errors import (
    ConfigError,
    DamagedStoreError,
    OptimizerError,
    RecordingError,
    SelectionError,
)
from thimble_zarr.record import capture, counting
from thimble_zarr.record.block import Block
from thimble_zarr.record.schedule import as_schedule, count_rows
from thimble_zarr.store.reader import StoreReader

N_STEPS = 31

TWO_WINDOWS = windows((5, 8), (20, 24))

SCHEDULES: dict[str, Callable[[int], bool]] = {
    "multiples": every(7),
    "windows": TWO_WINDOWS,
    "log": log_spaced(3),
    "joined": every(13) | windows((1, 2)),
    "everything": every(1),
    "a function": lambda step: step in {4, 5, 19, 40},
    "a row whose step never came": lambda step: step == N_STEPS + 1 or step == 3,
}

SKIPPED = (6, 9, 20)
"""Steps without a gradient, which torch skips."""


def record_skipping(path: Path, **options: object) -> Path:
    """Record a run with skipped steps and a changing learning rate."""
    loop = Loop()
    with Recorder(
        path,
        loop.optimizer,
        parameter=loop.weight,
        labels=token_labels(),
        memory_bytes=TINY_MEMORY,
        **options,
    ) as recorder:
        for step in range(1, N_STEPS + 1):
            loss = loop.backward()
            loop.optimizer.param_groups[0]["lr"] *= 0.97
            if step in SKIPPED:
                loop.weight.grad = None
            with warnings.catch_warnings(action="ignore"):  # of no gradient
                loop.optimizer.step()
            recorder.log(loss=loss)
            loop.optimizer.zero_grad()
    return path


@dataclass(frozen=True)
class Full:
    """A run of which every step was recorded."""

    path: Path
    ds: xr.Dataset
    table: xr.Dataset


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Full:
    path = record_skipping(tmp_path_factory.mktemp("full") / "run.zarr")
    ds = open_dataset(path)
    return Full(path, ds.compute(), accounting(ds))


@pytest.fixture(scope="module")
def scheduled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run recorded in two windows, never to be written to: rows of steps 4 to 8, 19 to 24."""
    path = tmp_path_factory.mktemp("scheduled") / "run.zarr"
    record(path, n_steps=N_STEPS, recorder_options={"schedule": TWO_WINDOWS})
    return path


# --- recorded ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_is_the_full_store_at_the_rows_of_its_steps(
    full: Full, tmp_path: Path, name: str
) -> None:
    schedule = SCHEDULES[name]
    path = record_skipping(tmp_path / "run.zarr", schedule=schedule, n_steps=N_STEPS)
    rows = [t for t in range(N_STEPS + 1) if (t > 0 and schedule(t)) or schedule(t + 1)]
    assert zarr.open_array(path / "step", mode="r")[...].tolist() == rows
    assert count_rows(as_schedule(schedule), N_STEPS) == len(rows)
    for variable in ("W", "grad", "exp_avg", "exp_avg_sq", *StoreReader.open(path).schema.scalars):
        recorded = zarr.open_array(path / variable, mode="r")[...]
        whole = zarr.open_array(full.path / variable, mode="r")[...]
        np.testing.assert_array_equal(recorded, whole[rows])
    ds = open_dataset(path)
    follows = np.isin(np.array(rows) - 1, rows)
    assert (ds.delta_W.notnull().all(["token", "dim"]).values == follows).all()
    checked = [t for t, joined in zip(rows, follows, strict=True) if joined]
    if not checked:
        return
    for variable in ("delta_W", "adam_residual", "rounding", "unexplained", "stalled"):
        np.testing.assert_array_equal(
            ds[variable].sel(step=checked), full.ds[variable].sel(step=checked)
        )
    table = accounting(ds)
    assert table.step.values.tolist() == checked
    assert table.identical(full.table.sel(step=checked))
    assert int(table.n_different.sum()) == 0
    assert find_causes(selected(ds), table) == []


def test_the_row_before_the_first_step_is_the_initial_state_only_where_it_is_needed(
    tmp_path: Path,
) -> None:
    for schedule, first in ((every(5), 4), (windows((0, 3)), 0), (windows((1, 3)), 0)):
        path = tmp_path / f"{schedule}.zarr"
        record(path, recorder_options={"schedule": schedule})
        assert int(open_dataset(path).step[0]) == first


def noting(real: Callable[..., object], calls: list[str]) -> Callable[..., object]:
    def called(*args: object) -> object:
        calls.append(real.__name__)
        return real(*args)

    return called


def test_steps_that_are_not_recorded_are_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    looked: list[str] = []
    for module, name in (
        (capture.LiveOptimizer, "check_unchanged"),
        (capture.LiveOptimizer, "_scalars"),
        (capture.LiveOptimizer, "states"),
        (counting.StepCounter, "count"),
    ):
        monkeypatch.setattr(module, name, noting(getattr(module, name), looked))

    def at_ten(step: int) -> bool:
        asked.append(step)
        return step == 10

    loop = Loop()
    options = {"parameter": loop.weight, "schedule": at_ten}
    with Recorder(tmp_path / "run.zarr", loop.optimizer, **options) as recorder:
        for step in range(1, N_STEPS + 1):
            loop.step()
            assert recorder.step == step
    assert asked == list(range(1, N_STEPS + 2))  # each once, in order
    row = ["check_unchanged", "count", "states", "_scalars"]
    # The first step is looked at; that of step 9, whose row before is not there, before it, too.
    # And when the recorder is made, for the dtypes of states, and when its last rows are committed.
    assert looked == ["states", *row[:1], *row[:1], "count", *row[1:], *row, "states"]


def record_scaled(path: Path, **options: object) -> xr.Dataset:
    """Record a run whose fused optimizer is called at steps 3, 4, 9 and 12 and skips them."""
    loop = Loop(dtype=torch.float32, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with Recorder(path, loop.optimizer, parameter=loop.weight, **options):
        for step in range(1, 14):
            loss = loop.weight.pow(2).sum() * (torch.inf if step in (3, 4, 9, 12) else 1.0)
            scaler.scale(loss).backward()
            scaler.step(loop.optimizer)
            scaler.update()
            loop.optimizer.zero_grad()
    return open_dataset(path)


@pytest.mark.parametrize("n", [4, 5, 13])
def test_a_gradient_that_a_skipped_step_left_is_recorded_in_no_row(tmp_path: Path, n: int) -> None:
    """Rows whose step was skipped, some of them behind steps that are not recorded."""
    whole = record_scaled(tmp_path / "whole.zarr")
    ds = record_scaled(tmp_path / "run.zarr", schedule=every(n))
    for name in ("grad", "W", "optimizer_step"):
        np.testing.assert_array_equal(ds[name], whole[name].sel(step=ds.step))
    table, of_whole = accounting(ds), accounting(whole)
    assert table.skipped.equals(of_whole.skipped.sel(step=table.step))
    assert int(table.n_different.sum()) == 0


def test_a_gradient_that_is_not_recorded_may_be_gone(tmp_path: Path) -> None:
    loop = Loop()
    options = {"parameter": loop.weight, "variables": ("W", "exp_avg", "exp_avg_sq")}
    with Recorder(tmp_path / "run.zarr", loop.optimizer, **options):
        hook = loop.optimizer.register_step_post_hook(lambda *args: loop.optimizer.zero_grad())
        loop.optimizer._optimizer_step_post_hooks.move_to_end(hook.id, last=False)
        for _ in range(3):
            loop.step()
    assert open_dataset(tmp_path / "run.zarr").optimizer_step.values.tolist() == [0, 1, 2, 3]


def test_a_subclass_that_calls_its_base_class_takes_one_step(tmp_path: Path) -> None:
    """torch calls the hooks of both, at steps that are recorded and at others."""

    class Twice(torch.optim.AdamW):
        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            return super().step(closure)

    Loop()  # torch hooks into the step of a class when it first makes one: here of the base class
    loop = Loop(optimizer=Twice)
    options = {"parameter": loop.weight, "schedule": every(5)}
    with Recorder(tmp_path / "run.zarr", loop.optimizer, **options) as recorder:
        for step in range(1, 14):
            loop.step()
            assert (recorder.step, recorder.next_step) == (step, step + 1)
    ds = open_dataset(tmp_path / "run.zarr")
    assert ds.step.values.tolist() == ds.optimizer_step.values.tolist() == [4, 5, 9, 10]


def test_an_optimizer_that_changed_between_rows_is_refused_at_the_next(tmp_path: Path) -> None:
    loop = Loop()
    options = {"parameter": loop.weight, "schedule": every(5)}
    recorder = Recorder(tmp_path / "run.zarr", loop.optimizer, **options)
    for _ in range(6):
        loop.step()
    loop.optimizer.param_groups[0].update(maximize=True)
    for _ in range(2):
        loop.step()
    with pytest.raises(OptimizerError, match="maximize False -> True"):
        loop.step()
    recorder.close()
    assert open_dataset(tmp_path / "run.zarr").step.values.tolist() == [4, 5]


def test_the_committed_step_is_the_one_of_the_last_committed_row(tmp_path: Path) -> None:
    loop = Loop()
    options = {"parameter": loop.weight, "schedule": every(5)}
    with Recorder(tmp_path / "run.zarr", loop.optimizer, **options) as recorder:
        assert recorder.committed_step == 0
        for _ in range(7):
            loop.step()
        recorder.flush()
        assert recorder.committed_step == 5


@pytest.mark.parametrize("before", [True, False])
def test_a_loss_belongs_to_its_own_step_or_is_dropped(tmp_path: Path, before: bool) -> None:
    loop = Loop()
    options = {"parameter": loop.weight, "schedule": every(4)}
    with Recorder(tmp_path / "run.zarr", loop.optimizer, **options) as recorder:
        for step in range(1, 14):
            if before:
                recorder.log(loss=step)
            loop.step()
            if not before:
                recorder.log(loss=step)
    ds = open_dataset(tmp_path / "run.zarr")
    np.testing.assert_array_equal(ds.loss, ds.step)
    assert ds.step.values.tolist() == [3, 4, 7, 8, 11, 12]


@pytest.mark.parametrize("schedule", [None, every(1)])
def test_a_first_row_that_failed_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: Callable[[int], bool] | None
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise MemoryError

    loop = Loop()
    options = {"parameter": loop.weight, "schedule": schedule}
    with Recorder(tmp_path / "run.zarr", loop.optimizer, **options):
        with monkeypatch.context() as failing:
            failing.setattr(Block, "append", fail)
            with pytest.raises(MemoryError):
                loop.step()
        for _ in range(3):
            loop.step()
    ds = open_dataset(tmp_path / "run.zarr")
    assert ds.step.values.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(ds.optimizer_step, ds.step)


def test_a_schedule_without_any_step_leaves_no_store_and_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"none of 13 steps was recorded.*every\(100\)"):
        record(tmp_path / "run.zarr", recorder_options={"schedule": every(100)})
    assert not (tmp_path / "run.zarr").exists()


def test_flushed_rows_can_be_read_while_the_schedule_waits(tmp_path: Path) -> None:
    loop = Loop()
    options = {"parameter": loop.weight, "schedule": windows((2, 3), (11, 12))}
    with Recorder(tmp_path / "run.zarr", loop.optimizer, **options) as recorder:
        for _ in range(7):
            loop.step()
        recorder.flush()
        assert open_dataset(tmp_path / "run.zarr").step.values.tolist() == [1, 2, 3]
        for _ in range(7):
            loop.step()
    assert open_dataset(tmp_path / "run.zarr").step.values.tolist() == [1, 2, 3, 10, 11, 12]


def test_a_state_loaded_between_windows_is_refused(tmp_path: Path) -> None:
    loop = Loop()
    options = {"parameter": loop.weight, "schedule": windows((1, 2), (9, 12))}
    recorder = Recorder(tmp_path / "run.zarr", loop.optimizer, **options)
    for _ in range(5):
        loop.step()
    for state in loop.optimizer.state.values():
        state["step"] += 50
    for _ in range(2):
        loop.step()
    with pytest.raises(RecordingError, match="counts 57 steps, and counted 2 at the last row"):
        loop.step()
    recorder.close()
    assert open_dataset(tmp_path / "run.zarr").step.values.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: every(0), r"every\(0\) cannot work; expected a whole number from 1 up"),
        (lambda: every(2.5), r"every\(2\.5\) cannot work"),
        (lambda: log_spaced(0), r"log_spaced\(0\) cannot work"),
        (lambda: windows(), r"windows\(\) cannot work; expected pairs"),
        (lambda: windows((5, 3)), r"windows\(\(5, 3\)\) cannot work"),
        (lambda: windows((-1, 3)), r"windows\(\(-1, 3\)\) cannot work"),
        (lambda: every(2) | 3, r"the schedule is 3; expected every\(10\)"),
        (lambda: as_schedule(10), r"the schedule is 10; expected every\(10\)"),
    ],
)
def test_what_is_no_schedule_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_log_spaced_steps_are_powers_of_one_factor() -> None:
    schedule = log_spaced(4)
    expected = sorted({round(10 ** (n / 4)) for n in range(17)})
    assert [step for step in range(1, 10_001) if schedule(step)] == expected


def test_the_store_says_what_the_schedule_was(scheduled: Path, tmp_path: Path) -> None:
    assert StoreReader.open(scheduled).schema.schedule == "windows((5, 8), (20, 24))"

    def odd(step: int) -> bool:
        return step % 2 == 1

    record(tmp_path / "run.zarr", recorder_options={"schedule": every(3) | odd})
    text = StoreReader.open(tmp_path / "run.zarr").schema.schedule
    assert text.startswith("every(3) | tests.record.test_schedule.")
    assert text.endswith("odd")


# --- selected ------------------------------------------------------------------------------------


def test_steps_are_selected_by_their_labels(scheduled: Path) -> None:
    ds = open_dataset(scheduled)
    source = selected(ds).source
    rows = select_steps(source, "6:21")
    assert accounting(ds.isel(step=rows)).step.values.tolist() == [6, 7, 8, 20, 21]
    assert accounting(ds.sel(step=21)).step.values.tolist() == [21]
    np.testing.assert_array_equal(ds.W.sel(step=20), ds.W.isel(step=6))
    with pytest.raises(SelectionError, match=r"9:18: none of them was recorded; near .* 8 and 19"):
        select_steps(source, "9:18")
    with pytest.raises(SelectionError, match="row before was recorded"):
        accounting(ds.sel(step=[4, 19]))


def test_a_token_freezes_at_a_step_and_not_at_a_row(tmp_path: Path) -> None:
    record(tmp_path / "run.zarr", recorder_options={"schedule": every(6)})
    ds = open_dataset(tmp_path / "run.zarr")
    moved = (ds.delta_W.isel(step=ds.step % 6 == 0) != 0).any("dim")
    expected = (moved * moved.step).max("step")
    np.testing.assert_array_equal(ds.freeze_step, expected)
    assert int(ds.freeze_step.max()) == 12


def test_runs_of_different_schedules_open_together(scheduled: Path, tmp_path: Path) -> None:
    other, whole = tmp_path / "other.zarr", tmp_path / "whole.zarr"
    record(other, n_steps=N_STEPS, recorder_options={"schedule": every(6)})
    record(whole, n_steps=13)
    runs = open_datasets([scheduled, other, whole])
    paths = [str(path) for path in (scheduled, other, whole)]
    ones = {path: open_dataset(path) for path in paths}
    steps = sorted(set().union(*(one.step.values.tolist() for one in ones.values())))
    assert runs.step.values.tolist() == steps
    for path, one in ones.items():
        run = runs.sel(run=path)
        for variable in ("W", "adam_residual", "loss"):
            np.testing.assert_array_equal(run[variable].sel(step=one.step), one[variable])
        assert run.W.drop_sel(step=one.step).isnull().all()
    np.testing.assert_array_equal(
        runs.W.sel(step=[12, 20], token=[3, 1]).isel(run=runs.run == str(other)).values[0],
        np.stack([ones[str(other)].W.sel(step=12, token=[3, 1]).values, np.full((2, 5), np.nan)]),
    )
    table = accounting(runs)
    assert np.nansum(table.n_different) == 0
    for path, one in ones.items():
        of_run = table.sel(run=path).dropna("step", subset=["norm_predicted"])
        np.testing.assert_array_equal(of_run.norm_predicted, accounting(one).norm_predicted)


# --- planted -------------------------------------------------------------------------------------


def found_in(path: Path) -> tuple[str, int, int | None, int | None]:
    ds = open_dataset(path)
    table = accounting(ds)
    finding, *_ = found = find_causes(selected(ds), table)
    judged = verdict(table, found)
    assert not judged.holds
    assert judged.step is not None
    return finding.code, finding.step, finding.token, finding.dim


def flip_weight(bits: Arrays, scalars: Arrays) -> None:
    row = int(np.flatnonzero(scalars["step"] == 21)[0])
    flip_bit(bits["W"], (row, 7, 2), 3)


def flip_first_of_window(bits: Arrays, scalars: Arrays) -> None:
    row = int(np.flatnonzero(scalars["step"] == 19)[0])
    flip_bit(bits["exp_avg"], (row, 3, 4), 9)


def flip_last_of_window(bits: Arrays, scalars: Arrays) -> None:
    row = int(np.flatnonzero(scalars["step"] == 8)[0])
    flip_bit(bits["W"], (row, 10, 0), 9)


def lose_row(bits: Arrays, scalars: Arrays) -> None:
    row = int(np.flatnonzero(scalars["step"] == 22)[0])
    bits["W"][row] = 0x7FC0


def shift_gradients(bits: Arrays, scalars: Arrays) -> None:
    bits["grad"][6:] = np.roll(bits["grad"][6:], 1, axis=0)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (flip_weight, ("bit-flip", 21, 7, 2)),
        (flip_first_of_window, ("bit-flip", 19, 3, 4)),
        (flip_last_of_window, ("bit-flip", 8, 10, 0)),
        (lose_row, ("missing-row", 22, None, None)),
        (shift_gradients, ("shifted-rows", 20, None, None)),
    ],
)
def test_a_fault_in_a_window_is_named_by_its_step(
    scheduled: Path,
    tmp_path: Path,
    change: Callable[[Arrays, Arrays], None],
    expected: tuple[object, ...],
) -> None:
    rewrite(scheduled, tmp_path / "run.zarr", change)
    assert found_in(tmp_path / "run.zarr") == expected


def relabel_window(bits: Arrays, scalars: Arrays) -> None:
    """Say of every row of the second window that it is of the step before."""
    scalars["step"][5:] -= 1


def join_windows(bits: Arrays, scalars: Arrays) -> None:
    """Say of the second window that it follows the first."""
    scalars["step"][5:] -= 10


@pytest.mark.parametrize(
    ("change", "codes", "step"),
    [(relabel_window, {"mislabelled-row"}, 18), (join_windows, {"mislabelled-row"}, 9)],
)
def test_a_shifted_label_is_found(
    scheduled: Path,
    tmp_path: Path,
    change: Callable[[Arrays, Arrays], None],
    codes: set[str],
    step: int,
) -> None:
    rewrite(scheduled, tmp_path / "run.zarr", change)
    ds = open_dataset(tmp_path / "run.zarr")
    table = accounting(ds)
    found = find_causes(selected(ds), table)
    assert codes <= {finding.code for finding in found}
    assert step in {finding.step for finding in found}
    assert not verdict(table, found).holds
    # Where a label makes neighbours of rows that are none, their books do not balance either.
    assert bool(table.n_beyond.any()) == (change is join_windows)


def test_a_label_that_was_stored_anew_is_found(scheduled: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(scheduled, tmp_path / "run.zarr"))
    steps = zarr.open_array(path / "step", mode="r+")
    steps[5:11] = steps[5:11] + 1  # the optimizer might have skipped a step between the windows
    ds = open_dataset(path)
    assert ds.step.values.tolist() == [4, 5, 6, 7, 8, 20, 21, 22, 23, 24, 25]
    codes = {
        (finding.code, finding.variable) for finding in find_causes(selected(ds), accounting(ds))
    }
    assert codes == {("altered-chunk", "step")}


def test_labels_that_do_not_ascend_are_damage(scheduled: Path, tmp_path: Path) -> None:
    def change(bits: Arrays, scalars: Arrays) -> None:
        scalars["step"][3] = 4

    rewrite(scheduled, tmp_path / "run.zarr", change)
    with pytest.raises(DamagedStoreError, match="the labels step do not ascend"):
        open_dataset(tmp_path / "run.zarr")


def test_a_row_under_the_label_of_its_neighbour_is_another_row(full: Full, tmp_path: Path) -> None:
    """What the comparison with the full store would see if rows were labelled one off."""
    path = record_skipping(tmp_path / "run.zarr", schedule=TWO_WINDOWS)
    reader = StoreReader.open(path)
    rows, whole = reader.read_steps(), StoreReader.open(full.path)
    numbers = decode(reader.read("W", (0, reader.n_rows)), "bfloat16", np.float64)
    for by in (-1, 1):
        others = decode(whole.read("W", (0, whole.n_rows)), "bfloat16", np.float64)[rows + by]
        assert not np.array_equal(numbers, others)
    assert torch.isfinite(torch.from_numpy(numbers)).all()
