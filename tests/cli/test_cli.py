import csv
import dataclasses
import errno
import io
import itertools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import click
import msgspec
import numpy as np
import pandas as pd
import psutil
import pytest
import safetensors.torch
import torch
import zarr
from click.testing import CliRunner, Result
from filelock import FileLock
from tokenizers import Tokenizer

import thimble_zarr
from tests.support.commands import (
    MAIN,
    START,
    checked,
    fails,
    info_of,
    run,
    strict_json,
    succeeds,
    told,
)
from tests.support.runs import N_TOKENS, Loop, record, token_labels
from tests.support.zoo import Recorded
from thimble_zarr import Recorder, accounting, open_dataset
from thimble_zarr.cli.main import cli
from thimble_zarr.cli.report import csv_text
from thimble_zarr.experiment import device
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.experiment.vocabulary import train_tokenizer
from thimble_zarr.format.schema import FORMAT_VERSION
from thimble_zarr.store.commit import Commit
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.keys import COMMIT, HOLDER
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.writer import StoreWriter

TEXT = (
    "The step that the weights take is the step that the optimizer took.\n"
    "What the gradient says, the moments remember; what they remember moves the weights.\n"
    "A token that never occurs moves too, because the weights of input and output are one.\n"
)

N_VOCABULARY = 300

HEADER = "t,norm_predicted,norm_observed,norm_difference,cosine_similarity,ratio"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "corpus.txt"
    file.write_text(TEXT * 3, encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def tokenizer(corpus: Path) -> Path:
    file = corpus.with_name("tokenizer.json")
    train_tokenizer([TEXT], N_VOCABULARY).save(str(file))
    return file


@pytest.fixture(scope="session")
def tiny(corpus: Path, tokenizer: Path) -> tuple[str, ...]:
    """Options of a run that takes a fraction of a second."""
    options = {
        "steps": 5,
        "batch-size": 2,
        "seq-len": 8,
        "vocab-size": N_VOCABULARY,
        "hidden-dim": 8,
        "layers": 1,
        "heads": 2,
        "device": "cpu",
        "corpus": corpus,
        "tokenizer": tokenizer,
    }
    return tuple(f"--{name}={value}" for name, value in options.items())


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: tuple[str, ...]) -> Path:
    """A store that `train` wrote, never to be written to."""
    store = tmp_path_factory.mktemp("trained") / "run.zarr"
    succeeds("train", store, *tiny)
    return store


