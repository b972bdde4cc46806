"""The notebook's file, in and out, held against the library it was written with."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors.torch import load_file

from tests.support.notebook_file import live_mask, notebook_tensors, save
from tests.support.peak import linux_only, measured
from tests.support.runs import (
    N_DIMS,
    N_LIVE,
    N_STEPS,
    N_TOKENS,
    History,
    Loop,
    record,
    token_labels,
)
from thimble_zarr import Recorder, TokenLabels, accounting, open_dataset
from thimble_zarr.analysis.dataset.open import dataset_of
from thimble_zarr.bits import decode
from thimble_zarr.errors import (
    ConfigError,
    DamagedStoreError,
    NotAStoreError,
    StoreError,
    StoreExistsError,
    ThimbleError,
)
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.sources.notebook.exporter import export_notebook
from thimble_zarr.sources.notebook.importer import import_notebook
from thimble_zarr.sources.notebook.reader import NotebookReader, has_narrow_states
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.writer import StoreWriter

N_ROWS = N_STEPS + 1

CONFIG = TrainingConfig(lr=1e-2, weight_decay=0.01, steps=N_STEPS, batch_size=128)

MB = 10**6


@pytest.fixture
def tensors(toy_history: History) -> dict[str, torch.Tensor]:
    return notebook_tensors(toy_history)


@pytest.fixture
def file(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    return save(tmp_path / "run.safetensors", tensors)


def round_trip(file: Path) -> Path:
    reader = import_notebook(file, file.with_suffix(".zarr"))
    again = file.with_name("again.safetensors")
    export_notebook(reader, again)
    return again


def same_tensors(first: Path, second: Path) -> bool:
    """Compare names, dtypes, shapes and bits."""
    one, two = load_file(first), load_file(second)
    assert set(one) == set(two)
    return all(
        tensor.dtype == two[name].dtype
        and tensor.shape == two[name].shape
        and tensor.numpy(force=True).tobytes() == two[name].numpy(force=True).tobytes()
        if tensor.dtype != torch.bfloat16
        else torch.equal(tensor.view(torch.int16), two[name].view(torch.int16))
        for name, tensor in one.items()
    )


def float32_states(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give the moments digits that bfloat16 does not have."""
    generator = torch.Generator().manual_seed(3)
    return tensors | {
        name: tensors[name] * (1 + 1e-4 * torch.rand(tensors[name].shape, generator=generator))
        for name in ("momentum_W", "variance_W")
    }


# --- out -----------------------------------------------------------------------------------------


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


# --- in ------------------------------------------------------------------------------------------


def test_an_import_holds_what_the_run_held(tmp_path: Path, file: Path) -> None:
    reader = import_notebook(file, tmp_path / "run.zarr")
    source = NotebookReader.open(file)
    assert reader.schema.to_attribute() == json.loads(json.dumps(source.schema.to_attribute()))
    assert reader.commit.complete
    assert set(reader.schema.dtypes.values()) == {"bfloat16"}
    assert has_narrow_states(reader.schema)


def test_stored_bits_are_those_of_a_recording(
    tmp_path: Path, file: Path, toy_path: Path, toy_history: History
) -> None:
    recorded = StoreReader.open(toy_path)
    for reader in (NotebookReader.open(file), import_notebook(file, tmp_path / "run.zarr")):
        assert reader.n_rows == recorded.n_rows == N_ROWS
        for name in recorded.schema.dtypes:
            bits = reader.read(name, (0, N_ROWS))
            assert bits.dtype == np.uint16
            np.testing.assert_array_equal(bits, recorded.read(name, (0, N_ROWS)), err_msg=name)
            np.testing.assert_array_equal(decode(bits, "bfloat16"), toy_history[name])
        scalars = reader.read_scalars()
        assert list(scalars) == list(reader.schema.scalars)
        for name, values in recorded.read_scalars().items():
            assert scalars[name].dtype == np.float64
            if name == "loss":
                values = values.astype(np.float32)  # the notebook's
            np.testing.assert_array_equal(scalars[name], values, err_msg=name)


