"""`check` of one store: selections, formats, findings."""

import csv
import io
import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import zarr

from tests.support.commands import checked, fails, run, strict_json, succeeds
from tests.support.runs import N_TOKENS, Loop, record, token_labels
from thimble_zarr import Recorder, accounting, open_dataset
from thimble_zarr.optim.programs.compiled import is_available
from thimble_zarr.report.check_tables import csv_text
from thimble_zarr.store.reader import StoreReader

HEADER = "t,norm_predicted,norm_observed,norm_difference,cosine_similarity,ratio"


def test_a_single_step_needs_no_summary(trained: Path) -> None:
    stdout = succeeds("check", trained, "--steps", "3").stdout
    assert "\nSteps    3\n" in stdout
    assert "Summary" not in stdout
    assert "Summary" in succeeds("check", trained, "--steps", "3:4").stdout


def test_check_of_a_sound_run_is_a_table_and_a_verdict(trained: Path) -> None:
    result = succeeds("check", trained)
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0] == f"Store    {trained}: bfloat16, AdamW (single)"
    assert lines[1].startswith("Tokens   dead: ")
    assert lines[2] == "Steps    1 to 5"
    assert lines[4].split() == HEADER.split(",")
    assert [line.split()[0] for line in lines[5:10]] == ["1", "2", "3", "4", "5"]
    assert "Summary" in lines
    replay = lines.index("Replay on cpu, to the bit")
    n_elements = 8 * 5 * int(lines[1].split()[2].replace(",", ""))
    for line, name in zip(
        lines[replay + 2 : replay + 5], ("W", "exp_avg", "exp_avg_sq"), strict=True
    ):
        assert line.split() == [name, *[f"{n_elements:,}"] * 2, "100", "%", "none", "0"]
    assert lines[-2].startswith("HOLDS to the bit: ")
    assert lines[-1].startswith("Health: exp_avg_sq cannot decay in bfloat16. ")


@pytest.fixture
def long_run(tmp_path: Path) -> Path:
    record(tmp_path / "run.zarr", n_steps=47)
    return tmp_path / "run.zarr"


def steps_shown(stdout: str) -> list[int]:
    """Return the steps in the table, apart from those left out."""
    lines = stdout.splitlines()
    first = next(i for i, line in enumerate(lines) if line.split() == HEADER.split(","))
    table = itertools.takewhile(bool, lines[first + 1 :])
    return [int(line.split()[0]) for line in table if not line.startswith("..")]


def test_a_long_table_shows_both_ends_and_all_fits_on_a_screen(
    long_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(long_run.parent)
    stdout = succeeds("check", long_run.name).stdout
    assert steps_shown(stdout) == [*range(1, 6), *range(43, 48)]
    assert "10 of 47 steps" in stdout
    lines = stdout.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("rows", "shown"),
    [
        (1, [1, 47]),
        (4, [1, 2, 46, 47]),
        (5, [1, 2, 3, 45, 46, 47]),
        (40, [*range(1, 21), *range(28, 48)]),
        (47, range(1, 48)),
        (1000, range(1, 48)),
        ("all", range(1, 48)),
    ],
)
def test_as_many_steps_are_shown_as_asked_for(
    long_run: Path, rows: object, shown: Iterable[int]
) -> None:
    stdout, n_shown = succeeds("check", long_run, "--rows", rows).stdout, len([*shown])
    assert steps_shown(stdout) == [*shown]
    assert (f"\n{n_shown} of 47 steps (" in stdout) == (n_shown < 47)


def test_rows_are_a_number_or_all_and_of_a_table(trained: Path) -> None:
    for rows in ("0", "-1", "many", "1.5", "²"):
        message = fails(2, "check", trained, "--rows", rows)
        assert f"'{rows}' is neither a number of steps, such as 40, nor all" in message
    message = fails(2, "check", trained, "--rows", "5", "--format", "csv")
    assert "--rows shortens the table, and --format csv has every step" in message


