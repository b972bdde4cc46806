"""Browser, runs and pages for tests of what a person sees."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from playwright.sync_api import Browser

from tests.support import browser as browsers
from tests.support.commands import succeeds

N_STEPS = 16


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """A browser for the tests of this folder: while it is open no other event loop can run."""
    with browsers.launched(browsers.executable()) as browser:
        yield browser


@pytest.fixture(scope="session")
def real_run(cache: Path) -> Path:
    """A run of the demo's model at its real size, recorded once for all processes of the tests."""
    folder = cache.parent / "browser"
    with FileLock(cache.with_suffix(".lock")):
        if not (store := folder / "run.zarr").exists():
            succeeds("train", store, "--steps", N_STEPS, "--batch-size", 4, "--lr", 5e-5)
            succeeds("summary", store)
    return store


@pytest.fixture(scope="session")
def real_report(real_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "run.html"
    succeeds("report", real_run, "-o", file)
    return file
