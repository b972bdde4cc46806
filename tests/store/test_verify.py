"""A change to any byte of a store is found, or changes nothing that is read."""

import json
import os
import platform
import subprocess
from pathlib import Path

import pytest
import zarr

from tests.support import stores
from tests.support.commands import outcome
from tests.support.damage import (
    edit,
    sweep,
)
from thimble_zarr.errors import (
    NotAStoreError,
    StoreError,
)
from thimble_zarr.store.integrity.metadata import is_same
from thimble_zarr.store.integrity.repair import plan_repair, repair
from thimble_zarr.store.integrity.verify import verify
from thimble_zarr.store.keys import HOLDER
from thimble_zarr.store.ledger import seal
from thimble_zarr.store.writer import StoreWriter

N_PLACES = 1
"""Bytes of each file that are changed here, in every way. `benchmarks.soak` changes every one."""


@stores.both_codings
def test_every_change_is_found_or_changes_nothing(store: Path) -> None:
    counts = sweep(store, N_PLACES)
    assert counts["found"] > 200
    assert counts["harmless"] < 0.1 * counts["found"]  # white space that was left out of JSON


@stores.both_codings
def test_a_sound_store_is_sound(sound: Path) -> None:
    seen: list[tuple[int, int]] = []
    verified = verify(sound, lambda done, total: seen.append((done, total)))
    assert verified.findings == []
    assert verified.n_rows == stores.N_ROWS
    assert seen[-1][0] == seen[-1][1] == verified.n_bytes
    chunks = list(sound.rglob("c.*"))
    assert (verified.n_files, verified.n_bytes) == (
        len(chunks),
        sum(file.stat().st_size for file in chunks),
    )


@stores.both_codings
@pytest.mark.usefixtures("coding")
def test_a_store_that_is_recorded_is_sound(tmp_path: Path) -> None:
    writer = stores.create(tmp_path / "run.zarr")
    for n_rows in stores.COMMITS:
        assert verify(writer.path).holds
        stores.commit(writer, n_rows)
    assert verify(writer.path).findings == []
    writer.release()
    assert verify(writer.path).findings == []


def test_without_commit_record_and_ledger_nothing_tells_what_was_committed(store: Path) -> None:
    (store / ".thimble/commit.json").unlink()
    (store / ".thimble/blocks.jsonl").unlink()
    for call in (verify, plan_repair, repair):
        with pytest.raises(StoreError, match="nothing else tells what was committed"):
            call(store)


def test_values_stored_anew_are_no_damage_where_they_are_the_same(store: Path) -> None:
    array = zarr.open_array(store, path="W", mode="r+")
    array[...] = array[...]
    assert verify(store).holds
    array[5, 3, 2] = ~array[5, 3, 2]
    (finding,) = (finding for finding in verify(store).findings if finding.is_damage)
    assert "the values of chunk 1 are not those that were committed" in finding.what
    assert finding.first_row == 4


def test_numbers_of_another_type_are_another_document() -> None:
    document = {"shape": [1, 2], "fill_value": 0}
    assert is_same(document, dict(reversed(document.items())))
    for fill in (0.0, False, -0.0, None):
        assert not is_same(document, {**document, "fill_value": fill})


def why_empty(store: Path) -> str:
    """Return why nothing is committed, as every command says that needs a row."""
    code, stdout, _ = outcome("verify", store)
    begin, said = stdout.splitlines()[-1].split(": ", maxsplit=1)
    assert (code, begin) == (0, "Nothing is committed yet, and so nothing is compared")
    for command in (("check", store), ("export", store, store.with_name("file.safetensors"))):
        code, _, stderr = outcome(*command)
        assert code == 3
        assert stderr == f"Error: {store} has no committed step yet: {said[:-1]}\n"
    return said


def test_a_store_without_rows_is_not_called_sound(tmp_path: Path) -> None:
    writer = stores.create(tmp_path / "run.zarr")
    said = why_empty(tmp_path / "run.zarr")
    assert said.startswith(f"process {os.getpid()} on {platform.node()} (since ")
    assert said.endswith(
        ") is recording into it and commits nothing before its first block is full; try again then."
    )
    writer.release()
    assert why_empty(tmp_path / "run.zarr") == (
        "nobody is recording into it; resume it (`thimble-zarr train --resume`, resume=True) or "
        "replace it (--overwrite, overwrite=True)."
    )


@pytest.mark.parametrize("is_here", [True, False])
def test_a_store_without_rows_tells_whether_its_writer_may_run(
    tmp_path: Path, *, is_here: bool
) -> None:
    store = tmp_path / "run.zarr"
    stores.create(store).release()
    with subprocess.Popen(["true"]) as ended:
        pass
    host = platform.node() if is_here else "elsewhere"
    name = {"pid": ended.pid, "host": host, "since": "2026-01-02T03:04:05+00:00"}
    (store / HOLDER).write_text(json.dumps(name))  # a killed writer leaves its own
    words = f"process {ended.pid} on {host} (since 2026-01-02T03:04:05+00:00)"
    said = f"its writer, {words}, is gone; resume it" if is_here else f"{words} may be recording"
    assert why_empty(store).startswith(said)


def test_what_cannot_be_verified_is_unreadable(tmp_path: Path, store: Path) -> None:
    for command in ("verify", "repair"):
        code, _, stderr = outcome(command, tmp_path / "absent")
        assert (code, stderr.count("\n")) == (3, 1)
    with pytest.raises(NotAStoreError):
        verify(tmp_path)
    edit(store / "zarr.json", lambda group: group["attributes"]["thimble"].update(format_version=9))
    code, _, stderr = outcome("verify", store)
    assert code == 3
    assert "format version 9" in stderr


def test_memory_does_not_grow_with_the_store(tmp_path: Path) -> None:
    """What is kept is a record a file; no line and no file is held."""
    import tracemalloc

    def peak(n_blocks: int) -> int:
        path = tmp_path / f"{n_blocks}.zarr"
        writer = StoreWriter.create(path, stores.SCHEMA)
        for index in range(n_blocks):
            stores.commit(writer, (index + 1) * stores.BLOCK_STEPS)
        writer.close()
        tracemalloc.start()
        assert verify(path).findings == []
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(1)  # what is imported and compiled once
    n_more = 40
    assert peak(2 + n_more) - peak(2) < n_more * 2 * 1500


def test_a_ledger_that_lies_is_damage(store: Path) -> None:
    """Its checksums are right, so this is no accident."""
    ledger = store / ".thimble/blocks.jsonl"
    for key in ("../../outside/c.0", "/etc/c.0", "W/../c.0", "W/c.0.0.0/../../x", "c.0"):
        line = seal({"rows": [0, 4], "files": {key: {"bytes": 1, "crc32": 0}}, "chunks": {}})
        ledger.write_bytes(line + b"\n")
        verified = verify(store)
        assert not verified.holds
        assert any("as no store has" in finding.what for finding in verified.findings)