@pytest.mark.parametrize("columns", [60, 80, 120, 160, 200])
@pytest.mark.parametrize("options", [(), ("--extended",), ("--tokens=dead,live,all",)])
def test_tables_fit_the_terminal(
    trained: Path, monkeypatch: pytest.MonkeyPatch, columns: int, options: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.chdir(trained.parent)
    lines = succeeds("check", trained.name, *options).stdout.splitlines()
    assert max(map(len, lines)) <= columns
    names = " ".join(lines).split()
    if "--extended" in options:
        assert {"norm_unexplained", *HEADER.split(",")} <= {*names}


def test_without_a_terminal_words_are_not_broken(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    *table, verdict, health = succeeds("check", trained, "--extended").stdout.splitlines()
    assert verdict.startswith("HOLDS to the bit: ")
    assert len(verdict) > 100
    assert len(health) > 100
    assert max(map(len, table[3:])) <= 100


def test_csv_is_every_step_with_a_fixed_header(tmp_path: Path) -> None:
    record(tmp_path / "run.zarr", n_steps=47)
    result = succeeds("check", tmp_path / "run.zarr", "--format", "csv")
    assert result.stdout.splitlines()[0] == HEADER
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [int(row["t"]) for row in rows] == list(range(1, 48))
    ds = open_dataset(tmp_path / "run.zarr")
    table = accounting(ds.sel(token=ds.dead))
    for name in HEADER.split(",")[1:]:
        assert [float(row[name]) for row in rows] == table[name].values.tolist()
    assert result.stderr.startswith("HOLDS to the bit: ")
    assert succeeds("check", tmp_path / "run.zarr", "--format", "csv", "--quiet").stderr == ""


def test_json_has_these_keys_and_nothing_json_does_not_know(trained: Path) -> None:
    content = checked(trained)
    ds = open_dataset(trained)
    about = ["store", "tokens", "steps", "n_skipped", "n_steps", "rows", "summary"]
    replay = ["replay", "replay_device", "replayed_by", "not_exact_because"]
    replay += ["not_replayed_because"]
    findings = ["findings", "health"]
    assert list(content) == [*about, *replay, *findings, "holds", "has_ended", "verdict"]
    total = 5 * 8 * int(ds.dead.sum())
    equal = {"total": total, "equal": total, "not_judged": 0, "max_ulp": 0, "first": None}
    assert content["replay"] == dict.fromkeys(("W", "exp_avg", "exp_avg_sq"), equal)
    assert (content["replay_device"], content["not_exact_because"]) == ("cpu", "")
    assert content["findings"] == []
    assert content["store"] == str(trained)
    assert content["tokens"] == {"subset": "dead", "n": int(ds.dead.sum())}
    assert content["steps"] == [1, 5]
    table = accounting(ds.sel(token=ds.dead))
    assert [row["t"] for row in content["rows"]] == [1, 2, 3, 4, 5]
    for name in HEADER.split(",")[1:]:
        column = [row[name] for row in content["rows"]]
        assert column == table[name].values.tolist()
        assert content["summary"][name]["mean"] == pytest.approx(np.mean(column))
        assert content["summary"][name]["count"] == 5
        assert content["summary"][name]["max"] == max(column)
    assert set(content["rows"][0]) == set(HEADER.split(","))
    assert content["holds"] is True
    assert content["verdict"].startswith("HOLDS to the bit: ")


@pytest.mark.parametrize("format_", ["table", "csv", "json"])
def test_output_goes_to_a_file_as_it_goes_to_stdout(
    tmp_path: Path, trained: Path, format_: str
) -> None:
    expected = succeeds("check", trained, "--format", format_).stdout
    file = tmp_path / "check"
    result = succeeds("check", trained, "--format", format_, "--output", file)
    assert result.stdout == ""
    assert result.stderr.startswith("HOLDS to the bit: ")
    assert file.read_text(encoding="utf-8") == expected
    quiet = succeeds("check", trained, "--format", format_, "--output", file, "--quiet")
    assert (quiet.stdout, quiet.stderr) == ("", "")


def test_output_that_cannot_be_written_is_told(tmp_path: Path, trained: Path) -> None:
    for file in (tmp_path, Path("/proc/check.csv")):
        assert str(file) in fails(3, "check", trained, "--output", file)
    message = fails(3, "check", trained, "--output", tmp_path / "nothing" / "check.csv")
    assert f"there is no directory {tmp_path / 'nothing'}" in message


def test_tokens_are_selected(tmp_path: Path, trained: Path) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("3, 5\n7 11\n", encoding="utf-8")
    labels = StoreReader.open(trained).read_labels()
    assert labels.live is not None
    assert labels.text is not None
    n_live = int(labels.live.sum())
    the = labels.text.index(" the")
    expected = {
        "all": range(300),
        "live": np.flatnonzero(labels.live),
        "dead": np.flatnonzero(~labels.live),
        "17,42": [17, 42],
        "299": [299],
        f"@{ids}": [3, 5, 7, 11],
        "text: the": [the],
    }
    assert 0 < n_live < 300
    ds = open_dataset(trained)
    for spec, tokens in expected.items():
        content = checked(trained, "--tokens", spec)
        assert content["tokens"] == {"subset": spec, "n": len(tokens)}
        table = accounting(ds.sel(token=list(tokens)))
        found = [row["norm_observed"] for row in content["rows"]]
        assert found == pytest.approx(table.norm_observed.values, rel=1e-12)


def test_without_dead_tokens_all_are_checked(tmp_path: Path) -> None:
    record(tmp_path / "run.zarr", n_live=N_TOKENS)
    assert checked(tmp_path / "run.zarr")["tokens"] == {"subset": "all", "n": N_TOKENS}
    message = fails(2, "check", tmp_path / "run.zarr", "--tokens", "dead")
    assert "no token is selected" in message


@pytest.mark.parametrize("label", ["dead", "live", "text:the"])
def test_tokens_that_were_never_labelled_cannot_be_named(tmp_path: Path, label: str) -> None:
    record(tmp_path / "run.zarr", recorder_options={"labels": None})
    assert "ids" in fails(2, "check", tmp_path / "run.zarr", "--tokens", label)
    assert checked(tmp_path / "run.zarr")["tokens"]["subset"] == "all"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("1,300", "token 300 is not in this run, which has tokens 0 to 299"),
        ("-1", "token -1 is not in this run"),
        ("99999999999999999999", "99999999999999999999"),
        ("1,x", "--tokens 1,x: expected all, live, dead, ids"),
        ("1.5", "--tokens 1.5: expected"),
        ("DEAD", "--tokens DEAD: expected"),
        ("", "--tokens"),
        (",", "--tokens"),
        ("@/nothing", "cannot read token ids from /nothing"),
        ("@/", "cannot read token ids from /"),
        ("@", "cannot read token ids from"),
        ("text:zzz", "no token has the text 'zzz'"),
        ("text:the ", "' the'"),
    ],
)
def test_tokens_that_are_not_there_are_refused(trained: Path, spec: str, expected: str) -> None:
    assert expected in fails(2, "check", trained, f"--tokens={spec}")


