"""The bounds on memory, each measured in a process of its own."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tests.support.layouts import SETTINGS
from tests.support.peak import linux_only, measured
from thimble_zarr.format.layout import RowSize, recorder_memory_bytes

MB = 10**6

N_TOKENS, BUDGET = 4000, 32 * 2**20

SIZES = dict.fromkeys(("W", "grad", "exp_avg", "exp_avg_sq"), 2)

pytestmark = linux_only

RECORD = """
import torch, thimble_zarr
from tests.support.runs import Loop
path, n_tokens, memory, early, late = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
loop = Loop(n_tokens=n_tokens, n_dims=64, n_live=100, lr=1e-3)
for _ in range(3):
    loop.step()
thimble_zarr.Recorder("{}.first".format(path), loop.optimizer, parameter=loop.weight,
                      memory_bytes=1).close()
found = {"before": peak()}
with thimble_zarr.Recorder(path, loop.optimizer, parameter=loop.weight, memory_bytes=memory) as r:
    found["block_steps"] = r.schemas[""].layout.block_steps
    for step in range(1, late + 1):
        loop.step()
        loop.optimizer.zero_grad()
        if step == early:
            found["early"] = peak()
    r.flush()
found["late"] = peak()
print(json.dumps(found))
"""

LARGE_ROW = """
import warnings
import torch, thimble_zarr
path, n_tokens, memory = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
weight = torch.nn.Parameter(torch.randn(n_tokens, 64))
optimizer = torch.optim.AdamW([weight], foreach=False)
weight.grad = torch.randn_like(weight)
for _ in range(2):
    optimizer.step()
small = torch.nn.Parameter(torch.zeros(3, 2))
small.grad = torch.ones_like(small)
first = torch.optim.AdamW([small])
with thimble_zarr.Recorder(f"{path}.first", first, parameter=small):
    first.step()
found = {"before": peak()}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    recorder = thimble_zarr.Recorder(path, optimizer, parameter=weight, memory_bytes=memory)
found["warned"] = [str(one.message) for one in caught]
found["block_steps"] = recorder.schemas[""].layout.block_steps
for _ in range(4):
    optimizer.step()
recorder.close()
found["after"] = peak()
print(json.dumps(found))
"""

CHECK = """
import thimble_zarr
ds = thimble_zarr.open_dataset(sys.argv[1])
ds.sel(step=[1, 2], token=[0]).adam_residual.compute()
thimble_zarr.accounting(ds.sel(step=[0, 1, 2], token=[0]))  # imports torch
found = {"before": peak()}
found["selection_bytes"] = ds.sel(token=[5, 900]).adam_residual.nbytes
ds.sel(token=[5, 900]).adam_residual.compute()
found["selection"] = peak()
thimble_zarr.accounting(ds.sel(step=slice(0, int(sys.argv[2]))))
found["accounting"] = peak()
print(json.dumps(found))
"""

HALF = """
import thimble_zarr
ds = thimble_zarr.open_dataset(sys.argv[1])
ds.sel(step=[1, 2], token=[0]).adam_residual.compute()
half = ds.isel(token=slice(None, None, 2)).adam_residual
found = {"before": peak(), "bytes": half.nbytes, "n_chunks": len(half.chunks[0])}
half.compute()
found["after"] = peak()
print(json.dumps(found))
"""

COUNT = """
from pathlib import Path
from thimble_zarr.cli.tokens import tokens
found = {}
for name in ("small", "large"):
    tokens.main([sys.argv[1] + "/" + name, "--tokenizer", sys.argv[1] + "/tokenizer", "--quiet",
                 "--save-mask", sys.argv[1] + "/mask." + name], standalone_mode=False)
    found[name] = peak()
tokens.main([sys.argv[1] + "/small", "--train-on", sys.argv[1] + "/small", "--vocab-size", "290",
             "--quiet"], standalone_mode=False)
found["small, trained"] = peak()
tokens.main([sys.argv[1] + "/small", "--train-on", sys.argv[1] + "/large", "--vocab-size", "290",
             "--quiet"], standalone_mode=False)
found["large, trained"] = peak()
print(json.dumps(found))
"""

LOAD = """
from dataclasses import replace
from pathlib import Path
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.experiment.trainer import load_data
found = {}
for name in ("small", "large"):
    data = load_data(TrainingConfig(corpus=Path(sys.argv[1], name), vocab_size=290,
                                    tokenizer=Path(sys.argv[1], "tokenizer")))
    found[name], found[name + ", ids"] = peak(), data.ids.nbytes
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("memory") / "run.zarr"
    return path, measured(RECORD, path, N_TOKENS, BUDGET, 80, 320)


