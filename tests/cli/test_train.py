"""`train`: a run of five steps, and what is refused before it begins."""

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import safetensors.torch
import torch
import zarr
from click.testing import Result
from tokenizers import Tokenizer

from tests.support.commands import MAIN, N_VOCABULARY, checked, fails, info_of, run, succeeds, told
from tests.support.runs import Loop
from tests.support.tuned import tuned
from thimble_zarr import Recorder, open_dataset
from thimble_zarr.experiment import device
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.experiment.optimizers import OPTIMIZERS, OWN
from thimble_zarr.format.layout import human_bytes
from thimble_zarr.report.panels.registry import PANELS
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.writer import StoreWriter


def test_train_shows_plan_corpus_validation_and_what_to_type_next(
    tmp_path: Path, tiny: tuple[str, ...], corpus: Path, tokenizer: Path
) -> None:
    store = tmp_path / "a run.zarr"
    result = succeeds("train", store, *tiny)
    assert result.stderr.splitlines() == [
        f"Training to step 5, recording into {store} ...",
        "Loading the tokenizer and the corpus (longer the first time) ...",
    ]
    for part in (
        "5 steps of 300 x 8, bfloat16",
        "Disk, at most",
        "RAM for recording",
        "Tokens   300: ",
        "t=   1: ratio=1.0",
        "t=   5: ratio=",
        "Recorded 5 steps",
        f"thimble-zarr check '{store}'",
    ):
        assert part in result.stdout, part
    n_tokens = len(Tokenizer.from_file(str(tokenizer)).encode(corpus.read_text(encoding="utf-8")))
    assert f"{n_tokens} tokens" in result.stdout


@pytest.mark.parametrize("loss_chunk", [0, 7])
@pytest.mark.parametrize("chosen", ["auto", "float32", "bfloat16"])
def test_the_arithmetic_is_shown_recorded_and_no_matter_to_the_replay(
    tmp_path: Path,
    tiny: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    chosen: str,
    loss_chunk: int,
) -> None:
    monkeypatch.setattr(device, "cpu_multiplies_bfloat16", lambda: False)
    store = tmp_path / "run.zarr"
    options = (f"--compute-dtype={chosen}", f"--loss-chunk={loss_chunk}")
    used = "bfloat16" if chosen == "bfloat16" else "float32"
    assert f"Forward and backward run in {used}" in succeeds("train", store, *tiny, *options).stdout
    recorded = info_of(store)["attrs"]["config"]
    assert recorded["compute_dtype"] == used
    assert recorded["loss_chunk"] == loss_chunk
    assert used in " ".join(
        line for line in succeeds("info", store).stdout.splitlines() if "compute" in line.lower()
    )
    assert {*StoreReader.open(store).schema.dtypes.values()} == {"bfloat16"}
    assert checked(store, "--tokens=all")["holds"] is True
    finished = succeeds("train", store, *tiny, "--resume", "--compute-dtype=auto", options[1])
    assert "All 5 steps are recorded" in finished.stdout


def option(options: tuple[str, ...], name: str) -> str:
    (value,) = (text.split("=", 1)[1] for text in options if text.startswith(f"--{name}="))
    return value


