"""The memory of a check: worked out from shapes, and held to when it is measured."""

import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from benchmarks.processes import Measured, measure
from benchmarks.synthetic import synthetic_run
from tests.support.tuned import tuned
from thimble_zarr import open_dataset
from thimble_zarr.analysis.audit.accounting import selected
from thimble_zarr.analysis.audit.audit import Audit
from thimble_zarr.analysis.compute.memory import Needs, task_bytes
from thimble_zarr.analysis.compute.reduction import Reduction, Statistics
from thimble_zarr.analysis.compute.run import Computation
from thimble_zarr.analysis.compute.windows import Window
from thimble_zarr.analysis.dataset.lazy import LazyArray, as_dask
from thimble_zarr.errors import ConfigError

MB = 10**6

CUDA_BYTES = 0 if torch.version.cuda is None else 320 * MB
"""What torch takes more where it is built with CUDA."""

BUDGET = 512 * MB + CUDA_BYTES

LONG_STEPS = 10_000

N_TOKENS = 27_011


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of 8 x 4, short and long, and one whose three steps do not fit into the budget."""
    directory = tmp_path_factory.mktemp("scale")
    for n_steps in (100, LONG_STEPS):
        synthetic_run(directory / f"{n_steps}.zarr", n_steps=n_steps, n_tokens=8, n_dims=4)
    synthetic_run(directory / "large.zarr", n_steps=3, n_tokens=N_TOKENS, n_dims=768)
    assert (
        4 * _weights(directory / "large.zarr").variable.source.reader.schema.row_bytes
        > BUDGET - CUDA_BYTES
    )
    return directory


def check(store: Path, *options: str) -> Measured:
    return measure([sys.executable, "-m", "thimble_zarr", "check", str(store), "-q", *options])


@pytest.mark.skipif(sys.platform != "linux", reason="measured on Linux")
def test_a_check_keeps_within_its_budget_whatever_the_size(runs: Path) -> None:
    names = ("100", str(LONG_STEPS), "large")
    found = {name: check(runs / f"{name}.zarr", f"--memory={BUDGET}") for name in names}
    for run in found.values():
        assert "HOLDS to the bit" in run.stdout
        assert run.peak_rss_bytes <= BUDGET
    few, many = found["100"].peak_rss_bytes, found[str(LONG_STEPS)].peak_rss_bytes
    table = _needs(open_dataset(runs / f"{LONG_STEPS}.zarr")).table_bytes
    assert many - table <= 1.05 * few


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="measured on Linux")
def test_a_budget_just_large_enough_is_kept(runs: Path) -> None:
    refused = measure_refused(runs / "large.zarr")
    least = int(1.01 * refused)
    assert check(runs / "large.zarr", f"--memory={least}").peak_rss_bytes <= least


def measure_refused(store: Path) -> float:
    """Return what a check says that it needs at least."""
    shown = subprocess.run(
        [sys.executable, "-m", "thimble_zarr", "check", store, "--memory", "1MB"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 2
    found = re.fullmatch(
        r"Error: the check needs at least ([\d.]+) MB of memory and may use only 1.00 MB: .*\n",
        shown.stderr,
    )
    assert found is not None, shown.stderr
    return float(found[1]) * MB


def _weights(store: Path) -> LazyArray:
    array: LazyArray = open_dataset(store).W.data
    return array


def _needs(ds: xr.Dataset) -> Needs:
    return Needs.of(Audit.of(selected(ds)).reduction, replay=True)


def test_needs_do_not_grow_with_steps_but_for_the_table(runs: Path) -> None:
    ds = open_dataset(runs / f"{LONG_STEPS}.zarr")
    few, many = (_needs(ds.isel(step=slice(1, n + 1))) for n in (4000, LONG_STEPS))
    assert few.task_bytes == many.task_bytes
    assert many.table_bytes == LONG_STEPS / 4000 * few.table_bytes


def test_needs_do_not_grow_with_tokens_beyond_a_window(runs: Path) -> None:
    schema = _weights(runs / "large.zarr").variable.source.reader.schema
    sizes = [task_bytes(schema, n_rows=4, n_tokens=n_tokens) for n_tokens in (5, 5000, N_TOKENS)]
    assert sizes[0] < sizes[1] == sizes[2]
    assert task_bytes(schema, n_rows=4, n_tokens=5000, replay=False) < sizes[1]


def test_as_many_tasks_as_fit() -> None:
    needs = Needs(task_bytes=30, table_bytes=10)
    assert [needs.n_at_once(memory, 100, 4) for memory in (140, 169, 170, 10_000)] == [1, 1, 2, 4]
    with pytest.raises(ConfigError, match="needs at least 140 B of memory and may use only 139 B"):
        needs.n_at_once(139, 100, 4)


def _rows(part: Window) -> list[np.ndarray]:
    return [np.ones(len(part.rows))]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    """1,000 steps of 10,000 tokens."""
    path = tmp_path_factory.mktemp("wide") / "run.zarr"
    synthetic_run(path, n_steps=1000, n_tokens=10_000, n_dims=8)
    return open_dataset(path)


def test_graphs_are_small_and_made_when_asked_for(wide: xr.Dataset) -> None:
    variable = wide.adam_residual.data
    layers = list(variable.dask.layers.values())
    assert not any(layer.is_materialized() for layer in layers)
    assert len(dict(variable.dask)) < 100
    reduction = Reduction(variable.selected, Statistics(_rows, (np.add,)))
    assert len(dict(as_dask(reduction).dask)) < 1000


@pytest.mark.parametrize("some", [slice(None), slice(1, None, 2), np.arange(0, 10_000, 3)])
def test_the_graph_of_an_accounting_pickles_small(wide: xr.Dataset, some: object) -> None:
    variable = wide.isel(token=some).adam_residual.data
    source = variable.variable.source
    assert {*source.scalars} == {*source.reader.schema.scalars}  # caches are filled, and stay here
    n_tokens = variable.shape[1]
    for classes in (None, np.arange(n_tokens) % 5):
        reduction = Reduction(variable.selected, Statistics(_rows, (np.add,)), classes)
        graph = dict(as_dask(reduction).dask)
        assert len(pickle.dumps(graph)) < 150_000
        assert max(len(pickle.dumps(task)) for task in graph.values()) < 30_000


def test_a_process_has_one_source_for_all_its_tasks(wide: xr.Dataset) -> None:
    content = pickle.dumps(wide.W.data.variable.source)
    assert pickle.loads(content) is pickle.loads(content)
    assert len(content) < 5000


def test_a_task_returns_no_more_numbers_a_step_than_planned(wide: xr.Dataset) -> None:
    from thimble_zarr.analysis.compute import memory as budget

    audit = Audit.of(selected(wide.isel(token=[3], step=slice(0, 3))), extended=True)
    ((part,),) = audit.reduction.parts()
    assert part().shape == (1, len(audit.tally.combine), 2)
    assert len(audit.tally.combine) <= budget._STEP_NUMBERS


def _several(part: Window) -> list[np.ndarray]:
    return [np.asarray(part.current("W").sum(axis=(1, 2))), np.ones(len(part.rows))]


def test_executors_and_dask_merge_alike(wide: xr.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Floating point sums depend on their order, and more tasks than are merged at once."""
    tuned(monkeypatch, window_elements=1)
    at = selected(wide.isel(step=slice(0, 200), token=slice(0, 9000)))
    reduction = Reduction(at, Statistics(_several, (np.add, np.maximum)))
    assert reduction.n_parts > 16
    numbers = reduction.compute()
    np.testing.assert_array_equal(numbers, as_dask(reduction).compute())
    with ThreadPoolExecutor(2) as executor:
        np.testing.assert_array_equal(numbers, Computation(reduction, executor, None).result())
