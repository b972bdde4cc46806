"""Recordings that are killed, run out of disk or are cut off otherwise: what is left of them."""

import errno
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support import crashing, stores
from tests.support.runs import TINY_MEMORY, History, Loop, record
from thimble_zarr import Recorder
from thimble_zarr.analysis.audit.accounting import accounting
from thimble_zarr.analysis.dataset.open import open_dataset
from thimble_zarr.bits import decode
from thimble_zarr.errors import (
    DamagedStoreError,
    NotAStoreError,
    RecordingError,
    StoreError,
    StoreLockedError,
)
from thimble_zarr.format.reader import State
from thimble_zarr.store.files import disk as disk_module
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.integrity.repair import repair
from thimble_zarr.store.integrity.verify import verify
from thimble_zarr.store.lock import recording_of
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.writer import StoreWriter

N_KILLS = {"plain": 10, "predicted": 4}
"""`make soak`: 200."""

N_CUT = {"plain": 3, "predicted": 1}
"""So many at least are killed while they record."""

N_STEPS = 30

EVERY = {"plain": 83, "predicted": 127}
"""One call of the system in so many fails. `make soak`: each."""


# --- SIGKILL -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[crashing.Server]:
    with crashing.server() as running:
        yield running


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> History:
    """What every one of the runs sees, as far as it comes."""
    return record(tmp_path_factory.mktemp("truth") / "run.zarr", n_steps=N_STEPS)


def check_against(path: Path, truth: History, promised: int) -> int:
    """Compare what is left of a run with what it saw; return the rows that are there."""
    try:
        reader = StoreReader.open(path)
    except (NotAStoreError, DamagedStoreError):
        assert promised == 0
        return 0
    n_rows = reader.n_rows
    assert n_rows >= promised + 1 or promised == 0
    for name, native in reader.schema.dtypes.items():
        rows = decode(reader.read(name, (0, n_rows)), native, np.float64)
        np.testing.assert_array_equal(rows, truth[name][:n_rows])
    if n_rows:
        losses = reader.read_scalars()["loss"]
        np.testing.assert_array_equal(losses[1:], truth.losses[: n_rows - 1])
        assert list(reader.integrity.altered_chunks((0, n_rows))) == []
    verified = verify(path)
    assert verified.holds, verified.findings
    return n_rows


def kill_one(
    server: crashing.Server,
    truth: History,
    directory: Path,
    delay_s: float | None,
    coding: str = "plain",
) -> tuple[int, bool]:
    """Kill a recording, check and repair what is left; return its rows and if it left anything."""
    directory.mkdir()
    path, said = directory / "run.zarr", directory / "promised"
    pid = server.start("record", path, said, N_STEPS, coding)
    if delay_s is not None:
        crashing.kill_after(pid, delay_s)
    assert server.wait(pid) in (0, -signal.SIGKILL)
    promises = said.read_text().split("\n")[:-1] if said.exists() else []
    n_rows = check_against(path, truth, int(promises[-1]) if promises else 0)
    left = bool(n_rows and verify(path).findings)
    if n_rows:
        repair(path)
        assert verify(path).findings == []
        assert check_against(path, truth, n_rows - 1) == n_rows
    return n_rows, left


def kill_many(
    server: crashing.Server, truth: History, directory: Path, n_kills: int, coding: str = "plain"
) -> list[tuple[int, bool]]:
    """Kill at random moments of the time that a whole run takes."""
    rng = random.Random(0)
    start_s = time.perf_counter()
    assert kill_one(server, truth, directory / "whole", None, coding) == (N_STEPS + 1, False)
    whole_s = time.perf_counter() - start_s
    return [
        kill_one(server, truth, directory / str(index), rng.uniform(0, 0.8 * whole_s), coding)
        for index in range(n_kills)
    ]


@stores.both_codings
def test_a_killed_recording_keeps_what_was_flushed(
    server: crashing.Server, truth: History, tmp_path: Path, coding: str
) -> None:
    found = kill_many(server, truth, tmp_path, N_KILLS[coding], coding)
    n_cut = sum(0 < n_rows <= N_STEPS for n_rows, _ in found)
    assert n_cut >= N_CUT[coding]


def test_the_books_of_a_killed_recording_balance(
    server: crashing.Server, truth: History, tmp_path: Path
) -> None:
    path, said = tmp_path / "run.zarr", tmp_path / "promised"
    pid = server.start("record", path, said, N_STEPS)
    while not said.exists() or said.read_text().count("\n") < 3:
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    server.wait(pid)
    assert check_against(path, truth, 21) >= 22
    table = accounting(open_dataset(path), replay=True)
    assert int(table.n_different.sum()) == 0


def test_the_second_writer_is_told_who_the_first_one_is(
    server: crashing.Server, tmp_path: Path
) -> None:
    path, said = tmp_path / "run.zarr", tmp_path / "promised"
    pid = server.start("record", path, said, 1_000_000)
    while not said.exists() or not said.read_text():
        time.sleep(0.005)
    loop = Loop()
    for call in (
        lambda: Recorder(path, loop.optimizer, parameter=loop.weight, overwrite=True),
        lambda: repair(path),
    ):
        with pytest.raises(StoreLockedError, match=rf"process {pid} on \S+ \(since 20\S+\) is rec"):
            call()
    assert StoreReader.open(path).n_rows >= crashing.FLUSH_EVERY + 1  # readers are not kept out
    assert verify(path).holds
    assert recording_of(LocalFiles(path)).state is State.RECORDING
    os.kill(pid, signal.SIGKILL)
    server.wait(pid)
    assert str(StoreReader.open(path).recording).startswith(
        f"cut off: its writer, process {pid} on "
    )
    # The lock of a dead writer blocks nobody, and its name says nothing any more.
    Recorder(path, loop.optimizer, parameter=loop.weight, overwrite=True).close()
    assert not path.exists()


