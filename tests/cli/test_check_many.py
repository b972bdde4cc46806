"""`check` of several subsets of tokens in one pass, and of several stores."""

import csv
import io
import re
import shutil
from pathlib import Path

import pytest
import zarr

from tests.support.commands import check, checked, fails
from tests.support.faults import flip_bit, rewrite
from tests.support.notebook_file import notebook_tensors, save
from tests.support.runs import N_LIVE, N_STEPS, N_TOKENS, History, record
from thimble_zarr.analysis.audit.audit import Tally
from thimble_zarr.analysis.compute.reduction import Reduction


@pytest.fixture
def faulty(toy_path: Path, tmp_path: Path) -> Path:
    """A copy of the toy run in which a bit of the live token 4 is flipped at step 5."""
    path = tmp_path / "faulty.zarr"
    rewrite(toy_path, path, lambda bits, scalars: flip_bit(bits["W"], (5, 4, 1), 10))
    return path


# --- subsets -------------------------------------------------------------------------------------


def test_subsets_are_a_line_each(toy_path: Path) -> None:
    stdout = check(toy_path, "--tokens", "dead,live,all").stdout
    titles, table, health = stdout.strip().split("\n\n")
    assert health.startswith("Health: exp_avg_sq cannot decay in bfloat16. ")
    assert titles.splitlines() == [f"Store     {toy_path}", f"Steps     1 to {N_STEPS}"]
    title, *lines = (re.split("  +", line) for line in table.splitlines())
    assert title == ["tokens", "cosine", "equal bits"]
    assert [(line[0], *line[-2:]) for line in lines] == [
        ("dead: 4", "100 %", "HOLDS"),
        ("live: 7", "100 %", "HOLDS"),
        ("all: 11", "100 %", "HOLDS"),
    ]


def test_subsets_are_shown_one_after_the_other_if_their_steps_are_asked_for(
    toy_path: Path,
) -> None:
    subsets = ("dead", "live", "all")
    together = check(toy_path, "--tokens", "dead,live,all", "--rows=6").stdout
    alone = [check(toy_path, "--tokens", subset, "--rows=6").stdout for subset in subsets]
    lines = check(toy_path, "--tokens", "dead,live,all").stdout
    assert together == "\n".join([*alone, lines])


