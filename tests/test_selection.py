from pathlib import Path

import pytest
import xarray as xr

from tests.runs import record
from thimble_zarr import open_dataset
from thimble_zarr.analysis.lazy import LazyArray
from thimble_zarr.analysis.selection import select_steps, select_tokens
from thimble_zarr.errors import SelectionError


@pytest.fixture
def ds(toy_path: Path) -> xr.Dataset:
    return open_dataset(toy_path)


@pytest.mark.parametrize(
    ("spec", "tokens"),
    [
        (None, [2, 3, 6, 9]),
        ("dead", [2, 3, 6, 9]),
        ("live", [0, 1, 4, 5, 7, 8, 10]),
        ("all", list(range(11))),
        ("3", [3]),
        ("9,2, 4", [2, 4, 9]),
        ("4,4", [4]),
        ("text: t5", [5]),
    ],
)
def test_tokens(ds: xr.Dataset, spec: str | None, tokens: list[int]) -> None:
    selected, subset = select_tokens(ds, spec)
    assert selected.token.values.tolist() == tokens
    assert subset == (spec or "dead")
    assert isinstance(selected.adam_residual.data, LazyArray)


def test_tokens_from_a_file(ds: xr.Dataset, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("8 3\n5,\n")
    selected, _ = select_tokens(ds, f"@{tmp_path / 'ids'}")
    assert selected.token.values.tolist() == [3, 5, 8]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("11", "token 11 is not in this run, which has tokens 0 to 10"),
        ("-1", "token -1 is not in this run"),
        ("every", "expected all, live, dead"),
        ("1;2", "expected all, live, dead"),
        ("99999999999999999999", "expected all, live, dead"),
        ("", "no token is selected"),
        ("text:t5", r"no token has the text 't5'; there is ' t5'"),
        ("text:unknown", "no token has the text 'unknown'$"),
        ("@nowhere", "cannot read token ids from nowhere"),
    ],
)
def test_tokens_that_are_not_there(ds: xr.Dataset, spec: str, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        select_tokens(ds, spec)


def test_an_empty_subset(ds: xr.Dataset) -> None:
    with pytest.raises(SelectionError, match="--tokens dead is empty in this run"):
        select_tokens(ds.sel(token=ds.live), "dead")


def test_a_run_without_labels(tmp_path: Path) -> None:
    record(tmp_path / "run.zarr", recorder_options={"labels": None})
    ds = open_dataset(tmp_path / "run.zarr")
    assert select_tokens(ds, None)[1] == "all"
    with pytest.raises(SelectionError, match="does not say which tokens are dead"):
        select_tokens(ds, "dead")
    with pytest.raises(SelectionError, match="does not record the tokens' texts"):
        select_tokens(ds, "text:a")


@pytest.mark.parametrize(
    ("spec", "first", "last"),
    [(None, 0, 13), ("5:9", 5, 9), (":4", 1, 4), ("11:", 11, 13), ("7", 7, 7), (":", 1, 13)],
)
def test_steps(ds: xr.Dataset, spec: str | None, first: int, last: int) -> None:
    steps = select_steps(ds, spec).step.values
    assert steps.tolist() == list(range(first, last + 1))


@pytest.mark.parametrize("spec", ["0:3", "3:14", "20", "20:", "-3:"])
def test_steps_outside_the_run(ds: xr.Dataset, spec: str) -> None:
    with pytest.raises(SelectionError, match="not within the recorded steps 1:13"):
        select_steps(ds, spec)


@pytest.mark.parametrize("spec", ["9:5", "20:10"])
def test_steps_in_the_wrong_order(ds: xr.Dataset, spec: str) -> None:
    first, last = spec.split(":")
    message = f"--steps {spec}: the first step, {first}, is after the last, {last}; expected A:B"
    with pytest.raises(SelectionError, match=message):
        select_steps(ds, spec)


@pytest.mark.parametrize("spec", ["a:b", "1:2:3", "", "1.5"])
def test_steps_that_cannot_be_read(ds: xr.Dataset, spec: str) -> None:
    with pytest.raises(SelectionError, match="expected A:B"):
        select_steps(ds, spec)
