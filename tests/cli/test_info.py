"""`info`: what a store holds."""

import dataclasses
import json
import os
import platform
import re
import shutil
from pathlib import Path

import msgspec
import pytest
import torch

from tests.support.commands import checked, fails, info_of, run, succeeds
from tests.support.runs import Loop, record
from tests.support.zoo import Recorded
from thimble_zarr import Recorder
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.format.schema import FORMAT_VERSION
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.keys import COMMIT, HOLDER
from thimble_zarr.store.ledger import Commit
from thimble_zarr.store.reader import StoreReader


def test_info_is_a_summary_for_people(trained: Path, corpus: Path) -> None:
    stdout = succeeds("info", trained).stdout
    assert "{" not in stdout
    first, *sections = stdout.strip().split("\n\n")
    lines = dict(line.split(maxsplit=1) for line in first.splitlines())
    reader = StoreReader.open(trained)
    live = reader.read_labels().live
    assert live is not None
    assert lines["Store"] == f"{trained}, format {FORMAT_VERSION}, closed"
    assert lines["Parameter"] == "transformer.wte.weight, 300 x 8, on cpu"
    assert lines["Variables"].startswith("W bfloat16, grad bfloat16")
    assert lines["Optimizer"] == "AdamW, single"
    assert lines["Steps"].startswith("5 ")
    assert lines["Tokens"] == f"{live.sum()} live, {300 - live.sum()} dead"
    assert torch.__version__ in lines["Recorded"]
    assert re.fullmatch(
        r"[\d.]+% of training time; 0 of 5 steps waited for the writer, "
        r"which was busy [\d.]+% of it and wrote [\d.]+ MB/s",
        lines["Overhead"],
    )
    assert lines["Memory"] == "268.44 MB"
    rows = {
        title: dict(row.split(maxsplit=1) for row in rows)
        for title, *rows in (section.splitlines() for section in sections)
    }
    assert list(rows) == ["Config", "Corpus", "Tokenizer"]
    assert list(rows["Config"]) == [setting.name for setting in dataclasses.fields(TrainingConfig)]
    found = {name: rows["Config"][name] for name in ("seed", "lr", "double_shift", "windows")}
    assert found == {"seed": "42", "lr": "0.001", "double_shift": "no", "windows": "-"}
    assert rows["Corpus"]["name"] == str(corpus)
    assert rows["Corpus"]["n_tokens"] == f"{info_of(trained)['attrs']['corpus']['n_tokens']:,}"