def test_subsets_are_one_pass(toy_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    real = Reduction.parts

    def counted(reduction: Reduction) -> object:
        if isinstance(reduction.statistics.compute, Tally):  # what health samples is apart
            passes.append(len(reduction.selected.tokens))
        return real(reduction)

    monkeypatch.setattr(Reduction, "parts", counted)
    check(toy_path, "--tokens", "dead,live,all")
    assert passes == [N_TOKENS]


def test_subsets_as_json_are_the_objects_of_each(toy_path: Path, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("3 9")
    spec = f"live, @{tmp_path / 'ids'}"
    content = checked(toy_path, "--tokens", spec)
    assert list(content) == ["store", "subsets"]
    assert content["store"] == str(toy_path)
    for subset, found in zip(spec.split(", "), content["subsets"], strict=True):
        assert found == checked(toy_path, "--tokens", subset)
    assert [found["tokens"]["n"] for found in content["subsets"]] == [N_LIVE, 2]


def test_subsets_as_csv_are_a_table_that_says_which(toy_path: Path) -> None:
    result = check(toy_path, "--tokens", "all,dead", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row.pop("subset") for row in rows] == ["all"] * N_STEPS + ["dead"] * N_STEPS
    alone = check(toy_path, "--tokens", "dead", "--format", "csv").stdout
    assert rows[N_STEPS:] == list(csv.DictReader(io.StringIO(alone)))
    lines = result.stderr.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["all:", "dead:", "Health:"]


def test_the_same_subset_twice_is_one(toy_path: Path) -> None:
    assert check(toy_path, "--tokens", "all,all").stdout == check(toy_path, "--tokens=all").stdout


def test_one_subset_that_fails_fails_the_check(toy_path: Path, faulty: Path) -> None:
    live, dead = checked(faulty, "--tokens", "live,dead", exit_code=1)["subsets"]
    assert (live["holds"], dead["holds"]) == (False, True)
    assert [finding["token"] for finding in live["findings"]] == [4]
    assert dead["findings"] == []
    shown = check(faulty, "--tokens", "live,dead", exit_code=1).stdout
    assert [line.split()[-1] for line in shown.splitlines()[4:6]] == ["5", "HOLDS"]
    words = shown.split("\n\n")[2]
    assert words.startswith(f"{faulty}, live: FAILS")
    assert "bit-flip: " in words


@pytest.mark.parametrize(
    ("spec", "part"),
    [("dead,17", "'17'"), ("all,every", "'every'"), ("text,all", "'text'"), ("live,", "''")],
)
def test_a_list_of_subsets_has_words_and_files_only(toy_path: Path, spec: str, part: str) -> None:
    message = fails(2, "check", toy_path, "--tokens", spec)
    assert f"--tokens {spec}: {part} cannot be one of several subsets" in message


def test_what_is_no_list_of_subsets_is_read_as_ever(toy_path: Path) -> None:
    for spec, n_tokens in (("1,2", 2), ("all", N_TOKENS)):
        assert checked(toy_path, "--tokens", spec)["tokens"] == {"subset": spec, "n": n_tokens}
    message = fails(2, "check", toy_path, "--tokens", "text:live,dead")
    assert "no token has the text 'live,dead'" in message


# --- stores --------------------------------------------------------------------------------------


@pytest.fixture
def stores(tmp_path: Path, toy_path: Path, faulty: Path) -> dict[str, Path]:
    """A sound run, a short one, one with a fault, one that cannot be read."""
    directory = tmp_path / "runs"
    directory.mkdir()
    paths = {name: directory / f"{name}.zarr" for name in ("damaged", "faulty", "short", "sound")}
    shutil.copytree(toy_path, paths["sound"])
    shutil.copytree(toy_path, paths["damaged"])
    (paths["damaged"] / "zarr.json").write_text("{}")
    faulty.rename(paths["faulty"])
    record(paths["short"], n_steps=3)
    return paths


def shown_lines(text: str) -> dict[str, list[str]]:
    """Return the columns of each store's line, apart from the title."""
    table = next(part for part in text.split("\n\n") if part.startswith("store "))
    lines = table.splitlines()[1:]
    return {Path(cells[0]).stem: cells[1:] for cells in (re.split("  +", line) for line in lines)}


def test_several_stores_are_a_line_each(stores: dict[str, Path]) -> None:
    result = check(stores["sound"], stores["short"])
    title, *lines = result.stdout.split("\n\n")[0].splitlines()
    assert re.split("  +", title) == [
        "store", "tokens", "steps", "cosine", "equal bits"
    ]  # fmt: skip
    assert len(lines) == 2
    shown = shown_lines(result.stdout)
    for name, n_steps in (("sound", N_STEPS), ("short", 3)):
        cosines = [row["cosine_similarity"] for row in checked(stores[name])["rows"]]
        first, last = f"{cosines[0]:.4f}", f"{cosines[-1]:.4f}"
        steps = f"1 to {n_steps}"
        assert shown[name] == ["dead: 4", steps, f"{first} to {last}", "100 %", "HOLDS"]


def test_what_fails_is_told_below(stores: dict[str, Path]) -> None:
    pattern = stores["sound"].with_name("[fs]*.zarr")
    shown = check(pattern, "--tokens=live", exit_code=1).stdout
    lines = shown_lines(shown)
    assert list(lines) == ["faulty", "short", "sound"]
    assert [columns[-1] for columns in lines.values()] == ["FAILS from step 5", "HOLDS", "HOLDS"]
    assert "100 %" not in lines["faulty"]
    words, _ = shown.split("\n\n")[1:]
    alone = check(stores["faulty"], "--tokens=live", exit_code=1).stdout.split("\n\n")[-1]
    assert f"{stores['faulty']}, live: {alone}".startswith(f"{words}\nHealth: ")


def test_subsets_of_several_stores_are_a_line_each(stores: dict[str, Path]) -> None:
    shown = check(stores["sound"], stores["faulty"], "--tokens=live,dead", exit_code=1).stdout
    lines = shown.split("\n\n")[1].splitlines()[1:]
    assert [line.split("  ")[-1].split()[0] for line in lines] == ["FAILS", "HOLDS"] + ["HOLDS"] * 2


@pytest.mark.parametrize("columns", [80, 100])
def test_long_paths_are_shortened_to_fit_the_terminal(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = check(stores["sound"], stores["short"]).stdout
    assert len(str(stores["short"])) > 60
    for line in shown.splitlines():
        assert len(line) <= columns
    assert re.search(r"…\S*/short\.zarr ", shown)
    assert shown.count("HOLDS") == 2


def test_a_store_that_cannot_be_read_does_not_stop_the_others(stores: dict[str, Path]) -> None:
    result = check(*stores.values(), exit_code=3)
    lines = shown_lines(result.stdout)
    assert lines["damaged"] == [*["-"] * 4, "not checked"]
    assert [lines[name][-1] for name in ("short", "sound")] == ["HOLDS", "HOLDS"]
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert str(stores["damaged"]) in line
    both = check(stores["damaged"], stores["damaged"].with_name("none.zarr"), exit_code=3)
    assert len(both.stderr.splitlines()) == 2


def test_a_selection_that_a_store_lacks_is_an_error_of_that_store(stores: dict[str, Path]) -> None:
    result = check(stores["sound"], stores["short"], "--steps=2:9", exit_code=2)
    message = "--steps 2:9 is not within the recorded steps 1:3"
    assert result.stderr == f"Error: {stores['short']}: {message}\n"
    assert shown_lines(result.stdout)["sound"][-1] == "HOLDS"


def test_several_stores_as_json_are_the_objects_of_each(stores: dict[str, Path]) -> None:
    damaged, sound = checked(stores["sound"], stores["damaged"], exit_code=3)
    assert sound == checked(stores["sound"])
    assert list(damaged) == ["store", "error"]
    assert damaged["store"] == str(stores["damaged"])


def test_several_stores_as_csv_are_one_table(stores: dict[str, Path], tmp_path: Path) -> None:
    names = ("short", "sound")
    output = tmp_path / "table.csv"
    options = "--format", "csv", "--tokens=dead,all"
    result = check(*(stores[name] for name in names), *options, "--output", output)
    rows = list(csv.DictReader(io.StringIO(output.read_text())))
    expected = [
        {"store": str(stores[name])} | row
        for name in names
        for row in csv.DictReader(io.StringIO(check(stores[name], *options).stdout))
    ]
    assert rows == expected
    assert list(rows[0])[:3] == ["store", "subset", "t"]
    assert list(shown_lines(result.stderr)) == ["short", "sound"]
    assert check(stores["damaged"], "nowhere", "--format=csv", "-q", exit_code=3).stdout == ""


def test_without_the_replay_the_overview_is_of_the_formula(stores: dict[str, Path]) -> None:
    shown = check(stores["sound"], stores["short"], "--no-replay").stdout
    assert "within rounding" in shown.splitlines()[0]
    assert [columns[-2] for columns in shown_lines(shown).values()] == ["100 %", "100 %"]


def test_without_the_formula_the_overview_has_no_cosines(stores: dict[str, Path]) -> None:
    shown, both = (
        check(stores["sound"], stores["short"], *how).stdout for how in (["--no-formula"], [])
    )
    assert "equal bits" in shown.splitlines()[0]
    assert "cosine" in both
    assert "cosine" not in shown
    for name, columns in shown_lines(both).items():
        assert shown_lines(shown)[name] == [*columns[:-3], *columns[-2:]]


def test_a_notebooks_file_is_a_store_too(
    stores: dict[str, Path], tmp_path: Path, toy_history: History
) -> None:
    file = save(tmp_path / "run.safetensors", notebook_tensors(toy_history))
    lines = shown_lines(check(file, stores["sound"]).stdout)
    assert [lines[name][-1] for name in ("run", "sound")] == ["HOLDS", "HOLDS"]


def test_a_pattern_of_one_store_is_that_store(stores: dict[str, Path]) -> None:
    for paths in ([stores["sound"].with_name("sou*")], [stores["sound"]] * 2):
        assert check(*paths).stdout == check(stores["sound"]).stdout


def test_a_pattern_that_matches_nothing_is_an_error(stores: dict[str, Path]) -> None:
    pattern = stores["sound"].with_name("seed*")
    assert f"no path matches {pattern}" in fails(3, "check", stores["sound"], pattern)


def test_a_store_that_was_altered_fails_from_where_it_was(stores: dict[str, Path]) -> None:
    array = zarr.open_array(stores["sound"], path="grad", mode="r+")
    array[0, 8] = 0  # of the initial state, which nothing consumes
    result = check(stores["sound"], stores["short"], exit_code=1)
    assert shown_lines(result.stdout)["sound"][-2:] == ["100 %", "FAILS from step 0"]