@pytest.fixture(scope="module")
def checked(recorded: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    return measured(CHECK, recorded[0], 320)


def test_the_recorder_keeps_within_its_bound(recorded: tuple[Path, dict[str, Any]]) -> None:
    _, found = recorded
    planned = recorder_memory_bytes([RowSize(N_TOKENS, 64, SIZES)], found["block_steps"])
    assert planned <= BUDGET
    assert found["late"] - found["before"] <= BUDGET + 16 * MB  # Python's own


def test_a_row_that_is_larger_than_the_limit_is_held_once(tmp_path: Path) -> None:
    """And the recorder says what it takes."""
    n_tokens = 140_000  # glibc gives tensors above 32 MB back at once
    found = measured(LARGE_ROW, tmp_path / "run.zarr", n_tokens, BUDGET)
    row_bytes = 4 * 4 * 64 * n_tokens
    assert row_bytes > BUDGET + 32 * MB
    assert found["block_steps"] == 1
    assert found["after"] - found["before"] <= row_bytes + 32 * MB  # Python's own
    (warned,) = found["warned"]
    assert warned.startswith("one row of what is recorded takes 143.36 MB: the recorder needs 144.")
    assert "more than memory_bytes (33.55 MB), and training waits" in warned
    wished = recorder_memory_bytes([RowSize(n_tokens, 64, dict.fromkeys(SIZES, 4))], 1)
    assert f"With memory_bytes={wished} it need not wait" in warned


def test_the_recorder_takes_no_more_with_more_steps(
    recorded: tuple[Path, dict[str, Any]],
) -> None:
    _, found = recorded
    assert found["late"] <= 1.05 * found["early"]


@pytest.mark.soak
def test_checking_takes_little(checked: dict[str, Any]) -> None:
    """That it takes no more with more steps is in `analysis/test_memory`."""
    assert checked["accounting"] - checked["before"] <= 150 * MB


def test_a_selection_takes_its_own_size_and_a_constant(checked: dict[str, Any]) -> None:
    assert checked["selection_bytes"] < MB
    assert checked["selection"] - checked["before"] <= 60 * MB


def test_a_large_selection_is_not_held_twice(recorded: tuple[Path, dict[str, Any]]) -> None:
    path, _ = recorded
    found = measured(HALF, path)
    assert found["bytes"] > 160 * MB
    assert found["n_chunks"] > 1
    assert found["after"] - found["before"] <= found["bytes"] + 40 * MB


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and two corpora, of half a MB and of 4."""
    from thimble_zarr.experiment.vocabulary import train_tokenizer

    directory = tmp_path_factory.mktemp("corpora")
    line = "The step that the weights take is the step that the optimizer took: 12 and 345.\n"
    (directory / "small").write_text(line * 6_250)
    (directory / "large").write_text(line * 50_000)
    train_tokenizer([line * 2], 290).save(str(directory / "tokenizer"))
    return directory


def test_counting_tokens_takes_no_more_of_a_larger_text(corpora: Path) -> None:
    found = measured(COUNT, corpora)
    assert found["large"] - found["small"] <= 6 * MB
    assert found["large, trained"] - found["small, trained"] <= 6 * MB


def test_loading_a_larger_text_takes_only_its_ids(corpora: Path) -> None:
    found = measured(LOAD, corpora)
    ids_bytes = found["large, ids"]
    assert ids_bytes > 5 * MB
    # An array that grows is copied now and then, as long as it is small.
    assert found["large"] - found["small"] <= 2 * ids_bytes + 8 * MB


CHECK_IN_PLACE = """
from thimble_zarr import check
small, large = sys.argv[1:]
found = {}
for file, moment in ((small, "before"), (large, "after")):
    for tokens in ("dead", "all"):
        assert check(file, tokens=tokens, workers=1).parameters[0].holds
        found[f"{moment}, {tokens}"] = peak()
print(json.dumps(found))
"""


def test_a_check_of_an_hdf5_file_holds_a_few_rows_of_it(tmp_path: Path) -> None:
    """Sparse files of 2 and of 512 MB with one chunk a variable, in which nothing ever moves."""
    for name, n_rows in (("small", 3), ("large", 100)):
        shape = n_rows, 10_000 if n_rows > 3 else 300, 64
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            for dataset in ("W", "grad_W", "momentum_W", "variance_W"):
                array = file.create_dataset(
                    dataset, shape, "u2", chunks=(1600, *shape[1:]), maxshape=(None, *shape[1:]),
                    fill_time="never",
                )  # fmt: skip
                array[-1] = 0  # so that the chunk is there
            file["dead_mask"] = np.arange(shape[1]) % 7 == 0
            file.attrs.update(SETTINGS)
    found = measured(CHECK_IN_PLACE, tmp_path / "small.h5", tmp_path / "large.h5")
    for tokens in ("dead", "all"):
        assert found[f"after, {tokens}"] - found["before, all"] <= 60 * MB