def test_a_file_that_holds_no_ids_is_refused(tmp_path: Path, trained: Path) -> None:
    for content in (b"", b"dead", b"\xff"):
        (tmp_path / "ids.txt").write_bytes(content)
        assert "ids.txt" in fails(2, "check", trained, "--tokens", f"@{tmp_path / 'ids.txt'}")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("2:4", [2, 4]), ("2:", [2, 5]), (":3", [1, 3]), ("3", [3, 3]), ("5:5", [5, 5])],
)
def test_steps_are_selected_both_ends_included(
    trained: Path, spec: str, expected: list[int]
) -> None:
    content = checked(trained, "--steps", spec)
    assert content["steps"] == expected
    assert [row["t"] for row in content["rows"]] == list(range(expected[0], expected[1] + 1))
    whole = {row["t"]: row for row in checked(trained)["rows"]}
    for row in content["rows"]:
        assert row == pytest.approx(whole[row["t"]], rel=1e-12)


@pytest.mark.parametrize(
    "spec", ["1:6", "0:3", "6", "4:2", "-1:3", "a:b", "1:2:3", "::", "", "1.5"]
)
def test_steps_that_are_not_there_are_refused(trained: Path, spec: str) -> None:
    assert f"--steps {spec}" in fails(2, "check", trained, f"--steps={spec}")


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """A run in which something changed the learning rate of step 3 unseen by the recorder."""
    loop = Loop(lr=1e-2)
    path = tmp_path / "faulty.zarr"
    with Recorder(path, loop.optimizer, parameter=loop.weight, labels=token_labels()) as recorder:

        def meddle(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
            optimizer.param_groups[0]["lr"] = 3e-2 if recorder.step == 2 else 1e-2

        def hide(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
            optimizer.param_groups[0]["lr"] = 1e-2

        loop.optimizer.register_step_pre_hook(meddle)
        hook = loop.optimizer.register_step_post_hook(hide)
        loop.optimizer._optimizer_step_post_hooks.move_to_end(hook.id, last=False)
        for _ in range(5):
            loop.step()
            loop.optimizer.zero_grad()
    return path


def test_a_planted_fault_is_found_where_it_was_planted(faulty: Path) -> None:
    for format_ in ("table", "csv", "json"):
        assert run("check", faulty, "--format", format_).exit_code == 1
    result = run("check", faulty, "--tokens", "all")
    assert "FAILS: from step 3 on, " in result.stdout
    assert result.stdout.splitlines()[-2].startswith("  other-learning-rate: The weights are those")
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("W "))
    assert "step 3, token 0, dim " in line
    assert "100 %" not in line
    found = checked(faulty, exit_code=1)
    assert found["holds"] is False
    assert found["verdict"].startswith("FAILS: ")
    (finding,) = found["findings"]
    assert (finding["code"], finding["step"]) == ("other-learning-rate", 3)
    assert "0.03" in finding["message"]
    assert found["replay"]["exp_avg"]["first"] is None
    assert found["replay"]["W"]["first"]["step"] == 3
    assert found["replay"]["W"]["equal"] < found["replay"]["W"]["total"]
    assert checked(faulty, "--steps", "1:2")["holds"] is True
    assert checked(faulty, "--steps", "4:5")["holds"] is True


def test_without_the_replay_the_formula_judges(faulty: Path, trained: Path) -> None:
    result = run("check", faulty, "--no-replay")
    assert result.exit_code == 1
    assert "Replay" not in result.stdout
    assert result.stdout.splitlines()[-2].startswith("FAILS: ")
    assert "first at step 3" in result.stdout
    found = checked(trained, "--no-replay")
    assert found["verdict"].startswith("HOLDS: all ")
    assert (found["replay"], found["replay_device"], found["findings"]) == (None, None, [])


def test_without_the_formula_the_replay_is_shown_alone(faulty: Path, trained: Path) -> None:
    shown, both = (succeeds("check", trained, *how).stdout for how in (["--no-formula"], []))
    assert "norm_predicted" not in shown
    assert "Summary" not in shown
    title, replay, words = shown.split("\n\n")
    verdict, _ = words.splitlines()
    assert both.startswith(title)
    assert replay in both
    assert both.startswith(verdict, both.index("HOLDS to the bit"))
    result = run("check", faulty, "--no-formula", "--format", "csv")
    assert result.exit_code == 1
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    names = ("W", "exp_avg", "exp_avg_sq")
    of_each = ("n_different", "n_beyond", "max_ulp")
    columns = [f"{column}_{name}" for name in names for column in of_each]
    assert list(rows[0]) == ["t", *columns]
    first = next(row for row in rows if int(row["n_different_W"]))
    assert first["t"] == "3"
    assert float(first["max_ulp_W"]) > 0
    found, with_formula = (checked(faulty, *how, exit_code=1) for how in (["--no-formula"], []))
    differing = ("rows", "summary")
    assert list(found["rows"][0]) == ["t", *columns]
    for key in with_formula.keys() - differing:
        assert found[key] == with_formula[key]
    assert [finding["code"] for finding in found["findings"]] == ["other-learning-rate"]


def test_csv_is_what_pandas_writes() -> None:
    floats = np.array([0.1, np.nan, np.inf, -np.inf, -0.0, 1e-300, 1e22, 1 / 3])
    long = {"t": np.arange(8), "a": floats, "n_different_W": np.arange(8)[::-1]}
    short = {"t": np.arange(2), "b": floats[:2]}
    labels = [{"store": 'runs/a,"b".zarr', "subset": "dead"}, {"store": "c", "subset": ""}]
    expected = pd.concat(
        [
            pd.DataFrame(labels[0] | long).astype({"n_different_W": object}),
            pd.DataFrame(labels[1] | short),
        ]
    )
    text = csv_text(list(zip(labels, (long, short), strict=True)))
    assert text == expected.to_csv(index=False, lineterminator="\n")


def test_formula_and_replay_are_not_both_left_out(trained: Path) -> None:
    message = fails(2, "check", trained, "--no-formula", "--no-replay")
    assert "nothing is left to check with formula=False (--no-formula)" in message
    message = fails(2, "check", trained, "--no-formula", "--extended")
    assert "formula=False (--no-formula) turns that off" in message


@pytest.mark.parametrize(
    ("options", "spared"),
    [
        (["--no-formula"], ["torch"] * is_available()),
        (["--no-replay"], ["torch", "xarray"]),
        (["--no-replay", "--format", "csv"], ["torch", "xarray", "pandas"]),
        (["--format", "csv"], ["xarray", "pandas"]),
        (["--no-formula"], ["xarray", "pandas"]),
        ([], ["xarray"]),
    ],
)
def test_nothing_is_imported_that_is_not_needed(
    trained: Path, options: list[str], spared: list[str]
) -> None:
    script = (
        f"import sys; sys.modules |= dict.fromkeys({spared!r}); sys.argv = ['thimble-zarr', "
        f"'check', {str(trained)!r}, *{options!r}]; from thimble_zarr.cli.main import main; main()"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "HOLDS" in shown.stdout + shown.stderr


def test_a_cause_is_named_without_xarray(faulty: Path) -> None:
    script = (
        "import sys; sys.modules['xarray'] = None; sys.argv = ['thimble-zarr', 'check', "
        f"{str(faulty)!r}]; from thimble_zarr.cli.main import main; main()"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert shown.returncode == 1, shown.stderr
    assert "other-learning-rate: " in shown.stdout


def test_more_columns_follow_those_of_the_notebook(trained: Path) -> None:
    more = ["share_stalled", "share_moved", "mean_displacement_ulp", "norm_unexplained"]
    shown = succeeds("check", trained, "--extended", "--format", "csv").stdout
    assert shown.splitlines()[0] == ",".join([HEADER, *more])
    ds = open_dataset(trained)
    table = accounting(ds.sel(token=ds.dead), extended=True)
    rows = list(csv.DictReader(io.StringIO(shown)))
    for name in more:
        assert [float(row[name]) for row in rows] == table[name].values.tolist()
    assert [float(row["norm_unexplained"]) for row in rows] == [0.0] * 5
    shown = succeeds("check", trained, "--extended", "--no-replay", "--format", "csv").stdout
    assert shown.splitlines()[0] == ",".join([HEADER, *more[:-1]])


def test_a_device_that_is_not_here_is_told(trained: Path) -> None:
    assert "torch finds no device mps here" in fails(2, "check", trained, "--device", "mps")
    assert "no device abacus" in fails(2, "check", trained, "--device", "abacus")
    assert checked(trained, "--device", "cpu")["holds"] is True
    assert "replay=False (--no-replay) turns it off" in fails(
        2, "check", trained, "--device", "cpu", "--no-replay"
    )


def test_a_store_that_was_altered_does_not_hold(tmp_path: Path, trained: Path) -> None:
    store = Path(shutil.copytree(trained, tmp_path / "run.zarr"))
    array = zarr.open_array(store, path="grad", mode="r+")
    array[0, 3] = 0  # of the initial state, which nothing consumes
    shown = run("check", store)
    assert shown.exit_code == 1
    assert "FAILS: every row follows from the row before, but the store was changed" in shown.stdout
    assert shown.stdout.splitlines()[-2].startswith("  altered-chunk: grad was changed after ")


def test_the_verdict_of_a_fault_goes_where_the_good_one_goes(tmp_path: Path, faulty: Path) -> None:
    result = run("check", faulty, "--format", "csv", "--output", tmp_path / "check.csv")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("FAILS: ")
    quiet = run("check", faulty, "--quiet", "--output", tmp_path / "check.txt")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (1, "", "")


@pytest.mark.parametrize("lr", ["0", "1e-30"])
@pytest.mark.parametrize("format_", ["table", "csv", "json"])
def test_a_run_in_which_nothing_moved_is_checked(
    tmp_path: Path, tiny: tuple[str, ...], lr: str, format_: str
) -> None:
    store = tmp_path / "run.zarr"
    succeeds("train", store, *tiny, "--lr", lr)
    result = succeeds("check", store, "--format", format_)
    if format_ == "json":
        rows = strict_json(result.stdout)["rows"]
        assert [row["norm_observed"] for row in rows] == 5 * [0.0]
        assert [row["ratio"] for row in rows] == 5 * [None]
