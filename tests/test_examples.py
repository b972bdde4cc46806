"""Examples in docstrings: they run where a recorded run is, and every public name has one."""

import doctest
import importlib
import shutil
from pathlib import Path

import pytest

import thimble_zarr
from thimble_zarr.report.panels.registry import PANELS

ROOT = Path(thimble_zarr.__file__).parent


def modules_with_examples() -> list[str]:
    files = [file for file in sorted(ROOT.rglob("*.py")) if ">>>" in file.read_text()]
    return [".".join(file.relative_to(ROOT.parent).with_suffix("").parts) for file in files]


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_run(
    name: str, toy_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for store in ("run.zarr", "seed0.zarr", "seed1.zarr"):
        shutil.copytree(toy_path, tmp_path / store)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("thimble_zarr.report.html.PANELS", PANELS[:1])
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert not result.failed


@pytest.mark.parametrize("name", sorted({*thimble_zarr.__all__} - {"ThimbleError"}))
def test_public_names_have_an_example(name: str) -> None:
    assert ">>>" in getattr(thimble_zarr, name).__doc__


def test_a_wrong_example_is_seen() -> None:
    examples = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(examples, out=lambda text: None).failed == 1
