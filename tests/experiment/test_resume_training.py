"""`train --resume`: a run that was ended anyhow ends as the store of one that was not."""

import functools
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.resume import differing_files
from tests.support.tiny import DATA, TINY
from thimble_zarr import accounting, open_dataset
from thimble_zarr.cli.main import cli
from thimble_zarr.errors import ResumeError, StoreError
from thimble_zarr.experiment import device, trainer
from thimble_zarr.experiment.checkpoints import Checkpoint, Checkpoints, RecordedRun
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.experiment.trainer import Progress, Training, sliding_batches, train
from thimble_zarr.experiment.vocabulary import train_tokenizer
from thimble_zarr.store.integrity.verify import verify
from thimble_zarr.store.keys import COMMIT, LOCK
from thimble_zarr.store.lock import WriterLock
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.tuning import TUNING

CONFIG = replace(TINY, steps=11)

MEMORY = 18_000
"""Makes blocks of two steps."""


def train_until(store: Path, step: int, config: TrainingConfig = CONFIG, **options: object) -> None:
    """End a run with an error once a step was taken, from the callback, as Ctrl-C might."""

    def stop(progress: Progress) -> None:
        if progress.step == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, DATA, store, memory_bytes=MEMORY, on_step=stop, **options)


@pytest.fixture(autouse=True)
def _at_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thimble_zarr.tuning.TUNING", replace(TUNING, checkpoint_share=1e9))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run.zarr"
    train(CONFIG, DATA, path, memory_bytes=MEMORY)
    assert StoreReader.open(path).schema.layout.block_steps == 2
    assert not Checkpoints(path).path.exists()
    return path


