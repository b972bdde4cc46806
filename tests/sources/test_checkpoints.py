"""Checkpoints at several steps: safetensors files, and PyTorch's distributed ones."""

import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.support.commands import fails, succeeds
from tests.support.layouts import N_DIMS, N_TOKENS, VARIABLES, Trajectory, bits, trajectory
from tests.support.notebook_file import save
from thimble_zarr import open_dataset, summary
from thimble_zarr.errors import ConfigError, DamagedStoreError, NotAStoreError, SelectionError
from thimble_zarr.sources.checkpoints import import_checkpoints, open_checkpoints
from thimble_zarr.store.reader import StoreReader

STEPS = (3, 4, 10)

NAME = "wte.weight"


@pytest.fixture(scope="module")
def run() -> Trajectory:
    return trajectory()


def model(run: Trajectory, step: int) -> dict[str, torch.Tensor]:
    return {f"transformer.{NAME}": run.tensors["W"][step], "ln.bias": torch.zeros(3)}


def states(run: Trajectory, step: int) -> dict[str, torch.Tensor]:
    return {name: run.tensors[name][step].clone() for name in VARIABLES[2:]}


def distributed(path: Path, content: Mapping[str, object]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is a single process
        dcp.save(dict(content), checkpoint_id=path)
    return path


def test_safetensors_at_several_steps_become_a_sparse_record(
    tmp_path: Path, run: Trajectory
) -> None:
    files = [save(tmp_path / f"step_{step}.safetensors", model(run, step)) for step in STEPS]
    store = tmp_path / "run.zarr"
    said = succeeds("import", *reversed(files), store, "--parameter", NAME).stdout
    assert f"Imported 3 checkpoints of {N_TOKENS} x {N_DIMS}; " in said
    assert "States   none: there are no moments" in said
    assert f"Next     thimble-zarr report {store}" in said
    reader = StoreReader.open(store)
    assert reader.read_steps().tolist() == [*STEPS]
    assert reader.schema.dtypes == {"W": "bfloat16"}
    np.testing.assert_array_equal(reader.read("W", (0, 3)), bits(run.tensors["W"][[*STEPS]]))
    ds = open_dataset(store)
    assert np.isnan(ds.delta_W.sel(step=[3, 10])).all()
    assert not np.isnan(ds.delta_W.sel(step=4)).any()
    assert summary(store, workers=1).step.values.tolist() == [*STEPS]
    assert "3 rows of steps 3 to 10" in succeeds("info", store).stdout
    assert "were not recorded" in fails(2, "check", store)


def test_distributed_checkpoints_have_states_where_they_were_saved(
    tmp_path: Path, run: Trajectory
) -> None:
    folders = []
    for step in STEPS:
        content: dict[str, object] = {"model": model(run, step), "epoch": 1}
        if step != 4:
            content["optim"] = {"state": {f"transformer.{NAME}": states(run, step)}}
        folders.append(distributed(tmp_path / f"checkpoint-{step}", content))
    name = f"transformer.{NAME}"
    reader = import_checkpoints(folders, tmp_path / "run.zarr", parameter=name)
    assert reader.schema.parameter == name
    assert [*reader.schema.dtypes] == ["W", "exp_avg", "exp_avg_sq"]
    for variable in reader.schema.dtypes:
        found = reader.read(variable, (0, 3))
        expected = bits(run.tensors[variable][[*STEPS]]).copy()
        if variable != "W":
            expected[1] = reader.schema.fill(variable)
        np.testing.assert_array_equal(found, expected, err_msg=variable)
    part = next(folders[0].glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(DamagedStoreError, match=f"{folders[0]}: torch cannot read"):
        import_checkpoints(folders, tmp_path / "other.zarr", parameter=name)
    assert not (tmp_path / "other.zarr").exists()


def test_a_directory_of_safetensors_files_is_one_checkpoint(
    tmp_path: Path, run: Trajectory
) -> None:
    folders = []
    for step in STEPS:
        folders.append(tmp_path / f"checkpoint-{step}")
        folders[-1].mkdir()
        for number, (name, tensor) in enumerate(model(run, step).items()):
            save(folders[-1] / f"model-{number}-of-2.safetensors", {name: tensor})
    found = open_checkpoints(folders, "ln.bias")
    assert [(of.step, of.info("W").shape) for of in found] == [(step, (3,)) for step in STEPS]
    inside = [path / "model-0-of-2.safetensors" for path in folders]
    assert [of.step for of in open_checkpoints(inside, NAME)] == [*STEPS]


METADATA = "torch.distributed.checkpoint.metadata"


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("evil",)


def test_an_index_that_would_run_code_is_not_read(
    tmp_path: Path, run: Trajectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = distributed(tmp_path / "step_1", model(run, 1))
    for content, error, message in (
        (pickle.dumps(Evil()), NotAStoreError, "asks for posix.mkdir"),
        # `dataclass` compiles the names of fields.
        (f"c{METADATA}\ndataclass\n.".encode(), NotAStoreError, f"asks for {METADATA}.dataclass"),
        ((folder / ".metadata").read_bytes()[:50], DamagedStoreError, "cannot be read"),
    ):
        (folder / ".metadata").write_bytes(content)
        with pytest.raises(error, match=message):
            open_checkpoints([folder], NAME)
    assert not (tmp_path / "evil").exists()


def test_a_tensor_of_which_an_index_has_a_part_only_is_not_read(
    tmp_path: Path, run: Trajectory
) -> None:
    folder = distributed(tmp_path / "step_1", model(run, 1))
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.state_dict_metadata[f"transformer.{NAME}"].chunks.clear()
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(DamagedStoreError, match=rf"does not say where all of .*{NAME} lies"):
        open_checkpoints([folder], NAME)


def test_a_tensor_in_two_files_of_a_directory_is_not_chosen_from(
    tmp_path: Path, run: Trajectory
) -> None:
    for name, step in (("ema", 0), ("model", 1)):
        save(tmp_path / f"{name}.safetensors", model(run, step))
    with pytest.raises(NotAStoreError, match=r"is in model\.safetensors and in another file"):
        open_checkpoints([tmp_path], NAME)


def test_checkpoints_that_do_not_fit_together_are_refused(tmp_path: Path, run: Trajectory) -> None:
    a = save(tmp_path / "a_1.safetensors", model(run, 1))
    for name, tensors, parameter, error, message in (
        ("b_1", model(run, 1), NAME, ConfigError, "are both of step 1"),
        ("b_2", {NAME: torch.zeros(3, 4)}, NAME, ConfigError, r"is float32 of shape \(3, 4\)"),
        ("b_2", {"other": torch.zeros(3)}, NAME, SelectionError, "no parameter .* there is other"),
        (
            "b_2",
            {f"{of}.{NAME}": torch.zeros(1) for of in "xy"},
            NAME,
            SelectionError,
            "which all end with",
        ),
        ("b", model(run, 1), NAME, ConfigError, "has a step in its name"),
    ):
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        b = save(folder / f"{name}.safetensors", tensors)
        with pytest.raises(error, match=message):
            open_checkpoints([a, b], parameter)
    with pytest.raises(NotAStoreError, match="there is nothing; check the path"):
        open_checkpoints([a, tmp_path / "nothing"], NAME)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotAStoreError, match=r"neither \.metadata nor safetensors files"):
        open_checkpoints([a, tmp_path / "empty"], NAME)
    assert "--parameter must name a tensor" in fails(2, "import", a, b, tmp_path / "run.zarr")