def test_train_without_steps_at_which_to_validate_but_the_last(
    tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    stdout = succeeds("train", tmp_path / "run.zarr", *tiny, "--steps", 11).stdout
    validated = [line.split(":")[0] for line in stdout.splitlines() if line.startswith("  t=")]
    assert validated == ["  t=   1", "  t=  10", "  t=  11"]


def test_quiet_training_says_nothing(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    result = succeeds("train", tmp_path / "run.zarr", *tiny, "--quiet")
    assert (result.stdout, result.stderr) == ("", "")
    assert info_of(tmp_path / "run.zarr")["complete"] is True


def test_quiet_demo_prints_the_result_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: tuple[str, ...]
) -> None:
    settings = TrainingConfig(
        steps=5,
        batch_size=2,
        corpus=Path(option(tiny, "corpus")),
        tokenizer=Path(option(tiny, "tokenizer")),
        vocab_size=N_VOCABULARY,
    )
    monkeypatch.setattr("thimble_zarr.cli.train.DEMO", settings)
    monkeypatch.setattr("thimble_zarr.report.html.PANELS", PANELS[:1])
    store = tmp_path / "run.zarr"
    result = succeeds("demo", store, "--steps", 5, "--quiet")
    assert result.stderr == ""
    page = tmp_path / "run.html"
    said = f"{page}, {human_bytes(page.stat().st_size)}\n"
    assert result.stdout == succeeds("check", store, "--quiet").stdout + said


def test_what_is_done_is_said_before_torch_is_loaded(tmp_path: Path) -> None:
    without_torch = "import sys\nsys.modules['torch'] = None\n" + MAIN
    for command in ("demo", "train"):
        arguments = [sys.executable, "-c", without_torch, command, tmp_path / "run.zarr"]
        shown = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert "import of torch halted" in shown.stderr
        assert shown.stderr.startswith("Training to step 1")


def test_progress_is_shown_where_stderr_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: tuple[str, ...]
) -> None:
    monkeypatch.setattr("thimble_zarr.cli.progress.LINE_INTERVAL_S", 0.0)
    lines = succeeds("train", tmp_path / "run.zarr", *tiny).stderr.splitlines()
    shown = [line.split(" s, ")[0].rsplit(",", 1)[0] for line in lines if ", loss " in line]
    assert shown == [f"training: {step} of 5 steps ({step * 20}%)" for step in range(1, 6)]


def test_every_setting_is_kept_in_the_store(tmp_path: Path, corpus: Path, tokenizer: Path) -> None:
    mask = tmp_path / "mask.safetensors"
    safetensors.torch.save_file({"live_mask": torch.ones(N_VOCABULARY, dtype=torch.bool)}, mask)
    settings = {
        "steps": 3,
        "batch_size": 5,
        "seq_len": 7,
        "optimizer": "adam",
        "lr": 0.125,
        "weight_decay": 0.25,
        "beta1": 0.5,
        "beta2": 0.75,
        "eps": 0.0625,
        "amsgrad": True,
        "dtype": "float32",
        "compute_dtype": "bfloat16",
        "loss_chunk": 3,
        "device": "cpu",
        "seed": 11,
        "vocab_size": N_VOCABULARY,
        "hidden_dim": 12,
        "layers": 1,
        "heads": 3,
        "init_scale": 0.5,
        "optimizer_impl": "foreach",
        "double_shift": True,
        "corpus": str(corpus),
        "tokenizer": str(tokenizer),
        "token_mask": str(mask),
        "every": 2,
        "windows": "1:1",
        "variables": "W,grad",
        "record_tokens": "live",
        "coding": "predicted",
    }
    of_others = OWN - OPTIMIZERS["adam"].defaults.keys()
    names = [setting.name for setting in dataclasses.fields(TrainingConfig)]
    assert list(settings) == [name for name in names if name not in of_others]
    flags = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in settings.items()
    ]
    succeeds("train", tmp_path / "run.zarr", *flags)
    content = info_of(tmp_path / "run.zarr")
    config = content["attrs"]["config"]
    assert {name: config[name] for name in settings} == settings
    assert content["attrs"]["corpus"]["name"] == str(corpus)
    assert content["attrs"]["tokenizer"]["name"] == str(tokenizer)
    assert content["optimizer"]["implementation"] == "foreach"
    ds = open_dataset(tmp_path / "run.zarr")
    assert ds.sizes == {"step": 4, "token": N_VOCABULARY, "dim": 12}
    hyperparameters = {
        "learning_rate": 0.125,
        "weight_decay": 0.25,
        "beta1": 0.5,
        "beta2": 0.75,
        "eps": 0.0625,
    }
    for name, value in hyperparameters.items():
        assert ds[name].values[1:].tolist() == 3 * [value]
    assert bool(ds.live.all())
    assert float(ds.W[0].std()) == pytest.approx(0.5, rel=0.1)


def test_settings_not_given_are_kept_too(trained: Path) -> None:
    config = info_of(trained)["attrs"]["config"]
    assert list(config) == [setting.name for setting in dataclasses.fields(TrainingConfig)]
    given = {"steps", "batch_size", "seq_len", "vocab_size", "hidden_dim", "layers", "heads"}
    given |= {"device", "corpus", "tokenizer"}
    assert config["compute_dtype"] in ("float32", "bfloat16")  # what auto was
    given |= {"compute_dtype"}
    defaults = TrainingConfig().to_json()
    assert {name: of for name, of in config.items() if name not in given} == {
        name: of for name, of in defaults.items() if name not in given
    }