@pytest.fixture
def shown_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show every bit of progress, as in five seconds a line."""
    monkeypatch.setattr("thimble_zarr.cli.progress.LINE_INTERVAL_S", 0.0)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=10**12, used=10**12 - 1000, free=1000)
    monkeypatch.setattr("thimble_zarr.experiment.plan.shutil.disk_usage", lambda path: usage)


# --- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", [None, *cli.commands])
def test_help_is_shown(flag: str, command: str | None) -> None:
    text = succeeds(*([] if command is None else [command]), flag).stdout
    assert text.startswith("Usage: ")
    for name in cli.commands if command is None else ():
        assert f"\n  {name} " in text


def test_the_commands_are_these() -> None:
    names = {"train", "demo", "plan", "check", "info", "tokens", "import", "export"}
    names |= {"verify", "repair"}
    assert set(cli.commands) == names


def test_the_list_of_commands_cuts_no_description_off() -> None:
    text = CliRunner().invoke(cli, ["--help"], terminal_width=80).stdout
    assert all(f"\n  {name} " in text for name in cli.commands)
    assert "..." not in text.partition("\nCommands:\n")[2]


def test_every_option_of_every_command_is_explained() -> None:
    for name, command in cli.commands.items():
        assert command.help, name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.opts}"


@pytest.mark.parametrize("command", ["train", "plan"])
def test_every_setting_is_an_option_and_its_default_is_told(command: str) -> None:
    text = " ".join(succeeds(command, "--help").stdout.split())
    for setting in dataclasses.fields(TrainingConfig):
        assert f"--{setting.name.replace('_', '-')} " in text
        if setting.default is not None and not isinstance(setting.default, bool):
            assert f"[default: {setting.default}]" in text


def test_an_error_of_the_system_is_its_file_and_reason(trained: Path, tmp_path: Path) -> None:
    message = fails(3, "check", trained, "--format=csv", f"--output={tmp_path}")
    assert message == f"Error: {tmp_path}: Is a directory"


def test_the_exit_codes_are_told() -> None:
    text = " ".join(succeeds("--help").stdout.split())
    for code in (
        "0 all is well",
        "1 a check found",
        "2 wrong usage",
        "3 a store",
        "130 interrupted",
    ):
        assert code in text


def test_the_version_is_told() -> None:
    assert thimble_zarr.__version__ in succeeds("--version").stdout


def test_help_starts_without_torch() -> None:
    code = (
        "import sys\nfrom thimble_zarr.cli.main import cli\n"
        "for args in (['-h'], ['train', '-h'], ['check', '-h'], ['tokens', '-h']):\n"
        "    cli(args, standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'xarray', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr == ""


@pytest.mark.parametrize("args", [["nothing"], ["train"], ["check"], ["info", "--nothing", "x"]])
def test_what_click_refuses_is_usage(args: list[str]) -> None:
    fails(2, *args)


# --- train ---------------------------------------------------------------------------------------


def test_train_shows_plan_corpus_validation_and_what_to_type_next(
    tmp_path: Path, tiny: tuple[str, ...]
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
    assert f"{len(Tokenizer.from_file(option(tiny, 'tokenizer')).encode(TEXT * 3))} tokens" in (
        result.stdout
    )


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
    store = tmp_path / "run.zarr"
    result = succeeds("demo", store, "--steps", 5, "--quiet")
    assert result.stderr == ""
    assert result.stdout == succeeds("check", store, "--quiet").stdout


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
        "lr": 0.125,
        "weight_decay": 0.25,
        "beta1": 0.5,
        "beta2": 0.75,
        "eps": 0.0625,
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
    }
    assert list(settings) == [setting.name for setting in dataclasses.fields(TrainingConfig)]
    flags = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in settings.items()
    ]
    succeeds("train", tmp_path / "run.zarr", *flags)
    content = info_of(tmp_path / "run.zarr")
    assert content["attrs"]["config"] == settings
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
    for setting in dataclasses.fields(TrainingConfig):
        if setting.name not in given:
            assert config[setting.name] == setting.default, setting.name


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
    import zarr

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

    def commit(store: StoreWriter, first_row: int, *block: object) -> None:
        if first_row >= 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        commit_block(store, first_row, *block)

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


# --- plan ----------------------------------------------------------------------------------------


def test_plan_is_beside_the_notebooks_way_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    disk = SimpleNamespace(total=10**13, used=0, free=10**13)
    monkeypatch.setattr("thimble_zarr.experiment.plan.shutil.disk_usage", lambda path: disk)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**11))
    result = succeeds("plan")
    assert list(tmp_path.iterdir()) == []
    assert told(result.stderr) == []
    rows = {
        name: line.split(name)[1].split("  ")
        for line in result.stdout.splitlines()
        for name in ("W ", "grad", "exp_avg ", "exp_avg_sq", "Disk, at most", "RAM for recording")
        if line.strip().startswith(name)
    }
    sizes = {name.strip(): [cell.strip() for cell in row if cell] for name, row in rows.items()}
    assert sizes["W"] == ["1.28 GB", "1.28 GB"]
    assert sizes["grad"] == ["1.28 GB", "1.28 GB"]
    assert sizes["exp_avg"] == ["1.28 GB", "2.56 GB"]
    assert sizes["exp_avg_sq"] == ["1.28 GB", "2.56 GB"]
    assert sizes["Disk, at most"][1] == sizes["RAM for recording"][1] == "7.69 GB"
    assert "100.00 GB of RAM and 10.00 TB of disk free" in result.stdout


def test_memory_of_training_is_that_of_its_arithmetic_beside_the_notebooks() -> None:
    def row(*options: str) -> list[str]:
        lines = succeeds("plan", "--device=cpu", *options).stdout.splitlines()
        (found,) = (line for line in lines if line.startswith("RAM for training, about"))
        return re.findall(r"[\d.]+ [MG]B", found)

    notebook = row("--compute-dtype=bfloat16", "--loss-chunk=0")
    assert notebook[0] == notebook[1]
    ours = row("--compute-dtype=bfloat16")
    assert ours[1] == notebook[1]
    assert ours[0].endswith("MB")
    assert notebook[1].endswith("GB")


@pytest.mark.parametrize("fast", [True, False])
def test_plan_says_in_which_dtype_and_why(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(device, "cpu_multiplies_bfloat16", lambda: fast)
    for options, expected in (
        ([], "bfloat16" if fast else "float32 (this CPU has no fast bfloat16)"),
        (["--compute-dtype=float32"], "float32"),
        (["--compute-dtype=bfloat16"], "bfloat16"),
        (["--dtype=float32"], "float32"),
    ):
        stdout = succeeds("plan", "--device=cpu", *options).stdout
        dtype = "float32" if "--dtype=float32" in options else "bfloat16"
        assert (
            f"Forward and backward run in {expected}, the loss in chunks of 512 positions. "
            f"The record is {dtype}.\n"
        ) in stdout
    assert "the loss in one piece." in succeeds("plan", "--loss-chunk=0").stdout


# --- info ----------------------------------------------------------------------------------------


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


def test_a_store_without_a_step_is_shown_and_cannot_be_checked(tmp_path: Path) -> None:
    loop = Loop()
    with Recorder(tmp_path / "run.zarr", loop.optimizer, parameter=loop.weight):
        assert "initial state" not in succeeds("info", tmp_path / "run.zarr").stdout
        assert info_of(tmp_path / "run.zarr")["n_rows"] == 0
        assert info_of(tmp_path / "run.zarr")["overhead"] is None
        assert "no committed step" in fails(3, "check", tmp_path / "run.zarr")


# --- check ---------------------------------------------------------------------------------------


def test_a_single_step_needs_no_summary(trained: Path) -> None:
    stdout = succeeds("check", trained, "--steps", "3").stdout
    assert "\nSteps    3\n" in stdout
    assert "Summary" not in stdout
    assert "Summary" in succeeds("check", trained, "--steps", "3:4").stdout


def test_check_of_a_sound_run_is_a_table_and_a_verdict(trained: Path) -> None:
    result = succeeds("check", trained)
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0] == f"Store    {trained}: bfloat16, AdamW (single)"
    assert lines[1].startswith("Tokens   dead: ")
    assert lines[2] == "Steps    1 to 5"
    assert lines[4].split() == HEADER.split(",")
    assert [line.split()[0] for line in lines[5:10]] == ["1", "2", "3", "4", "5"]
    assert "Summary" in lines
    replay = lines.index("Replay on cpu, to the bit")
    n_elements = 8 * 5 * int(lines[1].split()[2].replace(",", ""))
    for line, name in zip(
        lines[replay + 2 : replay + 5], ("W", "exp_avg", "exp_avg_sq"), strict=True
    ):
        assert line.split() == [name, *[f"{n_elements:,}"] * 2, "100", "%", "none", "0"]
    assert lines[-1].startswith("HOLDS to the bit: ")


@pytest.fixture
def long_run(tmp_path: Path) -> Path:
    record(tmp_path / "run.zarr", n_steps=47)
    return tmp_path / "run.zarr"


def steps_shown(stdout: str) -> list[int]:
    """Return the steps in the table, apart from those left out."""
    lines = stdout.splitlines()
    first = next(i for i, line in enumerate(lines) if line.split() == HEADER.split(","))
    table = itertools.takewhile(bool, lines[first + 1 :])
    return [int(line.split()[0]) for line in table if not line.startswith("..")]


def test_a_long_table_shows_both_ends_and_all_fits_on_a_screen(
    long_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(long_run.parent)
    stdout = succeeds("check", long_run.name).stdout
    assert steps_shown(stdout) == [*range(1, 6), *range(43, 48)]
    assert "10 of 47 steps" in stdout
    lines = stdout.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("rows", "shown"),
    [
        (1, [1, 47]),
        (4, [1, 2, 46, 47]),
        (5, [1, 2, 3, 45, 46, 47]),
        (40, [*range(1, 21), *range(28, 48)]),
        (47, range(1, 48)),
        (1000, range(1, 48)),
        ("all", range(1, 48)),
    ],
)
def test_as_many_steps_are_shown_as_asked_for(
    long_run: Path, rows: object, shown: Iterable[int]
) -> None:
    stdout, n_shown = succeeds("check", long_run, "--rows", rows).stdout, len([*shown])
    assert steps_shown(stdout) == [*shown]
    assert (f"\n{n_shown} of 47 steps (" in stdout) == (n_shown < 47)


def test_rows_are_a_number_or_all_and_of_a_table(trained: Path) -> None:
    for rows in ("0", "-1", "many", "1.5", "²"):
        message = fails(2, "check", trained, "--rows", rows)
        assert f"'{rows}' is neither a number of steps, such as 40, nor all" in message
    message = fails(2, "check", trained, "--rows", "5", "--format", "csv")
    assert "--rows shortens the table, and --format csv has every step" in message


@pytest.mark.parametrize("columns", [60, 80, 120, 160, 200])
@pytest.mark.parametrize("options", [(), ("--extended",), ("--tokens=dead,live,all",)])
def test_tables_fit_the_terminal(
    trained: Path, monkeypatch: pytest.MonkeyPatch, columns: int, options: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.chdir(trained.parent)
    lines = succeeds("check", trained.name, *options).stdout.splitlines()
    assert max(map(len, lines)) <= columns
    names = " ".join(lines).split()
    if "--extended" in options:
        assert {"norm_unexplained", *HEADER.split(",")} <= {*names}


def test_without_a_terminal_words_are_not_broken(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    *table, verdict = succeeds("check", trained, "--extended").stdout.splitlines()
    assert verdict.startswith("HOLDS to the bit: ")
    assert len(verdict) > 100
    assert max(map(len, table[3:])) <= 100


def test_csv_is_every_step_with_a_fixed_header(tmp_path: Path) -> None:
    record(tmp_path / "run.zarr", n_steps=47)
    result = succeeds("check", tmp_path / "run.zarr", "--format", "csv")
    assert result.stdout.splitlines()[0] == HEADER
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [int(row["t"]) for row in rows] == list(range(1, 48))
    ds = open_dataset(tmp_path / "run.zarr")
    table = accounting(ds.sel(token=ds.dead))
    for name in HEADER.split(",")[1:]:
        assert [float(row[name]) for row in rows] == table[name].values.tolist()
    assert result.stderr.startswith("HOLDS to the bit: ")
    assert succeeds("check", tmp_path / "run.zarr", "--format", "csv", "--quiet").stderr == ""


def test_json_has_these_keys_and_nothing_json_does_not_know(trained: Path) -> None:
    content = checked(trained)
    ds = open_dataset(trained)
    about = ["store", "tokens", "steps", "n_skipped", "n_steps", "rows", "summary"]
    replay = ["replay", "replay_device", "not_exact_because", "findings"]
    assert list(content) == [*about, *replay, "holds", "has_ended", "verdict"]
    total = 5 * 8 * int(ds.dead.sum())
    equal = {"total": total, "equal": total, "max_ulp": 0, "first": None}
    assert content["replay"] == dict.fromkeys(("W", "exp_avg", "exp_avg_sq"), equal)
    assert (content["replay_device"], content["not_exact_because"]) == ("cpu", "")
    assert content["findings"] == []
    assert content["store"] == str(trained)
    assert content["tokens"] == {"subset": "dead", "n": int(ds.dead.sum())}
    assert content["steps"] == [1, 5]
    table = accounting(ds.sel(token=ds.dead))
    assert [row["t"] for row in content["rows"]] == [1, 2, 3, 4, 5]
    for name in HEADER.split(",")[1:]:
        column = [row[name] for row in content["rows"]]
        assert column == table[name].values.tolist()
        assert content["summary"][name]["mean"] == pytest.approx(np.mean(column))
        assert content["summary"][name]["count"] == 5
        assert content["summary"][name]["max"] == max(column)
    assert set(content["rows"][0]) == set(HEADER.split(","))
    assert content["holds"] is True
    assert content["verdict"].startswith("HOLDS to the bit: ")


@pytest.mark.parametrize("format_", ["table", "csv", "json"])
def test_output_goes_to_a_file_as_it_goes_to_stdout(
    tmp_path: Path, trained: Path, format_: str
) -> None:
    expected = succeeds("check", trained, "--format", format_).stdout
    file = tmp_path / "check"
    result = succeeds("check", trained, "--format", format_, "--output", file)
    assert result.stdout == ""
    assert result.stderr.startswith("HOLDS to the bit: ")
    assert file.read_text(encoding="utf-8") == expected
    quiet = succeeds("check", trained, "--format", format_, "--output", file, "--quiet")
    assert (quiet.stdout, quiet.stderr) == ("", "")


def test_output_that_cannot_be_written_is_told(tmp_path: Path, trained: Path) -> None:
    for file in (tmp_path, Path("/proc/check.csv")):
        assert str(file) in fails(3, "check", trained, "--output", file)
    message = fails(3, "check", trained, "--output", tmp_path / "nothing" / "check.csv")
    assert f"there is no directory {tmp_path / 'nothing'}" in message


def test_tokens_are_selected(tmp_path: Path, trained: Path) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("3, 5\n7 11\n", encoding="utf-8")
    labels = StoreReader.open(trained).read_labels()
    assert labels.live is not None
    assert labels.text is not None
    n_live = int(labels.live.sum())
    the = labels.text.index(" the")
    expected = {
        "all": range(300),
        "live": np.flatnonzero(labels.live),
        "dead": np.flatnonzero(~labels.live),
        "17,42": [17, 42],
        "299": [299],
        f"@{ids}": [3, 5, 7, 11],
        "text: the": [the],
    }
    assert 0 < n_live < 300
    ds = open_dataset(trained)
    for spec, tokens in expected.items():
        content = checked(trained, "--tokens", spec)
        assert content["tokens"] == {"subset": spec, "n": len(tokens)}
        table = accounting(ds.sel(token=list(tokens)))
        found = [row["norm_observed"] for row in content["rows"]]
        assert found == pytest.approx(table.norm_observed.values, rel=1e-12)


def test_without_dead_tokens_all_are_checked(tmp_path: Path) -> None:
    record(tmp_path / "run.zarr", n_live=N_TOKENS)
    assert checked(tmp_path / "run.zarr")["tokens"] == {"subset": "all", "n": N_TOKENS}
    message = fails(2, "check", tmp_path / "run.zarr", "--tokens", "dead")
    assert "no token is selected" in message


@pytest.mark.parametrize("label", ["dead", "live", "text:the"])
def test_tokens_that_were_never_labelled_cannot_be_named(tmp_path: Path, label: str) -> None:
    record(tmp_path / "run.zarr", recorder_options={"labels": None})
    assert "ids" in fails(2, "check", tmp_path / "run.zarr", "--tokens", label)
    assert checked(tmp_path / "run.zarr")["tokens"]["subset"] == "all"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("1,300", "token 300 is not in this run, which has tokens 0 to 299"),
        ("-1", "token -1 is not in this run"),
        ("99999999999999999999", "99999999999999999999"),
        ("1,x", "--tokens 1,x: expected all, live, dead, ids"),
        ("1.5", "--tokens 1.5: expected"),
        ("DEAD", "--tokens DEAD: expected"),
        ("", "--tokens"),
        (",", "--tokens"),
        ("@/nothing", "cannot read token ids from /nothing"),
        ("@/", "cannot read token ids from /"),
        ("@", "cannot read token ids from"),
        ("text:zzz", "no token has the text 'zzz'"),
        ("text:the ", "' the'"),
    ],
)
def test_tokens_that_are_not_there_are_refused(trained: Path, spec: str, expected: str) -> None:
    assert expected in fails(2, "check", trained, f"--tokens={spec}")


def test_a_file_that_holds_no_ids_is_refused(tmp_path: Path, trained: Path) -> None:
    for content in (b"", b"dead", b"\xff"):
        (tmp_path / "ids.txt").write_bytes(content)
        assert "ids.txt" in fails(2, "check", trained, "--tokens", f"@{tmp_path / 'ids.txt'}")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("2:4", [2, 4]), ("2:", [2, 5]), (":3", [1, 3]), ("3", [3, 3]), ("5:5", [5, 5])],
)
def test_steps_are_selected_both_ends_included(
    trained: Path, spec: str, expected: list[int]
) -> None:
    content = checked(trained, "--steps", spec)
    assert content["steps"] == expected
    assert [row["t"] for row in content["rows"]] == list(range(expected[0], expected[1] + 1))
    whole = {row["t"]: row for row in checked(trained)["rows"]}
    for row in content["rows"]:
        assert row == pytest.approx(whole[row["t"]], rel=1e-12)


@pytest.mark.parametrize(
    "spec", ["1:6", "0:3", "6", "4:2", "-1:3", "a:b", "1:2:3", "::", "", "1.5"]
)
def test_steps_that_are_not_there_are_refused(trained: Path, spec: str) -> None:
    assert f"--steps {spec}" in fails(2, "check", trained, f"--steps={spec}")


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """A run in which something changed the learning rate of step 3 unseen by the recorder."""
    loop = Loop(lr=1e-2)
    path = tmp_path / "faulty.zarr"
    with Recorder(path, loop.optimizer, parameter=loop.weight, labels=token_labels()) as recorder:

        def meddle(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
            optimizer.param_groups[0]["lr"] = 3e-2 if recorder.step == 2 else 1e-2

        def hide(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
            optimizer.param_groups[0]["lr"] = 1e-2

        loop.optimizer.register_step_pre_hook(meddle)
        hook = loop.optimizer.register_step_post_hook(hide)
        loop.optimizer._optimizer_step_post_hooks.move_to_end(hook.id, last=False)
        for _ in range(5):
            loop.step()
            loop.optimizer.zero_grad()
    return path


def test_a_planted_fault_is_found_where_it_was_planted(faulty: Path) -> None:
    for format_ in ("table", "csv", "json"):
        assert run("check", faulty, "--format", format_).exit_code == 1
    result = run("check", faulty, "--tokens", "all")
    assert "FAILS: from step 3 on, " in result.stdout
    assert result.stdout.splitlines()[-1].startswith("  other-learning-rate: The weights are those")
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("W "))
    assert "step 3, token 0, dim " in line
    assert "100 %" not in line
    found = checked(faulty, exit_code=1)
    assert found["holds"] is False
    assert found["verdict"].startswith("FAILS: ")
    (finding,) = found["findings"]
    assert (finding["code"], finding["step"]) == ("other-learning-rate", 3)
    assert "0.03" in finding["message"]
    assert found["replay"]["exp_avg"]["first"] is None
    assert found["replay"]["W"]["first"]["step"] == 3
    assert found["replay"]["W"]["equal"] < found["replay"]["W"]["total"]
    assert checked(faulty, "--steps", "1:2")["holds"] is True
    assert checked(faulty, "--steps", "4:5")["holds"] is True


def test_without_the_replay_the_formula_judges(faulty: Path, trained: Path) -> None:
    result = run("check", faulty, "--no-replay")
    assert result.exit_code == 1
    assert "Replay" not in result.stdout
    assert result.stdout.splitlines()[-1].startswith("FAILS: ")
    assert "first at step 3" in result.stdout
    found = checked(trained, "--no-replay")
    assert found["verdict"].startswith("HOLDS: all ")
    assert (found["replay"], found["replay_device"], found["findings"]) == (None, None, [])


def test_without_the_formula_the_replay_is_shown_alone(faulty: Path, trained: Path) -> None:
    shown, both = (succeeds("check", trained, *how).stdout for how in (["--no-formula"], []))
    assert "norm_predicted" not in shown
    assert "Summary" not in shown
    title, replay, verdict = shown.split("\n\n")
    assert both.startswith(title)
    assert replay in both
    assert both.startswith(verdict.rstrip(), both.index("HOLDS to the bit"))
    result = run("check", faulty, "--no-formula", "--format", "csv")
    assert result.exit_code == 1
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    names = ("W", "exp_avg", "exp_avg_sq")
    of_each = ("n_different", "n_beyond", "max_ulp")
    columns = [f"{column}_{name}" for name in names for column in of_each]
    assert list(rows[0]) == ["t", *columns]
    first = next(row for row in rows if int(row["n_different_W"]))
    assert first["t"] == "3"
    assert float(first["max_ulp_W"]) > 0
    found, with_formula = (checked(faulty, *how, exit_code=1) for how in (["--no-formula"], []))
    differing = ("rows", "summary")
    assert list(found["rows"][0]) == ["t", *columns]
    for key in with_formula.keys() - differing:
        assert found[key] == with_formula[key]
    assert [finding["code"] for finding in found["findings"]] == ["other-learning-rate"]


def test_csv_is_what_pandas_writes() -> None:
    floats = np.array([0.1, np.nan, np.inf, -np.inf, -0.0, 1e-300, 1e22, 1 / 3])
    long = {"t": np.arange(8), "a": floats, "n_different_W": np.arange(8)[::-1]}
    short = {"t": np.arange(2), "b": floats[:2]}
    labels = [{"store": 'runs/a,"b".zarr', "subset": "dead"}, {"store": "c", "subset": ""}]
    expected = pd.concat(
        [
            pd.DataFrame(labels[0] | long).astype({"n_different_W": object}),
            pd.DataFrame(labels[1] | short),
        ]
    )
    text = csv_text(list(zip(labels, (long, short), strict=True)))
    assert text == expected.to_csv(index=False, lineterminator="\n")


def test_formula_and_replay_are_not_both_left_out(trained: Path) -> None:
    assert "leave nothing to check" in fails(2, "check", trained, "--no-formula", "--no-replay")
    assert "--no-formula turns that off" in fails(2, "check", trained, "--no-formula", "--extended")


@pytest.mark.parametrize(
    ("options", "spared"),
    [
        (["--no-replay"], ["torch", "xarray"]),
        (["--no-replay", "--format", "csv"], ["torch", "xarray", "pandas"]),
        (["--format", "csv"], ["xarray", "pandas"]),
        (["--no-formula"], ["xarray", "pandas"]),
        ([], ["xarray"]),
    ],
)
def test_nothing_is_imported_that_is_not_needed(
    trained: Path, options: list[str], spared: list[str]
) -> None:
    script = (
        f"import sys; sys.modules |= dict.fromkeys({spared!r}); sys.argv = ['thimble-zarr', "
        f"'check', {str(trained)!r}, *{options!r}]; from thimble_zarr.cli.main import main; main()"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "HOLDS" in shown.stdout + shown.stderr


def test_a_cause_is_named_without_xarray(faulty: Path) -> None:
    script = (
        "import sys; sys.modules['xarray'] = None; sys.argv = ['thimble-zarr', 'check', "
        f"{str(faulty)!r}]; from thimble_zarr.cli.main import main; main()"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert shown.returncode == 1, shown.stderr
    assert "other-learning-rate: " in shown.stdout


def test_more_columns_follow_those_of_the_notebook(trained: Path) -> None:
    more = ["share_stalled", "share_moved", "mean_displacement_ulp", "norm_unexplained"]
    shown = succeeds("check", trained, "--extended", "--format", "csv").stdout
    assert shown.splitlines()[0] == ",".join([HEADER, *more])
    ds = open_dataset(trained)
    table = accounting(ds.sel(token=ds.dead), extended=True)
    rows = list(csv.DictReader(io.StringIO(shown)))
    for name in more:
        assert [float(row[name]) for row in rows] == table[name].values.tolist()
    assert [float(row["norm_unexplained"]) for row in rows] == [0.0] * 5
    shown = succeeds("check", trained, "--extended", "--no-replay", "--format", "csv").stdout
    assert shown.splitlines()[0] == ",".join([HEADER, *more[:-1]])


def test_a_device_that_is_not_here_is_told(trained: Path) -> None:
    assert "torch finds no device mps here" in fails(2, "check", trained, "--device", "mps")
    assert "no device abacus" in fails(2, "check", trained, "--device", "abacus")
    assert checked(trained, "--device", "cpu")["holds"] is True
    assert "--no-replay turns it off" in fails(
        2, "check", trained, "--device", "cpu", "--no-replay"
    )


def test_a_store_that_was_altered_does_not_hold(tmp_path: Path, trained: Path) -> None:
    store = Path(shutil.copytree(trained, tmp_path / "run.zarr"))
    array = zarr.open_array(store, path="grad", mode="r+")
    array[0, 3] = 0  # of the initial state, which nothing consumes
    shown = run("check", store)
    assert shown.exit_code == 1
    assert "FAILS: every row follows from the row before, but the store was changed" in shown.stdout
    assert shown.stdout.splitlines()[-1].startswith("  altered-chunk: grad was changed after ")


def test_the_verdict_of_a_fault_goes_where_the_good_one_goes(tmp_path: Path, faulty: Path) -> None:
    result = run("check", faulty, "--format", "csv", "--output", tmp_path / "check.csv")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("FAILS: ")
    quiet = run("check", faulty, "--quiet", "--output", tmp_path / "check.txt")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (1, "", "")


@pytest.mark.parametrize("lr", ["0", "1e-30"])
@pytest.mark.parametrize("format_", ["table", "csv", "json"])
def test_a_run_in_which_nothing_moved_is_checked(
    tmp_path: Path, tiny: tuple[str, ...], lr: str, format_: str
) -> None:
    store = tmp_path / "run.zarr"
    succeeds("train", store, *tiny, "--lr", lr)
    result = succeeds("check", store, "--format", format_)
    if format_ == "json":
        rows = strict_json(result.stdout)["rows"]
        assert [row["norm_observed"] for row in rows] == 5 * [0.0]
        assert [row["ratio"] for row in rows] == 5 * [None]


# --- stores that cannot be read ------------------------------------------------------------------


@pytest.mark.parametrize("command", ["check", "info"])
def test_a_path_that_is_no_store_is_unreadable(tmp_path: Path, command: str) -> None:
    (tmp_path / "file").write_text("no store")
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    (tmp_path / "directory").mkdir()
    for store in (tmp_path, tmp_path / "file", tmp_path / "directory"):
        assert f"{store} is not a thimble-zarr store" in fails(3, command, store)
    for store in (tmp_path / "nothing", tmp_path / "file" / "below"):
        assert str(store) in fails(3, command, store)


@pytest.mark.parametrize("command", ["check", "info"])
def test_a_store_of_a_newer_format_is_unreadable(toy_copy: Path, command: str) -> None:
    metadata = json.loads((toy_copy / "zarr.json").read_text())
    metadata["attributes"]["thimble"]["format_version"] = 99
    metadata["attributes"]["thimble"]["new_in_99"] = True
    (toy_copy / "zarr.json").write_text(json.dumps(metadata))
    message = fails(3, command, toy_copy)
    assert "format version 99" in message
    assert str(toy_copy) in message


def test_a_store_whose_chunk_is_gone_empty_or_flipped_is_unreadable(toy_copy: Path) -> None:
    chunk = toy_copy / "exp_avg" / "c.1.0.0"
    content = bytearray(chunk.read_bytes())
    content[len(content) // 3] ^= 1
    for damage in (
        lambda: chunk.write_bytes(content),
        lambda: chunk.write_bytes(b""),
        chunk.unlink,
    ):
        damage()
        message = fails(3, "check", toy_copy)
        assert "exp_avg" in message
        assert "thimble-zarr verify" in message or "restore it from a copy" in message
        assert checked(toy_copy, "--steps", "1:2")["holds"] is True


def test_a_store_without_its_commit_record_is_unreadable(toy_copy: Path) -> None:
    (toy_copy / ".thimble" / "commit.json").unlink()
    for command in ("check", "info"):
        assert "commit record" in fails(3, command, toy_copy)


# --- tokens --------------------------------------------------------------------------------------


def test_tokens_trains_counts_and_writes_what_train_can_use(
    tmp_path: Path, corpus: Path, tiny: tuple[str, ...]
) -> None:
    more = tmp_path / "more.txt"
    more.write_text("zebra quagga zebroid " * 50, encoding="utf-8")
    tokenizer, mask = tmp_path / "tokenizer.json", tmp_path / "mask.safetensors"
    result = succeeds(
        "tokens", corpus, "--train-on", corpus, "--train-on", more, "--vocab-size", 310,
        "--save-tokenizer", tokenizer, "--save-mask", mask,
    )  # fmt: skip
    ids = Tokenizer.from_file(str(tokenizer)).encode(corpus.read_text(encoding="utf-8")).ids
    n_live = len(set(ids))
    assert f"{len(ids):,} tokens" in result.stdout
    assert f"310: {n_live} live, {310 - n_live} dead" in result.stdout
    masks = safetensors.torch.load_file(mask)
    assert torch.nonzero(masks["live_mask"]).flatten().tolist() == sorted(set(ids))
    assert "Ġzebra" in Tokenizer.from_file(str(tokenizer)).get_vocab()

    masks["live_mask"][ids[0]] = False  # so that it shows whose mask is used
    safetensors.torch.save_file({"live_mask": masks["live_mask"]}, mask)
    store = tmp_path / "run.zarr"
    succeeds(
        "train", store, *tiny, "--vocab-size", 310, "--tokenizer", tokenizer, "--token-mask", mask
    )
    ds = open_dataset(store)
    assert ds.live.values.tolist() == masks["live_mask"].tolist()
    assert ds.dead.values.tolist() == (~masks["live_mask"]).tolist()
    assert ds.n_occurrences.values.tolist() == [ids.count(token) for token in range(310)]


def test_tokens_counts_with_a_tokenizer_there_is(corpus: Path, tokenizer: Path) -> None:
    lines = succeeds("tokens", corpus, "--tokenizer", tokenizer).stdout.splitlines()
    loaded = Tokenizer.from_file(str(tokenizer))
    ids = loaded.encode(corpus.read_text(encoding="utf-8")).ids
    counts = sorted((ids.count(token) for token in set(ids)), reverse=True)
    first = lines.index("Most frequent") + 1
    assert [int(line.split()[-1]) for line in lines[first : first + 10]] == counts[:10]
    assert lines[-1].startswith("Dead, for example: ")


def test_tokens_without_dead_ones_says_so(tmp_path: Path) -> None:
    corpus = tmp_path / "bytes.txt"
    corpus.write_text("".join(map(chr, range(0x250))) + "".join(map(chr, range(0x800, 0xD800, 64))))
    result = succeeds("tokens", corpus, "--train-on", corpus, "--vocab-size", 256)
    loaded = train_tokenizer([corpus.read_text()], 256)
    dead = set(range(256)) - set(loaded.encode(corpus.read_text()).ids)
    assert f"{len(dead)} dead" in result.stdout
    assert dead  # some bytes, such as 255, are in no UTF-8 text


def test_tokens_of_an_empty_corpus_are_all_dead(tmp_path: Path, tokenizer: Path) -> None:
    corpus = tmp_path / "empty.txt"
    corpus.touch()
    stdout = succeeds("tokens", corpus, "--tokenizer", tokenizer).stdout
    assert "empty.txt: 0 tokens (it is empty)\n" in stdout
    assert f"0 live, {N_VOCABULARY} dead" in stdout
    assert "Most frequent" not in stdout


def test_tokens_are_shown_as_text(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("ää ää 数 字", encoding="utf-8")
    stdout = succeeds("tokens", corpus, "--train-on", corpus, "--vocab-size", 257).stdout
    shown = stdout.partition("Most frequent\n")[2]
    assert "  'ä' " in shown
    assert "  '<0xE6>' " in shown
    assert "Ã" not in shown


def test_tokens_of_a_directory_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    assert "it is a directory; give a text file" in fails(
        2, "tokens", tmp_path, "--tokenizer", tokenizer
    )


@pytest.mark.usefixtures("shown_at_once")
def test_tokens_shows_progress_unless_it_is_quiet(tmp_path: Path, corpus: Path) -> None:
    args = ("tokens", corpus, "--train-on", corpus, "--vocab-size", 300)
    result = succeeds(*args)
    assert "training the tokenizer: " in result.stderr
    assert "counting tokens: " in result.stderr
    assert "(100%)" in result.stderr
    quiet = succeeds(*args, "--quiet", "--save-mask", tmp_path / "mask")
    assert (quiet.stdout, quiet.stderr) == (result.stdout, "")


@pytest.mark.usefixtures("shown_at_once")
@pytest.mark.parametrize(
    ("args", "doing"),
    [
        (["check", "STORE"], "checking"),
        (["check", "STORE", "STORE", "--tokens=dead,live"], "checking"),
        (["verify", "STORE"], "verifying"),
        (["repair", "STORE"], "verifying"),
        (["export", "STORE", "run.safetensors"], "exporting"),
        (["import", "FILE", "imported.zarr"], "importing"),
    ],
)
def test_commands_say_what_they_are_doing_unless_they_are_quiet(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], doing: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "notebook.safetensors"
    succeeds("export", trained, file)
    places = {"STORE": trained, "FILE": file}
    args = [str(places.get(arg, arg)) for arg in args]
    lines = succeeds(*args).stderr.splitlines()
    assert lines
    assert all(line.startswith(f"{doing}: ") for line in lines)
    (tmp_path / "run.safetensors").unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "imported.zarr", ignore_errors=True)
    quiet = succeeds(*args, "--quiet")
    assert quiet.stderr == ""
    is_result = args[0] in ("check", "verify", "repair")
    assert bool(quiet.stdout) == is_result


def test_tokens_never_replaces_a_file(tmp_path: Path, corpus: Path, tokenizer: Path) -> None:
    file = tmp_path / "precious"
    file.write_text("precious")
    for flag in ("--save-tokenizer", "--save-mask"):
        assert str(file) in fails(2, "tokens", corpus, "--tokenizer", tokenizer, flag, file)
        assert file.read_text() == "precious"


@pytest.mark.parametrize("flag", ["--save-tokenizer", "--save-mask"])
def test_tokens_tells_what_it_cannot_write(
    tmp_path: Path, corpus: Path, tokenizer: Path, flag: str
) -> None:
    for file in (tmp_path / "nothing" / "file", corpus / "file"):
        message = fails(3, "tokens", "not-even-read", "--tokenizer", tokenizer, flag, file)
        assert f"cannot write {file}: there is no directory {file.parent}" in message


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--tokenizer", "x", "--train-on", "y"], "exclude each other"),
        (["--vocab-size", "255"], "255 is not in the range"),
        (["--tokenizer", "/nothing"], "cannot read the tokenizer /nothing"),
        (["--train-on", "/nothing"], "cannot read the corpus /nothing"),
        (["--train-on", "CORPUS", "--vocab-size", "9000"], "or train on more text"),
    ],
)
def test_tokens_refuses_what_cannot_work(corpus: Path, args: list[str], expected: str) -> None:
    args = [str(corpus) if arg == "CORPUS" else arg for arg in args]
    assert expected in fails(2, "tokens", corpus, *args)


def test_tokens_of_a_corpus_that_is_not_there_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    file = tmp_path / "nothing.txt"
    assert str(file) in fails(2, "tokens", file, "--tokenizer", tokenizer)


# --- the default corpus --------------------------------------------------------------------------


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Path, Path, Result]:
    """One step of the demo, with the real default corpus: its store, our cache, what it said."""
    store = tmp_path_factory.mktemp("demo") / "demo.zarr"
    with FileLock(cache.with_suffix(".lock")):
        return store, cache / "thimble-zarr", run("demo", store, "--steps", 1)


def test_the_demo_trains_records_and_checks(demo: tuple[Path, Path, Result]) -> None:
    store, _, result = demo
    assert result.exit_code == 0
    assert told(result.stderr) == []
    for part in (
        "1 steps of 10,000 x 64",
        "t=   1: ratio=1.0",
        "HOLDS to the bit: ",
        "open_dataset(",
    ):
        assert part in result.stdout, part
    content = info_of(store)
    assert (content["n_rows"], content["shape"]) == (2, [10_000, 64])
    assert content["attrs"]["config"]["batch_size"] == 16
    assert content["attrs"]["corpus"]["n_tokens"] > 100_000
    code = result.stdout.partition("Look next, in Python:\n")[2]
    names: dict[str, object] = {}
    exec("\n".join(line.strip() for line in code.splitlines()), names)
    assert names["ds"]["token"].size == 10_000


def test_the_default_tokenizer_leaves_dead_tokens(demo: tuple[Path, Path, Result]) -> None:
    ds = open_dataset(demo[0])
    assert 500 < int(ds.dead.sum()) < 5000
    assert ds.dead.values.tolist() == (ds.n_occurrences.values == 0).tolist()
    assert int(ds.n_occurrences.sum()) == info_of(demo[0])["attrs"]["corpus"]["n_tokens"]


def test_tokens_without_a_corpus_counts_the_default_one(demo: tuple[Path, Path, Result]) -> None:
    store, cache, _ = demo
    kept = {file: file.stat().st_mtime_ns for file in cache.rglob("*") if file.is_file()}
    assert len(kept) == 2  # corpus and tokenizer
    stdout = succeeds("tokens").stdout
    ds = open_dataset(store)
    n_dead = int(ds.dead.sum())
    assert f"10,000: {10_000 - n_dead:,} live, {n_dead:,} dead" in stdout
    assert f"{info_of(store)['attrs']['corpus']['n_tokens']:,} tokens" in stdout
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


# --- processes: signals and pipes ----------------------------------------------------------------


def start(*args: object) -> subprocess.Popen[str]:
    """Start the command line as its own process, its output piped."""
    return subprocess.Popen(
        [sys.executable, "-c", START + MAIN, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_rows(process: subprocess.Popen[str], store: Path, n_rows: int) -> None:
    """Return when rows are committed; fail when the process ends before."""
    for _ in range(2400):
        try:
            process.wait(timeout=0.05)
        except subprocess.TimeoutExpired:
            pass
        else:
            raise AssertionError(f"ended with {process.returncode}: {process.communicate()[1]}")
        try:
            if json.loads((store / ".thimble" / "commit.json").read_text())["n_rows"] >= n_rows:
                return
        except FileNotFoundError:
            continue
    process.kill()
    raise AssertionError("nothing was committed")


@pytest.mark.soak
def test_ctrl_c_ends_a_run_cleanly_and_keeps_what_was_recorded(
    tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    store = tmp_path / "run.zarr"
    process = start("train", store, *tiny, "--steps", 20_000, "--memory", "64KiB", "--force")
    wait_for_rows(process, store, 5)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert told(stderr) == ["Interrupted."]
    content = info_of(store)
    assert content["complete"] is True
    assert 5 <= content["n_rows"] < 20_001
    assert f"Recorded {content['n_rows'] - 1:,} steps" in stdout
    assert f"thimble-zarr check {store}" in stdout
    found = checked(store, "--tokens", "all")
    assert found["steps"] == [1, content["n_rows"] - 1]
    assert found["holds"] is True


def test_sigterm_ends_a_run_cleanly_and_keeps_what_was_recorded(
    tmp_path: Path, tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: the signal comes between two bytecodes of the third step."""
    store, log = tmp_path / "run.zarr", Recorder.log
    before = signal.getsignal(signal.SIGTERM)

    def terminated(recorder: Recorder, **loss: float) -> None:
        log(recorder, **loss)
        if recorder.step == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Recorder, "log", terminated)
    result = run("train", store, *tiny)
    assert result.exit_code == 143
    assert told(result.stderr) == ["Terminated."]
    assert "thimble-zarr check" in result.stdout
    content = info_of(store)
    assert (content["complete"], content["n_rows"]) == (True, 4)
    assert checked(store, "--tokens", "all")["holds"] is True
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.soak
@pytest.mark.parametrize(
    "module", ["thimble_zarr.cli.main", "click", "tqdm", "thimble_zarr.cli.verify", "numpy"]
)
def test_ctrl_c_while_the_command_starts_is_no_traceback(trained: Path, module: str) -> None:
    """Whatever it is that is just being imported."""
    script = (
        "import signal, sys\n"
        "class Interrupter:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupter())\n"
        f"sys.argv = ['thimble-zarr', 'check', {str(trained)!r}]\n"
        "from thimble_zarr.__main__ import main; main()"
    )
    shown = subprocess.run([sys.executable, "-c", START + script], capture_output=True, text=True)
    assert (shown.returncode, shown.stdout) == (130, "")
    assert shown.stderr.strip() == "Interrupted."


