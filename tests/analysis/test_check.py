"""`check` as a function: its result is data, and what the command line prints."""

import doctest
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import thimble_zarr
from tests.support.commands import checked, strict_json, succeeds
from tests.support.faults import Arrays, rewrite
from tests.support.zoo import Recorded
from thimble_zarr import accounting, check, open_dataset
from thimble_zarr.errors import NotAStoreError, SelectionError


def test_a_result_is_what_the_accounting_says(toy_path: Path) -> None:
    result = check(toy_path, tokens="dead", steps="3:9", extended=True)
    ds = open_dataset(toy_path)
    expected = accounting(ds.sel(token=ds.dead, step=slice(3, 9)), extended=True)
    assert result.holds
    assert result.findings == ()
    by = expected.attrs["replayed_by"]
    assert result.verdict.startswith(f"HOLDS to the bit: replayed by {by}, all 140 values each of ")
    assert result.table.t.tolist() == [*range(3, 10)]
    assert len(result.table.head()) == 5
    for name in ("norm_observed", "ratio", "cosine_similarity", "norm_unexplained"):
        np.testing.assert_array_equal(result.table[name], expected[name])
    (subset,) = result
    assert (subset.subset, subset.n_tokens, subset.steps) == ("dead", 4, (3, 9))
    np.testing.assert_array_equal(subset.numbers["n_different"], expected.n_different)


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, []),
        ({"tokens": "dead,all", "formula": False}, ["--tokens", "dead,all", "--no-formula"]),
        ({"tokens": "all", "replay": False}, ["--tokens", "all", "--no-replay"]),
        ({"tokens": [3, 9], "steps": "5"}, ["--tokens", "3,9", "--steps", "5"]),
    ],
)
def test_the_command_line_prints_its_json(
    toy_path: Path, options: dict[str, object], flags: list[str]
) -> None:
    assert check(toy_path, **options).to_json() == checked(toy_path, *flags)


def test_parameters_and_subsets_are_parts(zoo: Recorded) -> None:
    result = check(zoo.path)
    names = [subset.parameter for subset in result]
    assert len(names) == len({*names}) > 1
    assert all(subset.holds for subset in result)
    assert result.to_json() == strict_json(succeeds("check", zoo.path, "--format", "json").stdout)
    assert result.table.parameter.unique().tolist() == names
    assert [line.partition(",")[0] for line in result.verdict.splitlines()] == names
    one = check(zoo.path, parameters="wte*", tokens="dead,all")
    assert [subset.subset for subset in one] == ["dead", "all"]
    assert one.table.subset.unique().tolist() == ["dead", "all"]


def test_a_parameter_that_cannot_be_checked_is_no_end_of_the_others(zoo: Recorded) -> None:
    result = check(zoo.path, tokens="dead")
    assert not result.holds
    assert [subset.parameter for subset in result] == ["wte.weight"]
    errors = {of.parameter: of.error for of in result.parameters if of.error is not None}
    assert len(errors) == len(result.parameters) - 1
    assert all(isinstance(error, SelectionError) for error in errors.values())
    assert "norm, not checked: --tokens dead: the parameter norm has no tokens" in result.verdict
    with pytest.raises(SelectionError, match="has no tokens"):
        check(zoo.path, tokens="dead", parameters="norm")


def test_what_fails_is_named(toy_path: Path, tmp_path: Path) -> None:
    def change(bits: Arrays, scalars: Arrays) -> None:
        bits["W"][5, 3, 2] ^= 1 << 9

    rewrite(toy_path, tmp_path / "faulty.zarr", change)
    result = check(tmp_path / "faulty.zarr", tokens="all")
    assert not result.holds
    assert result.verdict.startswith("FAILS: from step 5 on, ")
    assert result.findings[0].step == 5
    assert result.to_json()["holds"] is False


def test_a_path_without_a_store_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotAStoreError):
        check(tmp_path)


def test_progress_is_told(toy_path: Path) -> None:
    told: list[tuple[int, int]] = []
    check(toy_path, progress=lambda n_done, n_tasks: told.append((n_done, n_tasks)))
    assert told == [(1, 1)]


def test_pandas_is_imported_when_the_table_is_asked_for(toy_path: Path) -> None:
    script = (
        "import sys; import thimble_zarr as t; r = t.check(sys.argv[1], tokens='dead'); "
        "assert not {'pandas', 'xarray', 'dask'} & set(sys.modules); r.to_json(); "
        "print(r.holds, 'pandas' in sys.modules, len(r.table.head()), r.table is r.table)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script, str(toy_path)], capture_output=True, text=True
    )
    assert shown.stdout == "True False 5 True\n", shown.stderr


def test_its_example_runs(toy_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.zarr").symlink_to(toy_path)
    monkeypatch.chdir(tmp_path)
    (example,) = doctest.DocTestFinder().find(thimble_zarr.check, "check")
    assert example.examples
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example).failed == 0