@pytest.mark.parametrize("columns", [80, 120])
def test_info_is_aligned_and_fits_the_terminal(
    trained: Path, zoo: Recorded, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for store in (trained, zoo.path):
        monkeypatch.chdir(store.parent)
        lines = succeeds("info", store.name).stdout.splitlines()
        assert max(len(line) for line in lines if os.sep not in line) <= columns


def test_info_shows_whatever_the_recorder_was_given(tmp_path: Path) -> None:
    attrs = {"note": "a\nrun", "tries": 1234, "budget_bytes": 5 * 10**12, "none": {}, "of": [1, 2]}
    record(tmp_path / "run.zarr", n_steps=1, recorder_options={"attrs": attrs})
    stdout = succeeds("info", tmp_path / "run.zarr").stdout
    first, rest = stdout.split("\n\n")
    assert [re.split("  +", line) for line in first.splitlines()[-4:]] == [
        ["Note", r'"a\nrun"'], ["Tries", "1,234"], ["Budget", "5.00 TB"], ["Of", "[1, 2]"]
    ]  # fmt: skip
    assert rest == "None\n"


def test_the_fields_of_infos_json_are_told(trained: Path) -> None:
    told = re.findall(r"^    (\w+)  ", succeeds("info", "--help").stdout, flags=re.MULTILINE)
    schema = StoreReader.open(trained).schema.to_attribute()
    assert {*told} == {*info_of(trained)} - {*schema} | {"attrs"}


def test_info_as_json_holds_everything(trained: Path) -> None:
    content = info_of(trained)
    reader = StoreReader.open(trained)
    files = [file for file in trained.rglob("*") if file.is_file()]
    assert content["store"] == str(trained)
    assert content["format_version"] == FORMAT_VERSION
    assert (content["shape"], content["n_rows"]) == ([300, 8], 6)
    assert content["complete"] is True
    assert content["disk_bytes"] == sum(file.stat().st_size for file in files)
    assert content["raw_bytes"] == 6 * 4 * 300 * 8 * 2
    assert content["attrs"] == reader.schema.attrs
    assert content["optimizer"]["name"] == "AdamW"
    assert content["overhead"]["n_steps"] == 5
    assert 0 < content["overhead"]["training_share"] < 1


def test_info_tells_a_store_that_was_not_closed(tmp_path: Path) -> None:
    loop = Loop()
    with Recorder(tmp_path / "run.zarr", loop.optimizer, parameter=loop.weight) as recorder:
        loop.step()
        recorder.flush()
        writer = f"process {os.getpid()} on {platform.node()} (since "
        shown = succeeds("info", tmp_path / "run.zarr").stdout
        assert f", being recorded by {writer}" in shown
        assert info_of(tmp_path / "run.zarr")["recording"] == "recording"
        found = checked(tmp_path / "run.zarr")
        assert found["verdict"].endswith(
            " The recording is still running: step 1 is the last one committed."
        )
        # The name of the writer is copied, and its lock is not.
        copy = Path(shutil.copytree(tmp_path / "run.zarr", tmp_path / "cut-off.zarr"))
    assert f", cut off: its writer, {writer}" in succeeds("info", copy).stdout
    assert (info_of(copy)["complete"], info_of(copy)["recording"]) == (False, "cut-off")
    found = checked(copy)
    assert (found["steps"], found["holds"], found["has_ended"]) == ([1, 1], True, False)
    assert found["verdict"].startswith("HOLDS ")
    assert found["verdict"].endswith(" The recording did not end: it was cut off after step 1.")
    (copy / HOLDER).unlink()  # a writer that fails takes it away
    assert ", cut off: it has no writer" in succeeds("info", copy).stdout
    name = {"pid": os.getpid(), "host": "elsewhere", "since": "2026-01-02T03:04:05+00:00"}
    (copy / HOLDER).write_text(json.dumps(name))
    assert info_of(copy)["recording"] == "unknown"
    assert "by step 1: it is being recorded by process" in checked(copy)["verdict"]
    closed = checked(tmp_path / "run.zarr")
    assert closed["has_ended"] is True
    assert "The recording" not in closed["verdict"]
    together = run("check", tmp_path / "run.zarr", copy).stdout.splitlines()
    assert together[3].endswith("HOLDS, not ended")
    assert together[4].endswith("HOLDS")


def test_a_run_that_was_cut_off_says_how_many_steps_it_was_to_take(
    trained: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(trained, tmp_path / "run.zarr"))
    commit = Commit.read(LocalFiles(store))
    (store / COMMIT).write_bytes(msgspec.structs.replace(commit, complete=False).to_bytes())
    assert checked(store)["verdict"].endswith(
        " The recording did not end: it was cut off after step 5 of 5."
    )


def test_info_tells_how_a_store_is_coded(trained: Path, tmp_path: Path) -> None:
    assert "Coding" not in succeeds("info", trained).stdout
    assert info_of(trained)["coding"]["name"] == "plain"
    record(tmp_path / "small.zarr", recorder_options={"coding": "predicted"})
    shown = succeeds("info", tmp_path / "small.zarr").stdout
    assert "\nCoding     predicted by adamw-single/1; gradient lz4-bitshuffle\n" in shown
    assert info_of(tmp_path / "small.zarr")["coding"] == {
        "name": "predicted",
        "program": "adamw-single/1",
        "gradient_codec": "lz4-bitshuffle",
    }


def test_info_tells_the_coding_of_several_parameters(tmp_path: Path) -> None:
    loop = Loop()
    parameters = {"a": loop.weight, "b": loop.head.weight}
    options = {"coding": "predicted", "variables": ("W", "exp_avg")}
    with Recorder(tmp_path / "run.zarr", loop.optimizer, parameters=parameters, **options):
        loop.step()
    shown = succeeds("info", tmp_path / "run.zarr").stdout
    assert shown.count("Coding") == 1
    assert "predicted by no program; gradient lz4-bitshuffle\n" in shown


def test_a_store_without_a_step_is_shown_and_cannot_be_checked(tmp_path: Path) -> None:
    loop = Loop()
    with Recorder(tmp_path / "run.zarr", loop.optimizer, parameter=loop.weight):
        assert "initial state" not in succeeds("info", tmp_path / "run.zarr").stdout
        assert info_of(tmp_path / "run.zarr")["n_rows"] == 0
        assert info_of(tmp_path / "run.zarr")["overhead"] is None
        assert "no committed step" in fails(3, "check", tmp_path / "run.zarr")
