"""Fixtures of all tests, and what makes a session quick.

What takes long to import is imported by the fixture that needs it: the process that only hands out
tests to others loads this file too, and everyone waits for it.
"""

import gc
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# As many test processes as cores: torch's own threads would only wait for each other, and they
# wait busily. Tests of several threads say how many they want. Read when torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tests.support.runs import History
    from tests.support.zoo import Recorded
    from thimble_zarr.experiment.trainer import TrainingData

# A test run that was started in the background ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A slow machine is no failure.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

SLOWEST = (
    *("test_viewer.py", "test_report_page.py", "test_watch.py"),
    *("test_readme.py", "test_docs.py", "test_memory.py", "test_real_run.py"),
)
"""Files of a few long tests: left to the end, one process would run them and the others wait."""

SLOW = frozenset(
    f"test_{name}.py"
    for name in (
        *("accounting", "choices", "comparison", "crash", "findings", "hostile", "limits"),
        *(
            "memory",
            "model",
            "optimizers",
            "per_step",
            "power_loss",
            "real_run",
            "repair",
            "replay",
        ),
        *("resume", "resume_training", "schedule", "several", "variables", "verify"),
        *("health", "lattice", "summary", "summary_kept", "vocabulary"),
        *("architecture", "batches", "demo", "docs", "examples", "readme", "train"),
        *("vocabulary_of_optimizers", "run", "report", "view"),
        *("audit", "keyframes", "predicted", "predicted_check"),
    )
)
"""Files that take most of the time, and test arithmetic, the disk, memory and documents: another
Python changes little there, and `make quick` leaves them out."""

SLOW_FOLDERS = frozenset({"browser", "report", "optim", "files"})
"""Likewise: what is drawn, what torch computes, and what a server answers."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: index for index, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    for item in items:
        if item.path.name in SLOW or item.path.parent.name in SLOW_FOLDERS:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Spare the garbage collector what was imported, which is much and stays, and most rounds."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def _no_terminal() -> Iterator[None]:
    """No terminal, of which workers of pytest-xdist have COLUMNS, and no machine that is slow.

    Where there is no terminal, what takes five seconds says so on stderr.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv("COLUMNS", raising=False)
        monkeypatch.setattr("thimble_zarr.cli.progress.LINE_INTERVAL_S", 3600.0)
        yield


def _is_open(descriptor: int) -> None:
    os.fstat(descriptor)


@pytest.fixture(scope="session", autouse=True)
def _disk_that_nobody_waits_for() -> Iterator[None]:
    """Only a power loss tells what was synced: `test_power_loss` has one, of a disk of its own.

    Whoever syncs what is not open still fails.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "fsync", _is_open)
        yield


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[Path]:
    """One cache of the default corpus for the session, not the user's; workers share it."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", str(shared / "cache"))
        yield shared / "cache"


@pytest.fixture(scope="session")
def default_data(cache: Path) -> "TrainingData":
    """The default corpus, its tokenizer trained by the first worker that asks."""
    from thimble_zarr.experiment.config import TrainingConfig
    from thimble_zarr.experiment.trainer import load_data

    with FileLock(cache.with_suffix(".lock")):
        return load_data(TrainingConfig())


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> "tuple[Path, History]":
    """A recorded bfloat16 run of 13 steps, never to be written to, and what really happened."""
    from tests.support.runs import record

    path = tmp_path_factory.mktemp("toy") / "run.zarr"
    return path, record(path)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> "Recorded":
    """A recorded model of several parameters, never to be written to."""
    from torch.optim import AdamW

    from tests.support.zoo import record_zoo

    return record_zoo(tmp_path_factory.mktemp("zoo") / "run.zarr", AdamW)


@pytest.fixture
def toy_path(toy_run: "tuple[Path, History]") -> Path:
    return toy_run[0]


@pytest.fixture
def toy_history(toy_run: "tuple[Path, History]") -> "History":
    return toy_run[1]


@pytest.fixture
def toy_copy(toy_path: Path, tmp_path: Path) -> Path:
    """A copy of the toy run that a test may damage."""
    return Path(shutil.copytree(toy_path, tmp_path / "copy.zarr"))


@pytest.fixture(scope="module")
def coding(request: pytest.FixtureRequest) -> Iterator[str]:
    """How the stores of `support.stores` are written: plain, but where `both_codings` asks."""
    from tests.support import stores

    name = getattr(request, "param", "plain")
    with stores.coded(name):
        yield name


@pytest.fixture(autouse=True)
def _forks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tests that read no server fork processes, as who has read none does.

    Those have what a test has planted.
    """
    if request.node.path.parent.name != "files":
        monkeypatch.delitem(sys.modules, "obstore", raising=False)
