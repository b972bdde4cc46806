"""`plan`: memory and disk of a run."""

import re
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tests.support.commands import succeeds, told
from thimble_zarr.experiment import device


def test_plan_is_beside_the_notebooks_way_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    disk = SimpleNamespace(total=10**13, used=0, free=10**13)
    monkeypatch.setattr("thimble_zarr.experiment.plan.shutil.disk_usage", lambda path: disk)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**11))
    result = succeeds("plan")
    assert list(tmp_path.iterdir()) == []
    assert told(result.stderr) == []
    rows = {
        name: line.split(name)[1].split("  ")
        for line in result.stdout.splitlines()
        for name in ("W ", "grad", "exp_avg ", "exp_avg_sq", "Disk, at most", "RAM for recording")
        if line.strip().startswith(name)
    }
    sizes = {name.strip(): [cell.strip() for cell in row if cell] for name, row in rows.items()}
    assert sizes["W"] == ["1.28 GB", "1.28 GB"]
    assert sizes["grad"] == ["1.28 GB", "1.28 GB"]
    assert sizes["exp_avg"] == ["1.28 GB", "2.56 GB"]
    assert sizes["exp_avg_sq"] == ["1.28 GB", "2.56 GB"]
    assert sizes["Disk, at most"][1] == sizes["RAM for recording"][1] == "7.69 GB"
    assert "100.00 GB of RAM and 10.00 TB of disk free" in result.stdout


def test_memory_of_training_is_that_of_its_arithmetic_beside_the_notebooks() -> None:
    def row(*options: str) -> list[str]:
        lines = succeeds("plan", "--device=cpu", *options).stdout.splitlines()
        (found,) = (line for line in lines if line.startswith("RAM for training, about"))
        return re.findall(r"[\d.]+ [MG]B", found)

    notebook = row("--compute-dtype=bfloat16", "--loss-chunk=0")
    assert notebook[0] == notebook[1]
    ours = row("--compute-dtype=bfloat16")
    assert ours[1] == notebook[1]
    assert ours[0].endswith("MB")
    assert notebook[1].endswith("GB")


@pytest.mark.parametrize("fast", [True, False])
def test_plan_says_in_which_dtype_and_why(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(device, "cpu_multiplies_bfloat16", lambda: fast)
    for options, expected in (
        ([], "bfloat16" if fast else "float32 (this CPU has no fast bfloat16)"),
        (["--compute-dtype=float32"], "float32"),
        (["--compute-dtype=bfloat16"], "bfloat16"),
        (["--dtype=float32"], "float32"),
    ):
        stdout = succeeds("plan", "--device=cpu", *options).stdout
        dtype = "float32" if "--dtype=float32" in options else "bfloat16"
        assert (
            f"Forward and backward run in {expected}, the loss in chunks of 512 positions. "
            f"The record is {dtype}.\n"
        ) in stdout
    assert "the loss in one piece." in succeeds("plan", "--loss-chunk=0").stdout
