"""Files that are imported and exported again, byte for byte."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.notebook_file import float32_states, import_notebook, live_mask, save
from tests.support.runs import N_DIMS, N_STEPS, N_TOKENS
from thimble_zarr.sources.exporting import export_notebook
from thimble_zarr.sources.open import open_file_alone
from thimble_zarr.store.reader import StoreReader

N_ROWS = N_STEPS + 1


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
    assert not open_file_alone(file).narrow_states
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
    export_notebook(open_file_alone(file), tmp_path / "copy.safetensors")
    assert (tmp_path / "copy.safetensors").read_bytes() == file.read_bytes()