def test_settings_come_from_a_file_and_flags_win(
    tmp_path: Path, corpus: Path, tokenizer: Path
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        "steps = 3\nbatch_size = 2\nseq_len = 8\nvocab_size = 300\nhidden_dim = 8\nlayers = 1\n"
        f'lr = 1\ndevice = "cpu"\ncorpus = "{corpus}"\ntokenizer = "{tokenizer}"\n'
        "double_shift = true\n"
    )
    succeeds("train", tmp_path / "a.zarr", "--config", file)
    succeeds("train", tmp_path / "b.zarr", "--config", file, "--steps", 2, "--lr", 0.5)
    of_file, of_both = (
        info_of(tmp_path / name)["attrs"]["config"] for name in ("a.zarr", "b.zarr")
    )
    assert (of_file["steps"], of_file["lr"], of_file["double_shift"]) == (3, 1.0, True)
    assert of_file["heads"] == TrainingConfig.heads
    assert of_both == of_file | {"steps": 2, "lr": 0.5}
    assert info_of(tmp_path / "b.zarr")["n_rows"] == 3


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("batchsize = 3", "unknown setting 'batchsize'"),
        ('steps = "3"', "steps is '3', but must be a whole number"),
        ("lr = true", "lr is True, but must be a number"),
        ("steps = 0", "steps is 0, but must be at least 1"),
        ("[model]\nheads = 2", "unknown setting 'model'"),
        ("steps =", "cannot read settings from"),
    ],
)
@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_wrong_settings_file_is_refused(
    tmp_path: Path, command: str, content: str, expected: str
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(content)
    assert expected in fails(2, command, tmp_path / "run.zarr", "--config", file)
    assert not (tmp_path / "run.zarr").exists()


def test_a_settings_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "nothing.toml" in fails(2, "plan", "--config", tmp_path / "nothing.toml")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--steps", "0"], "steps is 0"),
        (["--heads", "3"], "hidden_dim is 8, but must be a multiple of heads (3)"),
        (["--lr", "nan"], "lr is nan"),
        (["--beta1", "1"], "beta1 is 1.0"),
        (["--steps", "many"], "'many' is not a valid integer"),
        (["--dtype", "float16"], "'float16' is not one of"),
        (["--device", "tpu"], "device 'tpu' is not available"),
        (["--device", "cpu:x"], "device 'cpu:x' is not available"),
        (["--seed", "99999999999999999999"], "seed is 99999999999999999999"),
        (["--memory", "much"], "'much' is not a size such as 256MiB"),
        (["--memory", "-1MiB"], "'-1MiB' is not a size such as 256MiB"),
        (["--memory", ""], "'' is not a size such as 256MiB"),
        (["--seq-len", "100000"], "one sequence takes 100001"),
        (["--vocab-size", "301"], "pass --vocab-size 300"),
        (["--corpus", "/nothing.txt"], "cannot read the corpus /nothing.txt"),
        (["--corpus", "/"], "cannot read the corpus /"),
        (["--tokenizer", "/nothing.json"], "cannot read the tokenizer /nothing.json"),
        (["--tokenizer", __file__], "cannot read the tokenizer"),
        (["--token-mask", "/nothing"], "cannot read the token mask /nothing"),
        (["--token-mask", __file__], "cannot read the token mask"),
    ],
    ids=lambda value: " ".join(value).replace("/", "") if isinstance(value, list) else "",
)
def test_a_setting_that_cannot_work_is_refused_and_no_store_is_left(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny: tuple[str, ...],
    flags: list[str],
    expected: str,
) -> None:
    roomy = SimpleNamespace(available=10**15)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: roomy)  # or it warns, rightly
    assert expected in fails(2, "train", tmp_path / "run.zarr", *tiny, *flags)
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_that_is_not_utf8_is_refused(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"caf\xe9 " * 100)
    assert "UTF-8" in fails(2, "train", tmp_path / "run.zarr", *tiny, "--corpus", file)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"live_mask": torch.ones(299, dtype=torch.bool)}, "has shape (299,)"),
        ({"dead_mask": torch.ones(301, dtype=torch.bool)}, "has shape (301,)"),
        ({"W": torch.ones(3)}, "neither live_mask nor dead_mask"),
        ({"W": torch.ones(3, dtype=torch.bfloat16)}, "neither live_mask nor dead_mask"),
    ],
    ids=["short", "long", "no-mask", "a-notebooks-run"],
)
def test_a_mask_that_does_not_fit_is_refused(
    tmp_path: Path, tiny: tuple[str, ...], tensors: dict[str, torch.Tensor], expected: str
) -> None:
    file = tmp_path / "mask.safetensors"
    safetensors.torch.save_file(tensors, file)
    message = fails(2, "train", tmp_path / "run.zarr", *tiny, "--token-mask", file)
    assert expected in message
    assert str(file) in message


