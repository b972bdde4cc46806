"""More processes and machines than one: the same answer, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import thimble_zarr
from benchmarks.synthetic import synthetic_run
from tests.support.runs import record
from thimble_zarr.analysis.compute import reduction, run
from thimble_zarr.analysis.compute.run import Computation
from thimble_zarr.analysis.compute.windows import Windows
from thimble_zarr.errors import ConfigError, ThimbleError
from thimble_zarr.store.integrity.altered import StoreIntegrity
from thimble_zarr.store.ledger import FileRecord

distributed = pytest.importorskip("distributed")

ROOT = Path(__file__).parents[2]

CLUSTER = """
import json, os, signal, sys
import dask
import numpy as np
from distributed import Client, LocalCluster
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.utils import get_mp_context
from thimble_zarr import accounting, check, open_dataset

# Workers are forked from a process that has imported what they need.
dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})
get_mp_context().set_forkserver_preload(
    ["distributed", "thimble_zarr.optim.replay", "thimble_zarr.analysis.dataset.open"])

class Killer(SchedulerPlugin):
    # Kills the first worker that finishes a task of a kind, while there is more to do.
    killed, prefix = {}, "statistics-"
    def __init__(self, scheduler):
        self.scheduler = scheduler
    def transition(self, key, start, finish, *args, **kwargs):
        ours = self.prefix in str(key)
        if self.prefix not in self.killed and ours and finish == "memory":
            task = self.scheduler.tasks[key]
            Killer.killed[self.prefix] = sum(
                t.state != "memory" for t in self.scheduler.tasks.values())
            os.kill(Killer.pids[next(iter(task.who_has)).name], signal.SIGKILL)

ds = open_dataset(sys.argv[1])
tokens = ds.token.values
subsets = {"all": tokens, "some": tokens[::3]}
alone = accounting(ds, extended=True, subsets=subsets)
with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0",
                  silence_logs=60) as cluster, Client(cluster) as client:
    def look():
        client.wait_for_workers(2)
        Killer.pids = {i["name"]: p for i, p in zip(
            client.scheduler_info()["workers"].values(), client.run(os.getpid).values())}
    look()
    killer = Killer(cluster.scheduler)
    cluster.scheduler.add_plugin(killer, name="killer")
    together = accounting(ds, extended=True, subsets=subsets)
    look()
    Killer.prefix = "_reduce-"
    seen = []
    active = check(sys.argv[1], tokens="all", progress=lambda *at: seen.append(at))
    threads = client.run(lambda: __import__("torch").get_num_threads())
    residual = ds.isel(token=[1, 2]).adam_residual.compute()
    named = check(sys.argv[1], tokens="all", scheduler=cluster.scheduler_address)
print(json.dumps({
    "killed": Killer.killed,
    "checks": active.to_json() == named.to_json() == check(sys.argv[1], tokens="all").to_json(),
    "seen": seen == [(n + 1, len(seen)) for n in range(len(seen))] and len(seen) > 1,
    "same": all(np.array_equal(alone[n], together[n], equal_nan=True) for n in alone.variables
                if alone[n].dtype.kind in "if"),
    "columns": len(alone.data_vars),
    "attrs": alone.attrs == together.attrs,
    "residual": residual.shape,
}))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty blocks or so of a few tokens."""
    path = tmp_path_factory.mktemp("scheduling") / "run.zarr"
    record(path, n_steps=500, n_tokens=40, n_dims=16, recorder_options={"memory_bytes": 2**19 // 3})
    return path


def test_a_killed_worker_changes_no_bit(store: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-c", CLUSTER, store],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert {"statistics-", "_reduce-"} == found.pop("killed").keys()
    assert found.pop("columns") > 10
    assert found == {
        "checks": True,
        "seen": True,
        "same": True,
        "attrs": True,
        "residual": [501, 2, 16],
    }


def test_checksums_are_looked_at_in_blocks_that_were_just_read(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, int]] = []
    merge_next, differing = Computation._merge_next, StoreIntegrity._differing

    def merge(computation: Computation) -> None:
        events.append(("computed", computation._waiting[0][0]))
        merge_next(computation)

    def look(integrity: StoreIntegrity, name: str, record: FileRecord) -> list[int]:
        events.append(("looked", record.first_row))
        return differing(integrity, name, record)

    monkeypatch.setattr(Computation, "_merge_next", merge)
    monkeypatch.setattr(StoreIntegrity, "_differing", look)
    assert thimble_zarr.check(store).holds
    computed = [row for what, row in events if what == "computed"]
    assert len(computed) == 2
    second = events.index(("computed", computed[1]))
    looked = [row for what, row in events[:second] if what == "looked"]
    assert looked
    assert max(looked) < computed[1] <= min(row for what, row in events[second + 1 :])


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_processes_finds_the_same(store: Path, workers: int) -> None:
    result = thimble_zarr.check(store, tokens="all", workers=workers, memory_bytes=4 * 10**9)
    assert result.to_json() == thimble_zarr.check(store, tokens="all").to_json()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no process is forked")
def test_a_process_that_is_killed_ends_the_check(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, real = os.getpid(), reduction.windows_of

    def killed(*args: Any) -> Windows:
        if os.getpid() != parent:  # which reads a few rows itself meanwhile
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    monkeypatch.setattr("thimble_zarr.analysis.compute.reduction.windows_of", killed)
    with pytest.raises(
        ThimbleError, match=r"was killed, perhaps .* set a lower limit \(--memory\)"
    ):
        thimble_zarr.check(store, tokens="all", workers=2, memory_bytes=4 * 10**9)


@pytest.mark.soak
def test_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    synthetic_run(tmp_path / "long.zarr", n_steps=2000, n_tokens=8000, n_dims=8)
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "thimble_zarr",
            "check",
            tmp_path / "long.zarr",
            "-q",
            "--workers=2",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    workers = _workers_of(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (130, "", "Interrupted.\n")
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []


def _workers_of(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """Wait until two processes compute, and return them."""
    parent = psutil.Process(process.pid)
    for _ in range(600):
        children = parent.children(recursive=True)
        if len([child for child in children if child.cpu_times().user > 0.1]) >= 2:
            return children
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("no processes")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 2, "scheduler": "tcp://127.0.0.1:1"}, "leave out --workers"),
        ({"memory_bytes": 10**9, "scheduler": "tcp://127.0.0.1:1"}, "leave out --workers"),
        ({"scheduler": "there"}, "is not the address of a scheduler"),
    ],
)
def test_what_does_not_go_together_is_refused(
    store: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        thimble_zarr.check(store, **options)
    with pytest.raises(ValueError, match="No clients"):  # who computes next would wait for it
        distributed.default_client()


def test_without_distributed_it_says_what_to_install(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match=r"pip install 'thimble-zarr\[distributed\]'"):
        thimble_zarr.check(store, scheduler="tcp://127.0.0.1:1")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no affinity")
def test_there_are_as_many_cpus_as_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(6))
    assert run.n_cpus() == 6
