"""A writer whose store was removed or replaced under it: it stops, and touches no other's."""

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import stores
from tests.support.runs import TINY_MEMORY, Loop
from thimble_zarr import Recorder
from thimble_zarr.errors import RecordingError, StoreError, StoreLockedError
from thimble_zarr.format.reader import State
from thimble_zarr.store.files.disk import LocalWriter
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.integrity.verify import verify
from thimble_zarr.store.keys import HOLDER
from thimble_zarr.store.lock import Holder, WriterLock, recording_of
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.writer import StoreWriter

GONE = r"run\.zarr was removed or replaced while it was recorded"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


def snapshot(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("n_committed", [0, 3])
@pytest.mark.parametrize(
    "act",
    [StoreWriter.close, StoreWriter.discard, lambda stale: stores.commit(stale, 4)],
    ids=["close", "discard", "commit"],
)
def test_a_stale_writer_leaves_the_other_store_alone(
    path: Path, act: Callable[[StoreWriter], None], n_committed: int
) -> None:
    stale = stores.create(path)
    if n_committed:
        stores.commit(stale, n_committed)
    shutil.rmtree(path)
    writer = stores.create(path)
    stores.commit(writer, 4)
    before = snapshot(path)
    with pytest.raises(StoreError, match=GONE):
        act(stale)
    stale.release()
    assert snapshot(path) == before
    assert (stale.n_rows, stale.last_step) == (0, -1)
    with pytest.raises(StoreLockedError):
        stores.StoreWriter.create(path, stores.SCHEMA, overwrite=True)
    stores.commit(writer, 8)
    writer.close()
    assert verify(path).holds
    assert stores.check_rows(path) == 8


def test_a_stale_writer_begins_no_store_where_none_is(path: Path) -> None:
    stale = stores.create(path)
    shutil.rmtree(path)
    for act in (lambda: stores.commit(stale, 4), stale.close):
        with pytest.raises(StoreError, match=GONE):
            act()
    assert not path.exists()


@pytest.mark.parametrize("n_steps", [0, 1, 10], ids=["no step", "rows in memory", "committed"])
def test_a_stale_recorder_ends_and_costs_the_later_run_nothing(path: Path, n_steps: int) -> None:
    first, second = Loop(), Loop()
    stale = Recorder(path, first.optimizer, parameter=first.weight, memory_bytes=TINY_MEMORY)
    for _ in range(n_steps):
        first.step()
    if n_steps > 1:
        stale.flush()
    shutil.rmtree(path)
    recorder = Recorder(path, second.optimizer, parameter=second.weight, memory_bytes=TINY_MEMORY)
    for _ in range(10):
        second.step()
    recorder.close()
    before = snapshot(path)
    with pytest.raises(RecordingError, match=GONE) as raised:
        stale.close()
    assert "safe" not in str(raised.value)
    assert snapshot(path) == before
    first.step()  # its hooks are gone
    assert stale.step == n_steps
    WriterLock(path).release()  # and so is its lock
    assert StoreReader.open(path).n_rows == 11


def test_a_store_that_is_replaced_during_a_commit_is_not_committed_to(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = stores.create(path)

    def settle(disk: LocalWriter) -> None:
        monkeypatch.undo()
        disk.settle()
        shutil.rmtree(path)
        writer = stores.create(path)
        stores.commit(writer, 4)
        writer.close()

    monkeypatch.setattr(LocalWriter, "settle", settle)
    with pytest.raises(StoreError, match=GONE):
        stores.commit(stale, 3)
    stale.release()
    assert verify(path).holds
    assert stores.check_rows(path) == 4


def test_a_stale_lock_keeps_the_other_name(path: Path) -> None:
    stale = stores.create(path)
    shutil.rmtree(path)
    writer = stores.create(path)
    stale.release()
    assert Holder.read(LocalFiles(path)) is not None
    writer.release()
    assert not (path / HOLDER).exists()


@pytest.mark.parametrize("can_tell", [True, False])
def test_who_records_is_told_with_and_without_the_lock(
    path: Path, monkeypatch: pytest.MonkeyPatch, *, can_tell: bool
) -> None:
    """Not every system tells who holds a lock; then the name of the writer does."""
    if not can_tell:
        monkeypatch.setattr("thimble_zarr.store.lock._is_locked", lambda store: None)
    writer = stores.create(path)
    assert str(recording_of(LocalFiles(path))).startswith(
        f"being recorded by process {os.getpid()}"
    )
    name = (path / HOLDER).read_text()
    writer.release()
    assert str(recording_of(LocalFiles(path))) == "cut off: it has no writer"
    (path / HOLDER).write_text(name)  # the process goes on, but does not record
    state = State.CUT_OFF if can_tell else State.RECORDING
    assert recording_of(LocalFiles(path)).state is state


def test_files_without_numbers_are_not_taken_for_another(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems do not number their files: there a writer must not stop."""
    devices = itertools.count()

    def lstat(file: Path) -> os.stat_result:
        found = os.lstat(file)
        return os.stat_result((found.st_mode, 0, next(devices), *found[3:]))

    monkeypatch.setattr(Path, "lstat", lstat)
    writer = stores.create(path)
    for n_rows in (4, 8):
        stores.commit(writer, n_rows)
    writer.close()
    monkeypatch.undo()
    assert stores.check_rows(path) == 8
