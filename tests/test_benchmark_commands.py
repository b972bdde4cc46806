"""Every benchmark can still be started: its modules are where it looks for them."""

import importlib
import pkgutil

import click
import pytest
from click.testing import CliRunner

import benchmarks

NAMES = [found.name for found in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")]

OTHERS = {"h5py", "matplotlib", "tensorstore"}
"""What only benchmarks need."""


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_starts(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in OTHERS:
            raise
        pytest.skip(f"{error.name} is not installed")
    main = getattr(module, "main", None)
    if isinstance(main, click.Command):
        shown = CliRunner().invoke(main, ["--help"])
        assert (shown.exit_code, shown.output[:6]) == (0, "Usage:")
