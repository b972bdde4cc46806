from pathlib import Path

import numpy as np
import pytest

from tests.support.runs import record, token_labels
from thimble_zarr.analysis.compute.source import Source
from thimble_zarr.analysis.selection import select, select_steps, select_tokens
from thimble_zarr.errors import SelectionError
from thimble_zarr.format.schema import TokenLabels
from thimble_zarr.store.reader import StoreReader


@pytest.fixture
def source(toy_path: Path) -> Source:
    return Source(StoreReader.open(toy_path))


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
def test_tokens(source: Source, spec: str | None, tokens: list[int]) -> None:
    subset, positions = select_tokens(source, spec)
    assert positions.tolist() == tokens
    assert subset == (spec or "dead")


def test_tokens_from_a_file(source: Source, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("8 3\n5,\n")
    _, positions = select_tokens(source, f"@{tmp_path / 'ids'}")
    assert positions.tolist() == [3, 5, 8]


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
def test_tokens_that_are_not_there(source: Source, spec: str, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        select_tokens(source, spec)


def test_several_subsets_are_selected_together(source: Source) -> None:
    selected, subsets = select(source, "dead,all", "3:5")
    assert {name: [*subset.tokens] for name, subset in subsets.items()} == {
        "dead": [2, 3, 6, 9],
        "all": [*range(11)],
    }
    assert all(subset.rows == range(3, 6) for subset in subsets.values())
    assert (selected.tokens, selected.rows, selected.dims) == (range(11), range(3, 6), range(5))
    assert np.asarray(select(source, "dead", None)[0].tokens).tolist() == [2, 3, 6, 9]


def test_ids_become_positions_among_the_tokens_that_were_recorded(tmp_path: Path) -> None:
    record(tmp_path / "run.zarr", recorder_options={"tokens": [2, 3, 5, 9]})
    source = Source(StoreReader.open(tmp_path / "run.zarr"))
    selected, subsets = select(source, "all,dead", None)
    assert {name: [*subset.tokens] for name, subset in subsets.items()} == {
        "all": [0, 1, 2, 3],
        "dead": [0, 1, 3],
    }
    assert selected.ids.tolist() == [2, 3, 5, 9]
    assert select_tokens(source, "9,5")[1].tolist() == [2, 3]
    with pytest.raises(
        SelectionError, match=r"token 4 is not in .*, which has 4 of the tokens 2 to"
    ):
        select_tokens(source, "5,4")


def test_an_empty_subset(tmp_path: Path) -> None:
    record(tmp_path / "run.zarr", n_steps=1, recorder_options={"labels": token_labels(n_live=11)})
    source = Source(StoreReader.open(tmp_path / "run.zarr"))
    assert select_tokens(source, None)[0] == "all"
    with pytest.raises(SelectionError, match="--tokens dead is empty in this run"):
        select_tokens(source, "dead")


def test_a_run_without_labels(tmp_path: Path) -> None:
    record(tmp_path / "run.zarr", recorder_options={"labels": None})
    source = Source(StoreReader.open(tmp_path / "run.zarr"))
    assert select_tokens(source, None)[0] == "all"
    with pytest.raises(SelectionError, match="does not say which tokens are dead"):
        select_tokens(source, "dead")
    with pytest.raises(SelectionError, match="does not record the tokens' texts"):
        select_tokens(source, "text:a")


@pytest.mark.parametrize(
    ("spec", "first", "last"),
    [(None, 0, 13), ("5:9", 5, 9), (":4", 1, 4), ("11:", 11, 13), ("7", 7, 7), (":", 1, 13)],
)
def test_steps(source: Source, spec: str | None, first: int, last: int) -> None:
    assert select_steps(source, spec) == range(first, last + 1)


@pytest.mark.parametrize("spec", ["0:3", "3:14", "20", "20:", "-3:"])
def test_steps_outside_the_run(source: Source, spec: str) -> None:
    with pytest.raises(SelectionError, match="not within the recorded steps 1:13"):
        select_steps(source, spec)


@pytest.mark.parametrize("spec", ["9:5", "20:10"])
def test_steps_in_the_wrong_order(source: Source, spec: str) -> None:
    first, last = spec.split(":")
    message = f"--steps {spec}: the first step, {first}, is after the last, {last}; expected A:B"
    with pytest.raises(SelectionError, match=message):
        select_steps(source, spec)


@pytest.mark.parametrize("spec", ["a:b", "1:2:3", "", "1.5"])
def test_steps_that_cannot_be_read(source: Source, spec: str) -> None:
    with pytest.raises(SelectionError, match="expected A:B"):
        select_steps(source, spec)


@pytest.mark.parametrize("text", ["\0", "<0x00>"])
def test_a_token_is_found_by_its_text_as_it_is_and_as_it_is_shown(
    tmp_path: Path, text: str
) -> None:
    labels = TokenLabels(text=["\0", *(f" t{token}" for token in range(1, 11))])
    record(tmp_path / "run.zarr", n_steps=1, recorder_options={"labels": labels})
    _, positions = select_tokens(Source(StoreReader.open(tmp_path / "run.zarr")), f"text:{text}")
    assert positions.tolist() == [0]
