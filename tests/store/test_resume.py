"""A recording that was cut off goes on, and is then the one that was never cut off."""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from benchmarks.resume import differing_files
from tests.support import stores
from tests.support.faults import flip_in_place
from tests.support.runs import N_STEPS, TINY_MEMORY, Loop, token_labels
from thimble_zarr import Recorder, TokenLabels, accounting, every, open_dataset
from thimble_zarr.cli.main import cli
from thimble_zarr.errors import (
    ConfigError,
    DamagedStoreError,
    NotAStoreError,
    RecordingError,
    ResumeError,
    StoreError,
    StoreExistsError,
    StoreLockedError,
)
from thimble_zarr.store import writer as writer_module
from thimble_zarr.store.files import disk
from thimble_zarr.store.integrity.verify import verify
from thimble_zarr.store.keys import COMMIT, LEDGER, LOCK
from thimble_zarr.store.metadata import declare
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.resume import plan_cut
from thimble_zarr.store.writer import StoreWriter

BLOCK_STEPS = 4

MEMORY = {"plain": TINY_MEMORY, "predicted": 10_000}
"""Makes blocks of four steps."""


class Run:
    """A toy run that can be brought to any step, and recorded from there.

    Its losses are logged after the step, but before it with `loss_first`.
    """

    def __init__(self, *, loss_first: bool = False, **options: object) -> None:
        self.loop = Loop(**options)
        self.loss_first = loss_first
        self.step = 0

    def go_to(self, step: int, recorder: Recorder | None = None) -> "Run":
        for _ in range(self.step, step):
            loss = self.loop.backward()
            if recorder is not None and self.loss_first:
                recorder.log(loss=loss)
            self.loop.optimizer.step()
            if recorder is not None and not self.loss_first:
                recorder.log(loss=loss)
            self.loop.optimizer.zero_grad()
        self.step = step
        return self

    def recorder(self, path: Path, **options: object) -> Recorder:
        coding = stores.SCHEMA.coding.name
        given = {"labels": token_labels(), "memory_bytes": MEMORY[coding], "coding": coding}
        given |= options
        return Recorder(path, self.loop.optimizer, parameter=self.loop.weight, **given)


def kill(recorder: Recorder) -> None:
    """Leave a store as a killed process does: blocks that were passed on may be committed."""
    recorder._hooks.remove()
    recorder._forget()
    recorder._writer.stop()
    recorder._store.release()


def killed(path: Path, step: int, *, flushed: int | None = None, **options: object) -> Path:
    """Record up to a step and kill it, with all rows committed up to `flushed`."""
    run = Run(**options)
    recorder = run.recorder(path)
    if flushed is not None:
        run.go_to(flushed, recorder)
        recorder.flush()
    run.go_to(step, recorder)
    kill(recorder)
    return path


def whole(path: Path, n_steps: int = N_STEPS, **options: object) -> Path:
    """Record a run that nothing happens to."""
    run = Run(**options)
    with run.recorder(path) as recorder:
        run.go_to(n_steps, recorder)
    return path


def go_on(path: Path, *, after_step: int | None = None, n_steps: int = N_STEPS) -> None:
    """Resume a toy run as its loop would, with the right checkpoint, and end it."""
    step = StoreReader.open(path).n_rows - 1 if after_step is None else after_step
    run = Run().go_to(step)
    with run.recorder(path, resume=True, after_step=after_step) as recorder:
        assert recorder.next_step == step + 1
        run.go_to(n_steps, recorder)


