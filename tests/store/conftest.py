"""Fixtures of stores that are damaged."""

import shutil
from pathlib import Path

import pytest

from tests.support import stores


@pytest.fixture(scope="module")
def sound(coding: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(f"sound-{coding}") / "run.zarr"
    stores.write_run(path)
    return path


@pytest.fixture
def store(sound: Path, tmp_path: Path) -> Path:
    """A copy of a sound store, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "run.zarr"))