@pytest.mark.soak
def test_ctrl_c_at_any_moment_of_the_start_is_no_traceback_of_ours() -> None:
    """Before our first line Python itself may show one."""
    ended = set()
    for delay_ms in range(0, 400, 10):
        process = subprocess.Popen(
            [sys.executable, "-c", f"{START}from thimble_zarr.__main__ import main; main()"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(delay_ms / 1000)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
        assert "thimble_zarr" not in stderr, f"after {delay_ms} ms"
        ended.add((process.returncode, stderr))
    assert (130, "Interrupted.\n") in ended


def test_ctrl_c_while_options_are_read_is_no_finding_of_the_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(click.Group, "parse_args", interrupt)
    assert run("check").exit_code == 130


def test_a_quiet_piped_run_prints_a_warning_as_one_line_and_nothing_else(
    tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    store = tmp_path / "run.zarr"
    process = start("train", store, *tiny, "--quiet", "--lr", "1e30", "--dtype", "float32")
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (0, ""), stderr
    assert stderr.startswith("Warning: the loss of step 2 is nan")
    assert len(stderr.splitlines()) == 1, stderr
    assert info_of(store)["n_rows"] == 6


@pytest.mark.soak
def test_a_reader_that_went_away_is_no_finding_of_the_check(trained: Path) -> None:
    process = start("check", trained, "--format", "csv", "--quiet")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    stderr = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)
    assert stderr == ""
    assert process.returncode != 1  # which would say that the formula does not hold


def test_an_error_of_a_piped_run_is_one_line_on_stderr(tmp_path: Path) -> None:
    process = start("info", tmp_path)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (3, "")
    assert stderr.startswith("Error: ")
    assert stderr.count("\n") == 1
