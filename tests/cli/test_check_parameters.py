"""`check`, `info` and `export` of a store of several parameters."""

import csv
import io
import json
import re
from pathlib import Path

import pytest

from tests.support.commands import check, checked, fails, info_of, succeeds
from tests.support.faults import Arrays, flip_bit, rewrite
from tests.support.runs import N_STEPS
from tests.support.zoo import SHAPES, Recorded


def lines_of(text: str) -> dict[str, list[str]]:
    """Return the columns of each parameter's line, apart from the title."""
    lines = text.split("\n\n")[1].splitlines()[1:]
    return {cells[0]: cells[1:] for cells in (re.split("  +", line) for line in lines)}


@pytest.fixture
def faulty(zoo: Recorded, tmp_path: Path) -> Path:
    """A copy in which one bit of `image` is flipped."""

    def change(bits: Arrays, scalars: Arrays) -> None:
        flip_bit(bits["image/W"], (5, 2, 40), 20)

    rewrite(zoo.path, tmp_path / "faulty.zarr", change)
    return tmp_path / "faulty.zarr"


def test_every_parameter_is_a_line(zoo: Recorded) -> None:
    shown = check(zoo.path).stdout
    titles, table, _ = shown.split("\n\n")
    assert titles.splitlines() == [f"Store     {zoo.path}", f"Steps     1 to {N_STEPS}"]
    title = re.split("  +", table.splitlines()[0])
    assert title[:2] == ["parameter", "tokens"]
    lines = lines_of(shown)
    assert set(lines) == set(SHAPES)
    assert {tuple(line[-2:]) for line in lines.values()} == {("100 %", "HOLDS")}
    assert {name: line[0] for name, line in lines.items()} == {
        "scale": "all: 1 elements",
        "norm": "all: 131 elements",
        "wte.weight": "dead: 4",
        "query": "all: 11 rows",
        "up": "all: 3 rows",
        "filter": "all: 5 rows",
        "image": "all: 3 rows",
    }


def test_what_fails_is_named_by_its_own_axes(faulty: Path) -> None:
    shown = check(faulty, exit_code=1).stdout
    lines = lines_of(shown)
    assert {name for name, line in lines.items() if line[-1] != "HOLDS"} == {"image"}
    assert lines["image"][-1] == "FAILS from step 5"
    words = shown.split("\n\n")[2]
    assert words.startswith(f"{faulty}, image, all: FAILS: ")
    place = "dim_0 2, dim_1 1, dim_2 0, dim_3 5"  # 40 in (2, 5, 7)
    assert f"bit-flip: One bit of W is flipped: bit 20 at step 5, {place}." in words
    alone = check(faulty, "--parameter", "image", exit_code=1).stdout
    assert f"Store    {faulty}, image: float32, AdamW (single)" in alone
    assert "Rows     all: 3 of 3" in alone
    assert f"step 5, {place}" in alone.split("first differing")[1]
    finding = checked(faulty, "--parameter", "image", exit_code=1)["findings"][0]
    assert (finding["token"], finding["dim"]) == (2, 40)


def test_parameters_are_chosen_by_patterns(zoo: Recorded) -> None:
    shown = check(zoo.path, "--parameter", "wte.*", "--parameter", "[nu]*", "--parameter=norm")
    assert list(lines_of(shown.stdout)) == ["norm", "up", "wte.weight"]
    message = fails(2, "check", zoo.path, "--parameter", "wte.*", "--parameter", "none*")
    assert "has no parameter none*; there is" in message


def test_a_single_parameter_may_be_chosen_too(zoo: Recorded, toy_path: Path) -> None:
    alone = checked(zoo.path, "--parameter", "up")
    assert (alone["parameter"], alone["holds"]) == ("up", True)
    assert "parameter" not in checked(toy_path)
    assert "there is one without a name" in fails(2, "check", toy_path, "--parameter", "up")


def test_tokens_are_of_embeddings_only(zoo: Recorded) -> None:
    result = check(zoo.path, "--tokens", "live", exit_code=2)
    lines = lines_of(result.stdout)
    assert {name for name, line in lines.items() if line[-1] == "HOLDS"} == {"wte.weight"}
    assert f"{zoo.path}, up: --tokens live: the parameter up has no tokens" in result.stderr
    assert "dims (row, col)" in result.stderr
    both = checked(zoo.path, "--parameter", "wte.weight", "--tokens", "live,dead")
    assert both["parameter"] == "wte.weight"
    assert [subset["tokens"]["n"] for subset in both["subsets"]] == [7, 4]


def test_machines_read_which_parameter(zoo: Recorded) -> None:
    options = ("--parameter", "up", "--parameter", "norm", "--no-replay")
    found = json.loads(check(zoo.path, *options, "--format", "json").stdout)
    assert [run["parameter"] for run in found] == ["norm", "up"]
    rows = list(csv.DictReader(io.StringIO(check(zoo.path, *options, "--format=csv").stdout)))
    assert [row["parameter"] for row in rows] == ["norm"] * N_STEPS + ["up"] * N_STEPS


def test_several_stores_of_several_parameters(zoo: Recorded, faulty: Path, toy_path: Path) -> None:
    shown = check(zoo.path, faulty, toy_path, "--parameter", "up", exit_code=2)
    assert [line.split()[-1] for line in shown.stdout.split("\n\n")[0].splitlines()[1:]] == [
        "checked" if path == toy_path else "HOLDS" for path in sorted([zoo.path, faulty, toy_path])
    ]


def test_a_damaged_parameter_does_not_stop_the_others(faulty: Path) -> None:
    (faulty / "up/W/c.0.0.0").write_bytes(b"")
    result = check(faulty, "--parameter", "up", "--parameter", "query", exit_code=3)
    lines = lines_of(result.stdout)
    assert {name: line[-1] for name, line in lines.items()} == {
        "query": "HOLDS",
        "up": "not checked",
    }
    assert "up/W/c.0.0.0 is missing or empty" in result.stderr


def test_info_lists_parameters_with_their_shapes(zoo: Recorded) -> None:
    shown = succeeds("info", zoo.path).stdout
    assert "Parameters  7, each a group\n" in shown
    assert re.search(r"image +3 x 2 x 5 x 7 +\(dim_0, dim_1, dim_2, dim_3\) +float32", shown)
    assert re.search(r"scale +scalar +\(\) +float64", shown)
    assert f"Steps       {N_STEPS} and the initial state" in shown
    content = info_of(zoo.path)
    shapes = {of["parameter"]: tuple(of["shape"]) for of in content["parameters"]}
    assert shapes == SHAPES
    assert content["n_rows"] == N_STEPS + 1
    one = succeeds("info", zoo.path, "--parameter", "up").stdout
    assert "Parameter  up, 3 x 67, on cpu" in one


def test_one_parameter_is_exported(zoo: Recorded, tmp_path: Path) -> None:
    file = tmp_path / "run.safetensors"
    assert "holds 7 parameters" in fails(2, "export", zoo.path, file)
    message = fails(2, "export", zoo.path, file, "--parameter", "image")
    assert "an embedding of shape (token, dim) only" in message
    assert not file.exists()
