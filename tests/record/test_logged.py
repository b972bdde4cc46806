"""Small arrays that a loop logs beside the loss, from the loop to whatever reads a store."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import thimble_zarr
from tests.support.commands import fails, succeeds
from tests.support.runs import N_STEPS, TINY_MEMORY, Loop, token_labels
from thimble_zarr import Recorder
from thimble_zarr.errors import ConfigError, DamagedStoreError
from thimble_zarr.store.reader import StoreReader

SHAPE = (3, 2)


def logged(step: int) -> np.ndarray:
    return np.random.default_rng(step).normal(size=SHAPE).astype(np.float32)


LEFT_OUT = 6
"""A step of which nothing is logged."""


def record(path: Path, *, first: int = 1, last: int = N_STEPS, **options: object) -> Loop:
    """Record a run with what `logged` says, in blocks of four steps."""
    loop = Loop()
    for _ in range(1, first):
        loop.step()
        loop.optimizer.zero_grad()
    with Recorder(
        path,
        loop.optimizer,
        parameter=loop.weight,
        labels=token_labels(),
        memory_bytes=TINY_MEMORY,
        **options,
    ) as recorder:
        for step in range(first, last + 1):
            loss = loop.step()
            arrays = {"h_mean": logged(step), "norm": torch.tensor(float(step))}
            recorder.log(loss=loss, **({} if step == LEFT_OUT else arrays))
            loop.optimizer.zero_grad()
            if step == 9:
                recorder.flush()
    return loop


def truth(n_rows: int = N_STEPS + 1) -> np.ndarray:
    rows = [logged(step) for step in range(n_rows)]
    for missing in {0, LEFT_OUT} & {*range(n_rows)}:
        rows[missing] = np.full(SHAPE, np.nan, np.float32)
    return np.stack(rows)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("logged") / "run.zarr"
    record(path)
    return path


def has_all(path: Path, n_rows: int = N_STEPS + 1, first: int = 0) -> bool:
    ds = thimble_zarr.open_dataset(path)
    assert ds.h_mean.dims == ("step", "h_mean_0", "h_mean_1")
    assert ds.h_mean.dtype == np.float32
    assert ds.norm.dims == ("step",)
    expected = truth(n_rows)
    norms = np.where(np.isnan(expected[:, 0, 0]), np.nan, np.arange(n_rows))
    return np.array_equal(ds.h_mean, expected[first:], equal_nan=True) and np.array_equal(
        ds.norm, norms[first:], equal_nan=True
    )


def test_what_was_logged_is_there(run: Path) -> None:
    assert has_all(run)
    assert thimble_zarr.verify(run).holds
    assert thimble_zarr.check(run, tokens="all").holds
    import zarr

    array = zarr.open_array(run, path="h_mean", mode="r")
    assert array.metadata.dimension_names == ("step", "h_mean_0", "h_mean_1")
    np.testing.assert_array_equal(array[:], truth())


def test_it_goes_wherever_the_run_goes(run: Path, tmp_path: Path) -> None:
    succeeds("recode", run, tmp_path / "small.zarr", "--coding=predicted")
    assert has_all(tmp_path / "small.zarr")
    thimble_zarr.fetch(str(run), tmp_path / "copy.zarr")
    assert has_all(tmp_path / "copy.zarr")
    succeeds("fetch", run, tmp_path / "part.zarr", "--steps=5:9")
    assert has_all(tmp_path / "part.zarr", 10, first=4)
    error = fails(2, "export", run, tmp_path / "run.safetensors")
    assert "h_mean, norm by step, for which the notebook's file has no place" in error


@pytest.mark.parametrize("kept", [13, 7, 5])
def test_a_run_is_resumed_with_it(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "run.zarr"
    record(path, last=10)
    torch.manual_seed(0)
    after = min(kept, 10)
    record(path, first=after + 1, resume=True, after_step=after)
    assert has_all(path)
    assert thimble_zarr.verify(path).holds


def test_a_difference_is_found(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.zarr"
    loop = Loop()
    options = {"parameter": loop.weight, "labels": token_labels(), "memory_bytes": TINY_MEMORY}
    with Recorder(other, loop.optimizer, **options) as recorder:
        for step in range(1, N_STEPS + 1):
            values = logged(step)
            values[2, 1] += step >= 8
            arrays = {"h_mean": values, "norm": np.float64(step).astype(np.float32)[()]}
            arrays["norm"] = np.asarray(arrays["norm"])
            recorder.log(loss=loop.step(), **({} if step == LEFT_OUT else arrays))
            loop.optimizer.zero_grad()
    (found,) = thimble_zarr.diff(run, other).parameters
    (difference,) = found.differences
    assert (difference.variable, difference.step) == ("h_mean", 8)
    assert (difference.n_different, difference.n_elements) == (1, 6)
    assert thimble_zarr.diff(run, run).is_equal


@pytest.mark.parametrize("key", ["h_mean/c.1.0.0", "norm/c.2"])
def test_damage_is_found(run: Path, tmp_path: Path, key: str) -> None:
    path = Path(shutil.copytree(run, tmp_path / "run.zarr"))
    content = bytearray((path / key).read_bytes())
    content[3] ^= 4
    (path / key).write_bytes(content)
    assert not thimble_zarr.verify(path).holds
    with pytest.raises(DamagedStoreError):
        thimble_zarr.open_dataset(path)
    succeeds("repair", path, "--apply")
    ds = thimble_zarr.open_dataset(path)
    block = slice(4, 8) if key.startswith("h") else slice(8, 12)
    assert np.isnan(ds[key.partition("/")[0]][block]).all()
    assert thimble_zarr.verify(path).holds


def test_what_cannot_be_logged_says_so(tmp_path: Path) -> None:
    loop = Loop()
    options = {"parameter": loop.weight, "memory_bytes": TINY_MEMORY}
    with Recorder(tmp_path / "run.zarr", loop.optimizer, **options) as recorder:
        for name, values, words in (
            ("W", np.zeros(2), "nothing can be logged as 'W'"),
            ("loss_", np.zeros(2, np.int64), "loss_ is int64"),
            ("big", np.zeros(2**14 + 1, np.float32), "big has 65,540 bytes"),
            ("none", np.zeros((2, 0)), "none has 0 bytes"),
        ):
            with pytest.raises(ConfigError, match=words):
                recorder.log(**{name: values})
        recorder.log(h_mean=torch.ones(3, dtype=torch.bfloat16))
        loop.step()
        with pytest.raises(ConfigError, match=r"shape \(3,\) and dtype float32 first"):
            recorder.log(h_mean=np.zeros(4, np.float32))
        for _ in range(8):
            loop.optimizer.zero_grad()
            loop.step()
        recorder.flush()
        with pytest.raises(ConfigError, match="late was first logged after step"):
            recorder.log(late=np.zeros(2))
    ds = thimble_zarr.open_dataset(tmp_path / "run.zarr")
    np.testing.assert_array_equal(ds.h_mean[:2], [[np.nan] * 3, [1.0] * 3])


def test_of_several_parameters_the_first_has_it(tmp_path: Path) -> None:
    loop = Loop()
    parameters = {"embedding": loop.weight, "head": loop.head.weight}
    with Recorder(tmp_path / "run.zarr", loop.optimizer, parameters=parameters) as recorder:
        for step in range(1, 4):
            recorder.log(h_mean=logged(step))
            loop.step()
            loop.optimizer.zero_grad()
    first, second = StoreReader.open_each(tmp_path / "run.zarr")
    np.testing.assert_array_equal(first.read_logged()["h_mean"], truth(4))
    assert second.read_logged() == {}
    assert thimble_zarr.verify(tmp_path / "run.zarr").holds
