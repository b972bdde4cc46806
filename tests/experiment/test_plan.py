import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from tests.support.tiny import SMALL, random_data
from thimble_zarr.errors import ConfigError, DiskSpaceError
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.experiment.model import build_model
from thimble_zarr.experiment.plan import plan_run, training_bytes
from thimble_zarr.experiment.trainer import train
from thimble_zarr.store.reader import StoreReader

DEFAULT = TrainingConfig()


MEMORY_BYTES = 4_000_000


@pytest.fixture
def free_disk(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A disk of which we say what is free, and are told where it was looked for."""
    disk = SimpleNamespace(free=10**12, asked=[])

    def usage(path: Path) -> SimpleNamespace:
        disk.asked.append(Path(path))
        assert Path(path).exists()
        return SimpleNamespace(total=2 * 10**12, used=0, free=disk.free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    return disk


def test_the_notebooks_way_is_what_its_safety_check_prints(tmp_path: Path) -> None:
    plan = plan_run(DEFAULT, tmp_path / "run.zarr")
    in_gb = {name: f"{n_bytes / 1e9:.2f}" for name, n_bytes in plan.notebook_array_bytes.items()}
    assert in_gb == {"W": "1.28", "grad": "1.28", "exp_avg": "2.56", "exp_avg_sq": "2.56"}
    assert f"{plan.notebook_bytes / 1e9:.2f}" == "7.69"


def test_the_disk_is_every_row_of_four_arrays_in_the_models_dtype(tmp_path: Path) -> None:
    for dtype, itemsize in (("bfloat16", 2), ("float32", 4)):
        storage = plan_run(replace(DEFAULT, dtype=dtype), tmp_path).storage
        an_array = 1001 * 10_000 * 64 * itemsize
        assert storage.array_bytes == dict.fromkeys(
            ("W", "grad", "exp_avg", "exp_avg_sq"), an_array
        )
        assert 4 * an_array < storage.disk_bytes < 4.01 * an_array


def test_recording_stays_within_its_memory_bound(tmp_path: Path) -> None:
    for memory_bytes in (2**26, 2**28, 2**30):
        storage = plan_run(DEFAULT, tmp_path, memory_bytes=memory_bytes).storage
        assert memory_bytes / 3 < storage.memory_bytes <= memory_bytes


def test_the_plan_is_what_is_recorded(tmp_path: Path) -> None:
    plan = plan_run(SMALL, tmp_path / "run.zarr", memory_bytes=MEMORY_BYTES)
    train(SMALL, random_data(SMALL), tmp_path / "run.zarr", memory_bytes=MEMORY_BYTES)
    reader = StoreReader.open(tmp_path / "run.zarr")
    assert reader.schema.layout == plan.storage.layout
    assert 1 < plan.storage.layout.block_steps < SMALL.steps
    assert reader.n_rows * reader.schema.row_bytes == sum(plan.storage.array_bytes.values())


def test_a_variable_that_is_none_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no variable gradient to record; choose among W, grad, "):
        plan_run(replace(SMALL, variables="W,gradient"), tmp_path / "run.zarr")


@pytest.mark.parametrize(
    "config", [SMALL, replace(SMALL, steps=1), replace(SMALL, steps=3, hidden_dim=2)]
)
def test_disk_at_most_is_never_exceeded(tmp_path: Path, config: TrainingConfig) -> None:
    plan = plan_run(config, tmp_path / "run.zarr")
    train(config, random_data(config), tmp_path / "run.zarr")
    assert StoreReader.open(tmp_path / "run.zarr").disk_bytes() <= plan.storage.disk_bytes


@pytest.mark.parametrize("config", [DEFAULT, SMALL], ids=["default", "small"])
def test_training_memory_counts_parameters_gradients_and_two_moments(
    config: TrainingConfig,
) -> None:
    model = build_model(config, torch.device("cpu"))
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    config = replace(config, dtype="float32", compute_dtype="float32", loss_chunk=0)
    one, two = (training_bytes(replace(config, batch_size=n)) for n in (1, 2))
    least = {"batch_size": 1, "vocab_size": 1, "hidden_dim": 1, "heads": 1, "layers": 1}
    libraries = training_bytes(replace(config, **least, seq_len=1))
    of_parameters = one - (two - one) - libraries
    assert of_parameters == pytest.approx(4 * 4 * n_parameters, rel=0.05, abs=20_000)
    in_bfloat16 = replace(config, dtype="bfloat16", batch_size=1)
    casting = training_bytes(in_bfloat16) - (one - of_parameters)
    assert casting == pytest.approx((4 * 2 + 2 * 4) * n_parameters, rel=0.05, abs=20_000)


@pytest.mark.parametrize(
    ("settings", "measured"),
    [
        ({"compute_dtype": "bfloat16"}, 0.79e9),
        ({"compute_dtype": "float32"}, 1.06e9),
        ({"compute_dtype": "bfloat16", "loss_chunk": 0}, 2.68e9),
        ({"dtype": "float32", "loss_chunk": 0}, 2.96e9),
    ],
    ids=["bfloat16", "float32", "whole logits", "whole logits in float32"],
)
def test_training_memory_is_near_what_was_measured(
    tmp_path: Path, settings: dict[str, object], measured: float
) -> None:
    """Measured: the peak resident set of training without recording, on Linux."""
    plan = plan_run(replace(DEFAULT, **settings), tmp_path)
    assert measured <= plan.training_bytes <= 1.3 * measured


@pytest.mark.parametrize(
    "larger",
    [
        {"batch_size": 256},
        {"seq_len": 256},
        {"vocab_size": 20_000},
        {"hidden_dim": 128},
        {"layers": 4},
        {"compute_dtype": "float32"},
        {"loss_chunk": 0},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_more_of_anything_takes_more_memory(tmp_path: Path, larger: dict[str, object]) -> None:
    config = replace(DEFAULT, compute_dtype="bfloat16")
    less, more = (plan_run(one, tmp_path) for one in (config, replace(config, **larger)))
    assert more.training_bytes > less.training_bytes


def test_more_steps_take_more_disk_and_no_more_memory(tmp_path: Path) -> None:
    less, more = (plan_run(replace(DEFAULT, steps=n), tmp_path) for n in (999, 1999))
    assert sum(more.storage.array_bytes.values()) == 2 * sum(less.storage.array_bytes.values())
    assert more.memory_bytes == less.memory_bytes


def test_memory_is_training_and_recording_against_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_run(SMALL, tmp_path)
    assert plan.memory_bytes == plan.training_bytes + plan.storage.memory_bytes
    for spare, short in ((0, False), (-1, True)):
        free = SimpleNamespace(available=plan.memory_bytes + spare)
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: free)
        assert plan_run(SMALL, tmp_path).memory_is_short is short


def test_a_disk_that_just_holds_the_run_is_enough(
    tmp_path: Path, free_disk: SimpleNamespace
) -> None:
    free_disk.free = plan_run(SMALL, tmp_path).storage.disk_bytes
    plan_run(SMALL, tmp_path).check_disk()
    free_disk.free -= 1
    with pytest.raises(DiskSpaceError):
        plan_run(SMALL, tmp_path).check_disk()


def test_a_disk_too_small_is_told_with_both_sizes(
    tmp_path: Path, free_disk: SimpleNamespace
) -> None:
    free_disk.free = 10**9
    with pytest.raises(
        DiskSpaceError, match=r"5\.1\d GB of disk, but only 1\.00 GB is free.*--force"
    ):
        plan_run(DEFAULT, tmp_path).check_disk()


def test_sizes_of_a_tiny_run_are_told_in_units_that_show_them(
    tmp_path: Path, free_disk: SimpleNamespace
) -> None:
    free_disk.free = 1000
    with pytest.raises(DiskSpaceError) as caught:
        plan_run(SMALL, tmp_path).check_disk()
    assert "0.00 GB" not in str(caught.value)


def test_the_disk_is_that_of_the_nearest_directory_there_is(
    tmp_path: Path, free_disk: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.zarr").mkdir()
    (tmp_path / "file").touch()
    for store, looked_at in (
        (tmp_path / "a" / "b" / "c.zarr", tmp_path),
        (tmp_path / "run.zarr", tmp_path / "run.zarr"),
        (tmp_path / "file" / "below.zarr", tmp_path / "file"),
        ("relative.zarr", tmp_path),
        (Path("/nothing/here.zarr"), Path("/")),
    ):
        plan = plan_run(SMALL, store)
        assert free_disk.asked[-1] == looked_at
        assert plan.free_disk_bytes == free_disk.free


def test_planning_writes_nothing(tmp_path: Path) -> None:
    plan_run(DEFAULT, tmp_path / "run.zarr").check_disk()
    assert list(tmp_path.iterdir()) == []