def test_rows_and_tokens_are_read_alone(file: Path) -> None:
    reader = NotebookReader.open(file)
    for name in reader.schema.dtypes:
        whole = reader.read(name, (0, N_ROWS))
        for rows in ((0, 1), (3, 3), (2, 9), (N_ROWS - 1, N_ROWS)):
            for tokens in (range(1), range(4, 4), range(3, 8), np.array([N_TOKENS - 1, 0, 2, 0])):
                part = reader.read(name, rows, tokens)
                np.testing.assert_array_equal(part, whole[slice(*rows)][:, np.asarray(tokens, int)])
                part[:] = 1  # the array is the caller's


def test_a_reader_is_small_to_pickle(file: Path) -> None:
    reader = NotebookReader.open(file, labels=token_labels())
    pickled = pickle.dumps(reader)
    assert len(pickled) < 10_000
    copy = pickle.loads(pickled)
    assert copy == reader
    np.testing.assert_array_equal(copy.read("W", (0, 3)), reader.read("W", (0, 3)))


@pytest.mark.parametrize("lr", [1e-3, 3e-4, 0.1, 1.0, 1e-30, 6.02e23])
def test_the_optimizers_own_double_comes_back(
    tmp_path: Path, tensors: dict[str, torch.Tensor], lr: float
) -> None:
    tensors["learning_rate"] = torch.tensor(lr, dtype=torch.float32)
    file = save(tmp_path / "run.safetensors", tensors)
    scalars = NotebookReader.open(file).read_scalars()
    assert np.isnan(scalars["learning_rate"][0])
    assert scalars["learning_rate"][1:].tolist() == N_STEPS * [lr]
    assert scalars["beta2"][1:].tolist() == N_STEPS * [0.999]
    assert scalars["optimizer_step"].tolist() == list(range(N_ROWS))