@pytest.fixture(scope="module")
def reference(coding: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole(tmp_path_factory.mktemp(f"whole-{coding}") / "run.zarr")


def assert_sound(path: Path) -> None:
    """Every chunk is the committed one, and every row follows from the one before."""
    assert verify(path).findings == []
    table = accounting(open_dataset(path), replay=True)
    assert table.attrs["not_exact_because"] == ""
    assert int(table.n_different.sum()) == 0


# --- a run goes on -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "flushed", "committed"),
    [(2, 1, 1), (6, 5, 5), (6, None, 3), (9, 8, 8), (11, 11, 11), (8, 7, 7)],
    ids=["first block", "in a block", "blocks only", "one row", "block end", "block end, then one"],
)
@stores.both_codings
def test_a_killed_run_ends_as_one_that_was_not(
    tmp_path: Path, reference: Path, step: int, flushed: int | None, committed: int
) -> None:
    path = killed(tmp_path / "run.zarr", step, flushed=flushed)
    assert StoreReader.open(path).n_rows - 1 == committed
    go_on(path)
    assert differing_files(reference, path) == []
    assert StoreReader.open(path).read_history().resumed_after == [committed]
    assert_sound(path)


@pytest.mark.parametrize("after_step", [0, 2, 3, 4, 7, 9])
@stores.both_codings
def test_a_loop_goes_on_from_an_older_checkpoint(
    tmp_path: Path, reference: Path, after_step: int
) -> None:
    path = killed(tmp_path / "run.zarr", 10, flushed=9)
    go_on(path, after_step=after_step)
    assert differing_files(reference, path) == []


@stores.both_codings
@pytest.mark.usefixtures("coding")
def test_later_rows_are_gone_as_soon_as_a_run_goes_on(tmp_path: Path) -> None:
    path = killed(tmp_path / "run.zarr", 10, flushed=9)
    run = Run().go_to(2)
    kill(run.recorder(path, resume=True, after_step=2))
    assert StoreReader.open(path).n_rows == 3
    assert verify(path).findings == []
    assert not (path / "W/c.1.0.0").exists()
    assert accounting(open_dataset(path)).sizes["step"] == 2


def test_a_finished_run_goes_on(tmp_path: Path, reference: Path) -> None:
    path = whole(tmp_path / "run.zarr", 6)
    assert StoreReader.open(path).commit.complete
    run = Run().go_to(6)
    recorder = run.recorder(path, resume=True)
    assert not StoreReader.open(path).commit.complete
    run.go_to(N_STEPS, recorder)
    recorder.close()
    assert differing_files(reference, path) == []


def test_a_run_that_goes_on_for_no_step_is_closed_as_it_was(tmp_path: Path) -> None:
    path, expected = whole(tmp_path / "run.zarr", 6), whole(tmp_path / "other.zarr", 6)
    go_on(path, n_steps=6)
    assert differing_files(expected, path) == []
    go_on(path, after_step=5, n_steps=5)
    assert differing_files(whole(tmp_path / "five.zarr", 5), path) == []


def declare_level_5(*args: object) -> object:
    return json.loads(json.dumps(declare(*args)).replace('"clevel": 9', '"clevel": 5'))


