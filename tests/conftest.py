import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.runs import History, record
from tests.zoo import Recorded, record_zoo

# A slow machine is no failure.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[None]:
    """One cache of the default corpus for the session, not the user's; workers share it."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", str(shared / "cache"))
        yield


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
