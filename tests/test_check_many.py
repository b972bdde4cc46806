"""`check` of several subsets of tokens in one pass."""

import csv
import io
from pathlib import Path

import pytest
from click.testing import Result

from tests.faults import flip_bit, rewrite
from tests.runs import N_LIVE, N_STEPS, N_TOKENS
from tests.test_cli import checked, fails, run
from thimble_zarr.analysis import accounting as accounting_module


def check(*args: object, exit_code: int = 0) -> Result:
    result = run("check", *args)
    assert result.exit_code == exit_code, result.output
    return result


@pytest.fixture
def faulty(toy_path: Path, tmp_path: Path) -> Path:
    """A copy of the toy run in which a bit of the live token 2 is flipped at step 5."""
    path = tmp_path / "faulty.zarr"
    rewrite(toy_path, path, lambda bits, scalars: flip_bit(bits["W"], (5, 2, 1), 10))
    return path


# --- subsets -------------------------------------------------------------------------------------


def test_subsets_are_shown_one_after_the_other(toy_path: Path) -> None:
    together = check(toy_path, "--tokens", "dead,live,all").stdout
    alone = [check(toy_path, "--tokens", subset).stdout for subset in ("dead", "live", "all")]
    assert together == "\n".join(alone)


def test_subsets_are_one_pass(toy_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    real = accounting_module.accounting

    def counted(*args: object, **options: object) -> object:
        passes.append(options["subsets"])
        return real(*args, **options)

    monkeypatch.setattr(accounting_module, "accounting", counted)
    check(toy_path, "--tokens", "dead,live,all")
    assert [list(subsets) for subsets in passes] == [["dead", "live", "all"]]


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
    assert [line.split(" HOLDS")[0] for line in lines] == ["all:", "dead:"]


def test_the_same_subset_twice_is_one(toy_path: Path) -> None:
    assert check(toy_path, "--tokens", "all,all").stdout == check(toy_path, "--tokens=all").stdout


def test_one_subset_that_fails_fails_the_check(toy_path: Path, faulty: Path) -> None:
    live, dead = checked(faulty, "--tokens", "live,dead", exit_code=1)["subsets"]
    assert (live["holds"], dead["holds"]) == (False, True)
    assert [finding["token"] for finding in live["findings"]] == [2]
    assert dead["findings"] == []
    shown = check(faulty, "--tokens", "live,dead", exit_code=1).stdout
    assert "FAILS: " in shown
    assert shown.splitlines()[-1].startswith("HOLDS to the bit: ")


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
