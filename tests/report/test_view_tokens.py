"""Tokens of the viewer: found, changed, sampled; held against the definitions, token by token."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from thimble_zarr.analysis.compute.source import Source
from thimble_zarr.analysis.selection import select_tokens
from thimble_zarr.report.run import Run
from thimble_zarr.report.view.tokens import REGIMES, Tokens, median_over_tokens
from thimble_zarr.store.reader import StoreReader

N_STEPS = 6


def tokens_of(
    moves: np.ndarray, n_dims: int = 4, lost: tuple[int, ...] = (), **coords: object
) -> Tokens:
    """Return tokens by the ULP (L-inf, on one dim) that each moved, shape (step, token)."""
    n_steps, n_tokens = moves.shape
    steps = np.arange(1, n_steps + 1)
    last = {
        "last_early": moves > np.sqrt(n_dims),
        "last_midlife": moves > 1,
        "freeze_step": moves > 0,
    }
    ids = np.arange(n_tokens) * 3 + 2
    norms = np.ones((n_steps + 1, n_tokens))
    norms[-1, lost] = np.nan
    summary = xr.Dataset(
        {name: ("token", (of * steps[:, np.newaxis]).max(0)) for name, of in last.items()}
        | {"norm_W": (("step", "token"), norms)},
        coords={"step": np.arange(n_steps + 1), "token": ids},
    )
    ds = xr.Dataset(coords={name: ("token", of) for name, of in coords.items()})
    return Tokens(Run(store="run.zarr", ds=ds, summary=summary))


def regimes_by_definition(moves: np.ndarray, n_dims: int = 4) -> np.ndarray:
    """Return the regime of each step and token, as an index, looking at every later step."""
    n_steps, n_tokens = moves.shape
    regimes = np.empty(moves.shape, int)
    for step in range(n_steps):
        for token in range(n_tokens):
            ahead = moves[step:, token]
            limits = (np.sqrt(n_dims), 1, 0)
            regimes[step, token] = next(
                (index for index, limit in enumerate(limits) if (ahead > limit).any()), 3
            )
    return regimes


@given(
    moves=st.lists(
        st.lists(st.sampled_from([0, 0.5, 1, 1.5, 2, 3]), min_size=5, max_size=5),
        min_size=N_STEPS,
        max_size=N_STEPS,
    ),
    span=st.tuples(st.integers(0, N_STEPS), st.integers(0, N_STEPS)),
)
def test_the_changes_of_a_span_are_those_of_the_definition(
    moves: list[list[float]], span: tuple[int, int]
) -> None:
    first, last = sorted(span)
    regimes = regimes_by_definition(np.array(moves))
    expected = sorted(
        (step, token, regimes[step - 1, token], regimes[step, token])
        for step in range(1, N_STEPS)
        for token in range(5)
        if first <= step <= last and regimes[step - 1, token] != regimes[step, token]
    )
    change = tokens_of(np.array(moves)).changed(first, last)
    assert [
        *zip(change.steps, change.positions, change.before, change.after, strict=True)
    ] == expected
    assert change.words == [f"{REGIMES[b]} → {REGIMES[a]}" for _, _, b, a in expected]


def test_a_token_whose_weights_are_no_numbers_any_more_is_not_called_frozen() -> None:
    moves = np.array([[3, 3], [0, 0], [0, 0]])
    assert tokens_of(moves, lost=(1,)).changed(1, 3).words == [
        "early → frozen",
        "early → not finite",
    ]


TEXTS = ["the", " the", "The", " other", "x", "12", "", " "]


@pytest.fixture(scope="module")
def named() -> Tokens:
    counts = np.array([5, 90, 7, 80, 3, 0, 0, 1])
    return tokens_of(np.ones((2, len(TEXTS))), text=TEXTS, n_occurrences=counts, dead=counts == 0)


@pytest.mark.parametrize(
    ("query", "texts"),
    [
        (" the", [" the", "The", "the", " other"]),
        ("the", ["the", " the", "The", " other"]),
        ("OTHER", [" other"]),
        ("he", [" the", " other", "The", "the"]),
        ("nothing", []),
        ("", []),
        (" ", [" "]),
    ],
)
def test_a_text_is_found_exact_before_alike_before_a_part(
    named: Tokens, query: str, texts: list[str]
) -> None:
    assert [TEXTS[position] for position in named.found(query)] == texts


def test_an_id_comes_before_a_text(named: Tokens) -> None:
    assert named.ids[named.found("14")].tolist() == [14]
    assert [TEXTS[position] for position in named.found("12")] == ["12"]
    assert named.found("the", n_most=2).tolist() == [0, 1]


def test_a_sample_has_other_tokens_as_many_of_each_kind(named: Tokens) -> None:
    listed = np.array([0, 1, 5])
    sample = named.sample(listed)
    assert not set(sample) & set(listed)
    assert len(set(sample.tolist())) == 3
    assert named.is_dead[sample].sum() == 1
    assert named.sample(np.arange(len(TEXTS))).size == 0


def test_the_median_is_that_of_numpy() -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=(5, 7))
    values[0] = values[2, 3] = np.nan
    positions = np.array([1, 3, 6])
    medians = median_over_tokens(xr.DataArray(values, dims=("step", "token")), positions)
    expected = [np.nan, *(np.nanmedian(row) for row in values[1:, positions])]
    np.testing.assert_array_equal(medians, expected)


def test_saved_ids_are_what_the_other_commands_read(toy_path: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("7\n2\n")
    source = Source(StoreReader.open(toy_path))
    assert select_tokens(source, f"@{tmp_path / 'ids.txt'}")[1].tolist() == [2, 7]
