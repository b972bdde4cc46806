"""Files are there whole or not at all, and the caller waits for the disk once."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from thimble_zarr.format.overhead import Stopwatch
from thimble_zarr.store.files import disk as disk_module
from thimble_zarr.store.files.disk import LocalWriter


@pytest.fixture
def stopwatch() -> Stopwatch:
    return Stopwatch()


@pytest.fixture
def disk(stopwatch: Stopwatch, tmp_path: Path) -> Iterator[LocalWriter]:
    disk = LocalWriter(tmp_path, stopwatch)
    yield disk
    disk.close()


def test_files_are_replaced_whole(disk: LocalWriter, stopwatch: Stopwatch, tmp_path: Path) -> None:
    file = tmp_path / "a/b/file"
    assert disk.put("a/b/file", iter([b"one", b"", b"two"])) == 6
    disk.sync()
    assert disk.put("a/b/file", [b"three"]) == 5
    disk.sync()
    assert file.read_bytes() == b"three"
    assert list(file.parent.iterdir()) == [file]
    spent = stopwatch.lap()
    assert min(spent.encode_s, spent.write_s, spent.sync_s) > 0


def test_the_caller_goes_on_while_the_disk_is_slow(
    disk: LocalWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync = threading.Event(), os.fsync

    def slow(descriptor: int) -> None:
        assert synced.wait(timeout=60)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    files = [tmp_path / name for name in "abc"]
    for file in files:
        disk.put(file.name, [b"content"])
    assert not any(file.exists() for file in files)
    synced.set()
    disk.sync()
    assert all(file.read_bytes() == b"content" for file in files)


def test_a_slow_disk_does_not_keep_all_files_open(
    disk: LocalWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit of a hundred parameters has more files than a process may open by default."""
    opened, closed, n_open = os.open, os.close, [0]

    def counted(*args: object) -> int:
        descriptor = opened(*args)
        descriptors.add(descriptor)
        n_open.append(len(descriptors))
        return descriptor

    def close(descriptor: int) -> None:
        descriptors.discard(descriptor)
        closed(descriptor)

    descriptors: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: threading.Event().wait(0.01))
    monkeypatch.setattr(os, "open", counted)
    monkeypatch.setattr(os, "close", close)
    files = [tmp_path / str(index) for index in range(200)]
    for file in files:
        disk.put(file.name, [b"content"])
    disk.sync()
    assert 16 < max(n_open) < 80
    assert all(file.read_bytes() == b"content" for file in files)


def test_a_disk_that_fails_meanwhile_is_an_error_of_a_later_write(
    disk: LocalWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError("No space left")

    def write_many() -> None:
        for index in range(200):
            disk.put(str(index), [b"content"])

    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_many()
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        disk.sync()
    assert not [file for file in tmp_path.iterdir() if file.suffix != ".partial"]


def test_directories_are_synced_after_every_rename(
    disk: LocalWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def sync_directory(directory: Path) -> None:
        seen.append(sorted(file.name for file in directory.iterdir()))

    monkeypatch.setattr(disk_module, "sync_directory", sync_directory)
    for name in "abc":
        disk.put(name, [b"content"])
    disk.sync()
    assert ["a", "b", "c"] in seen
    assert ["a"] not in seen


def test_a_disk_that_fails_is_an_error_of_sync(
    disk: LocalWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError("No space left")

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fail)
    disk.put("file", [b"new"])
    with pytest.raises(OSError, match="No space left"):
        disk.sync()
    assert (tmp_path / "file").read_bytes() == b"old"


def test_what_cannot_be_encoded_replaces_nothing(disk: LocalWriter, tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        yield b"new"
        raise ValueError("cannot encode")

    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(ValueError, match="cannot encode"):
        disk.put("file", parts())
    disk.sync()
    assert (tmp_path / "file").read_bytes() == b"old"
