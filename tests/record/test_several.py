"""Several parameters in one store, of any rank and dtype, against what a loop saw."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import xarray as xr
import zarr
from zarr.errors import ZarrUserWarning

from tests.support.faults import Arrays, rewrite
from tests.support.runs import N_STEPS
from tests.support.zoo import (
    DIMS,
    DTYPES,
    IN_SECOND_GROUP,
    MEMORY,
    NO_GRADIENT,
    SHAPES,
    Recorded,
    Zoo,
    record_zoo,
)
from thimble_zarr import Recorder, accounting, open_dataset, open_datasets, open_datatree
from thimble_zarr.analysis.audit.accounting import selected
from thimble_zarr.analysis.findings import find_causes
from thimble_zarr.bits import decode
from thimble_zarr.errors import ConfigError, DamagedStoreError, SelectionError
from thimble_zarr.format.layout import plan_layouts, recorder_memory_bytes
from thimble_zarr.format.schema import row_size
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.writer import StoreWriter


def native_of(name: str) -> str:
    return str(DTYPES.get(name, torch.bfloat16)).removeprefix("torch.")


# --- what is on disk -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("library", ["zarr", "tensorstore"])
def test_others_read_every_rank(zoo: Recorded, name: str, library: str) -> None:
    for variable in ("W", "grad", "exp_avg", "exp_avg_sq"):
        path = zoo.path / name / variable
        if library == "zarr":
            bits = zarr.open_array(path, mode="r")[...]
        else:
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
            bits = tensorstore.open(spec, read=True).result().read().result()
        assert bits.shape == (N_STEPS + 1, *SHAPES[name])
        order = StoreReader.open(zoo.path, name).schema.places
        bits = bits if order is None else np.asarray(bits)[:, order]
        numbers = decode(np.asarray(bits), native_of(name), np.float64)
        np.testing.assert_array_equal(numbers, zoo.histories[name][variable])


@pytest.mark.parametrize("name", SHAPES)
def test_plain_xarray_opens_a_group(zoo: Recorded, name: str) -> None:
    ds = xr.open_zarr(zoo.path, group=name)
    assert ds.W.dims == ("step", *DIMS[name])
    assert ds.W.shape == (N_STEPS + 1, *SHAPES[name])
    assert ds.step.values.tolist() == list(range(N_STEPS + 1))
    assert ("token" in ds.coords) == (name == "wte.weight")


def test_plain_xarray_opens_all(zoo: Recorded) -> None:
    tree = xr.open_datatree(zoo.path, engine="zarr")
    assert set(SHAPES) <= set(tree.children)
    assert tree["wte.weight"].dims["token"] == 11


@pytest.mark.parametrize("group", ["", "up"])
def test_metadata_are_consolidated_as_zarr_does_it(
    zoo: Recorded, tmp_path: Path, group: str
) -> None:
    path = Path(shutil.copytree(zoo.path, tmp_path / "again.zarr"))
    for file in (path / name / "zarr.json" for name in (*SHAPES, "")):
        metadata = json.loads(file.read_text())
        del metadata["consolidated_metadata"]
        file.write_text(json.dumps(metadata))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZarrUserWarning)  # no specification has it
        zarr.consolidate_metadata(path, path=group)
    theirs, ours = (json.loads((at / group / "zarr.json").read_text()) for at in (path, zoo.path))
    assert ours == theirs


def test_a_reader_sees_rows_of_a_matrix(zoo: Recorded) -> None:
    readers = {reader.group: reader for reader in StoreReader.open_each(zoo.path)}
    assert list(readers) == [name for name, _ in Zoo(torch.optim.AdamW).named_parameters()]
    assert {reader.n_rows for reader in readers.values()} == {N_STEPS + 1}
    for name, reader in readers.items():
        schema = reader.schema
        assert (schema.shape, schema.dims) == (SHAPES[name], DIMS[name])
        bits = reader.read("W", (3, 9))
        assert bits.shape == (6, schema.n_tokens, schema.n_dims)
        numbers = decode(bits, native_of(name), np.float64).reshape(6, *schema.shape)
        np.testing.assert_array_equal(numbers, zoo.histories[name]["W"][3:9])
        assert list(reader.integrity.altered_chunks((0, N_STEPS + 1))) == []


def test_scalars_are_those_of_the_parameters_own_group(zoo: Recorded) -> None:
    for reader in StoreReader.open_each(zoo.path):
        scalars, second = reader.read_scalars(), reader.group in IN_SECOND_GROUP
        expected = zoo.histories[reader.group].learning_rates
        np.testing.assert_array_equal(scalars["learning_rate"][1:], expected)
        assert set(scalars["beta2"][1:]) == {0.99 if second else 0.999}
        assert set(scalars["weight_decay"][1:]) == {0.01 if second else 0.1}
        assert ("max_exp_avg_sq" in reader.schema.dtypes) == second
        np.testing.assert_array_equal(scalars["loss"][1:], range(1, N_STEPS + 1))


def test_a_parameter_without_a_gradient_is_recorded_as_skipped(zoo: Recorded) -> None:
    counts = {
        name: StoreReader.open(zoo.path, name).read_scalars()["optimizer_step"] for name in SHAPES
    }
    np.testing.assert_array_equal(counts["wte.weight"], range(N_STEPS + 1))
    assert np.flatnonzero(np.diff(counts["norm"]) == 0).tolist() == [NO_GRADIENT - 1]
    assert np.isnan(open_dataset(zoo.path, "norm").grad[NO_GRADIENT]).all()


def test_blocks_of_all_are_of_one_length_within_the_bound(zoo: Recorded) -> None:
    schemas = [reader.schema for reader in StoreReader.open_each(zoo.path)]
    rows = [row_size(schema.shape, schema.dtypes) for schema in schemas]
    (length,) = {schema.layout.block_steps for schema in schemas}
    assert length > 1
    assert recorder_memory_bytes(rows, length) <= MEMORY < recorder_memory_bytes(rows, 2 * length)
    assert [schema.layout for schema in schemas] == plan_layouts(rows, memory_bytes=MEMORY)


# --- choosing one --------------------------------------------------------------------------------


def test_one_of_several_must_be_chosen(zoo: Recorded) -> None:
    with pytest.raises(SelectionError, match=r"holds 7 parameters.*`parameter=`.*wte.weight"):
        open_dataset(zoo.path)
    with pytest.raises(SelectionError, match=r"no parameter wte; there is .*wte.weight"):
        open_dataset(zoo.path, "wte")


def test_the_only_one_needs_no_choosing(toy_path: Path, tmp_path: Path) -> None:
    assert StoreReader.open(toy_path).group == ""
    with pytest.raises(SelectionError, match=r"no parameter x; there is one without a name"):
        StoreReader.open(toy_path, "x")
    zoo = Zoo(torch.optim.AdamW)
    with Recorder(tmp_path / "run.zarr", zoo.optimizer, parameters={"a": zoo.up}):
        zoo.step(1)
    assert StoreReader.open(tmp_path / "run.zarr").group == "a"
    assert open_dataset(tmp_path / "run.zarr", "a").attrs["parameter"] == "a"


def test_a_named_root_may_be_chosen_by_its_name(tmp_path: Path) -> None:
    zoo = Zoo(torch.optim.AdamW)
    with Recorder(tmp_path / "run.zarr", zoo.optimizer, parameter=zoo.filter, model=zoo):
        zoo.step(1)
    assert open_dataset(tmp_path / "run.zarr", "filter").W.dims == ("step", *DIMS["filter"])


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "__x", ".thimble", "zarr.json"])
def test_names_that_cannot_be_groups_are_refused(tmp_path: Path, name: str) -> None:
    zoo = Zoo(torch.optim.AdamW)
    both = {"a": zoo.up, name: zoo.norm}
    with pytest.raises(ConfigError, match="cannot be a Zarr group"):
        Recorder(tmp_path / "run.zarr", zoo.optimizer, parameters=both)
    assert not list(tmp_path.iterdir())


def test_names_that_leave_the_store_are_damage(zoo: Recorded, tmp_path: Path) -> None:
    (tmp_path / "run.zarr").mkdir()
    text = (zoo.path / "zarr.json").read_text().replace('"wte.weight"', '"../wte.weight"')
    (tmp_path / "run.zarr/zarr.json").write_text(text)
    with pytest.raises(DamagedStoreError, match=r"run\.zarr: .*'\.\./wte\.weight'"):
        StoreReader.open_each(tmp_path / "run.zarr")


def test_a_damaged_parameter_does_not_hide_the_others(tmp_path: Path) -> None:
    zoo = Zoo(torch.optim.AdamW)
    with Recorder(tmp_path / "run.zarr", zoo.optimizer, parameters=["up", "norm"], model=zoo):
        zoo.step(1)
    (tmp_path / "run.zarr/up/zarr.json").unlink()
    assert StoreReader.open(tmp_path / "run.zarr", "norm").n_rows == 2
    with pytest.raises(DamagedStoreError, match=r"cannot read .*run\.zarr/up: "):
        StoreReader.open(tmp_path / "run.zarr", "up")


# --- opened --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_variables_have_the_shape_of_the_parameter(zoo: Recorded, name: str) -> None:
    ds, history = open_dataset(zoo.path, name), zoo.histories[name]
    assert ds.adam_residual.dims == ("step", *DIMS[name])
    assert ds.freeze_step.dims == DIMS[name][:1]
    with np.errstate(invalid="ignore"):
        for variable in ("W", "grad", "exp_avg", "exp_avg_sq"):
            expected = history[variable].astype(np.float32)
            np.testing.assert_array_equal(ds[variable].values, expected)
    xr.testing.assert_equal(
        ds.W.diff("step").sel(step=slice(1, NO_GRADIENT - 1)).compute() * 0,
        ds.unexplained.sel(step=slice(1, NO_GRADIENT - 1)).compute() * 0,
    )
    assert (ds.unexplained[1:] == 0).all()
    whole = ds.compute()
    assert {v.dims for v in whole.data_vars.values()} <= {
        ("step", *DIMS[name]),
        ("step",),
        DIMS[name][:1],
    }


@pytest.mark.parametrize("name", SHAPES)
def test_any_axis_can_be_selected(zoo: Recorded, name: str) -> None:
    ds = open_dataset(zoo.path, name)
    values, rng = ds.adam_update.values, np.random.default_rng(0)
    for _ in range(20):
        indices = {
            dim: [
                slice(None),
                slice(1, None),
                int(rng.integers(size)),
                rng.permutation(size)[:2],
            ][rng.integers(4)]
            for dim, size in ds.adam_update.sizes.items()
        }
        selected, expected = ds.adam_update, values
        for dim, index in indices.items():
            expected = np.take(
                expected,
                np.arange(ds.sizes[dim])[index],
                axis=selected.dims.index(dim),
            )
            selected = selected.isel({dim: index})
        np.testing.assert_array_equal(selected.values, expected)


def test_a_tree_has_all(zoo: Recorded, toy_path: Path) -> None:
    tree = open_datatree(zoo.path)
    assert set(tree.children) == set(SHAPES)
    xr.testing.assert_identical(
        tree["wte.weight"].to_dataset().compute(), open_dataset(zoo.path, "wte.weight").compute()
    )
    assert tree["wte.weight"].ds.dead.values.sum() == 4
    single = open_datatree(toy_path)
    assert not single.children
    assert single.ds.W.dims == ("step", "token", "dim")


def test_the_xarray_engine_takes_a_parameter(zoo: Recorded) -> None:
    ds = xr.open_dataset(zoo.path, engine="thimble", parameter="up")
    xr.testing.assert_identical(ds.compute(), open_dataset(zoo.path, "up").compute())


@pytest.mark.parametrize("name", ["scale", "norm", "image"])
def test_runs_of_any_rank_open_together(zoo: Recorded, tmp_path: Path, name: str) -> None:
    shutil.copytree(zoo.path, tmp_path / "again.zarr")
    runs = open_datasets([zoo.path, tmp_path / "again.zarr"], name)
    assert runs.W.dims == ("run", "step", *DIMS[name])
    one = open_dataset(zoo.path, name)
    for variable in ("W", "adam_residual", "freeze_step"):
        np.testing.assert_array_equal(runs[variable].isel(run=1).values, one[variable].values)
    assert int(accounting(runs).n_different.sum()) == 0


# --- checked -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.Adam, {"foreach": False}),
        (torch.optim.Adam, {"fused": True}),
    ],
)
def test_every_parameter_is_replayed_to_the_bit(
    tmp_path: Path, optimizer: type[torch.optim.Optimizer], options: dict[str, bool]
) -> None:
    recorded = record_zoo(tmp_path / "run.zarr", optimizer, **options)
    for name, node in open_datatree(recorded.path).children.items():
        table = accounting(node.to_dataset())
        assert table.attrs["not_exact_because"] == ""
        assert int(table.n_different.sum()) == 0, name
        assert int(table.n_elements) == np.prod(SHAPES[name], dtype=int)


@pytest.mark.parametrize("name", SHAPES)
def test_every_parameter_is_the_formula_within_rounding(zoo: Recorded, name: str) -> None:
    table = accounting(open_dataset(zoo.path, name), replay=False)
    assert int(table.n_beyond_rounding.sum()) == 0


def swap_rows(bits: Arrays, scalars: Arrays) -> None:
    one, other = bits["wte.weight/W"], bits["query/W"]
    one[5], other[5] = other[5].copy(), one[5].copy()


def take_other_rate(bits: Arrays, scalars: Arrays) -> None:
    scalars["norm/learning_rate"][3:] = scalars["wte.weight/learning_rate"][3:]


@pytest.mark.parametrize(
    ("change", "wrong", "step"),
    [(swap_rows, {"wte.weight", "query"}, 5), (take_other_rate, {"norm"}, 3)],
)
def test_what_is_of_another_parameter_fails(
    zoo: Recorded,
    tmp_path: Path,
    change: Callable[[Arrays, Arrays], None],
    wrong: set[str],
    step: int,
) -> None:
    rewrite(zoo.path, tmp_path / "run.zarr", change)
    failing = {}
    for name, node in open_datatree(tmp_path / "run.zarr").children.items():
        table = accounting(node.to_dataset())
        if table.n_beyond.any():
            failing[name] = find_causes(selected(node.to_dataset()), table)[0]
    assert set(failing) == wrong
    assert {finding.step for finding in failing.values()} == {step}
    if change is take_other_rate:
        assert failing["norm"].code == "other-learning-rate"


def test_a_step_is_committed_for_all_or_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = Zoo(torch.optim.AdamW)
    recorder = Recorder(tmp_path / "run.zarr", zoo.optimizer, parameters=["up", "norm"], model=zoo)
    zoo.step(1)
    recorder.flush()
    real, written = StoreWriter._write, []

    def write(writer: StoreWriter, key: str, parts: object) -> int:
        written.append(key)
        if key.startswith("norm/grad"):
            raise OSError(28, "No space left on device")
        return real(writer, key, parts)

    zoo.step(2)
    monkeypatch.setattr(StoreWriter, "_write", write)
    with pytest.raises(RuntimeError, match="steps 0 to 1 are committed and safe"):
        recorder.close()
    assert any(key.startswith("norm/W") for key in written)
    assert [reader.n_rows for reader in StoreReader.open_each(tmp_path / "run.zarr")] == [2, 2]