def test_a_run_that_was_declared_with_another_level_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an earlier version did: what is declared is what the ledger has a copy of."""
    with monkeypatch.context() as earlier:
        earlier.setattr(writer_module, "declare", declare_level_5)
        killed(tmp_path / "run.zarr", 6, flushed=6)
    go_on(tmp_path / "run.zarr")
    assert StoreReader.open(tmp_path / "run.zarr").arrays.declared("W").compression.level == 5
    assert verify(tmp_path / "run.zarr").findings == []


@stores.both_codings
def test_it_goes_on_again_and_again(tmp_path: Path, reference: Path) -> None:
    path = killed(tmp_path / "run.zarr", 2, flushed=1)
    for step in (3, 6, 7, 9):
        run = Run().go_to(StoreReader.open(path).n_rows - 1)
        recorder = run.recorder(path, resume=True)
        run.go_to(step, recorder)
        recorder.flush()
        kill(recorder)
    go_on(path, after_step=5)
    assert differing_files(reference, path) == []
    assert StoreReader.open(path).read_history().resumed_after == [1, 3, 6, 7, 5]
    assert_sound(path)


CHOICES = {"variables": ("W", "exp_avg", "exp_avg_sq"), "tokens": [10, 2, 7]}


def record_chosen(path: Path, step: int, **options: object) -> Path:
    """Record some rows and variables up to a step, of which the last is not committed."""
    run = Run()
    recorder = run.recorder(path, **{**CHOICES, **options})
    run.go_to(step - 1, recorder)
    recorder.flush()
    run.go_to(step, recorder)
    kill(recorder)
    return path


def test_chosen_variables_and_tokens_go_on(tmp_path: Path) -> None:
    run = Run()
    with run.recorder(tmp_path / "whole.zarr", **CHOICES) as recorder:
        run.go_to(N_STEPS, recorder)
    path = record_chosen(tmp_path / "run.zarr", 7)
    run = Run().go_to(6)
    with run.recorder(path, resume=True, **CHOICES) as recorder:
        assert (recorder.step, recorder.next_step, recorder.committed_step) == (6, 7, 6)
        run.go_to(N_STEPS, recorder)
    assert differing_files(tmp_path / "whole.zarr", path) == []
    assert verify(path).findings == []
    assert open_dataset(path).token.values.tolist() == [2, 7, 10]
    assert int(accounting(open_dataset(path), replay=False).n_beyond_rounding.sum()) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": [2, 7, 9]}, r"another run: ids of tokens: 10 recorded, 9 now;"),
        ({"tokens": None}, r"another run: tokens: 3 of 11 recorded, all now;"),
        ({"tokens": [2, 7]}, r"another run: tokens: 3 of 11 recorded, 2 of 11 now;"),
        (
            {"variables": None},
            r"another run: variables: W, exp_avg, exp_avg_sq recorded, "
            r"W, grad, exp_avg, exp_avg_sq now;",
        ),
        (
            {"variables": ["W"], "tokens": None},
            r"run: tokens: 3 of 11 recorded, all now; variables: W, exp_avg, exp_avg_sq recorded, "
            r"W now; make",
        ),
        ({"schedule": every(2)}, r"another run: schedule: none recorded, every\(2\) now;"),
    ],
)
def test_other_choices_are_refused(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    path = record_chosen(tmp_path / "run.zarr", 7)
    before = unchanged(path)
    with pytest.raises(ResumeError, match=message):
        Run().go_to(6).recorder(path, resume=True, **{**CHOICES, **options})
    assert unchanged(path) == before


def test_a_chosen_row_with_another_bit_is_refused(tmp_path: Path) -> None:
    path = record_chosen(tmp_path / "run.zarr", 7)
    run = Run().go_to(6)
    run.loop.weight.data[7, 3] += 1
    with pytest.raises(ResumeError, match=r"\(W differs in 1 of 15 elements\)"):
        run.recorder(path, resume=True, **CHOICES)


def test_a_recording_with_a_schedule_does_not_go_on(tmp_path: Path) -> None:
    path = record_chosen(tmp_path / "run.zarr", 8, schedule=every(3))
    before = unchanged(path)
    for after_step in (None, 6):
        run = Run().go_to(6)
        with pytest.raises(ResumeError, match=r"steps of the schedule every\(3\) only"):
            run.recorder(path, resume=True, after_step=after_step, schedule=every(3), **CHOICES)
    assert unchanged(path) == before
    with run.recorder(tmp_path / "new.zarr", resume=True, schedule=every(3)) as recorder:
        assert recorder.next_step == 1  # nothing lies there yet


def test_losses_that_are_logged_before_the_step_stay_with_it(tmp_path: Path) -> None:
    expected = whole(tmp_path / "whole.zarr", loss_first=True)
    path = killed(tmp_path / "run.zarr", 6, flushed=5, loss_first=True)
    run = Run(loss_first=True).go_to(5)
    with run.recorder(path, resume=True) as recorder:
        run.go_to(N_STEPS, recorder)
    assert differing_files(expected, path) == []


def test_per_step_values_go_on_in_the_middle_of_their_chunk_and_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("schema", "layout"):
        monkeypatch.setattr(f"thimble_zarr.format.{module}.SCALAR_CHUNK_STEPS", 8)
    expected = whole(tmp_path / "whole.zarr", 29)
    for after_step in (13,):
        path = killed(tmp_path / f"{after_step}.zarr", 26, flushed=25)
        kill(Run().go_to(after_step).recorder(path, resume=True, after_step=after_step))
        reader = StoreReader.open(path)
        assert list(reader.integrity.altered_chunks((0, reader.n_rows))) == []
        go_on(path, n_steps=29)
        assert differing_files(expected, path) == []


@stores.both_codings
def test_several_parameters_go_on_together(tmp_path: Path, coding: str) -> None:
    def recorded(path: Path, start: int, stop: int, **options: object) -> None:
        run = Run(dtype=torch.float32, amsgrad=True).go_to(start)
        model = nn.ModuleDict({"embedding": run.loop.embedding, "head": run.loop.head})
        with Recorder(
            path,
            run.loop.optimizer,
            parameters=["*.weight", "head.bias"],
            model=model,
            memory_bytes=20_000,
            coding=coding,
            **options,
        ) as recorder:
            run.go_to(stop, recorder)

    recorded(tmp_path / "whole.zarr", 0, 11)
    recorded(tmp_path / "run.zarr", 0, 7)
    recorded(tmp_path / "run.zarr", 5, 11, resume=True, after_step=5)
    assert differing_files(tmp_path / "whole.zarr", tmp_path / "run.zarr") == []
    with pytest.raises(ResumeError, match=r"run: parameters: embedding\.weight, head\.weight"):
        Run(dtype=torch.float32, amsgrad=True).recorder(tmp_path / "run.zarr", resume=True)


def test_it_begins_where_nothing_lies(tmp_path: Path, reference: Path) -> None:
    path = tmp_path / "run.zarr"
    run = Run()
    with run.recorder(path, resume=True) as recorder:
        assert recorder.next_step == 1
        run.go_to(N_STEPS, recorder)
    assert differing_files(reference, path) == []
    assert StoreReader.open(path).read_history().resumed_after == []


@pytest.mark.parametrize("left", ["declared", "locked only", "first block not committed"])
def test_it_begins_where_nothing_was_committed(tmp_path: Path, reference: Path, left: str) -> None:
    path = tmp_path / "run.zarr"
    kill(Run().recorder(path))
    if left == "locked only":
        for entry in path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        (path / LOCK).parent.mkdir()
        (path / LOCK).touch()
    elif left == "first block not committed":
        (path / LEDGER).write_bytes(b'{"rows": [0, 4], "files"')
        (path / "W/c.0.0.0.partial").write_bytes(b"torn")
    run = Run()
    with run.recorder(path, resume=True) as recorder:
        run.go_to(N_STEPS, recorder)
    assert differing_files(reference, path) == []


def test_what_took_time_and_was_said_of_the_run_stays(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    run = Run()
    with run.recorder(path, attrs={"seed": 7}) as recorder:
        run.go_to(6, recorder)
    before = StoreReader.open(path).schema
    go_on(path)
    reader = StoreReader.open(path)
    assert (reader.schema.created, reader.schema.attrs) == (before.created, {"seed": 7})
    spent = reader.read_history().overhead
    assert sum(one.n_steps for one in spent.values()) == N_STEPS
    assert all(one.elapsed_s < 600 for one in spent.values())
    assert json.loads((path / "zarr.json").read_text())["attributes"]["thimble"]["attrs"]


@stores.both_codings
@pytest.mark.usefixtures("coding")
def test_a_reader_keeps_what_it_sees_while_a_run_goes_on(tmp_path: Path) -> None:
    path = killed(tmp_path / "run.zarr", 10, flushed=9)
    early = StoreReader.open(path)
    values = early.read("W", (0, 10)).copy()
    go_on(path)
    np.testing.assert_array_equal(early.read("W", (0, 10)), values)
    assert list(early.integrity.altered_chunks((0, 10))) == []


# --- what a killed writer left -------------------------------------------------------------------


CALLS = ("open", "write", "replace", "ftruncate", "unlink")

STRIDE = 41
"""Calls from one place where work is cut off to the next; 1 takes minutes."""


class Failing:
    """Stands in for `os` in `format.disk`: its n-th call fails, and so do all later ones.

    A killed process leaves its files to the system, so it waits for no disk.
    """

    def __init__(self, n_calls: float) -> None:
        self.n_calls = n_calls
        self.n_called = 0

    def __getattr__(self, name: str) -> object:
        found = getattr(os, name)
        if name not in CALLS:
            return found if name != "fsync" else lambda descriptor: None

        def call(*arguments: object) -> object:
            self.n_called += 1
            if self.n_called > self.n_calls:
                raise OSError(errno.EIO, "the process was killed")
            return found(*arguments)

        return call


def cut_off_everywhere(work: Callable[[str, Failing], object]) -> None:
    """Do work once whole, and then once for each place where it is cut off."""
    whole = Failing(math.inf)
    work("whole", whole)
    assert whole.n_called > STRIDE
    renaming = (whole.n_called - 26, whole.n_called - 21)  # some files have their names by then
    for n_calls in (*range(0, whole.n_called, STRIDE), *renaming):
        failing = Failing(n_calls)
        with pytest.raises((OSError, RecordingError)):
            work(str(n_calls), failing)


@stores.both_codings
def test_a_commit_that_was_cut_off_anywhere_is_gone_on_with(
    tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = []

    def commit(name: str, failing: Failing) -> None:
        paths.append(tmp_path / f"{name}.zarr")
        run = Run()
        recorder = run.recorder(paths[-1])
        run.go_to(5, recorder)
        recorder.flush()
        monkeypatch.setattr(disk, "os", failing)
        try:
            run.go_to(6, recorder)  # rows 4 to 6 are committed again, and so are all scalars
            recorder.flush()
        finally:
            kill(recorder)
            monkeypatch.setattr(disk, "os", os)

    cut_off_everywhere(commit)
    committed = set()
    for number, path in enumerate(paths):
        step = StoreReader.open(path).n_rows - 1
        committed.add(step)
        kill(Run().go_to(step).recorder(path, resume=True))
        assert verify(path).findings == []
        go_on(path, after_step=4 if number % 3 == 1 else None)
        assert differing_files(reference, path) == [], path
        assert verify(path).findings == []
    assert committed == {5, 6}


@stores.both_codings
def test_going_on_can_be_cut_off_anywhere_and_begun_again(
    tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = whole(tmp_path / "source.zarr", 10)
    values = StoreReader.open(source).read("W", (0, 11)).copy()
    paths = []

    def resume(name: str, failing: Failing) -> None:
        paths.append(Path(shutil.copytree(source, tmp_path / f"{name}.zarr")))
        monkeypatch.setattr(disk, "os", failing)
        try:
            kill(Run().go_to(5).recorder(paths[-1], resume=True, after_step=5))
        finally:
            monkeypatch.setattr(disk, "os", os)

    cut_off_everywhere(resume)
    seen = set()
    for path in paths:
        reader = StoreReader.open(path)
        seen.add(reader.n_rows)
        np.testing.assert_array_equal(reader.read("W", (0, reader.n_rows)), values[: reader.n_rows])
        assert list(reader.integrity.altered_chunks((0, reader.n_rows))) == []
        assert verify(path).holds
        go_on(path)
        assert differing_files(reference, path) == [], path
    assert seen == {11, 6}


def test_a_store_with_other_rows_than_were_committed_is_not_gone_on_with(tmp_path: Path) -> None:
    path = killed(tmp_path / "run.zarr", 6, flushed=5)
    flip_in_place(path, "W", (2, 1, 1), 3)  # before the last row: nobody reads it again
    go_on(path)
    (altered,) = StoreReader.open(path).integrity.altered_chunks((0, N_STEPS + 1))
    assert (altered.variable, altered.first_row) == ("W", 0)


def test_a_ledger_that_is_not_the_committed_one_is_refused(tmp_path: Path) -> None:
    path = killed(tmp_path / "run.zarr", 6, flushed=5)
    content = bytearray((path / LEDGER).read_bytes())
    content[20] ^= 1
    (path / LEDGER).write_bytes(content)
    with pytest.raises(
        DamagedStoreError, match=r"ledger of .*/run.zarr: its line at byte 0: the checksum"
    ):
        Run().go_to(5).recorder(path, resume=True)


# --- what is refused -----------------------------------------------------------------------------


def unchanged(path: Path) -> dict[str, bytes]:
    names = (LOCK,)
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.relative_to(path).as_posix() not in names
    }


def assert_refused(path: Path, message: str, make: Callable[[], Recorder]) -> None:
    """The store is as it was, nothing listens to the optimizer, and the lock is free."""
    before = unchanged(path)
    with pytest.raises(ResumeError, match=message):
        make()
    assert unchanged(path) == before
    go_on(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float32}, r"another run: dtype: bfloat16 recorded, float32 now;"),
        ({"n_tokens": 13}, r"another run: shape: \(11, 5\) recorded, \(13, 5\) now;"),
        ({"amsgrad": True}, r"another run: optimizer.amsgrad: False recorded, True now;"),
        (
            {"foreach": True},
            r"another run: optimizer.implementation: single recorded, foreach now;",
        ),
        (
            {"optimizer": torch.optim.Adam},
            r"optimizer.name: AdamW recorded, Adam now; optimizer.decoupled_weight_decay: True",
        ),
    ],
    ids=["dtype", "shape", "amsgrad", "implementation", "optimizer"],
)
def test_another_run_is_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    path = killed(tmp_path / "run.zarr", 6, flushed=5, foreach=False)
    run = Run(**{"foreach": False} | options).go_to(5)
    n_tokens = len(run.loop.weight)
    before = unchanged(path)
    with pytest.raises(ResumeError, match=message):
        run.recorder(path, resume=True, labels=token_labels(n_tokens), memory_bytes=TINY_MEMORY)
    assert unchanged(path) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"memory_bytes": 50_000},
            r"another run: memory_bytes: blocks of 4 steps recorded, \d+ now;",
        ),
        ({"name": "wte"}, r"another run: name: none recorded, wte now;"),
        ({"labels": TokenLabels.from_counts(np.ones(11, int))}, r"the count of the tokens differs"),
        ({"after_step": 6}, r"after step 6: steps 0 to 5 are committed"),
        ({"after_step": -1}, r"after step -1: steps 0 to 5 are committed"),
    ],
    ids=["layout", "name", "labels", "later step", "no step"],
)
def test_other_options_are_refused(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    path = killed(tmp_path / "run.zarr", 6, flushed=5)
    run = Run().go_to(5)
    assert_refused(path, message, lambda: run.recorder(path, resume=True, **options))


def test_tokens_may_be_spelled_otherwise(tmp_path: Path) -> None:
    """The texts are for people; a later version may write control characters in another way."""
    path = killed(tmp_path / "run.zarr", 6, flushed=5)
    labels = replace(token_labels(), text=[f"<{token}>" for token in range(11)])
    run = Run().go_to(5)
    with run.recorder(path, resume=True, labels=labels) as recorder:
        run.go_to(8, recorder)
    assert StoreReader.open(path).n_rows == 9
    assert StoreReader.open(path).read_labels().text == token_labels().text


def test_another_torch_is_refused(tmp_path: Path) -> None:
    path = killed(tmp_path / "run.zarr", 6, flushed=5)
    schema = StoreReader.open(path).schema
    other = replace(schema, software={**schema.software, "torch": "1.0", "zarr": "9"}, created="")
    before = unchanged(path)
    with pytest.raises(ResumeError, match=r"another run: torch: 2\.\S+ recorded, 1.0 now;"):
        StoreWriter.resume(path, other)
    assert unchanged(path) == before


@pytest.mark.parametrize(
    ("stands_at", "after_step", "offered"),
    [
        (5, None, "with after_step=5, which drops steps 6 to 8"),
        (7, None, "with after_step=7, which drops step 8"),
        (0, 6, "with after_step=0, which drops steps 1 to 8"),
        (8, 6, "with after_step=8"),
    ],
)
def test_the_wrong_checkpoint_is_refused_and_the_right_step_named(
    tmp_path: Path, stands_at: int, after_step: int | None, offered: str
) -> None:
    path = killed(tmp_path / "run.zarr", 9, flushed=8)
    run = Run().go_to(stands_at)
    assert_refused(
        path,
        rf"after step {after_step or 8}: .*optimizer_step is {stands_at}, not {after_step or 8}; "
        rf"W differs in \d+ of 55 elements; .*resume from where they are, {offered}$",
        lambda: run.recorder(path, resume=True, after_step=after_step),
    )


@pytest.mark.parametrize("stands_at", [0, 5])
@pytest.mark.parametrize("name", ["W", "exp_avg_sq"])
def test_a_step_is_offered_only_where_all_that_is_recorded_of_it_is_there(
    tmp_path: Path, stands_at: int, name: str
) -> None:
    """To follow the offer would cost every later row."""
    path = killed(tmp_path / "run.zarr", 9, flushed=8)
    run = Run().go_to(stands_at)
    if name == "W":
        run.loop.weight.data[3, 2] += 1
    else:
        states = run.loop.optimizer.state[run.loop.weight]
        states[name] = states.get(name, torch.zeros_like(run.loop.weight)) + 1
    assert_refused(
        path,
        r"or that of an earlier one, and pass its step as after_step=; or another parameter of "
        r"that shape was passed than the one recorded$",
        lambda: run.recorder(path, resume=True),
    )


def test_another_parameter_is_offered_where_the_weights_differ_only(tmp_path: Path) -> None:
    path = killed(tmp_path / "run.zarr", 6, flushed=5)
    run = Run().go_to(5)
    run.loop.optimizer.state[run.loop.weight]["exp_avg"] += 1
    assert_refused(path, r"pass its step as after_step=$", lambda: run.recorder(path, resume=True))


def test_the_last_of_the_steps_that_the_optimizer_skipped_is_offered(tmp_path: Path) -> None:
    path, run = tmp_path / "run.zarr", Run().go_to(1)
    recorder = run.recorder(path)
    with pytest.warns(UserWarning, match="no gradient"):
        run.loop.optimizer.step()
    run.loop.optimizer.step()
    run.go_to(3, recorder)
    recorder.close()
    run = Run().go_to(1)
    with pytest.raises(ResumeError, match=r"after_step=2, which drops steps 3 to 4$"):
        run.recorder(path, resume=True)


class OnDevice(torch.Tensor):
    """A count that NumPy cannot have, as one on a GPU."""

    def __array__(self, *arguments: object, **options: object) -> np.ndarray:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def test_a_count_on_a_device_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = killed(tmp_path / "run.zarr", 9, flushed=8)
    run = Run().go_to(5)
    count = torch.tensor(5.0).as_subclass(OnDevice)
    monkeypatch.setattr("thimble_zarr.record.counting.StepCounter.count", lambda *of: count)
    with pytest.raises(ResumeError, match=r"optimizer_step is 5, not 8; .* with after_step=5,"):
        run.recorder(path, resume=True)


@pytest.mark.parametrize("name", ["W", "exp_avg", "exp_avg_sq"])
def test_one_bit_of_a_checkpoint_is_enough(tmp_path: Path, name: str) -> None:
    path = killed(tmp_path / "run.zarr", 6, flushed=5)
    run = Run().go_to(5)
    state = run.loop.optimizer.state[run.loop.weight]
    tensor = run.loop.weight.detach() if name == "W" else state[name]
    tensor.view(torch.int16)[3, 2] ^= 1
    assert_refused(
        path,
        rf"\({name} differs in 1 of 55 elements\)",
        lambda: run.recorder(path, resume=True),
    )


def test_an_optimizer_without_states_is_not_the_recorded_one(tmp_path: Path) -> None:
    path = killed(tmp_path / "run.zarr", 6, flushed=5)
    run = Run().go_to(5)
    run.loop.optimizer.state.clear()
    assert_refused(
        path,
        r"optimizer_step is 0, not 5; exp_avg differs",
        lambda: run.recorder(path, resume=True),
    )


def test_a_step_without_a_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="after step 5: nothing is recorded at"):
        Run().go_to(5).recorder(tmp_path / "none.zarr", resume=True, after_step=5)
    assert not (tmp_path / "none.zarr").exists()


@pytest.mark.parametrize("options", [{"overwrite": True, "resume": True}, {"after_step": 3}])
def test_options_that_contradict_each_other_are_refused(
    tmp_path: Path, options: dict[str, object]
) -> None:
    with pytest.raises(ConfigError, match="choose one; `after_step` is for `resume`"):
        Run().recorder(tmp_path / "run.zarr", **options)


def test_a_store_that_is_recorded_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    run = Run()
    with run.recorder(path) as recorder:
        run.go_to(3, recorder)
        recorder.flush()
        with pytest.raises(StoreLockedError, match=f"process {os.getpid()}"):
            Run().go_to(3).recorder(path, resume=True)


def test_what_is_no_store_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(NotAStoreError):
        Run().recorder(tmp_path, resume=True)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_store_that_lost_its_commit_record_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    path = killed(tmp_path / "run.zarr", 6, flushed=5)
    (path / COMMIT).unlink()
    with pytest.raises(StoreError, match="no commit record"):
        Run().recorder(path, resume=True)
    assert (path / "W/c.1.0.0").exists()


def test_a_full_disk_leaves_the_store_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = killed(tmp_path / "run.zarr", 6, flushed=5)
    monkeypatch.setattr(disk, "os", Failing(0))
    with pytest.raises(StoreError, match="cannot resume"):
        Run().go_to(5).recorder(path, resume=True)
    monkeypatch.setattr(disk, "os", os)
    go_on(path)


def test_info_says_where_a_run_was_resumed(tmp_path: Path) -> None:
    path = killed(tmp_path / "run.zarr", 6, flushed=5)
    go_on(path)
    shown = CliRunner().invoke(cli, ["info", str(path)])
    assert "Resumed    after step 5\n" in shown.output
    content = CliRunner().invoke(cli, ["info", str(path), "--format", "json"]).output
    assert json.loads(content)["resumed_after"] == [5]


def test_a_store_in_the_way_is_not_gone_on_with_unasked(reference: Path) -> None:
    with pytest.raises(StoreExistsError):
        Run().recorder(reference)


def test_a_cut_that_was_not_committed_promises_nothing(tmp_path: Path) -> None:
    """Killed between the line that would cut the store off and the commit record."""
    stores.write_run(tmp_path / "run.zarr")
    readers = StoreReader.open_each(tmp_path / "run.zarr")
    with (tmp_path / "run.zarr" / LEDGER).open("ab") as ledger:
        ledger.write(plan_cut(readers, 3)[-1])
    assert stores.check_rows(tmp_path / "run.zarr") == stores.N_ROWS
    StoreWriter.resume(tmp_path / "run.zarr", stores.SCHEMA).release()
    assert stores.check_rows(tmp_path / "run.zarr") == stores.N_ROWS
    assert verify(tmp_path / "run.zarr").findings == []
