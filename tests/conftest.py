import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

# As many test processes as cores: torch's own threads would only wait for each other, and they
# wait busily. Tests of several threads say how many they want. Read when torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings

from tests.runs import History, record
from tests.zoo import Recorded, record_zoo
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.experiment.trainer import TrainingData, load_data

# A test run that was started in the background ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A slow machine is no failure.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[Path]:
    """One cache of the default corpus for the session, not the user's; workers share it."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", str(shared / "cache"))
        yield shared / "cache"


@pytest.fixture(scope="session")
def default_data(cache: Path) -> TrainingData:
    """The default corpus, its tokenizer trained by the first worker that asks."""
    with FileLock(cache.with_suffix(".lock")):
        return load_data(TrainingConfig())


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, History]:
    """A recorded bfloat16 run of 13 steps, never to be written to, and what really happened."""
    path = tmp_path_factory.mktemp("toy") / "run.zarr"
    return path, record(path)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A recorded model of several parameters, never to be written to."""
    return record_zoo(tmp_path_factory.mktemp("zoo") / "run.zarr", torch.optim.AdamW)


@pytest.fixture
def toy_path(toy_run: tuple[Path, History]) -> Path:
    return toy_run[0]


@pytest.fixture
def toy_history(toy_run: tuple[Path, History]) -> History:
    return toy_run[1]


@pytest.fixture
def toy_copy(toy_path: Path, tmp_path: Path) -> Path:
    """A copy of the toy run that a test may damage."""
    return Path(shutil.copytree(toy_path, tmp_path / "copy.zarr"))
