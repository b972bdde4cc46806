"""More processes and machines than one: the same answer, and nothing left behind."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from benchmarks.synthetic import synthetic_run
from tests.support.runs import record
from thimble_zarr.cli import scheduling
from thimble_zarr.cli.main import cli
from thimble_zarr.cli.scheduling import _Tasks
from thimble_zarr.store.reader import StoreReader

pytest.importorskip("distributed")

ROOT = Path(__file__).parents[2]

CLUSTER = """
import json, os, signal, sys
import numpy as np
from distributed import Client, LocalCluster
from distributed.diagnostics.plugin import SchedulerPlugin
from thimble_zarr import accounting, open_dataset

class Killer(SchedulerPlugin):
    # Kills the first worker that finishes a task, while there is more to do.
    killed = None
    def __init__(self, scheduler):
        self.scheduler = scheduler
    def transition(self, key, start, finish, *args, **kwargs):
        if self.killed is None and "statistics-" in str(key) and finish == "memory":
            task = self.scheduler.tasks[key]
            Killer.killed = next(iter(task.who_has)).name
            Killer.unfinished = sum(t.state != "memory" for t in self.scheduler.tasks.values())
            os.kill(Killer.pids[Killer.killed], signal.SIGKILL)

ds = open_dataset(sys.argv[1])
tokens = ds.token.values
subsets = {"all": tokens, "some": tokens[::3]}
alone = accounting(ds, extended=True, subsets=subsets)
with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None,
                  silence_logs=60) as cluster, Client(cluster) as client:
    Killer.pids = {w["name"]: w["pid"] for w in (
        {"name": i["name"], "pid": p} for i, p in zip(
            client.scheduler_info()["workers"].values(), client.run(os.getpid).values()))}
    killer = Killer(cluster.scheduler)
    cluster.scheduler.add_plugin(killer, name="killer")
    together = accounting(ds, extended=True, subsets=subsets)
    threads = client.run(lambda: __import__("torch").get_num_threads())
    residual = ds.isel(token=[1, 2]).adam_residual.compute()
print(json.dumps({
    "killed": Killer.killed is not None,
    "unfinished": Killer.unfinished,
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
    assert found.pop("unfinished") > 1
    assert found.pop("columns") > 10
    assert found == {"killed": True, "same": True, "attrs": True, "residual": [501, 2, 16]}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "thimble_zarr", *map(str, arguments)]


def test_checksums_are_looked_at_in_blocks_that_were_just_read(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, int]] = []
    merge_next, altered_in = _Tasks._merge_next, StoreReader._altered_in

    def merge(tasks: _Tasks) -> None:
        events.append(("computed", tasks._waiting[0][0]))
        merge_next(tasks)

    def look(reader: StoreReader, name: str, first_row: int, checksums: object) -> object:
        events.append(("looked", first_row))
        return altered_in(reader, name, first_row, checksums)

    monkeypatch.setattr(_Tasks, "_merge_next", merge)
    monkeypatch.setattr(StoreReader, "_altered_in", look)
    assert CliRunner().invoke(cli, ["check", str(store), "--quiet"]).exit_code == 0
    computed = [row for what, row in events if what == "computed"]
    assert len(computed) == 2
    second = events.index(("computed", computed[1]))
    looked = [row for what, row in events[:second] if what == "looked"]
    assert looked
    assert max(looked) < computed[1] <= min(row for what, row in events[second + 1 :])


@pytest.mark.soak
def test_worker_processes_print_what_threads_print_and_leave_nothing_open(
    store: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Warnings are errors here, those of sockets that nobody closed too."""
    options = ["check", str(store), "--tokens", "all", "--format", "csv"]
    alone = CliRunner().invoke(cli, options)
    together = CliRunner().invoke(cli, [*options, "--memory", "4GB", "--workers", "2"])
    assert alone.exit_code == together.exit_code == 0, together.output
    assert (alone.stdout, alone.stderr) == (together.stdout, together.stderr)
    assert "HOLDS to the bit" in alone.stderr
    gc.collect()
    assert capfd.readouterr() == ("", "")  # of the workers themselves


@pytest.mark.soak
def test_ctrl_c_leaves_no_worker(tmp_path: Path) -> None:
    synthetic_run(tmp_path / "long.zarr", n_steps=2000, n_tokens=8000, n_dims=8)
    process = subprocess.Popen(
        command("check", tmp_path / "long.zarr", "--workers", "2"),
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
    """Wait until both workers compute; return all processes that were started."""
    parent = psutil.Process(process.pid)
    for _ in range(600):
        children = parent.children(recursive=True)
        busy = [child for child in children if child.cpu_times().user > 1.5]
        if len(busy) >= 2:
            return children
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("no workers")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "2", "--scheduler", "tcp://127.0.0.1:1"], "leave out --workers"),
        (["--memory", "1GB", "--scheduler", "tcp://127.0.0.1:1"], "leave out --workers"),
        (["--workers", "0"], "0 is not in the range x>=1"),
        (["--scheduler", "there"], "is not the address of a scheduler"),
        (["--workers", "3", "--memory", "1GB"], "and may use only 1.00 GB: "),
    ],
)
def test_what_does_not_go_together_is_a_usage_error(
    store: Path, options: list[str], message: str
) -> None:
    result = CliRunner().invoke(cli, ["check", str(store), *options])
    assert result.exit_code == 2
    assert message in result.output
    from distributed.client import _get_global_client

    assert _get_global_client() is None  # else whoever computes next would wait for it


def test_without_distributed_it_says_what_to_install(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    result = CliRunner().invoke(cli, ["check", str(store), "--workers", "2"])
    assert result.exit_code == 2
    assert "pip install 'thimble-zarr[distributed]'" in result.output


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has cgroups")
@pytest.mark.parametrize(
    ("own", "quota"),
    [
        ("0::/\n", "cpu.max"),  # a container
        ("1:cpu:/\n0::/user.slice/job-7.scope\n", "user.slice/job-7.scope/cpu.max"),
        ("0::/elsewhere\n", "cpuacct,cpu/cpu.cfs_quota_us"),
        ("0::/elsewhere\n", "cpu,cpuacct/cpu.cfs_quota_us"),
    ],
)
def test_there_are_as_many_cpus_as_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, quota: str
) -> None:
    groups, of_process = tmp_path / "groups", tmp_path / "own"
    monkeypatch.setattr(scheduling, "_CGROUPS", groups)
    monkeypatch.setattr(scheduling, "_OWN_CGROUP", of_process)
    monkeypatch.setattr("dask.system.CPU_COUNT", 77)
    allowed = len(os.sched_getaffinity(0))
    assert scheduling.n_cpus() == 77  # nothing is known, and Dask asked
    of_process.write_text(own)
    assert scheduling.n_cpus() == allowed
    (groups / quota).parent.mkdir(parents=True)
    for content, expected in {
        "max 100000\n": allowed,
        "-1\n": allowed,
        "150000 100000\n": 77,
    }.items():
        (groups / quota).write_text(content)
        assert scheduling.n_cpus() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Dask is asked")
def test_processes_are_counted_without_dask() -> None:
    script = (
        "import os, pathlib, sys; from thimble_zarr.cli import scheduling; "
        "scheduling._CGROUPS = pathlib.Path('nowhere'); os.sched_setaffinity(0, "
        "list(os.sched_getaffinity(0))[:1]); print(scheduling.n_cpus(), 'dask' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert shown.stdout == "1 False\n", shown.stderr
