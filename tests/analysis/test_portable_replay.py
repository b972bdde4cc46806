"""Portable programs take the steps first, torch the rest: what is found is the same."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.draws import ADAM, BFLOAT16, FLOAT32, Cell
from tests.support.faults import Arrays, flip_bit, relabel, rewrite
from thimble_zarr import accounting, check, open_dataset
from thimble_zarr.analysis.compute.source import TORCH, Source
from thimble_zarr.errors import ConfigError
from thimble_zarr.optim.programs.compiled import is_available
from thimble_zarr.store.reader import StoreReader

pytestmark = pytest.mark.skipif(not is_available(), reason="kernels cannot be compiled here")

CELLS = {
    "adamw-single/1": Cell(BFLOAT16, options={"weight_decay": 0.1, "foreach": False}, n_steps=9),
    "adam-single/1": Cell(BFLOAT16, ADAM, {"weight_decay": 0.1, "foreach": False}, n_steps=9),
    "adamw-fused/1": Cell(FLOAT32, options={"fused": True, "amsgrad": True}, n_steps=9),
}
"""By the program. In the last two torch takes some elements one at a time, and otherwise."""


def both(path: Path, **options: object) -> tuple[dict[str, object], dict[str, object]]:
    """What check finds, by what replays."""
    found = []
    for replay in (True, TORCH):
        content = check(path, tokens="all", replay=replay, **options).to_json()
        assert isinstance(content, dict)
        found.append(content)
    return found[0], found[1]


@pytest.mark.parametrize("name", CELLS)
def test_a_sound_run_holds_whatever_replays(name: str, tmp_path: Path) -> None:
    path = CELLS[name].record(tmp_path / "run.zarr")
    portable, torch = both(path)
    assert str(portable["replayed_by"]).startswith(name)
    assert torch["replayed_by"] == TORCH
    for content in (portable, torch):
        assert content["holds"]
        assert f"replayed by {content.pop('replayed_by')}, all" in str(content.pop("verdict"))
    assert portable == torch


@pytest.mark.parametrize("name", CELLS)
def test_a_fault_is_the_same_whatever_replays(name: str, tmp_path: Path) -> None:
    def fault(bits: Arrays, scalars: Arrays) -> None:
        flip_bit(bits["exp_avg"], (5, 3, 2), 3)
        bits["W"][8, 40:44] = bits["W"][7, 40:44]

    path = CELLS[name].record(tmp_path / "run.zarr")
    rewrite(path, tmp_path / "faulty.zarr", fault)
    portable, torch = both(tmp_path / "faulty.zarr")
    assert portable.pop("replayed_by") == f"{name}, and by torch where that differs"
    assert torch.pop("replayed_by") == TORCH
    assert not portable["holds"]
    assert portable == torch


@pytest.mark.parametrize("rows", [[5], [4, 5, 6], [7, 2, 5], [9, 1]])
def test_any_rows_in_any_order_are_found_at_fault_alike(rows: list[int], tmp_path: Path) -> None:
    def fault(bits: Arrays, scalars: Arrays) -> None:
        flip_bit(bits["W"], (5, 3, 2), 0)

    path = CELLS["adamw-single/1"].record(tmp_path / "run.zarr")
    rewrite(path, tmp_path / "faulty.zarr", fault)
    ds = open_dataset(tmp_path / "faulty.zarr")
    table = accounting(ds.isel(step=rows, token=[2, 3, 7], dim=slice(1, 6, 2)), formula=False)
    counts = table.n_different.sel(recurrence="W").values
    # Dim 2 is not among them; with it both steps of the flipped weight are.
    assert not counts.any()
    table = accounting(ds.isel(step=rows, token=[2, 3, 7]), formula=False)
    counts = table.n_different.sel(recurrence="W").values
    assert counts.tolist() == [row in (5, 6) for row in rows]


def test_torch_takes_the_steps_where_nothing_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = CELLS["adamw-single/1"].record(tmp_path / "run.zarr")
    reader = StoreReader.open(path)
    assert Source(reader).program is not None
    assert Source(reader, "cuda").program is None
    single = Cell(FLOAT32, options={"foreach": False}).record(tmp_path / "float32.zarr")
    assert Source(StoreReader.open(single)).program is None  # MKL takes the root there
    relabel(path, tmp_path / "default.zarr", cpu_capability="DEFAULT")
    assert Source(StoreReader.open(tmp_path / "default.zarr")).program is None
    monkeypatch.setattr("thimble_zarr.optim.programs.program.is_available", lambda: False)
    assert Source(reader).program is None
    assert check(path).to_json()["replayed_by"] == TORCH


def test_steps_that_were_skipped_change_nothing(tmp_path: Path) -> None:
    path = CELLS["adamw-single/1"].record(tmp_path / "run.zarr")

    def skip(bits: Arrays, scalars: Arrays) -> None:
        for array in bits.values():
            array[6] = array[5]
        scalars["optimizer_step"][6:] -= 1

    rewrite(path, tmp_path / "skipped.zarr", skip)
    table = accounting(open_dataset(tmp_path / "skipped.zarr"), formula=False)
    assert np.flatnonzero(table.n_different.sum("recurrence")).tolist() == [6, 7, 8]


def test_what_replays_is_known_by_name(tmp_path: Path) -> None:
    path = CELLS["adamw-single/1"].record(tmp_path / "run.zarr")
    with pytest.raises(ConfigError, match="replay is 'numba', and can be 'portable', 'torch'"):
        check(path, replay="numba")
