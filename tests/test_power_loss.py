"""Power is lost at any point of a recording: what `flush` returned for is there, and is right."""

from pathlib import Path

import pytest

from tests.support import power, stores
from thimble_zarr.errors import DamagedStoreError, NotAStoreError
from thimble_zarr.store.files import disk as disk_module
from thimble_zarr.store.integrity.repair import repair
from thimble_zarr.store.integrity.verify import verify
from thimble_zarr.store.keys import COMMIT
from thimble_zarr.store.reader import StoreReader

EVERY = {"plain": 47, "predicted": 127}
"""Of some 1300 calls the power is lost after one in so many, with every policy. `make soak`: 1. The
coding changes which files there are, and not how they get to the disk."""


@pytest.fixture
def logged(
    coding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, list[power.Call]]:
    """A recording in a directory that is new itself, and what the disk was asked for."""
    system = power.LoggedOs()
    with monkeypatch.context() as patch:
        patch.setattr(disk_module, "os", system)
        return record(tmp_path / "disk/new/run.zarr", system), system.log


def record(path: Path, system: power.LoggedOs) -> Path:
    writer = stores.create(path)
    for n_rows in stores.COMMITS:
        stores.commit(writer, n_rows)
        system.note(str(n_rows))
    writer.close()
    system.note("closed")
    return path


def lose_power(path: Path, log: list[power.Call], policy: str, target: Path) -> int:
    """Check what a power loss behind the log leaves; return the rows that are there."""
    notes = [call.name for call in log if call.kind == "note"]
    promised = max([0, *(int(note) for note in notes if note != "closed")])
    power.lay_out(power.left_after(log, policy, seed=len(log)), path, target)
    try:
        n_rows = stores.check_rows(target)
    except (NotAStoreError, DamagedStoreError):
        assert not promised
        return 0
    assert n_rows >= promised
    assert StoreReader.open(target).commit.complete or "closed" not in notes
    verified = verify(target)
    assert verified.holds, verified.findings
    if n_rows and verified.findings:
        repair(target)
        assert stores.check_rows(target) == n_rows
        assert verify(target).findings == []
    return n_rows


def cuts(log: list[power.Call], every: int) -> list[int]:
    """Return where to cut the log: now and then, and around every note."""
    notes = [index for index, call in enumerate(log) if call.kind == "note"]
    around = {index + shift for index in notes for shift in (-4, -2, -1, 0, 1)}
    return sorted({*range(0, len(log), every), *around, len(log)} - {-1, -2, -3, -4})


def sweep(path: Path, log: list[power.Call], directory: Path, every: int) -> int:
    """Lose power at many points in every way; return in how many different states of the disk."""
    seen = set()
    for cut in cuts(log, every):
        for policy in power.POLICIES:
            left = power.left_after(log[:cut], policy, seed=cut)
            state = (hash(tuple(sorted(left.items()))), cut in cuts(log, len(log)))
            if state not in seen:
                seen.add(state)
                try:
                    lose_power(path, log[:cut], policy, directory / f"{cut}-{policy}")
                except Exception as error:
                    error.add_note(f"{policy} left of what was not synced in call {cut}")
                    raise
    return len(seen)


@stores.both_codings
def test_what_was_flushed_survives(
    logged: tuple[Path, list[power.Call]], tmp_path: Path, coding: str
) -> None:
    path, log = logged
    assert stores.check_rows(path) == stores.N_ROWS
    assert sweep(path, log, tmp_path, EVERY[coding]) > 30


@pytest.mark.parametrize(
    ("kind", "only"),
    [("sync", "W"), ("sync", ".thimble"), ("sync directory", "W"), ("sync directory", ".thimble")],
)
def test_a_sync_that_is_left_out_is_found(
    logged: tuple[Path, list[power.Call]], tmp_path: Path, kind: str, only: str
) -> None:
    """The test above would notice: each of these is needed."""
    path, log = logged
    directory = str(path / only)
    of_files = {call.file for call in log if call.kind == "name" and call.directory == directory}
    faulty = [
        call
        for call in log
        if call.kind != kind or not (call.file in of_files or call.directory == directory)
    ]
    assert len(faulty) < len(log)
    losses = 0
    for policy in power.POLICIES:
        try:
            lose_power(path, faulty, policy, tmp_path / policy)
        except (AssertionError, DamagedStoreError, NotAStoreError):
            losses += 1
    assert losses


def test_overwriting_never_mixes_two_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old commit record goes before anything else of the old store does."""
    path = tmp_path / "run.zarr"
    stores.write_run(path)
    removed: list[str] = []
    real = disk_module.sync_directory

    def sync_directory(directory: Path) -> None:
        if not (path / COMMIT).exists():
            removed.append("W" if not (path / "W/c.0.0.0").exists() else COMMIT)
        real(directory)

    monkeypatch.setattr(disk_module, "sync_directory", sync_directory)
    stores.StoreWriter.create(path, stores.SCHEMA, overwrite=True).release()
    assert removed[:2] == [COMMIT, "W"]
