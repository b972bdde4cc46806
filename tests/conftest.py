from pathlib import Path

import pytest

from tests.runs import History, record


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, History]:
    """A recorded bfloat16 run of 13 steps, never to be written to, and what really happened."""
    path = tmp_path_factory.mktemp("toy") / "run.zarr"
    return path, record(path)


@pytest.fixture
def toy_path(toy_run: tuple[Path, History]) -> Path:
    return toy_run[0]


@pytest.fixture
def toy_history(toy_run: tuple[Path, History]) -> History:
    return toy_run[1]


@pytest.fixture
def toy_copy(toy_path: Path, tmp_path: Path) -> Path:
    """A copy of the toy run that a test may damage."""
    import shutil

    return Path(shutil.copytree(toy_path, tmp_path / "copy.zarr"))
