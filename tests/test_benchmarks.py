"""The peers give the answers that we give, and what is written down is what was measured."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.runs import record
from thimble_zarr import accounting, open_dataset
from thimble_zarr.analysis.audit.table import COLUMNS
from thimble_zarr.store.reader import StoreReader

h5py = pytest.importorskip("h5py")
pytest.importorskip("matplotlib")

from benchmarks.peers import (  # noqa: E402
    by_hand,
    hdf5,
    memmap,
    notebook,
    tensor_store,
    thimble,
    zarr_dask,
)
from benchmarks.peers.inputs import BOTH, EXACT, SMALL, TABLES, TASKS, TITLES, VARIABLES, Inputs  # noqa: E402
from benchmarks.peers.prepare import prepare  # noqa: E402
from benchmarks.peers.recording import RECORDING, run  # noqa: E402
from benchmarks.peers.report import LARGER, OURS, markdown, plot, summary  # noqa: E402
from benchmarks.processes import measure  # noqa: E402

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PEERS = {
    module.__name__.split(".")[-1]: module
    for module in (notebook, memmap, hdf5, zarr_dask, tensor_store)
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    directory = tmp_path_factory.mktemp("peers")
    record(directory / "run.zarr", weight_decay=0.0)
    inputs = Inputs(directory, directory / "run.zarr")
    prepare(inputs)
    return inputs


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memmap, "PIECE_TOKENS", 4)
    monkeypatch.setattr(by_hand, "PASS_ELEMENTS", 40)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("task", TABLES)
def test_a_peer_gives_our_table(inputs: Inputs, peer: str, task: str) -> None:
    ds = open_dataset(inputs.store)
    ours = accounting(ds.sel(token=ds.dead) if task == TABLES[0] else ds, replay=False)
    expected = np.column_stack([ours[column].values for column in COLUMNS])
    # All but we have the formula in float32, and the notebook its betas and weights in less.
    accuracy = {"rtol": 2**-8, "atol": 2**-14} if peer == "notebook" else {"rtol": 2**-14}
    np.testing.assert_allclose(PEERS[peer].READING[task](inputs), expected, **accuracy)


@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_replays_to_the_bit(inputs: Inputs, peer: str) -> None:
    assert PEERS[peer].READING[EXACT](inputs).tolist() == [0, 0, 0]


def test_a_replay_by_hand_finds_one_wrong_bit(inputs: Inputs) -> None:
    rows = memmap.MappedRows(inputs)
    rows.read(("exp_avg",), (5, 6), (0, 11))[0][0, 3, 2] ^= 1  # copy on write: not in the file
    assert by_hand.exact(rows, inputs)[1] >= 1


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("task", SMALL)
def test_a_peer_reads_what_we_read(inputs: Inputs, peer: str, task: str) -> None:
    expected = thimble.READING[task](inputs)
    found = PEERS[peer].READING[task](inputs)
    if peer == "notebook" and task == "history":
        expected[1, 0] = 0  # it has no missing gradient
    np.testing.assert_allclose(found, expected, rtol=0, atol=2**-23 if task == "residual" else 0)


def _read_h5py(path: Path, name: str) -> np.ndarray:
    with h5py.File(path) as file:
        return file[name][:]


def _read_zarr(path: Path, name: str) -> np.ndarray:
    import zarr

    return zarr.open_array(path / name, mode="r")[:]


READ: dict[str, Callable[[Path, str], np.ndarray]] = {
    "h5py": _read_h5py,
    "zarr": _read_zarr,
    "tensorstore": _read_zarr,
}


@pytest.mark.parametrize("peer", READ)
def test_a_peer_records_what_we_record(inputs: Inputs, tmp_path: Path, peer: str) -> None:
    n_steps = 18  # more than a block
    for name in (peer, "thimble-zarr"):
        assert run(name, tmp_path / name, inputs, n_steps)["disk_bytes"] > 0
    ours = StoreReader.open(tmp_path / "thimble-zarr")
    for name in VARIABLES:
        recorded = READ[peer](tmp_path / peer, name)
        np.testing.assert_array_equal(recorded[1:], ours.read(name, (1, n_steps + 1)))


def test_peak_memory_is_not_the_parent_s() -> None:
    held = np.ones(2**24)
    assert measure([sys.executable, "-c", "pass"]).peak_rss_bytes < held.nbytes / 2


def test_results_become_tables_and_a_plot(tmp_path: Path) -> None:
    numbers = {"wall_s": 2.0, "peak_rss_bytes": 1e8, "bytes_read": 1e6}
    numbers |= {"process_s": 1e-3, "process_bytes_read": 1e3, "difference": 0.0, "n": 5}
    peers = ("notebook", "memmap", "h5py", "zarr + dask", "tensorstore", "thimble-zarr")
    reading = {task: {peer: dict(numbers) for peer in peers} for task in TASKS}
    reading |= {BOTH: {OURS: dict(numbers)}}
    reading[EXACT]["memmap"]["wall_s"] = 0.5
    reading[EXACT]["zarr + dask"]["n"] = 1
    taken = {"busy_median_s": 1e-3, "busy_worst_s": 1.0, "total_s": 5.0}
    taken |= {"peak_rss_bytes": 1e9, "disk_bytes": 1e9, "n": 3}
    results = {
        "about": {
            "date": "2026-01-01",
            "commit": "abc",
            "machine": {"platform": "x", "cores": 2, "memory_bytes": 8e9, "python": "3"},
            "repeats": 5,
            "recording_steps": 300,
            **dict.fromkeys(("steps", "n_tokens", "n_dims", "n_dead"), 7),
        },
        "tasks": TITLES,
        "disk": dict.fromkeys(peers, 1e9),
        "reading": reading,
        "cold": {task: {peer: dict(numbers) for peer in peers} for task in TASKS},
        "recording": dict.fromkeys(RECORDING, taken),
    }
    text = markdown(results)
    assert "not first in: exact check of all tokens (memmap, 4.0 times)." in text
    assert "medians of 5; zarr + dask, where it takes minutes, once. x, 2 cores" in text
    assert text.count("not first in: nothing.") == 3
    assert "| both checks of all tokens in one pass | - | - | - | - | - | 2 s, 100 MB" in text
    assert "Reading what is larger" not in text
    found = {peer: dict(numbers) for peer in ("memmap", "tensorstore", "thimble-zarr")}
    found["memmap"]["wall_s"] = 9.0
    results[LARGER] = {
        "about": results["about"] | {"steps": 5000},
        "tasks": TITLES,
        "disk": dict.fromkeys(found, 26e9),
        "reading": {EXACT: found},
    }
    section = markdown(results).split("## Reading what is larger than the memory")[1]
    assert "5,000 steps of 7 x 7: 26.00 GB of raw numbers, where there are 8.00 GB" in section
    assert "| exact check of all tokens | 9 s, 100 MB | **2 s**, 100 MB | **2 s**" in section
    plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_the_results_are_the_measured_ones() -> None:
    measured = BENCHMARKS / "peers.json"
    if not measured.exists():
        pytest.skip("nothing was measured yet")
    results = json.loads(measured.read_text())
    assert (BENCHMARKS / "RESULTS.md").read_text(encoding="utf-8") == markdown(results)
    page = (BENCHMARKS.parent / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert summary(results) in page
    assert summary(results[LARGER]) in page
