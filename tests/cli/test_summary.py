"""`summary`: what it prints, and what it is asked."""

import csv
import io
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.support.commands import fails, strict_json, succeeds
from thimble_zarr import summary


@pytest.fixture
def store(toy_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_path, tmp_path / "run.zarr"))


def test_the_table_has_a_column_for_each_group(store: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("3 5")
    shown = succeeds("summary", store, "--group", f"mine=@{tmp_path / 'ids.txt'}", "-q").stdout
    head, table, where = shown.strip().split("\n\n")
    assert head.endswith("steps 0 to 13")
    assert where == f"Summary  {tmp_path / 'run.summary.zarr'}"
    rows = [line.split() for line in table.splitlines()]
    assert rows[0] == ["dead", "live", "all", "mine"]
    assert rows[1] == ["tokens", "4", "7", "11", "2"]
    assert "bfloat16 ULP (L2)" in table


def test_json_and_csv_say_what_the_summary_says(store: Path) -> None:
    found = strict_json(succeeds("summary", store, "--format", "json").stdout)
    ds = summary(store)
    (parameter,) = found["parameters"]
    assert parameter["steps"] == [0, 13]
    groups = {of["group"]: of for of in parameter["groups"]}
    for name, of in groups.items():
        members = ds.is_member.sel(group=name).values
        freeze = ds.freeze_step.values[members]
        frozen = freeze[freeze < 13]
        assert of["n_tokens"] == members.sum()
        assert of["n_frozen"] == len(frozen)
        assert of["n_early"] + of["n_midlife"] + of["n_late"] == of["n_moving"]
        sizes = ds.norm_delta_W.values[:, members]
        step, position = np.unravel_index(np.nanargmax(sizes), sizes.shape)
        assert of["largest"]["step"] == step
        assert of["largest"]["token"] == np.flatnonzero(members)[position]
    table = csv.DictReader(io.StringIO(succeeds("summary", store, "--format", "csv").stdout))
    for row in table:
        of = groups[row["group"]]
        assert int(row["largest_ulp_step"]) == of["largest_ulp"]["step"]
        assert float(row["centroid_drift"]) == of["centroid_drift"]


def test_it_is_kept_where_it_is_asked_to_be(store: Path, tmp_path: Path) -> None:
    succeeds("summary", store, "--output", tmp_path / "there.zarr", "--workers", "1")
    assert (tmp_path / "there.zarr" / "zarr.json").is_file()
    assert not (tmp_path / "run.summary.zarr").exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--group", "mine"], 2, "'mine' is not NAME="),
        (["--group", "mine=99"], 2, "token 99 is not in this run"),
        (["--dtype", "int8"], 2, "there is no dtype int8"),
        (["--memory", "1MB"], 2, "the summary needs at least"),
    ],
)
def test_what_cannot_be_is_refused(
    options: list[str], code: int, message: str, store: Path
) -> None:
    assert message in fails(code, "summary", store, *options)
