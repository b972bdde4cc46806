"""What is damaged is repaired as far as it can be, and nothing that can be read is lost."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import xarray as xr
import zarr
from numcodecs import Blosc

import thimble_zarr
from tests.support import stores
from tests.support.commands import outcome
from tests.support.damage import (
    CHANGED,
    DAMAGE,
    WRONG_COPIES,
    chunk_files,
    consolidated,
    edit,
    files,
    flip,
    reseal,
    store_again,
    swap,
)
from tests.support.faults import everything
from tests.support.runs import record, token_labels
from thimble_zarr import every
from thimble_zarr.errors import (
    DamagedStoreError,
    StoreError,
    StoreLockedError,
)
from thimble_zarr.store.integrity.repair import plan_repair, repair
from thimble_zarr.store.integrity.verify import verify
from thimble_zarr.store.keys import HOLDER
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.writer import StoreWriter


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_called_by_its_name_and_repaired(store: Path, what: str) -> None:
    damage, kind, n_rows = DAMAGE[what]
    damage(store)
    verified = verify(store)
    assert not verified.holds
    assert kind in {finding.kind for finding in verified.findings if finding.is_damage}
    before = {file: (store / file).read_bytes() for file in chunk_files(store)}
    plan = plan_repair(store)
    assert {file: (store / file).read_bytes() for file in before} == before
    assert plan.n_rows == n_rows
    assert not [one for one in verified.findings if one.repair.startswith("none")]
    assert repair(store).steps == plan.steps
    # A store of which a repair wrote anything, or took it at its word, is not called as committed.
    is_told = bool(set(plan.written) - set(files_of_metadata(store)) or plan.lines)
    assert bool(verify(store).repairs) == is_told
    assert_sound(store, n_rows)
    assert plan_repair(store).steps == []
    # What was sound and stays was not written to.
    touched = {*plan.written, *plan.removed}
    for file in before.keys() - touched:
        assert (store / file).read_bytes() == before[file]


def files_of_metadata(path: Path) -> list[str]:
    return [file for file in files(path) if file.endswith("zarr.json")]


def assert_sound(path: Path, n_rows: int) -> None:
    """Check that a repaired store is right for all who read it, and missing values are missing."""
    verified = verify(path)
    assert (verified.findings, verified.n_rows) == ([], n_rows)
    reader = StoreReader.open(path)
    assert list(reader.integrity.altered_chunks((0, n_rows))) == []
    truth = [stores.block(index) for index in range(3)]
    for name in reader.schema.dtypes:
        rows = np.concatenate([block[name] for block in truth])[:n_rows]
        np.testing.assert_array_equal(reader.read(name, (0, n_rows)), rows)
    truth_of = stores.scalars(0, n_rows)
    for name, values in reader.read_numbers().items():
        is_missing = np.isnan(values).all()
        assert is_missing or np.array_equal(values, truth_of[name], equal_nan=True)
    labels, expected = reader.read_labels(), token_labels()
    for name in ("count", "live", "dead", "text"):
        label = getattr(labels, name)
        assert label is None or list(label) == list(getattr(expected, name))
    ds = xr.open_zarr(path)
    assert ds.sizes["step"] == n_rows
    assert ds.step.values.tolist() == list(range(n_rows))
    assert ds.token.values.tolist() == list(range(11))
    assert ds.grad.values.tobytes() == reader.read("grad", (0, n_rows)).tobytes()


PREDICTED: dict[str, tuple[Callable[[Path], object], str, int]] = {
    "keyframe": (lambda path: flip(path / "W_keyframe/c.1.0.0"), "damaged-block", 4),
    "residual": (lambda path: flip(path / "W_residual/c.2.0.0", 1), "damaged-block", 8),
    "no residual": (lambda path: (path / "exp_avg_residual/c.2.0.0").unlink(), "damaged-block", 8),
    "gradient": (lambda path: flip(path / "grad/c.2.0.0"), "damaged-block", 8),
    "derived": (lambda path: flip(path / "bias_correction1/c.0"), "damaged-values", 10),
    "not needed": (lambda path: flip(path / "loss/c.0"), "damaged-values", 10),
    "metadata": (lambda path: (path / "W_keyframe/zarr.json").unlink(), "metadata", 10),
    "first line": (lambda path: change_line(path, 0), "ledger", 10),
    "line of a block that was stored again": (lambda path: change_line(path, 2), "ledger", 10),
    "line of a residual that another one is like": (
        lambda path: change_line(path, 3),
        "ledger",
        10,
    ),
    "last line": (lambda path: change_line(path, -1), "ledger", 10),
    "no ledger": (lambda path: (path / ".thimble/blocks.jsonl").unlink(), "ledger", 10),
    "no commit": (lambda path: (path / ".thimble/commit.json").unlink(), "commit-record", 10),
}


def change_line(path: Path, number: int) -> None:
    """Take the seal from a line of the ledger."""
    file = path / ".thimble/blocks.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    lines[number] = lines[number].replace(b"crc32", b"crc33", 1)
    file.write_bytes(b"".join(lines))


@pytest.mark.parametrize("coding", ["predicted"], indirect=True)
@pytest.mark.parametrize("what", PREDICTED)
def test_damage_of_a_predicted_store_is_repaired(store: Path, what: str) -> None:
    damage, kind, n_rows = PREDICTED[what]
    damage(store)
    verified = verify(store)
    assert kind in {finding.kind for finding in verified.findings if finding.is_damage}
    assert not [one for one in verified.findings if one.repair.startswith("none")]
    plan = plan_repair(store)
    assert plan.n_rows == n_rows
    assert repair(store).steps == plan.steps
    assert_sound(store, n_rows)
    assert plan_repair(store).steps == []
    derived = StoreReader.open(store).read_numbers()["bias_correction1"]
    np.testing.assert_array_equal(derived, stores.scalars(0, n_rows)["bias_correction1"])


@pytest.mark.parametrize("coding", ["predicted"], indirect=True)
def test_numbers_that_states_are_computed_from_never_become_missing(store: Path) -> None:
    flip(store / "eps/c.0")
    (finding,) = verify(store).findings
    assert finding.repair == (
        "compute it again, if the ledger proves that; else none: no row would be left; restore it "
        "from a copy"
    )
    before = {file: (store / file).read_bytes() for file in files(store)}
    with pytest.raises(StoreError, match=r"eps/c\.0 cannot be read, and the states of its rows"):
        repair(store)
    assert {file: (store / file).read_bytes() for file in files(store)} == before


@pytest.mark.parametrize("coding", ["predicted"], indirect=True)
def test_a_predicted_store_ends_before_rows_whose_numbers_are_lost(
    coding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("format.schema", "format.layout", "store.integrity.files"):
        monkeypatch.setattr(f"thimble_zarr.{module}.SCALAR_CHUNK_STEPS", 8)
    path = tmp_path / "run.zarr"
    stores.write_run(path)
    flip(path / "eps/c.1")
    assert "else end the store before row 8" in verify(path).findings[0].repair
    assert repair(path).n_rows == 8
    assert_sound(path, 8)


def test_a_block_that_is_damaged_twice_over_is_cut_off_once(store: Path) -> None:
    flip(store / "W/c.2.0.0")
    flip(store / ".thimble/blocks.jsonl", 0.99)
    (store / ".thimble/commit.json").unlink()
    flip(store / "grad/zarr.json")
    assert repair(store).n_rows == 8
    assert_sound(store, 8)


def test_a_store_whose_first_block_is_damaged_is_left_alone(store: Path) -> None:
    flip(store / "W/c.0.0.0")
    before = {file: (store / file).read_bytes() for file in files(store)}
    assert "no row would be left" in plan_repair(store).hopeless[0]
    with pytest.raises(StoreError, match=r"cannot repair .*no row would be left"):
        repair(store)
    assert {file: (store / file).read_bytes() for file in files(store)} == before


@pytest.mark.parametrize("what", WRONG_COPIES)
def test_wrong_copies_of_metadata_are_found_and_made_again(store: Path, what: str) -> None:
    change, is_damage, words = WRONG_COPIES[what]
    change(store)
    (finding,) = verify(store).findings
    assert (finding.kind, finding.is_damage) == ("consolidated-metadata", is_damage)
    assert finding.what.startswith(words)
    assert repair(store).steps == ["consolidate the metadata in zarr.json"]
    assert_sound(store, 10)


def test_arrays_of_others_in_the_store_are_nothing_to_repair(store: Path) -> None:
    """Whether or not the copies of the metadata have them."""
    group = zarr.open_group(store, mode="r+")
    group.create_array("mine", shape=(3,), dtype="int8")
    assert not [one for one in verify(store).findings if one.kind == "consolidated-metadata"]
    assert plan_repair(store).steps == []
    mine = json.loads((store / "mine/zarr.json").read_text())
    consolidated(lambda copies: copies.update(mine=mine))(store)
    assert not [one for one in verify(store).findings if one.kind == "consolidated-metadata"]
    assert plan_repair(store).steps == []


def test_arrays_of_others_are_not_declared_where_the_ledger_is_made_again(store: Path) -> None:
    zarr.open_group(store, mode="r+").create_array("mine", shape=(3,), dtype="int8")
    flip(store / ".thimble/blocks.jsonl", 0.01)
    repair(store)
    assert plan_repair(store).steps == []
    assert_sound(store, 10)


def test_metadata_that_no_writer_declares_are_not_taken_from_disk(store: Path) -> None:
    edit(store / "token/zarr.json", lambda array: array.update(data_type="float8"))
    flip(store / ".thimble/blocks.jsonl", 0.01)
    with pytest.raises(
        StoreError, match=r"token/zarr.json: it is malformed: its dtype is 'float8'"
    ):
        repair(store)


@pytest.mark.parametrize("what", CHANGED)
def test_what_was_changed_is_left_and_not_called_sound(store: Path, what: str) -> None:
    """Nothing tells which of its values are the recorded ones: none of them is erased."""
    CHANGED[what](store)
    before = everything(store)
    (finding,) = verify(store).findings
    assert finding.is_damage
    assert "from a copy" in finding.repair
    assert "it was changed after it was recorded" in finding.what
    plan = repair(store)
    assert (plan.steps, plan.written, plan.removed) == ([], {}, [])
    (left,) = plan.left
    assert left.startswith(f"{finding.where} is left as it is: it was changed after")
    assert everything(store) == before
    code, stdout, _ = outcome("repair", store, "--apply")
    assert code == 1
    assert stdout.endswith("the store stays DAMAGED until these files are restored.\n")
    code, stdout, _ = outcome("verify", store)
    assert code == 1
    assert stdout.splitlines()[-1].startswith("DAMAGED in 1 place")


def test_what_was_changed_stays_damaged_when_other_damage_is_repaired(store: Path) -> None:
    store_again(store, "learning_rate", slice(6, 9), 0.25)
    store_again(store, "W", (5, 3, 2), 1)
    flip(store / "grad/c.2.0.0")
    flip(store / "eps/c.0")
    plan = plan_repair(store)
    assert (plan.n_rows, len(plan.left)) == (8, 2)
    code, stdout, _ = outcome("repair", store, "--apply")
    assert code == 1
    assert stdout.splitlines()[:-1] == [*plan.steps, *plan.left]
    assert stdout.splitlines()[-1].startswith("The rest is repaired. The store stays DAMAGED")
    assert any("eps/c.0 again: the values of rows 0 to 7 cannot be read" in s for s in plan.steps)
    assert any("before row 8, because grad/c.2.0.0 cannot be read" in s for s in plan.steps)
    verified = verify(store)
    assert {one.where for one in verified.findings} == {"learning_rate/c.0", "W/c.1.0.0"}
    assert not verified.holds
    values = StoreReader.open(store).read_scalars()["learning_rate"]
    assert values.tolist() == [0, 1, 2, 3, 4, 5, 0.25, 0.25]
    assert plan_repair(store).steps == []


def test_what_was_changed_behind_the_rows_that_stay_goes_with_them(store: Path) -> None:
    store_again(store, "W", (9, 3, 2), 1)
    flip(store / "grad/c.1.0.0")
    plan = repair(store)
    assert (plan.n_rows, plan.left) == (4, [])
    assert_sound(store, 4)


@pytest.mark.parametrize("name", ["step", "token"])
def test_labels_that_can_be_counted_are_written_again(store: Path, name: str) -> None:
    store_again(store, name, 5, 77)
    assert repair(store).left == []
    assert_sound(store, 10)


@pytest.mark.parametrize(
    ("row", "value"), [(3, 0.5), (0, -1.0), (9, 9e9)], ids=["between", "first", "last"]
)
def test_a_value_that_its_neighbours_tell_is_restored_by_its_checksum(
    store: Path, row: int, value: float
) -> None:
    """Hyper-parameters are the same at most steps; the ledger proves that the guess was right."""
    writer = StoreWriter.create(store, stores.SCHEMA, overwrite=True)
    constant = dict.fromkeys(stores.scalars(0), np.full(4, 1e-3))
    for first_row, n_rows in ((0, 4), (4, 4), (8, 2)):
        block = stores.block(first_row // 4)
        writer.commit_block(first_row, n_rows, block, constant)
    writer.close()
    before = {file: (store / file).read_bytes() for file in files(store)}
    store_again(store, "learning_rate", row, value)
    assert not verify(store).holds
    (step,) = repair(store).steps
    assert step.startswith(f"write learning_rate/c.0 again: its row {row} is 0.001 again")
    assert {file: (store / file).read_bytes() for file in files(store)} == before


@pytest.mark.parametrize("first", [0.5, np.nan])
def test_values_that_were_only_compressed_again_are_restored(store: Path, first: float) -> None:
    writer = StoreWriter.create(store, stores.SCHEMA, overwrite=True)
    values = np.array([first, 1.0, 2.0, 3.0])
    writer.commit_block(0, 4, stores.block(0), dict.fromkeys(stores.scalars(0), values))
    writer.close()
    file = store / "learning_rate/c.0"
    before, whole = file.read_bytes(), np.full(4096, np.nan)
    whole[: len(values)] = values
    encoded = Blosc(cname="lz4", clevel=1, shuffle=Blosc.NOSHUFFLE).encode(whole)
    file.write_bytes(encoded + google_crc32c.value(encoded).to_bytes(4, "little"))
    assert not verify(store).holds
    assert repair(store).steps == [
        "write learning_rate/c.0 again: its values are the recorded ones"
    ]
    assert file.read_bytes() == before


def test_swapped_files_are_named_and_left(store: Path) -> None:
    before = everything(store)
    for _ in range(2):
        swap(store / "W/c.1.0.0", store / "W/c.2.0.0")
        if everything(store) == before:
            break
        swap(store / "loss/c.0", store / "eps/c.0")
        told = {finding.where: finding.what for finding in verify(store).findings}
        assert told["W/c.1.0.0"].startswith("it is the file that was recorded as W/c.2.0.0")
        assert told["W/c.2.0.0"].startswith("it is the file that was recorded as W/c.1.0.0")
        plan = repair(store)
        assert (plan.n_rows, plan.steps, len(plan.left)) == (10, [], 2)
    assert verify(store).findings == []


def test_the_file_of_another_block_is_not_taken_for_one_whose_line_is_lost(store: Path) -> None:
    shutil.copy(store / "W/c.0.0.0", store / "W/c.1.0.0")
    ledger = store / ".thimble/blocks.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    (number,) = [at for at, line in enumerate(lines) if b'"W/c.1.0.0"' in line]
    lines[number] = lines[number].replace(b"crc32", b"crc33", 1)
    ledger.write_bytes(b"".join(lines))
    left = {key: (store / key).read_bytes() for key in files(store)}
    with pytest.raises(
        StoreError, match=r"W/c\.1\.0\.0: it is the file that was recorded as W/c\.0"
    ):
        repair(store)
    assert {key: (store / key).read_bytes() for key in files(store)} == left


@pytest.mark.parametrize("n_rows", [9, 12, 50])
def test_the_ledger_says_how_many_rows_there_are(store: Path, n_rows: int) -> None:
    reseal(store, n_rows=n_rows)
    with pytest.raises(DamagedStoreError, match=rf"claims {n_rows} rows, and the ledger has 10"):
        StoreReader.open(store)
    verified = verify(store)
    assert not verified.holds
    assert verified.n_rows == 10
    assert [finding.kind for finding in verified.findings] == ["commit-record"]
    assert repair(store).n_rows == 10
    assert_sound(store, 10)


def test_a_ledger_that_is_cut_off_says_nothing_against_the_commit_record(store: Path) -> None:
    """All rows are there and can be read, and a repair makes its lines again."""
    before, file = everything(store), store / ".thimble/blocks.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))
    assert everything(store) == before
    assert repair(store).n_rows == 10
    assert everything(store) == before


def test_no_row_is_made_up_where_the_ledger_is_damaged_too(store: Path) -> None:
    reseal(store, n_rows=12)  # the last block is declared that long
    flip(store / ".thimble/blocks.jsonl", 0.01)
    assert repair(store).n_rows == 10
    assert_sound(store, 10)


def test_what_a_crash_left_is_no_damage_and_is_removed(store: Path) -> None:
    (store / "W/c.3.0.0.partial").write_bytes(b"half")
    (store / "W/c.7.0.0").write_bytes(b"orphan")
    with (store / ".thimble/blocks.jsonl").open("ab") as ledger:
        ledger.write(b'{"rows": [10, 12], "fi')
    (store / ".thimble/writer.json").write_text(
        '{"pid": 99999999, "host": "elsewhere", "since": "2026"}'
    )
    (store / "notes.txt").write_text("mine")
    verified = verify(store)
    assert verified.holds
    assert {finding.kind for finding in verified.findings} == {
        "leftover",
        "stray",
        "uncommitted-line",
    }
    repair(store)
    assert [finding.where for finding in verify(store).findings] == ["notes.txt"]
    assert (store / "notes.txt").read_text() == "mine"
    assert stores.check_rows(store) == 10


@stores.both_codings
@pytest.mark.usefixtures("coding")
@pytest.mark.parametrize("n_files", range(0, 21, 4))
def test_a_commit_that_was_cut_off_between_any_two_files_is_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_files: int
) -> None:
    """Files of the last block and of scalars are those of one line of the ledger, or the next."""
    writer = stores.create(tmp_path / "run.zarr")
    stores.commit(writer, 3)
    real, calls = os.replace, []
    n_renamed = len(stores.SCHEMA.arrays) + len(stores.SCHEMA.per_step) + 1

    def replace(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) > n_files:
            raise OSError(5, "Input/output error")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        if n_files < n_renamed:
            with pytest.raises(OSError, match="Input/output"):
                stores.commit(writer, 4)
        else:
            stores.commit(writer, 4)
    writer.release()
    n_rows = stores.check_rows(writer.path)
    assert n_rows == (3 if n_files < n_renamed else 4)
    assert verify(writer.path).holds
    repair(writer.path)
    assert verify(writer.path).findings == []
    assert stores.check_rows(writer.path) == n_rows


def test_a_store_that_is_recorded_is_not_repaired(tmp_path: Path) -> None:
    writer = stores.create(tmp_path / "run.zarr")
    stores.commit(writer, 4)
    with (writer.path / ".thimble/blocks.jsonl").open("ab") as ledger:
        ledger.write(b'{"rows": [4, 8], "fi')  # the line of a commit that is being made
    for call in (repair, plan_repair):
        with pytest.raises(StoreLockedError, match=rf"process {os.getpid()} on .* is recording"):
            call(writer.path)
    code, stdout, stderr = outcome("repair", writer.path)
    assert (code, stdout) == (3, "")
    assert re.fullmatch(r"Error: process \d+ on .* is recording into .*; wait for it\n", stderr)
    writer.close()
    assert repair(writer.path).steps == [
        "cut off what was not committed from .thimble/blocks.jsonl"
    ]


@pytest.mark.parametrize("call", [plan_repair, repair])
def test_a_store_that_another_machine_may_be_recording_is_not_repaired(
    tmp_path: Path, call: Callable[[Path], object]
) -> None:
    """Its lock may not reach this machine."""
    writer = stores.create(tmp_path / "run.zarr")
    stores.commit(writer, 4)
    writer.release()
    name = {"pid": os.getpid(), "host": "elsewhere", "since": "2026-01-02T03:04:05+00:00"}
    (writer.path / HOLDER).write_text(json.dumps(name))
    with pytest.raises(StoreLockedError, match=r"on elsewhere .* may be recording"):
        call(writer.path)
    (writer.path / HOLDER).unlink()  # as the error advises
    call(writer.path)


@pytest.mark.parametrize("is_changed", [False, True])
def test_a_repair_that_was_cut_off_is_begun_again(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_changed: bool
) -> None:
    flip(store / "W/c.2.0.0")
    flip(store / "loss/c.0")
    flip(store / ".thimble/blocks.jsonl", 0.01)
    if is_changed:
        store_again(store, "eps", slice(2, 4), 0.25)
    real = os.replace
    for n_calls in range(60):
        copy = Path(shutil.copytree(store, tmp_path / str(n_calls)))
        calls: list[Path] = []

        def replace(
            source: Path, target: Path, calls: list[Path] = calls, n_calls: int = n_calls
        ) -> None:
            calls.append(target)
            if len(calls) > n_calls:
                raise OSError(5, "Input/output error")
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                repair(copy)
            except OSError:
                is_done = False
            else:
                is_done = True
        repair(copy)
        assert plan_repair(copy).steps == []
        if is_changed:
            assert [finding.where for finding in verify(copy).findings] == ["eps/c.0"]
        else:
            assert_sound(copy, 8)
        if is_done:
            return
    raise AssertionError("it never ended")


def test_the_command_says_what_is_damaged_and_repairs_it(store: Path) -> None:
    code, stdout, stderr = outcome("verify", store)
    assert (code, stderr) == (0, "")
    assert "10 rows committed" in stdout
    assert stdout.splitlines()[-1].startswith("SOUND: ")
    flip(store / "W/c.2.0.0")
    code, stdout, _ = outcome("verify", store)
    assert code == 1
    assert "DAMAGE  W/c.2.0.0: the checksum of chunk" in stdout
    assert f"DAMAGED in 1 place; what can be done: thimble-zarr repair {store}" in stdout
    code, stdout, _ = outcome("verify", store, "--format", "json", "--quiet")
    content = json.loads(stdout)
    assert code == 1
    assert content == thimble_zarr.verify(store).to_json()
    assert content["sound"] is False
    assert content["findings"][0]["first_row"] == 8
    code, stdout, _ = outcome("repair", store)
    assert code == 1
    assert (
        "end the store before row 8, because W/c.2.0.0 cannot be read: of 10 committed rows 8 "
        "stay and 2 go" in stdout
    )
    assert "remove grad/c.2.0.0" in stdout
    assert f"Nothing is done yet: thimble-zarr repair {store} --apply" in stdout
    assert StoreReader.open(store).n_rows == 10
    code, stdout, _ = outcome("repair", store, "--apply")
    assert code == 0
    assert stdout.splitlines()[-1].startswith("SOUND after repair: ")
    code, stdout, _ = outcome("verify", store)
    assert code == 0
    assert "repair  end the store before row 8, because" in stdout
    assert stdout.splitlines()[-1].startswith("SOUND after repair: ")
    assert outcome("repair", store)[:2] == (0, "There is nothing to repair.\n")
    assert_sound(store, 8)


def test_repair_says_that_it_removed_the_name_of_a_writer_that_is_gone(store: Path) -> None:
    writer = store / ".thimble/writer.json"
    writer.write_text('{"pid": 99999999, "host": "elsewhere", "since": "2026"}')
    planned = outcome("repair", store)[1].splitlines()[:-1]
    assert planned == ["remove .thimble/writer.json"]
    code, stdout, _ = outcome("repair", store, "--apply")
    assert code == 0
    assert stdout.splitlines()[:-1] == planned
    assert stdout.splitlines()[-1].startswith("SOUND: ")
    assert not writer.exists()


def test_damage_beyond_repair_is_told(store: Path) -> None:
    flip(store / "W/c.0.0.0")
    _, stdout, _ = outcome("verify", store)
    assert "Repair: none: no row would be left; restore it from a copy." in stdout
    code, stdout, _ = outcome("repair", store)
    assert code == 1
    assert "cannot be repaired: its first block cannot be read" in stdout
    code, _, stderr = outcome("repair", store, "--apply")
    assert code == 3
    assert "no row would be left" in stderr


@pytest.mark.parametrize(
    ("place", "is_there"),
    [
        ("W", False),
        ("W", True),
        ("learning_rate", False),
        ("learning_rate", True),
        (".thimble", True),
    ],
)
def test_nothing_is_repaired_where_metadata_and_their_copy_in_the_ledger_are_lost(
    store: Path, place: str, *, is_there: bool
) -> None:
    """Files of an array that nothing describes are not leftovers."""
    (store / ".thimble/blocks.jsonl").write_bytes(b"")
    (store / place / "zarr.json").unlink()
    if is_there:
        (store / place / "zarr.json").write_bytes(b"{")
    assert f"{place}/zarr.json" in {finding.where for finding in verify(store).findings}
    before = {file: (store / file).read_bytes() for file in files(store)}
    with pytest.raises(StoreError, match=rf"cannot repair .*{place}/zarr.json: it "):
        repair(store)
    assert before.items() <= {file: (store / file).read_bytes() for file in files(store)}.items()


def test_which_rows_of_a_matrix_were_chosen_is_not_left_out(tmp_path: Path) -> None:
    """They are labels of another name than `token`, and no others tell the rows apart."""
    schema = replace(stores.SCHEMA, dims=("row", "col"), whole_tokens=40)
    ids = np.arange(0, 33, 3)
    writer = StoreWriter.create(tmp_path / "run.zarr", schema, token_ids={"": ids})
    stores.commit(writer, 4)
    writer.close()
    flip(writer.path / "row/c.0")
    with pytest.raises(StoreError, match=r"row/c.0 cannot be read, .* which rows were recorded"):
        repair(writer.path)


@pytest.mark.parametrize(("name", "key"), [("step", "step/c.0"), ("token", "token/c.0")])
def test_labels_of_what_was_chosen_are_never_counted_anew(
    tmp_path: Path, name: str, key: str
) -> None:
    path = tmp_path / "run.zarr"
    record(path, recorder_options={"schedule": every(5), "tokens": [2, 7, 10]})
    assert verify(path).findings == []
    flip(path / key)
    assert [finding.where for finding in verify(path).findings] == [key]
    with pytest.raises(StoreError, match=f"{key} cannot be read, and .* which {name}s"):
        repair(path)
