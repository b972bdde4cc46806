"""`import`, `export`, and the notebook's file where a store is expected."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from tests.support.commands import MAIN, START, checked, fails, info_of, run, succeeds
from tests.support.notebook_file import live_mask, notebook_tensors, save
from tests.support.runs import N_LIVE, N_STEPS, N_TOKENS, History, record, token_labels
from thimble_zarr import open_dataset
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.keys import COMMIT
from thimble_zarr.store.ledger import Commit
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.token_mask import write_mask
from thimble_zarr.store.writer import StoreWriter


@pytest.fixture
def tensors(toy_history: History) -> dict[str, torch.Tensor]:
    return notebook_tensors(toy_history)


@pytest.fixture
def file(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    return save(tmp_path / "run.safetensors", tensors)


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """As the second notebook reads it."""
    return save(tmp_path / "mask.safetensors", {"dead_mask": ~live_mask()})


def test_import_and_export_give_the_file_back(tmp_path: Path, file: Path) -> None:
    store, again = tmp_path / "a run.zarr", tmp_path / "again.safetensors"
    imported = succeeds("import", file, store)
    assert imported.stderr == ""
    for part in (
        f"Imported {N_STEPS} steps of {N_TOKENS} x 5; ",
        "States   stored as bfloat16: nothing is lost, since all their values are",
        f"Store    {store}",
        f"Next     thimble-zarr check '{store}'",
    ):
        assert part in imported.stdout
    assert info_of(store)["complete"] is True
    exported = succeeds("export", store, again)
    assert exported.stderr == ""
    assert f"Exported {N_STEPS} steps of {N_TOKENS} x 5; " in exported.stdout
    assert exported.stdout.splitlines()[-1] == f"Next     thimble-zarr check {again}"
    assert again.read_bytes() == file.read_bytes()


def test_states_that_are_float32_are_said_to_be(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    tensors["momentum_W"][4] += 1e-3
    file = save(tmp_path / "run.safetensors", tensors)
    stdout = succeeds("import", file, tmp_path / "run.zarr").stdout
    assert "States   stored as float32, as they are in the file" in stdout
    assert info_of(tmp_path / "run.zarr")["dtypes"]["exp_avg_sq"] == "float32"


def test_quiet_says_nothing(tmp_path: Path, file: Path) -> None:
    for args in (("import", file, tmp_path / "s"), ("export", tmp_path / "s", tmp_path / "f")):
        result = succeeds(*args, "--quiet")
        assert (result.stdout, result.stderr) == ("", "")


@pytest.mark.parametrize("flags", [[], ["--quiet"]])
def test_progress_is_for_people_only(tmp_path: Path, file: Path, flags: list[str]) -> None:
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    os.set_blocking(ours, False)
    command = [sys.executable, "-c", MAIN, "import", file, tmp_path / "run.zarr", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, check=True)
    try:
        shown = os.read(ours, 100_000)
    except BlockingIOError:  # nothing was written
        shown = b""
    os.close(theirs)
    os.close(ours)
    assert (b"importing" in shown) is (not flags)
    assert (done.stdout == b"") is bool(flags)


def test_a_mask_labels_the_tokens(tmp_path: Path, file: Path, mask: Path) -> None:
    succeeds("import", file, tmp_path / "run.zarr", "--token-mask", mask)
    ds = open_dataset(tmp_path / "run.zarr")
    assert ds.live.values.tolist() == live_mask().tolist()
    assert ds.dead.values.tolist() == (~live_mask()).tolist()
    ours = tmp_path / "ours.safetensors"
    write_mask(ours, token_labels())
    succeeds("import", file, tmp_path / "other.zarr", "--token-mask", ours)
    assert open_dataset(tmp_path / "other.zarr").live.values.tolist() == live_mask().tolist()
    tokens = {"subset": "dead", "n": N_TOKENS - N_LIVE}
    assert checked(file, "--token-mask", mask)["tokens"] == tokens
    assert checked(file, "--token-mask", mask, "--tokens", "live")["tokens"]["n"] == N_LIVE


@pytest.mark.parametrize("command", ["import", "check"])
def test_a_mask_that_does_not_fit_is_refused(tmp_path: Path, file: Path, command: str) -> None:
    other = save(tmp_path / "other.safetensors", {"dead_mask": torch.ones(13).bool()})
    target = [tmp_path / "run.zarr"] if command == "import" else []
    for mask, message in (
        (other, "has shape (13,), but the vocabulary has 11 tokens"),
        (file, "has neither live_mask nor dead_mask"),
        (tmp_path / "nothing", "cannot read the token mask"),
    ):
        assert message in fails(2, command, file, *target, "--token-mask", mask)
    assert not (tmp_path / "run.zarr").exists()


def test_a_mask_for_a_store_is_refused(toy_path: Path, mask: Path) -> None:
    message = fails(2, "check", toy_path, "--token-mask", mask)
    assert "a store has what it was recorded" in message


def test_the_file_is_checked_as_its_store_is(tmp_path: Path, file: Path, mask: Path) -> None:
    store = tmp_path / "run.zarr"
    succeeds("import", file, store, "--token-mask", mask)
    for args in ((), ("--tokens", "all"), ("--tokens", "3,5", "--steps", "2:7")):
        for format_ in ("table", "csv"):
            of_store = succeeds("check", store, "--format", format_, *args)
            of_file = succeeds("check", file, "--format", format_, "--token-mask", mask, *args)
            assert of_file.stdout == of_store.stdout.replace(str(store), str(file))
            assert of_file.stderr == of_store.stderr
    assert checked(file, "--replay", "torch")[
        "not_exact_because"
    ]  # who knows what program it was, and yet:
    assert "Replay on cpu, to the bit\n" in succeeds("check", file).stdout
    rows = checked(store)["rows"]
    assert checked(file, "--token-mask", mask)["rows"] == rows
    assert len(rows) == N_STEPS


def test_a_fault_in_the_file_is_found(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors["W"][7, 9] += 1
    file = save(tmp_path / "run.safetensors", tensors)
    result = run("check", file)
    assert result.exit_code == 1
    assert "FAILS: from step 7 on, " in result.stdout
    assert "Replay on cpu, not to the bit, because" in result.stdout
    assert "  torn-row: The row of step 7 was overwritten" in result.stdout


def test_info_of_a_file(file: Path, tmp_path: Path) -> None:
    stdout = succeeds("info", file).stdout
    lines = dict(line.split(maxsplit=1) for line in stdout.splitlines() if "  " in line)
    assert lines["Store"] == f"{file}, the notebook's file"
    assert lines["Variables"].startswith("W bfloat16, grad bfloat16, exp_avg bfloat16")
    assert lines["lr"] == "0.01"
    assert " with " not in lines["Recorded"]
    content = info_of(file)
    assert content["disk_bytes"] == file.stat().st_size
    assert (content["n_rows"], content["complete"]) == (N_STEPS + 1, True)
    succeeds("import", file, tmp_path / "run.zarr")
    imported = info_of(tmp_path / "run.zarr")
    for name in ("dtypes", "attrs", "optimizer", "created", "layout"):
        assert imported[name] == content[name]
    assert imported["overhead"] is content["overhead"] is None
    assert "Overhead" not in succeeds("info", tmp_path / "run.zarr").stdout


def test_outputs_that_exist_are_kept(tmp_path: Path, file: Path, toy_copy: Path) -> None:
    assert "--overwrite" in fails(2, "import", file, toy_copy)
    assert "--overwrite" in fails(2, "export", toy_copy, file)
    precious = tmp_path / "precious"
    precious.write_text("precious")
    fails(2, "import", file, precious, "--overwrite")
    fails(2, "export", toy_copy, precious, "--overwrite")
    fails(2, "export", toy_copy, toy_copy, "--overwrite")
    assert precious.read_text() == "precious"
    succeeds("import", file, toy_copy, "--overwrite")
    succeeds("export", toy_copy, file, "--overwrite")


@pytest.mark.parametrize("command", ["import", "check", "info"])
def test_files_that_cannot_be_read(tmp_path: Path, file: Path, command: str) -> None:
    target = [tmp_path / "out.zarr"] if command == "import" else []
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-1])
    model = save(tmp_path / "model.safetensors", {"weight": torch.zeros(3)})
    text = tmp_path / "text"
    text.write_text("no store, no file of the notebook")
    for path, message in (
        (cut, "its header promises"),
        (model, "it has no recording: no W or embeddings"),
        (text, "is not a safetensors file"),
        (tmp_path / "nothing", "there is nothing at"),
    ):
        found = fails(3, command, path, *target)
        assert message in found
        assert str(path) in found
    assert not (tmp_path / "out.zarr").exists()


def test_a_run_that_does_not_fit_into_the_file(tmp_path: Path) -> None:
    record(tmp_path / "run.zarr", dtype=torch.float32, n_steps=1)
    assert "lose precision" in fails(2, "export", tmp_path / "run.zarr", tmp_path / "f")
    assert "not a thimble-zarr store" in fails(3, "export", tmp_path, tmp_path / "f")
    assert not list(tmp_path.glob("f*"))


def test_a_killed_import_is_to_be_made_again(tmp_path: Path, file: Path) -> None:
    succeeds("import", file, tmp_path / "run.zarr")
    commit = Commit.read(LocalFiles(tmp_path / "run.zarr"))
    (tmp_path / "run.zarr" / COMMIT).write_bytes(
        msgspec.structs.replace(commit, complete=False).to_bytes()
    )
    assert checked(tmp_path / "run.zarr")["verdict"].endswith(
        f" The import did not end: it was cut off after step {N_STEPS} of {N_STEPS}. "
        "Import the file again, with --overwrite."
    )
    # Killed before a row was committed:
    schema = StoreReader.open(tmp_path / "run.zarr").schema
    StoreWriter.create(tmp_path / "empty.zarr", schema).release()
    told = fails(3, "check", tmp_path / "empty.zarr")
    assert told.endswith("nobody is recording into it; import the file again, with --overwrite")
    succeeds("import", file, tmp_path / "empty.zarr", "--overwrite")


@pytest.mark.parametrize("command", ["import", "export"])
def test_ctrl_c_leaves_nothing(tmp_path: Path, command: str) -> None:
    """Interrupted for real, in the middle of a file that takes a while."""
    n_rows, n_tokens = 400, 2003
    shape = (n_rows, n_tokens, 32)
    big = {"W": torch.bfloat16, "grad_W": torch.bfloat16}
    big |= {"momentum_W": torch.float32, "variance_W": torch.float32}
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, dtype in big.items()}
    tensors |= {"losses": torch.zeros(n_rows)}
    names = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
    tensors |= {name: torch.tensor(np.float32(0.5)) for name in names}
    file, store = save(tmp_path / "run.safetensors", tensors), tmp_path / "run.zarr"
    source, target = file, tmp_path / "new.zarr"
    growing = target / ".thimble" / "blocks.jsonl"
    if command == "export":
        succeeds("import", file, store)
        source, target, growing = store, tmp_path / "new", tmp_path / "new.partial"
    before = sorted(tmp_path.iterdir())
    process = subprocess.Popen(
        [sys.executable, "-c", START + MAIN, command, source, target],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (growing.exists() and growing.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (130, "", "Interrupted.\n")
    assert sorted(tmp_path.iterdir()) == before