def test_an_existing_store_is_kept_unless_overwriting_was_asked_for(
    tmp_path: Path, trained: Path, tiny: tuple[str, ...]
) -> None:
    store = Path(shutil.copytree(trained, tmp_path / "run.zarr"))
    # Told at once, not when corpus and tokenizer have been read.
    assert "--overwrite" in fails(2, "train", store, *tiny, "--corpus", "/nothing.txt")
    assert "--overwrite" in fails(2, "train", store, *tiny)
    assert info_of(store)["n_rows"] == 6
    succeeds("train", store, *tiny, "--steps", 2, "--overwrite")
    assert info_of(store)["n_rows"] == 3


def test_a_directory_that_is_no_store_is_never_overwritten(
    tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    precious = tmp_path / "directory" / "deep" / "precious.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("precious")
    for flags in ([], ["--overwrite"], ["--overwrite", "--force"]):
        message = fails(2, "train", tmp_path / "directory", *tiny, *flags)
        assert "is not a thimble-zarr store" in message
        assert [file for file in tmp_path.rglob("*") if file.is_file()] == [precious]
        assert precious.read_text() == "precious"


def test_another_tools_zarr_group_is_never_overwritten(
    tmp_path: Path, tiny: tuple[str, ...]
) -> None:

    group = zarr.create_group(tmp_path / "other.zarr", zarr_format=3)
    group.create_array("x", shape=(3,), dtype="f4")[:] = 7
    fails(2, "train", tmp_path / "other.zarr", *tiny, "--overwrite")
    assert zarr.open_array(tmp_path / "other.zarr" / "x", mode="r")[:].tolist() == [7, 7, 7]


def test_a_file_is_never_overwritten(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    file = tmp_path / "precious.txt"
    file.write_text("precious")
    fails(2, "train", file, *tiny, "--overwrite")
    assert file.read_text() == "precious"


def test_a_store_that_is_being_recorded_is_never_overwritten(
    tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    loop = Loop()
    with Recorder(tmp_path / "run.zarr", loop.optimizer, parameter=loop.weight) as recorder:
        loop.step()
        recorder.flush()
        message = fails(3, "train", tmp_path / "run.zarr", *tiny, "--overwrite")
        assert f"process {os.getpid()} on " in message
    assert info_of(tmp_path / "run.zarr")["n_rows"] == 2


def test_an_empty_directory_may_become_a_store(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    succeeds("train", tmp_path, *tiny)
    assert info_of(tmp_path)["complete"] is True


def test_a_path_below_a_file_cannot_be_written(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    (tmp_path / "file").write_text("precious")
    for store in (tmp_path / "file" / "run.zarr", tmp_path / "file" / "below" / "run.zarr"):
        assert str(store) in fails(3, "train", store, *tiny)
    assert (tmp_path / "file").read_text() == "precious"


def test_a_path_in_proc_cannot_be_written(tiny: tuple[str, ...]) -> None:
    fails(3, "train", "/proc/nothing/x", *tiny)
    assert "/proc/nothing/x" in fails(3, "train", "/proc/nothing/x", *tiny, "--force")


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_found_before_anything_is_written(
    tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    message = fails(3, "train", tmp_path / "run.zarr", *tiny)
    assert "--force" in message
    assert "1.00 kB" in message or "1000 B" in message  # what is free
    assert list(tmp_path.iterdir()) == []
    assert "disk" in fails(3, "plan", tmp_path / "run.zarr", *tiny)


@pytest.mark.usefixtures("full_disk")
def test_force_trains_although_the_disk_looks_full(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    succeeds("train", tmp_path / "run.zarr", *tiny, "--force")
    assert info_of(tmp_path / "run.zarr")["n_rows"] == 6


def test_short_memory_is_warned_of_and_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: tuple[str, ...]
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    for command in ("plan", "train"):
        result = succeeds(command, tmp_path / "run.zarr", *tiny)
        (warning,) = told(result.stderr)
        assert warning.startswith("Warning: the run needs about ")
        assert "1.00 MB is free" in warning


def test_a_loss_that_is_not_a_number_is_recorded_and_warned_of_once(
    tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    store = tmp_path / "run.zarr"
    with pytest.warns(UserWarning, match="the loss of step 2 is nan") as warned:
        result = run("train", store, *tiny, "--lr", "1e30", "--dtype", "float32")
    assert result.exit_code == 0
    assert len(warned) == 1
    ds = open_dataset(store)
    assert np.isnan(ds.loss.values).tolist() == [True, False, True, True, True, True]
    assert info_of(store)["n_rows"] == 6
    for format_ in ("table", "csv", "json"):
        assert run("check", store, "--format", format_).exit_code == 1
    assert checked(store, exit_code=1)["holds"] is False


def test_an_interruption_before_the_first_step_says_that_nothing_was_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: tuple[str, ...]
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("thimble_zarr.experiment.trainer.Training.step", interrupt)
    result = run("train", tmp_path / "run.zarr", *tiny)
    assert (result.exit_code, told(result.stderr)) == (130, ["Interrupted."])
    assert result.stdout.splitlines()[-1] == "Nothing was recorded."
    monkeypatch.setattr("thimble_zarr.experiment.trainer.load_data", interrupt)
    result = run("train", tmp_path / "another.zarr", *tiny)
    assert (result.exit_code, told(result.stderr)) == (130, ["Interrupted."])
    assert not (tmp_path / "another.zarr").exists()


def test_a_disk_that_fills_up_on_the_way_ends_the_run_with_what_is_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: tuple[str, ...]
) -> None:
    commit_block = StoreWriter.commit_block

    def commit(store: StoreWriter, first_row: int, *block: object, **told: object) -> None:
        if first_row >= 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        commit_block(store, first_row, *block, **told)

    monkeypatch.setattr(StoreWriter, "commit_block", commit)
    store = tmp_path / "run.zarr"
    message = fails(3, "train", store, *tiny, "--memory", "64KiB")
    assert "No space left on device" in message
    assert "steps 0 to 2 are committed and safe" in message
    assert checked(store)["steps"] == [1, 2]


def test_blocks_follow_from_the_memory(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    steps = []
    for memory in ("64KiB", "1MiB"):
        store = tmp_path / f"{memory}.zarr"
        succeeds("train", store, *tiny, "--memory", memory)
        steps.append(info_of(store)["layout"]["block_steps"])
        assert (
            f"the last block of {steps[-1]} steps"
            in succeeds("plan", *tiny, "--memory", memory).stdout
        )
    assert steps == [1, 16]


def assert_unpublished(result: Result, spool: Path, url: str) -> None:
    """Its last line says what to type."""
    assert result.exit_code == 3
    *_, last = result.stderr.splitlines()
    assert last.startswith(f"Error: the run is recorded in {spool}, but not all of it is published")
    assert last.endswith(f"`thimble-zarr publish {spool} {url}`")


def test_a_run_whose_address_is_on_a_server_is_in_its_spool(
    tmp_path: Path, tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned(monkeypatch, request_retries=0)
    for name, value in (("ENDPOINT_URL", "http://127.0.0.1:1"), ("REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    monkeypatch.chdir(tmp_path)
    url, spool = "s3://bucket/run.zarr", tmp_path / "spool.zarr"
    for options, path in (((), tmp_path / "run.zarr"), (("--spool", spool), spool)):
        with pytest.warns(UserWarning, match="publish") as told:
            result = run("train", url, *tiny, *options)
        assert f"{path} is not published whole" in str(told[-1].message)
        assert_unpublished(result, path, url)
        assert f"thimble-zarr check {path}" in result.stdout
        assert checked(path, "--tokens=all")["holds"] is True
    with pytest.warns(UserWarning, match="not published whole"):
        finished = run("train", url, *tiny, "--resume", "--spool", spool)
    assert_unpublished(finished, spool, url)
    assert "All 5 steps are recorded" in finished.stdout
    assert "`spool` says where" in fails(2, "train", spool, *tiny, "--spool", spool)