@pytest.mark.parametrize("ends", [(1,), (2,), (3, 4, 9), (10,)])
def test_a_run_that_was_ended_goes_on_from_its_checkpoint(
    tmp_path: Path, reference: Path, ends: tuple[int, ...]
) -> None:
    store = tmp_path / "run.zarr"
    steps = []
    for number, end in enumerate(ends):
        train_until(store, end, resume=number > 0)
    train(
        CONFIG, DATA, store, memory_bytes=MEMORY, resume=True, on_step=lambda one: steps.append(one)
    )
    assert differing_files(reference, store) == []
    assert verify(store).findings == []
    assert [one.step for one in steps] == [*range((ends[-1] - 1) // 2 * 2 + 2, 12)] or ends == (1,)
    assert not Checkpoints(store).path.exists()


def test_what_is_kept_is_enough_for_whatever_was_committed(tmp_path: Path) -> None:
    store = tmp_path / "run.zarr"
    train_until(store, 8)
    steps = Checkpoints(store).steps()
    assert steps[-1] == 7
    assert 1 <= len(steps) <= 3  # the writer thread is a block behind, or two
    committed = StoreReader.open(store).n_rows - 1
    found = Checkpoints(store).newest(committed)
    assert found is not None
    assert found.step <= committed


def killed_without_rows(store: Path, left: str = "declared") -> Path:
    """Leave what SIGKILL leaves of a run that has a checkpoint, and of which nothing is committed.

    A copy of what is on disk is that: its lock is held by nobody.
    """
    original = store.with_name("original.zarr")

    def copy(progress: Progress) -> None:
        if progress.step == 1:
            shutil.copytree(original, store)
            shutil.copytree(Checkpoints(original).path, Checkpoints(store).path)

    train(CONFIG, DATA, original, memory_bytes=MEMORY, on_step=copy)
    assert StoreReader.open(store).n_rows == 0
    assert Checkpoints(store).steps() == [1]
    if left != "declared":
        (store / COMMIT).unlink()
    if left == "locked":
        (store / "zarr.json").unlink()
    return store


@pytest.mark.parametrize("left", ["declared", "declared in part", "locked"])
def test_a_run_that_was_killed_before_its_first_commit_begins_anew(
    tmp_path: Path, reference: Path, left: str
) -> None:
    store = killed_without_rows(tmp_path / "run.zarr", left)
    train(CONFIG, DATA, store, memory_bytes=MEMORY, resume=True)
    assert differing_files(reference, store) == []
    assert verify(store).findings == []
    assert not Checkpoints(store).path.exists()


@pytest.mark.parametrize("left", ["declared", "declared in part"])
def test_a_store_without_rows_has_the_settings_of_its_run(tmp_path: Path, left: str) -> None:
    store = killed_without_rows(tmp_path / "run.zarr", left)
    run = RecordedRun.read(store)
    assert run is not None
    assert run.config.to_json() == CONFIG.to_json()
    assert (run.memory_bytes, run.committed_step) == (MEMORY, -1)
    assert not run.is_finished
    other = replace(DATA, attrs={"corpus": {"name": "other"}})
    for config, data, message in (
        (replace(CONFIG, lr=0.5), DATA, r": lr 0\.01 recorded, 0\.5 now; leave these options out"),
        (CONFIG, other, r"corpus {'name': 'random'} recorded, {'name': 'other'} now"),
    ):
        with pytest.raises(ResumeError, match=message):
            train(config, data, store, memory_bytes=MEMORY, resume=True)
    assert Checkpoints(store).steps() == [1]


def test_auto_is_what_was_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run keeps its arithmetic, also on a machine that would choose another."""
    config = replace(CONFIG, dtype="bfloat16", compute_dtype="auto")
    whole, store = tmp_path / "whole.zarr", tmp_path / "run.zarr"
    monkeypatch.setattr(device, "cpu_multiplies_bfloat16", lambda: False)
    train(config, DATA, whole, memory_bytes=MEMORY)
    train_until(store, 5, config)
    monkeypatch.setattr(device, "cpu_multiplies_bfloat16", lambda: True)
    train(config, DATA, store, memory_bytes=MEMORY, resume=True)
    assert differing_files(whole, store) == []
    run = RecordedRun.read(store)
    assert run is not None
    assert run.config.to_json() == replace(config, compute_dtype="float32").to_json()
    other = tmp_path / "other.zarr"
    train(config, DATA, other, memory_bytes=MEMORY)
    assert differing_files(whole, other) != []  # the arithmetic does make a difference


def test_another_arithmetic_than_the_recorded_one_is_refused(tmp_path: Path) -> None:
    store = tmp_path / "run.zarr"
    train_until(store, 5)
    for other, message in (
        (replace(CONFIG, compute_dtype="bfloat16"), "compute_dtype float32 recorded, bfloat16 now"),
        (replace(CONFIG, loss_chunk=0), "loss_chunk 4 recorded, 0 now"),
    ):
        with pytest.raises(ResumeError, match=message):
            train(other, DATA, store, memory_bytes=MEMORY, resume=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_of_version_0_1_goes_on_in_the_notebooks_arithmetic(
    tmp_path: Path, dtype: str
) -> None:
    """Such a store has no word of either setting."""
    config = replace(CONFIG, dtype=dtype, compute_dtype=dtype, loss_chunk=0)
    whole, store = tmp_path / "whole.zarr", tmp_path / "run.zarr"

    def to_earlier(self: TrainingConfig) -> dict[str, object]:
        names = {known.name for known in fields(self)} - {"compute_dtype", "loss_chunk"}
        return {name: getattr(self, name) for name in names}

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(TrainingConfig, "to_json", to_earlier)
        train(config, DATA, whole, memory_bytes=MEMORY)
        train_until(store, 5, config)
    run = RecordedRun.read(store)
    assert run is not None
    assert run.config == config
    train(run.config, DATA, store, memory_bytes=MEMORY, resume=True)
    assert differing_files(whole, store) == []


@pytest.mark.parametrize(
    ("own", "recorded"),
    [
        ({"optimizer": "adagrad", "eps": 1e-8}, {}),
        (
            {"optimizer": "sgd", "momentum": 0.9},
            {"eps": 1e-8, "beta1": 0.9, "momentum_decay": 4e-3},
        ),
    ],
)
def test_a_run_goes_on_whose_store_has_settings_of_other_optimizers(
    tmp_path: Path, own: dict, recorded: dict
) -> None:
    """A version before recorded AdamW's defaults, also where the optimizer has no such setting."""
    config = replace(CONFIG, **own)
    store = tmp_path / "run.zarr"
    to_json = TrainingConfig.to_json
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(TrainingConfig, "to_json", lambda self: to_json(self) | recorded)
        train(config, DATA, tmp_path / "whole.zarr", memory_bytes=MEMORY)
        train_until(store, 5, config)
    run = RecordedRun.read(store)
    assert run is not None
    assert run.config.to_json() == config.to_json()
    other = replace(config, eps=1e-6) if "eps" in own else replace(config, momentum=None)
    with pytest.raises(ResumeError, match=r"(eps 1e-08|momentum 0\.9) recorded, (1e-06|0\.0) now;"):
        train(other, DATA, store, memory_bytes=MEMORY, resume=True)
    train(config, DATA, store, memory_bytes=MEMORY, resume=True)
    assert differing_files(tmp_path / "whole.zarr", store) == []


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("double_shift", [False, True])
def test_in_any_arithmetic_a_resumed_run_is_the_whole_one_and_the_replay_exact(
    tmp_path: Path, compute_dtype: str, double_shift: bool
) -> None:
    config = replace(
        CONFIG, dtype="bfloat16", compute_dtype=compute_dtype, double_shift=double_shift
    )
    whole, store = tmp_path / "whole.zarr", tmp_path / "run.zarr"
    train(config, DATA, whole, memory_bytes=MEMORY)
    train_until(store, 6, config)
    train(config, DATA, store, memory_bytes=MEMORY, resume=True)
    assert differing_files(whole, store) == []
    table = accounting(open_dataset(store))
    assert int(table.n_different.sum()) == 0
    assert table.sizes["step"] == config.steps


def test_a_schedule_without_rows_begins_anew(tmp_path: Path) -> None:
    config = replace(CONFIG, every=4)
    train(config, DATA, tmp_path / "whole.zarr", memory_bytes=MEMORY)
    store = tmp_path / "run.zarr"
    copy = functools.partial(shutil.copytree, tmp_path / "original.zarr", store)
    train(
        config,
        DATA,
        tmp_path / "original.zarr",
        memory_bytes=MEMORY,
        on_step=lambda progress: progress.step == 1 and copy(),
    )
    train(config, DATA, store, memory_bytes=MEMORY, resume=True)
    assert differing_files(tmp_path / "whole.zarr", store) == []


def test_a_resumed_run_begins_where_nothing_lies(tmp_path: Path, reference: Path) -> None:
    train(CONFIG, DATA, tmp_path / "run.zarr", memory_bytes=MEMORY, resume=True)
    assert differing_files(reference, tmp_path / "run.zarr") == []


def test_a_run_of_chosen_variables_and_tokens_goes_on(tmp_path: Path) -> None:
    config = replace(CONFIG, variables="W,exp_avg", record_tokens="dead")
    train(config, DATA, tmp_path / "whole.zarr", memory_bytes=MEMORY)
    train_until(tmp_path / "run.zarr", 7, config)
    train(config, DATA, tmp_path / "run.zarr", memory_bytes=MEMORY, resume=True)
    assert differing_files(tmp_path / "whole.zarr", tmp_path / "run.zarr") == []


def test_a_run_with_a_schedule_keeps_no_checkpoint_and_does_not_go_on(tmp_path: Path) -> None:
    store, config = tmp_path / "run.zarr", replace(CONFIG, every=4)
    train_until(store, 9, config)
    assert not Checkpoints(store).path.exists()
    with pytest.raises(ResumeError, match=r"steps of the schedule every\(4\) only"):
        train(config, DATA, store, memory_bytes=MEMORY, resume=True)
    assert StoreReader.open(store).read_steps().tolist() == [3, 4, 7, 8]


def test_a_finished_run_takes_no_step(tmp_path: Path) -> None:
    store = tmp_path / "run.zarr"
    train(CONFIG, DATA, store, memory_bytes=MEMORY)
    before = (store / "zarr.json").stat().st_mtime_ns

    def no_step(progress: Progress) -> None:
        raise AssertionError(progress)

    train(CONFIG, DATA, store, memory_bytes=MEMORY, resume=True, on_step=no_step)
    assert (store / "zarr.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("config", "data", "memory_bytes", "message"),
    [
        (replace(CONFIG, lr=0.02), DATA, MEMORY, r": lr 0\.01 recorded, 0\.02 now;"),
        (
            replace(CONFIG, steps=12, seed=1),
            DATA,
            MEMORY,
            r": steps 11 recorded, 12 now; seed 42 recorded, 1 now;",
        ),
        (CONFIG, DATA, 2 * MEMORY, r": memory_bytes 18000 recorded, 36000 now;"),
        (
            CONFIG,
            replace(DATA, attrs={"corpus": {"name": "other"}}),
            MEMORY,
            r"corpus {'name': 'random'} recorded, {'name': 'other'} now;",
        ),
    ],
    ids=["learning rate", "steps and seed", "memory", "corpus"],
)
def test_other_settings_are_refused(
    tmp_path: Path,
    config: TrainingConfig,
    data: trainer.TrainingData,
    memory_bytes: int,
    message: str,
) -> None:
    store = tmp_path / "run.zarr"
    train_until(store, 5)
    with pytest.raises(ResumeError, match=message):
        train(config, data, store, memory_bytes=memory_bytes, resume=True)
    assert StoreReader.open(store).n_rows == 6


def test_lost_checkpoints_cost_no_recorded_step(tmp_path: Path) -> None:
    store = tmp_path / "run.zarr"
    train_until(store, 7)
    Checkpoints(store).clear()
    with pytest.raises(ResumeError, match=r"it has 7 steps, but .* has no checkpoint of any"):
        train(CONFIG, DATA, store, memory_bytes=MEMORY, resume=True)
    assert StoreReader.open(store).n_rows == 8


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    store = tmp_path / "run.zarr"
    train_until(store, 7)
    checkpoints = Checkpoints(store)
    for step in checkpoints.steps():
        tensors = dict(checkpoints.newest(step).tensors)
        tensors["model.transformer.wte.weight"] = tensors["model.transformer.wte.weight"] + 1
        checkpoints.save(Checkpoint(step, tensors))
    with pytest.raises(ResumeError, match=r"after step \d: .*\(W differs in 174 of 174 elements"):
        train(CONFIG, DATA, store, memory_bytes=MEMORY, resume=True)
    for step in checkpoints.steps():
        checkpoints.save(Checkpoint(step, {}))
    with pytest.raises(ResumeError, match=r"is of another model: transformer.wte.weight is not"):
        train(CONFIG, DATA, store, memory_bytes=MEMORY, resume=True)
    assert StoreReader.open(store).n_rows == 8


def test_a_torn_checkpoint_is_named(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run.zarr")
    checkpoints.save(Checkpoint(3, {"model.x": torch.zeros(2)}))
    file = checkpoints.path / "step-00000003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"step-00000003\.safetensors: .*; remove it"):
        checkpoints.newest(5)


def test_a_checkpoint_holds_all_there_is_and_shares_no_memory(tmp_path: Path) -> None:
    training = Training(CONFIG, DATA)
    for _ in range(3):
        training.step()
    taken = Checkpoint.take(3, training.model, training.optimizer)
    checkpoints = Checkpoints(tmp_path / "run.zarr")
    checkpoints.save(taken)
    for _ in range(2):
        training.step()
    found = checkpoints.newest(4)
    assert found is not None
    other = Training(CONFIG, DATA, found)
    for _ in range(2):
        other.step()
    for ours, theirs in zip(training.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for name, value in training.optimizer.state[ours].items():
            assert torch.equal(value, other.optimizer.state[theirs][name])


def test_what_is_not_a_checkpoint_stays(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run.zarr")
    for step in (2, 4, 6):
        checkpoints.save(Checkpoint(step, {"model.x": torch.zeros(2)}))
    (checkpoints.path / "notes.txt").write_text("mine")
    checkpoints.prune(committed_step=5)
    assert checkpoints.steps() == [4, 6]
    checkpoints.clear(after_step=4)
    assert checkpoints.steps() == [4]
    checkpoints.clear()
    assert [file.name for file in checkpoints.path.iterdir()] == ["notes.txt"]


def test_checkpoints_take_a_small_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0
    module = "thimble_zarr.experiment.checkpoints"
    monkeypatch.setattr("thimble_zarr.tuning.TUNING", replace(TUNING, checkpoint_share=0.005))
    monkeypatch.setattr(f"{module}.time.perf_counter", lambda: now_s)

    def save_slowly(tensors: dict[str, torch.Tensor]) -> bytes:
        nonlocal now_s
        now_s += 0.1
        return b""

    monkeypatch.setattr(f"{module}.safetensors.torch.save", save_slowly)
    checkpoints = Checkpoints(tmp_path / "run.zarr")
    assert checkpoints.is_due
    layer = torch.nn.Linear(1, 1)
    checkpoints.take(1, layer, torch.optim.AdamW(layer.parameters()))
    now_s = 20.0
    assert not checkpoints.is_due
    now_s = 20.2
    assert checkpoints.is_due


@pytest.mark.parametrize("n_skipped", [0, 1, 3, 4, 5, 11])
def test_batches_go_on_where_they_ended(n_skipped: int) -> None:
    def batches(n_skipped: int) -> list[list[list[int]]]:
        taken = sliding_batches(DATA.ids, seq_len=5, batch_size=3, seed=0, n_skipped=n_skipped)
        return [next(taken)[0].tolist() for _ in range(13 - n_skipped)]

    assert batches(n_skipped) == batches(0)[n_skipped:]


# --- the command line ----------------------------------------------------------------------------


TEXT = "The step of the weights is the weights of the step.\n" * 20


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a tiny run."""
    directory = tmp_path_factory.mktemp("texts")
    (directory / "corpus.txt").write_text(TEXT, encoding="utf-8")
    train_tokenizer([TEXT], 270).save(str(directory / "tokenizer.json"))
    settings = {
        "steps": 40,
        "batch-size": 2,
        "seq-len": 5,
        "vocab-size": 270,
        "hidden-dim": 6,
        "layers": 1,
        "heads": 2,
        "device": "cpu",
        "memory": "300KB",
        "corpus": directory / "corpus.txt",
        "tokenizer": directory / "tokenizer.json",
    }
    return [f"--{name}={value}" for name, value in settings.items()]


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, [*map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def check_is_first(store: Path) -> None:
    """What cannot go on says so in one line, and nothing before it."""
    locked = WriterLock(store)
    code, stdout, stderr = run("train", "--resume", store)
    locked.release()
    assert (code, stdout) == (3, "")
    assert "is recording into" in stderr
    checkpoints = Checkpoints(store).path
    away = checkpoints.rename(checkpoints.with_name("away"))
    code, stdout, stderr = run("train", "--resume", store)
    away.rename(checkpoints)
    assert (code, stdout) == (2, "")
    assert "has no checkpoint of any" in stderr
    code, stdout, stderr = run("train", "--resume", store, "--memory", "400KB")
    assert (code, stdout) == (2, "")
    assert "memory_bytes 300000 recorded, 400000 now" in stderr


def test_the_command_goes_on_with_the_settings_of_the_store(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, store = tmp_path / "whole.zarr", tmp_path / "run.zarr"
    assert run("train", whole, *options)[0] == 0
    step = Training.step

    def step_until_seventeen(training: Training) -> float:
        training.__dict__["n"] = training.__dict__.get("n", 0) + 1
        if training.__dict__["n"] == 17:
            signal.raise_signal(signal.SIGINT)
        return step(training)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(Training, "step", step_until_seventeen)
        code, stdout, _ = run("train", store, *options)
    assert code == 130
    (start,) = re.findall(
        rf"^Resume   thimble-zarr train --resume {store}  \(from step (\d+) on\)$", stdout, re.M
    )
    last = StoreReader.open(store).n_rows - 1
    stopped = f"The run was stopped after step {last} of 40."
    assert stopped in run("check", store)[1]
    assert f"{last} of 40 and the initial state" in run("info", store)[1]
    assert "stopped" not in run("check", whole)[1]
    assert "40 and the initial state" in run("info", whole)[1]
    code, _, stderr = run("train", store, "--resume", "--lr", "0.5")
    assert code == 2
    assert "lr 0.001 recorded, 0.5 now; leave these options out" in stderr
    code, _, stderr = run("train", store, "--resume", "--optimizer", "sgd")
    assert code == 2
    assert ": optimizer adamw recorded, sgd now; leave these options out" in stderr
    code, _, stderr = run("train", store, "--resume", "--optimizer", "sgd", "--lr", "0.5")
    assert code == 2
    assert ": optimizer adamw recorded, sgd now; lr 0.001 recorded, 0.5 now; leave" in stderr
    assert run("train", store, "--resume", "--overwrite")[0] == 2
    check_is_first(store)
    code, stdout, _ = run("train", "--resume", store)
    assert code == 0
    assert (told := re.search(r"^Recorded (\d+) steps \((\d+) to 40\) in ", stdout, re.MULTILINE))
    assert int(told[1]) == 40 - int(told[2]) + 1 < 40
    assert told[2] == start
    assert differing_files(whole, store) == []
    code, stdout, _ = run("train", "--resume", store)
    assert code == 0
    assert stdout.endswith("All 40 steps are recorded.\n")


def test_the_command_begins_a_run_without_rows_anew_with_its_settings(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, store = tmp_path / "whole.zarr", tmp_path / "run.zarr"
    step = Training.step

    def copy_and_step(training: Training) -> float:
        assert training.config.steps == 40  # those of the defaults would take an hour
        if not store.exists():
            shutil.copytree(whole, store)
        return step(training)

    monkeypatch.setattr(Training, "step", copy_and_step)
    assert run("train", whole, *options)[0] == 0
    assert StoreReader.open(store).n_rows == 0
    code, _, stderr = run("train", store, "--resume", "--lr", "0.5")
    assert code == 2
    assert "lr 0.001 recorded, 0.5 now; leave these options out" in stderr
    code, _, stderr = run("train", "--resume", store, "--quiet")
    assert (code, stderr) == (0, "")
    assert differing_files(whole, store) == []

    locked = tmp_path / "locked.zarr"  # killed before there was anything else
    (locked / LOCK).parent.mkdir(parents=True)
    (locked / LOCK).touch()
    code, _, stderr = run("train", "--resume", locked, *options)
    assert code == 0
    assert stderr.startswith(
        f"Note: {locked} has no settings; the run starts with the ones given here\n"
    )
    assert differing_files(whole, locked) == []


def test_a_store_of_another_recorder_is_not_trained_on(tmp_path: Path, toy_copy: Path) -> None:
    code, _, stderr = run("train", toy_copy, "--resume")
    assert code == 2
    assert "this version of `thimble-zarr train` did not record it" in stderr
    assert "Recorder(..., resume=True)" in stderr


@pytest.mark.soak
def test_runs_that_are_killed_at_random_are_the_same(options: list[str]) -> None:
    """SIGKILL, in processes of their own; the benchmark does more of them."""
    longer = ["--steps=120" if option.startswith("--steps") else option for option in options]
    command = [sys.executable, "-m", "benchmarks.resume", "--runs=2", "--seed=3", "--", *longer]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.stdout.startswith("2 of 2 runs are identical after "), shown.stdout + shown.stderr
    assert shown.returncode == 0