# --- a disk that is full or broken ---------------------------------------------------------------


def stay_in_memory(descriptor: int) -> None:
    """Do not wait for the disk: whether one did shows only when the power is lost."""


class FaultyOs:
    """Stands in for `os` in `format.disk`: the n-th call of one kind fails, and all after it."""

    def __init__(self, kind: str, n_sound: int, code: int) -> None:
        self.n_calls = 0
        self._kind, self._n_sound, self._code = kind, n_sound, code

    def __getattr__(self, name: str) -> object:
        real = getattr(os, name)
        if name != self._kind:
            return stay_in_memory if name == "fsync" else real

        def call(*args: object) -> object:
            self.n_calls += 1
            if self.n_calls > self._n_sound:
                raise OSError(self._code, os.strerror(self._code))
            return None if name == "fsync" else real(*args)

        return call


def fail_at(path: Path, kind: str, n_sound: int, code: int) -> bool:
    """Write a run until a call fails; check what is left. Return whether any call failed."""
    system, committed = FaultyOs(kind, n_sound, code), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_module, "os", system)
        try:
            writer = stores.create(path)
            try:
                for n_rows in stores.COMMITS:
                    stores.commit(writer, n_rows)
                    committed = n_rows
                writer.close()
            finally:
                writer.release()
        except (OSError, StoreError) as error:
            failed = str(error)
        else:
            failed = ""
    assert not failed or os.strerror(code) in failed
    if committed:
        assert stores.check_rows(path) >= committed
        assert verify(path).holds
        repair(path)
        assert verify(path).findings == []
        assert stores.check_rows(path) >= committed
    assert not [thread for thread in threading.enumerate() if "thimble-zarr-writer" in thread.name]
    return bool(failed)


def fail_everywhere(directory: Path, kind: str, code: int, every: int) -> int:
    """Let every call of a kind fail in turn; return how many there are."""
    n_sound = 0
    while fail_at(directory / f"{kind}-{n_sound}", kind, n_sound, code):
        n_sound += every
    return n_sound


CALLS = {
    "write": errno.ENOSPC,
    "fsync": errno.EIO,
    "replace": errno.EIO,
    "mkdir": errno.ENOSPC,
    "open": errno.EMFILE,
    "ftruncate": errno.EIO,
    "close": errno.EIO,
}


@stores.both_codings
@pytest.mark.parametrize("kind", CALLS)
def test_a_call_that_fails_costs_nothing_that_was_committed(
    tmp_path: Path, kind: str, coding: str
) -> None:
    every = {"ftruncate": 1, "mkdir": 9}.get(kind, EVERY[coding])
    assert fail_everywhere(tmp_path, kind, CALLS[kind], every) > every


@pytest.mark.parametrize("kind", ["write", "fsync", "replace"])
def test_training_is_told_of_a_disk_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path, loop = tmp_path / "run.zarr", Loop()
    n_declared = 40  # calls that declare the store
    monkeypatch.setattr(disk_module, "os", FaultyOs(kind, n_declared + 90, CALLS[kind]))
    taken = []

    def run() -> None:
        with Recorder(path, loop.optimizer, parameter=loop.weight, memory_bytes=TINY_MEMORY):
            for step in range(400):
                loop.step()
                taken.append(step)

    with pytest.raises(RecordingError, match=os.strerror(CALLS[kind])):
        run()
    assert 0 < StoreReader.open(path).n_rows < len(taken) < 400
    assert verify(path).holds


def test_a_file_that_may_not_grow_stops_the_recording(
    server: crashing.Server, tmp_path: Path
) -> None:
    path, said = tmp_path / "run.zarr", tmp_path / "promised"
    pid = server.start("record_with_small_files", path, said, 60_000)
    assert server.wait(pid) == 17
    assert StoreReader.open(path).n_rows > 4
    assert verify(path).holds


@pytest.mark.parametrize("error", [MemoryError("no memory"), RuntimeError("a bug"), SystemExit(1)])
def test_a_writer_thread_that_dies_stops_training_at_its_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path, loop = tmp_path / "run.zarr", Loop()
    real, calls = StoreWriter.commit_block, []

    def commit_block(writer: StoreWriter, *args: object, **told: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise error
        real(writer, *args, **told)

    monkeypatch.setattr(StoreWriter, "commit_block", commit_block)

    def run() -> None:
        with Recorder(path, loop.optimizer, parameter=loop.weight, memory_bytes=TINY_MEMORY):
            for _ in range(400):
                loop.step()

    with pytest.raises(RecordingError, match=r"stopped: .*steps 0 to 3 are committed and safe"):
        run()
    assert StoreReader.open(path).n_rows == 4
    assert verify(path).holds
