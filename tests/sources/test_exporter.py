"""The notebook's file made of a recording, held against the library it was written with."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.notebook_file import notebook_tensors, save
from tests.support.runs import N_DIMS, N_STEPS, N_TOKENS, History, Loop, record
from thimble_zarr import Recorder
from thimble_zarr.errors import ConfigError, StoreError, StoreExistsError
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.sources.exporting import export_notebook
from thimble_zarr.store.reader import StoreReader

CONFIG = TrainingConfig(lr=1e-2, weight_decay=0.01, steps=N_STEPS, batch_size=128)


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Path, History]:
    path = tmp_path / "recorded.zarr"
    attrs = {"config": CONFIG.to_json()}
    return path, record(path, recorder_options={"attrs": attrs}, weight_decay=0.01)


def test_an_export_is_byte_for_byte_what_the_notebook_would_have_saved(
    tmp_path: Path, recorded: tuple[Path, History]
) -> None:
    path, history = recorded
    expected = save(tmp_path / "expected.safetensors", notebook_tensors(history))
    export_notebook(StoreReader.open(path), tmp_path / "run.safetensors")
    assert (tmp_path / "run.safetensors").read_bytes() == expected.read_bytes()
    assert [entry.name for entry in tmp_path.iterdir() if "partial" in entry.name] == []


def test_a_run_that_was_cut_short_says_how_many_steps_there_are(tmp_path: Path) -> None:
    attrs = {"config": CONFIG.to_json()}
    record(tmp_path / "run.zarr", n_steps=3, recorder_options={"attrs": attrs})
    export_notebook(StoreReader.open(tmp_path / "run.zarr"), tmp_path / "run.safetensors")
    found = load_file(tmp_path / "run.safetensors")
    assert found["num_steps"].item() == 3
    assert len(found["losses"]) == 4


def test_a_run_without_settings_has_those_that_were_recorded(tmp_path: Path) -> None:
    options = {"lr": 0.25, "betas": (0.5, 0.75), "eps": 0.125, "weight_decay": 0.0}
    attrs = {"config": {"seed": "many", "init_scale": 1, "lr": 7.0}}
    record(tmp_path / "run.zarr", recorder_options={"attrs": attrs, "labels": None}, **options)
    export_notebook(StoreReader.open(tmp_path / "run.zarr"), tmp_path / "run.safetensors")
    found = {n: t.item() for n, t in load_file(tmp_path / "run.safetensors").items() if not t.ndim}
    assert found == {
        "learning_rate": 0.25,
        "adam_beta1": 0.5,
        "adam_beta2": 0.75,
        "adam_epsilon": 0.125,
        "weight_decay": 0.0,
        "vocab_size": N_TOKENS,
        "hidden_dim": N_DIMS,
        "num_steps": N_STEPS,
    }


def test_what_the_notebooks_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    runs = {
        "would lose precision": {"dtype": torch.float32},
        "max_exp_avg_sq": {"amsgrad": True},
        "L2 decay": {"optimizer": torch.optim.Adam, "weight_decay": 0.1},
    }
    for index, (message, options) in enumerate(runs.items()):
        path = tmp_path / f"{index}.zarr"
        record(path, n_steps=2, **options)
        with pytest.raises(ConfigError, match=message):
            export_notebook(StoreReader.open(path), tmp_path / "x.safetensors")
    assert not list(tmp_path.glob("*.safetensors*"))


def test_a_run_of_another_optimizer_than_adam_is_refused_by_name(tmp_path: Path) -> None:
    loop = Loop(optimizer=torch.optim.SGD, momentum=0.9)
    with Recorder(tmp_path / "run.zarr", loop.optimizer, parameter=loop.weight):
        loop.step()
    with pytest.raises(ConfigError, match=r"was trained with SGD, .* file is of AdamW"):
        export_notebook(StoreReader.open(tmp_path / "run.zarr"), tmp_path / "x.safetensors")
    assert not list(tmp_path.glob("*.safetensors*"))


def test_a_schedule_does_not_fit(tmp_path: Path) -> None:
    loop = Loop()
    with Recorder(tmp_path / "run.zarr", loop.optimizer, parameter=loop.weight):
        for lr in (1e-2, 1e-3):
            loop.optimizer.param_groups[0]["lr"] = lr
            loop.step()
    with pytest.raises(ConfigError, match="learning_rate by step"):
        export_notebook(StoreReader.open(tmp_path / "run.zarr"), tmp_path / "x.safetensors")


def test_a_file_is_replaced_only_when_asked_and_only_by_its_like(
    tmp_path: Path, toy_path: Path
) -> None:
    reader = StoreReader.open(toy_path)
    file = tmp_path / "run.safetensors"
    file.write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(StoreExistsError, match=str(file)):
            export_notebook(reader, file, overwrite=overwrite)
        assert file.read_text() == "precious"
    file.unlink()
    export_notebook(reader, file)
    content = file.read_bytes()
    with pytest.raises(StoreExistsError, match="--overwrite"):
        export_notebook(reader, file)
    file.write_bytes(content[:-1])  # cut off, and still a safetensors file
    export_notebook(reader, file, overwrite=True)
    assert file.read_bytes() == content
    with pytest.raises(StoreExistsError, match="not a safetensors file"):
        export_notebook(reader, tmp_path, overwrite=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_export_that_fails_leaves_nothing_and_keeps_what_was_there(
    tmp_path: Path, toy_path: Path, error: BaseException
) -> None:
    def fail(n_done: int, n_total: int) -> None:
        if n_done > n_total // 2:
            raise error

    reader, old = StoreReader.open(toy_path), tmp_path / "old.safetensors"
    export_notebook(reader, old)
    content = old.read_bytes()
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else StoreError
    for file in (old, tmp_path / "new.safetensors"):
        with pytest.raises(expected):
            export_notebook(reader, file, overwrite=True, on_progress=fail)
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_bytes() == content


def test_a_directory_that_is_not_there_is_told(tmp_path: Path, toy_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot write .*nothing.*No such file"):
        export_notebook(StoreReader.open(toy_path), tmp_path / "nothing" / "x.safetensors")
