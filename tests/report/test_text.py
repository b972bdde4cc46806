"""Tables for people, without the library that used to print them."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thimble_zarr.analysis.check_result import _summary
from thimble_zarr.report.text import DEFAULT_WIDTH, aligned, number_column, packed, wrapped

NUMBERS = st.one_of(
    st.floats(),
    st.floats(-1, 1),
    st.sampled_from([0.0, -0.0, 1.0, 0.5, 1e-6, 1e-7, 123456.75, 1e6, 1e7, 1e13]),
)

COLUMNS = st.lists(st.lists(NUMBERS, min_size=6, max_size=6), min_size=1, max_size=3)


@given(COLUMNS, st.sampled_from([2, 4, 6]))
def test_steps_are_printed_as_pandas_prints_them(columns: list[list[float]], n_shown: int) -> None:
    table = pd.DataFrame({"t": range(97, 103)} | dict(zip("abc", columns, strict=False)))
    expected = table.to_string(index=False, max_rows=n_shown)
    ends = n_shown // 2
    rows = table if n_shown == len(table) else pd.concat([table[:ends], table[-ends:]])
    gap_at = 0 if n_shown == len(table) else ends
    first, *others = (number_column(n, rows[n].tolist(), gap_at=gap_at) for n in table.columns)
    assert packed(first, others) == expected


@given(COLUMNS)
def test_named_rows_are_printed_as_pandas_prints_them(columns: list[list[float]]) -> None:
    names = ["a", "longer", "norm", "d", "e", "f"]
    table = pd.DataFrame(dict(zip("xyz", columns, strict=False)), index=names)
    first = [name.ljust(6) for name in ("", *names)]
    others = (number_column(name, table[name].tolist(), sign=" ") for name in table)
    assert packed(first, others) == table.to_string()


@given(st.one_of(st.lists(NUMBERS, min_size=1), st.lists(st.integers(0, 10**9), min_size=1)))
def test_a_summary_is_what_pandas_describes(values: list[float]) -> None:
    with np.errstate(all="ignore"):
        expected = pd.Series(values).describe().to_dict()
        found = _summary(np.array(values))
    assert list(found) == list(expected)
    np.testing.assert_array_equal([*found.values()], [*expected.values()])


def test_columns_that_are_too_wide_are_another_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    first = number_column("t", [1, 2])
    columns = [number_column(name * 7, [0.5, 0.25]) for name in "abc"]
    assert packed(first, columns) == (
        " t  aaaaaaa  bbbbbbb\n 1     0.50     0.50\n 2     0.25     0.25\n\n"
        " t  ccccccc\n 1     0.50\n 2     0.25"
    )


def test_words_and_cells_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrapped("word " * 40) == "word " * 40
    rows = [("seed1/a-long-name/run.zarr", "HOLDS"), ("b", "1")]
    assert aligned(rows) == "seed1/a-long-name/run.zarr  HOLDS\nb                               1"
    assert aligned(rows, width=20) == "seed1/…n.zarr  HOLDS\nb                  1"
    monkeypatch.setenv("COLUMNS", "30")
    assert max(map(len, wrapped("word " * 40).splitlines())) <= 30 < DEFAULT_WIDTH
