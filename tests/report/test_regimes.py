"""Regimes and freeze steps of tokens whose regimes are known."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.panels import figure_of, layer_of, summed
from tests.support.resting import EARLY, LATE, MIDLIFE, moves, regime, resting
from tests.support.runs import N_STEPS, N_TOKENS, live_mask
from thimble_zarr.report.figure import Bars, Image, Line, Rule, Stack
from thimble_zarr.report.panels.regimes import last_steps, regimes, token_image

GROUPS = {"dead": ~live_mask(), "live": live_mask(), "all": np.ones(N_TOKENS, bool)}


def test_shares_are_those_counted_token_by_token(toy_path: Path) -> None:
    (figure,) = regimes(resting(toy_path)).figures
    for group, mask in GROUPS.items():
        stack = layer_of(figure, Stack, group=group, label="")
        np.testing.assert_array_equal(stack.x, range(1, N_STEPS + 1))
        for name, heights in stack.heights.items():
            counts = [
                sum(regime(token, step) == name for token in np.flatnonzero(mask))
                for step in range(1, N_STEPS + 1)
            ]
            np.testing.assert_allclose(heights, np.array(counts) * 100 / mask.sum())
        assert (
            set(stack.heights)
            == {"early", "midlife", "late", "frozen"}
            == set(stack.colors) - {"not finite"}
        )


def test_fewer_columns_are_true_at_the_steps_that_are_left(toy_path: Path) -> None:
    whole, few = (
        layer_of(regimes(run).figures[0], Stack, group="all", label="")
        for run in (resting(toy_path), replace(resting(toy_path), n_columns=4))
    )
    assert len(few.x) == 4
    assert few.x[[0, -1]].tolist() == [1, N_STEPS]
    for name, heights in few.heights.items():
        np.testing.assert_array_equal(heights, whole.heights[name][few.x.astype(int) - 1])


def test_a_rule_says_when_half_have_frozen(toy_path: Path) -> None:
    (figure,) = regimes(resting(toy_path)).figures
    rules = {layer.group: layer for layer in figure.layers if isinstance(layer, Rule)}
    for group, mask in GROUPS.items():
        n_frozen = [(mask & (step > LATE)).sum() for step in range(1, N_STEPS + 1)]
        first = next((at for at, n in enumerate(n_frozen) if 2 * n >= mask.sum()), None)
        if first is None:
            assert group not in rules
        else:
            assert rules[group].x == first
            assert rules[group].label == f"half had made their last move by step {first}"


def test_weights_that_are_lost_are_not_called_frozen(toy_path: Path) -> None:
    ds = resting(toy_path).ds
    W = ds.W.values.copy()
    W[7:, 3] = np.nan
    with np.errstate(invalid="ignore"):
        run = summed(ds.assign(W=(ds.W.dims, W)))
    stack = layer_of(regimes(run).figures[0], Stack, group="all", label="")
    np.testing.assert_allclose(stack.heights["not finite"][[5, 6, -1]], [0, 100 / 11, 100 / 11])
    np.testing.assert_allclose(sum(stack.heights.values()), 100)
    freezing = figure_of(last_steps(run), "Last step with any change")
    n_before = ((LATE > 0) & (LATE < N_STEPS)).sum()
    assert layer_of_group(freezing.layers, "all").heights.sum() == n_before - 1


def layer_of_group(layers: list[Bars], group: str) -> Bars:
    (found,) = (layer for layer in layers if layer.group == group)
    return found


@pytest.mark.parametrize(
    ("title", "ends", "words"),
    [
        ("Last early step", EARLY, "8 left; 1 still early at step 13"),
        ("Last midlife step", MIDLIFE, "8 left; 2 still midlife at step 13"),
        ("Last step with any change", LATE, "7 at rest; 3 still moving at step 13"),
    ],
)
def test_histograms_count_who_left(
    toy_path: Path, title: str, ends: np.ndarray, words: str
) -> None:
    figure = figure_of(last_steps(resting(toy_path)), title)
    assert layer_of_group(figure.layers, "all").label == words
    for group, mask in GROUPS.items():
        bars = layer_of_group(figure.layers, group)
        np.testing.assert_array_equal(bars.edges, np.arange(N_STEPS + 1) + 0.5)
        counts = [(ends[mask] == step).sum() for step in range(1, N_STEPS)]
        np.testing.assert_array_equal(bars.heights, [*counts, 0])


def test_the_picture_has_a_row_a_token_sorted_by_freeze_step(toy_path: Path) -> None:
    (figure,) = token_image(resting(toy_path)).figures
    sizes = np.linalg.norm(moves(), axis=2)
    for group, mask in GROUPS.items():
        image = layer_of(figure, Image, group=group, label="")
        order = sorted(
            np.flatnonzero(mask),
            key=lambda token: (LATE[token], max(EARLY[token], MIDLIFE[token]), EARLY[token]),
        )
        np.testing.assert_array_equal(image.tokens, order)
        expected = sizes[:, order].T
        expected[:, 0] = np.nan  # nothing was before it
        np.testing.assert_allclose(image.values, expected, rtol=1e-6)
        assert image.x == (-0.5, N_STEPS + 0.5)
        assert image.y == (0, mask.sum())
        frozen = layer_of(figure, Line, group=group, label="last move")
        ends = np.where(LATE < N_STEPS, LATE + 0.5, np.nan)[order]
        np.testing.assert_array_equal(frozen.x, ends)
        np.testing.assert_array_equal(frozen.y, np.arange(mask.sum()) + 0.5)


@pytest.mark.parametrize("panel", [regimes, token_image, last_steps])
def test_where_no_change_is_known_nothing_is_drawn(toy_path: Path, panel: object) -> None:
    run = resting(toy_path)
    for steps in ([0], [0, 5, 10]):
        found = panel(replace(run, summary=run.summary.sel(step=steps)))
        assert found.figures == []
        assert "recorded together with the one before" in found.note


def test_steps_whose_row_before_is_missing_have_no_share(toy_path: Path) -> None:
    run = summed(resting(toy_path).ds.sel(step=[0, 1, 4, 5, 9, 10]))
    stack = layer_of(regimes(run).figures[0], Stack, group="all", label="")
    assert stack.x.tolist() == [1, 5, 10]
    (figure,) = token_image(run).figures
    image = layer_of(figure, Image, group="all", label="")
    is_blank = np.isnan(image.low).all(0)
    assert np.flatnonzero(~is_blank).tolist() == [1, 5, 10]


def test_a_group_may_be_empty(toy_path: Path) -> None:
    run = resting(toy_path)
    nobody = run.summary["is_member"].copy(data=run.summary["is_member"].values)
    nobody[0] = False
    run = replace(run, summary=run.summary.assign(is_member=nobody))
    for panel in (regimes, token_image):
        groups = {layer.group for layer in panel(run).figures[0].layers}
        assert groups == {"live", "all"}