def test_other_dtypes_of_a_scalar_are_taken_as_they_are(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    tensors["learning_rate"] = torch.tensor(float(np.float32(0.1)), dtype=torch.float64)
    tensors["adam_beta1"] = torch.tensor(0.9, dtype=torch.bfloat16)
    tensors["weight_decay"] = torch.tensor(0.1, dtype=torch.float16)
    scalars = NotebookReader.open(save(tmp_path / "x.safetensors", tensors)).read_scalars()
    assert scalars["learning_rate"][1] == float(np.float32(0.1))
    assert scalars["beta1"][1] == 0.8984375
    assert scalars["weight_decay"][1] == 0.1


def test_settings_are_taken_over(file: Path) -> None:
    schema = NotebookReader.open(file).schema
    expected = {
        "vocab_size": N_TOKENS, "hidden_dim": N_DIMS, "layers": 2, "heads": 2, "steps": N_STEPS,
        "batch_size": 128, "lr": 0.01, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999,
        "eps": 1e-8, "init_scale": 0.02, "seed": 42,
    }  # fmt: skip
    assert schema.attrs["config"] == expected
    assert (schema.optimizer.name, schema.optimizer.decoupled_weight_decay) == ("AdamW", True)
    assert (schema.software, schema.device, schema.parameter) == ({}, "unknown", None)


# --- in and out again ----------------------------------------------------------------------------


def test_a_round_trip_gives_the_file_back_byte_for_byte(file: Path) -> None:
    assert round_trip(file).read_bytes() == file.read_bytes()


def test_float32_states_stay_float32(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors = float32_states(tensors)
    file = save(tmp_path / "run.safetensors", tensors)
    assert round_trip(file).read_bytes() == file.read_bytes()
    stored = StoreReader.open(tmp_path / "run.zarr")
    assert stored.schema.dtypes == {
        "W": "bfloat16", "grad": "bfloat16", "exp_avg": "float32", "exp_avg_sq": "float32",
    }  # fmt: skip
    assert not has_narrow_states(stored.schema)
    expected = tensors["momentum_W"].numpy()
    np.testing.assert_array_equal(stored.read("exp_avg", (0, N_ROWS)), expected)


@pytest.mark.parametrize("row", [0, 1, 4, N_STEPS])
@pytest.mark.parametrize("name", ["momentum_W", "variance_W"])
def test_one_number_that_bfloat16_lacks_is_found(
    tmp_path: Path, tensors: dict[str, torch.Tensor], name: str, row: int
) -> None:
    tensors[name][row, N_TOKENS - 1, N_DIMS - 1] = 1 + 2.0**-23
    file = save(tmp_path / "run.safetensors", tensors)
    assert round_trip(file).read_bytes() == file.read_bytes()
    assert StoreReader.open(tmp_path / "run.zarr").schema.dtypes["exp_avg"] == "float32"


def test_a_number_that_bfloat16_lacks_is_never_rounded_in_place(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    tensors["momentum_W"][3, 2, 1] = 1 + 2.0**-23  # not in a row that is looked at first
    reader = NotebookReader.open(save(tmp_path / "run.safetensors", tensors))
    assert reader.schema.dtypes["exp_avg"] == "bfloat16"
    reader.read("exp_avg", (0, 3))
    reader.read("exp_avg", (0, N_ROWS), (3, N_TOKENS))
    with pytest.raises(DamagedStoreError, match=r"momentum_W .* at step 3,.*thimble-zarr import"):
        reader.read("exp_avg", (0, N_ROWS), (2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_every_dtype_is_taken_as_it_is(
    tmp_path: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    big = ("W", "grad_W", "momentum_W", "variance_W", "losses")
    tensors |= {name: tensors[name].to(dtype) for name in big}
    file = save(tmp_path / "run.safetensors", tensors)
    assert round_trip(file).read_bytes() == file.read_bytes()
    stored = StoreReader.open(tmp_path / "run.zarr").schema.dtypes
    assert stored["W"] == str(dtype).removeprefix("torch.")


def test_nothing_that_is_small_gets_lost(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors |= {
        "seed": torch.tensor(-1, dtype=torch.int64),
        "init_scale": torch.tensor(float("nan")),
        "temperature": torch.tensor(0.7, dtype=torch.float64),
        "flag": torch.tensor(True),
        "tied": torch.tensor([[1, 2, 3]], dtype=torch.uint8),
        "dead_mask": ~live_mask(),
        "empty": torch.zeros(0, 3),
        "void": torch.zeros(2, 0, dtype=torch.float32),
        "vacuum": torch.zeros(0),
        "a naïve name": torch.tensor(-0.0, dtype=torch.float16),
    }
    del tensors["batch_size"], tensors["n_live"]
    file = save(tmp_path / "run.safetensors", tensors, metadata={"format": "pt"})
    assert round_trip(file).read_bytes() == file.read_bytes()


def test_special_numbers_come_back(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    special = torch.tensor([float("nan"), -float("nan"), float("inf"), -float("inf"), -0.0])
    for name in ("W", "grad_W", "momentum_W", "variance_W"):
        tensors[name][5, 3] = special.to(tensors[name].dtype)
    tensors["losses"][:5] = special
    file = save(tmp_path / "run.safetensors", tensors)
    assert round_trip(file).read_bytes() == file.read_bytes()


def test_another_order_of_tensors_comes_back(tmp_path: Path, file: Path) -> None:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    moved, parts, offset = {}, [], 0
    for name in reversed(header):
        begin, end = header[name]["data_offsets"]
        moved[name] = header[name] | {"data_offsets": [offset, offset + end - begin]}
        parts.append(data[begin:end])
        offset += end - begin
    text = json.dumps(moved).encode()
    other = tmp_path / "other.safetensors"
    other.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))
    again = round_trip(other)
    assert same_tensors(file, again)
    assert again.read_bytes().endswith(b"".join(parts))


def test_a_file_of_the_initial_state_alone(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    tensors |= {n: tensors[n][:1] for n in ("W", "grad_W", "momentum_W", "variance_W", "losses")}
    file = save(tmp_path / "run.safetensors", tensors)
    assert round_trip(file).read_bytes() == file.read_bytes()


def test_a_file_goes_out_of_a_file(tmp_path: Path, file: Path) -> None:
    export_notebook(NotebookReader.open(file), tmp_path / "copy.safetensors")
    assert (tmp_path / "copy.safetensors").read_bytes() == file.read_bytes()


# --- read in place -------------------------------------------------------------------------------


def test_the_analysis_is_the_same_in_place(tmp_path: Path, file: Path, toy_path: Path) -> None:
    labels = token_labels()
    in_place = dataset_of(NotebookReader.open(file, labels=labels))
    import_notebook(file, tmp_path / "run.zarr", labels=labels)
    imported, recorded = open_dataset(tmp_path / "run.zarr"), open_dataset(toy_path)
    for ds in (in_place, imported):
        table = accounting(ds.sel(token=ds.dead))
        xr.testing.assert_equal(table, accounting(recorded.sel(token=recorded.dead)))
        xr.testing.assert_equal(ds.adam_residual.compute(), recorded.adam_residual.compute())
        assert np.isnan(ds.grad[0].values).all()
    assert in_place.identical(imported.assign_attrs(in_place.attrs))


def test_labels_are_kept(tmp_path: Path, file: Path) -> None:
    live = live_mask().numpy()
    labels = TokenLabels(live=live, dead=~live)
    found = import_notebook(file, tmp_path / "run.zarr", labels=labels).read_labels()
    assert found.live is not None
    assert found.dead is not None
    assert found.live.tolist() == live.tolist() == (~found.dead).tolist()
    assert int(found.live.sum()) == N_LIVE


def test_labels_of_another_vocabulary_are_refused(tmp_path: Path, file: Path) -> None:
    with pytest.raises(ConfigError, match=f"has {N_TOKENS} tokens, but {N_TOKENS + 1} values"):
        import_notebook(file, tmp_path / "run.zarr", labels=token_labels(N_TOKENS + 1))
    assert list(tmp_path.iterdir()) == [file]


# --- files that are not what they should be ------------------------------------------------------


def refused(file: Path, error: type[ThimbleError], message: str) -> None:
    """Expect an error, in place and from an import, that names the file and leaves nothing."""
    before = sorted(file.parent.iterdir())
    for attempt in (NotebookReader.open, lambda f: import_notebook(f, f.with_suffix(".zarr"))):
        with pytest.raises(error, match=message) as raised:
            attempt(file)
        assert type(raised.value) is error
        assert str(file) in str(raised.value)
    assert sorted(file.parent.iterdir()) == before


def test_a_file_cut_off_anywhere_is_never_read(tmp_path: Path, file: Path) -> None:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    cut = tmp_path / "cut.safetensors"
    for n_bytes in (0, 1, 7, 8):
        cut.write_bytes(content[:n_bytes])
        refused(cut, NotAStoreError, "not a safetensors file")
    for n_bytes in (9, 8 + length // 2, 7 + length, 8 + length, len(content) // 2):
        cut.write_bytes(content[:n_bytes])
        refused(cut, DamagedStoreError, f"it has {n_bytes:,} bytes, and its header promises")
    for longer_or_shorter in (content[:-1], content + b"x"):
        cut.write_bytes(longer_or_shorter)
        refused(cut, DamagedStoreError, f"{len(longer_or_shorter):,} .* {len(content):,}")


def test_a_file_that_shrinks_while_it_is_read_is_told(file: Path) -> None:
    reader = NotebookReader.open(file)
    file.write_bytes(file.read_bytes()[:-N_DIMS])
    with pytest.raises(DamagedStoreError, match=f"{file}: it was cut off after it was opened"):
        [reader.read(name, (0, N_ROWS)) for name in reader.schema.dtypes]
    file.unlink()
    with pytest.raises(StoreError, match="No such file"):
        reader.read("W", (0, 1))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no safetensors",
        b"PK\x03\x04 a torch checkpoint is a zip file",
        bytes(100),
        (1).to_bytes(8, "little") + b"{",
        (2).to_bytes(8, "little") + b"[]",
        (10**8 + 1).to_bytes(8, "little") + b"{}",
        b"\xff" * 8 + b"{}",
    ],
    ids=range(8),
)
def test_another_file_is_not_taken_for_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    refused(tmp_path / "file", NotAStoreError, "it is not a safetensors file")


def edited(file: Path, edit: Callable[[dict], object]) -> Path:
    """Change the JSON header."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = json.dumps(edit(header) or header).encode()
    target = file.with_name("edited.safetensors")
    target.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return target


@pytest.mark.parametrize(
    "edit",
    [
        lambda h: h["W"].update(shape=[N_ROWS, N_TOKENS, N_DIMS + 1]),
        lambda h: h["W"].update(shape=[-1, N_TOKENS, N_DIMS]),
        lambda h: h["W"].update(shape=[1.5]),
        lambda h: h["W"].update(shape=[10**30, 10**30, 10**30]),
        lambda h: h["W"].update(shape=[2**32, 2**32, 2**32]),
        lambda h: h["W"].update(shape=None),
        lambda h: h["W"].update(dtype="F7"),
        lambda h: h["W"].update(dtype=["F32"]),
        lambda h: h["W"].update(dtype="F32"),
        lambda h: h["W"].update(data_offsets=[0, 1540]),
        lambda h: h["W"].update(data_offsets=[5]),
        lambda h: h["W"].update(data_offsets=["a", "b"]),
        lambda h: h["W"].pop("dtype") and None,
        lambda h: h.update(W=3),
        lambda h: {"__metadata__": {"a": 1}, **h},
        lambda h: {"__metadata__": 1, **h},
    ],
    ids=range(16),
)
def test_a_header_that_is_not_sound_is_refused(file: Path, edit: Callable[[dict], object]) -> None:
    refused(edited(file, edit), NotAStoreError, "it is not a sound safetensors file")


def test_a_dtype_that_is_not_known_is_named(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    file = save(tmp_path / "x.safetensors", tensors | {"z": torch.zeros(3, dtype=torch.complex64)})
    refused(file, NotAStoreError, "its tensor 'z' has the unknown dtype 'C64'")


def test_a_header_nested_without_end_is_refused(tmp_path: Path) -> None:
    text = b'{"a":' + b"[" * 100_000
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text)
    refused(tmp_path / "file", NotAStoreError, "not a sound safetensors file")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W": None}, "it has no W, only "),
        ({"losses": None, "adam_beta1": None}, "it has no losses, adam_beta1, only "),
        ({"W": torch.zeros(N_TOKENS, N_DIMS)}, r"W has shape \(11, 5\), expected"),
        ({"W": torch.zeros(0, N_TOKENS, N_DIMS)}, r"W has shape \(0, 11, 5\)"),
        (
            {"grad_W": torch.zeros(N_STEPS, N_TOKENS, N_DIMS)},
            r"grad_W has shape \(13, 11, 5\), expected \(14, 11, 5\)",
        ),
        ({"losses": torch.zeros(N_STEPS)}, r"losses has shape \(13,\), expected \(14,\)"),
        ({"learning_rate": torch.zeros(3)}, r"learning_rate has shape \(3,\), expected \(\)"),
        ({"adam_beta1": torch.tensor(1)}, "adam_beta1 is I64, expected one of BF16"),
        ({"adam_epsilon": torch.tensor(float("nan"))}, "adam_epsilon is nan"),
        (
            {"variance_W": torch.zeros(N_ROWS, N_TOKENS, N_DIMS, dtype=torch.int32)},
            "variance_W is I32",
        ),
        ({"grad_W": torch.ones(N_ROWS, N_TOKENS, N_DIMS)}, "grad_W of row 0.* is not zero"),
    ],
    ids=range(11),
)
def test_another_layout_is_refused(
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    changes: dict[str, torch.Tensor | None],
    message: str,
) -> None:
    changed = {name: t for name, t in (tensors | changes).items() if t is not None}
    refused(save(tmp_path / "run.safetensors", changed), NotAStoreError, message)


def test_a_model_is_refused_in_a_short_message(tmp_path: Path) -> None:
    model = {f"layers.{index}.weight": torch.zeros(2) for index in range(1000)}
    file = save(tmp_path / "model.safetensors", model)
    with pytest.raises(NotAStoreError, match="it is not the notebook's file") as raised:
        NotebookReader.open(file)
    assert len(str(raised.value)) < 1000


def test_what_a_store_has_no_room_for_is_not_dropped_in_silence(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    file = save(tmp_path / "run.safetensors", tensors | {"activations": torch.zeros(200, 200)})
    assert NotebookReader.open(file).n_rows == N_ROWS  # to check it is no harm
    for attempt in (
        lambda: import_notebook(file, tmp_path / "run.zarr"),
        lambda: export_notebook(NotebookReader.open(file), tmp_path / "x.safetensors"),
    ):
        with pytest.raises(ConfigError, match="activations"):
            attempt()
    assert list(tmp_path.iterdir()) == [file]


def test_settings_are_read_whatever_lies_before_them(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    tensors["a"] = torch.zeros(2**13, dtype=torch.int64)  # takes all the room there is
    reader = NotebookReader.open(save(tmp_path / "run.safetensors", tensors))
    assert reader.read_scalars()["learning_rate"][1] == 0.01


def test_there_must_be_a_file(tmp_path: Path) -> None:
    refused(tmp_path / "nothing.safetensors", NotAStoreError, "there is nothing at")
    (tmp_path / "directory").mkdir()
    refused(tmp_path / "directory", StoreError, "Is a directory")


def test_a_store_whose_attribute_was_changed_is_not_exported(tmp_path: Path, file: Path) -> None:
    reader = import_notebook(file, tmp_path / "run.zarr")
    attrs = reader.schema.attrs
    for broken in (
        {},
        "nothing",
        {"tensors": {}, "metadata": None},
        attrs["notebook_file"] | {"tensors": {"W": {"dtype": "BF16", "shape": [1]}}},
    ):
        schema = replace(reader.schema, attrs=attrs | {"notebook_file": broken})
        with pytest.raises(DamagedStoreError, match="notebook_file"):
            export_notebook(replace(reader, schema=schema), tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


# --- all or nothing ------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("at_byte", [0, 5000, 10**9])
def test_an_import_that_fails_leaves_no_store(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: Path,
    error: BaseException,
    at_byte: int,
) -> None:
    close = StoreWriter.close

    def fail(n_done: int, n_total: int) -> None:
        if n_done > at_byte:
            raise error

    def fail_at_the_end(writer: StoreWriter) -> None:
        close(writer)
        raise error

    monkeypatch.setattr(StoreWriter, "close", fail_at_the_end)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError
    with pytest.raises(expected):
        import_notebook(file, tmp_path / "run.zarr", on_progress=fail)
    assert list(tmp_path.iterdir()) == [file]


def test_an_existing_store_is_kept_unless_overwriting_was_asked_for(
    tmp_path: Path, file: Path
) -> None:
    path = tmp_path / "run.zarr"
    record(path, n_steps=2)
    for source in (file, tmp_path / "nothing"):  # told before the file is looked at
        with pytest.raises(StoreExistsError, match="--overwrite"):
            import_notebook(source, path)
    assert StoreReader.open(path).n_rows == 3
    with pytest.raises(StoreExistsError, match="is not a thimble-zarr store"):
        import_notebook(file, file, overwrite=True)
    with pytest.raises(NotAStoreError):
        import_notebook(tmp_path / "nothing", path, overwrite=True)
    assert StoreReader.open(path).n_rows == 3
    assert import_notebook(file, path, overwrite=True).n_rows == N_ROWS


def test_progress_ends_with_everything(
    tmp_path: Path, file: Path, tensors: dict[str, torch.Tensor]
) -> None:
    real = save(tmp_path / "float32.safetensors", float32_states(tensors))
    for index, source in enumerate((file, real)):
        told: list[tuple[int, int]] = []
        store = tmp_path / f"{index}.zarr"
        reader = import_notebook(source, store, on_progress=lambda *n: told.append(n))  # noqa: B023
        assert told == sorted(told)
        assert told[-1][0] == told[-1][1]
        told.clear()
        export_notebook(
            reader,
            tmp_path / f"{index}.safetensors",
            on_progress=lambda *n: told.append(n),  # noqa: B023
        )
        assert told[-1][0] == told[-1][1] == sum(t.nbytes for t in tensors.values())


# --- memory --------------------------------------------------------------------------------------

MEASURE = """
from pathlib import Path
from thimble_zarr.sources.notebook.exporter import export_notebook
from thimble_zarr.sources.notebook.importer import import_notebook
from thimble_zarr.sources.notebook.reader import NotebookReader
small, large, store, again = map(Path, sys.argv[1:])
export_notebook(import_notebook(small, store), again)
found = {"before": peak()}
reader = NotebookReader.open(large)
for name in reader.schema.dtypes:
    for row in range(0, reader.n_rows, 8):
        reader.read(name, (row, min(row + 8, reader.n_rows)))
found["read"] = peak()
reader = import_notebook(large, store, overwrite=True)
found["import"] = peak()
export_notebook(reader, again, overwrite=True)
found["export"] = peak()
print(json.dumps(found))
"""


@linux_only
def test_memory_is_that_of_a_block(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A sparse file of 500 MB, of which most was never written."""
    small = save(tmp_path / "small.safetensors", tensors)
    shape = (140, 4663, 64)  # times 12 bytes
    big = {"W": "BF16", "grad_W": "BF16", "momentum_W": "F32", "variance_W": "F32"}
    header, offset, scalars = {}, 0, b""
    for name, tensor in tensors.items():
        if tensor.ndim == 0:
            content = tensor.numpy().tobytes()
            kind = "F32" if tensor.dtype == torch.float32 else "I64"
            header[name] = {"dtype": kind, "shape": [], "data_offsets": [0, len(content)]}
            header[name]["data_offsets"] = [offset, offset + len(content)]
            scalars, offset = scalars + content, offset + len(content)
    for name in ("losses", *big):
        size = 4 * shape[0] if name == "losses" else np.prod(shape) * int(big[name][-2:]) // 8
        kind, of = ("F32", shape[:1]) if name == "losses" else (big[name], shape)
        header[name] = {"dtype": kind, "shape": of, "data_offsets": [offset, offset + int(size)]}
        offset += int(size)
    text = json.dumps(header).encode()
    large = tmp_path / "large.safetensors"
    with large.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text + scalars)
        stream.truncate(8 + len(text) + offset)
    assert large.stat().st_size > 500 * MB

    found = measured(MEASURE, small, large, tmp_path / "run.zarr", tmp_path / "again.safetensors")
    assert found["read"] - found["before"] <= 40 * MB
    assert found["import"] - found["before"] <= 200 * MB
    assert found["export"] - found["before"] <= 200 * MB
