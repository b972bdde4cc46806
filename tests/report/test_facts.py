"""What is told of a run first, against what really happened to it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import thimble_zarr
from tests.support.panels import layer_of, summed
from tests.support.resting import LATE, moves
from tests.support.resting import resting as at_rest
from tests.support.runs import History
from tests.support.summary_oracle import spacing_of
from thimble_zarr.report.browser.facts import facts, largest_step, median_freeze_steps, resting
from thimble_zarr.report.figure import Stack
from thimble_zarr.report.panels.regimes import Exits, regimes
from thimble_zarr.report.rests import Rests
from thimble_zarr.report.run import Run


@pytest.fixture(scope="module")
def run(toy_run: tuple[Path, History]) -> Run:
    store = str(toy_run[0])
    ds = thimble_zarr.open_dataset(store)
    return Run(store=store, ds=ds, summary=thimble_zarr.summary(ds).load())


def frozen_at(run: Run, steps: list[int]) -> Run:
    """Return the run as if its tokens had moved last at these steps, of 13."""
    return replace(run, summary=run.summary.assign(freeze_step=("token", np.array(steps))))


def test_when_a_group_froze_and_what_of_it_did_not(run: Run) -> None:
    dead = run.members["dead"]
    steps = np.full(11, 13)
    steps[np.flatnonzero(dead)] = [0, 4, 7, 13]
    of = frozen_at(run, steps.tolist())
    table, caption = resting(of)
    rows = {row[0]: row[1:] for row in table[1:]}
    # Nothing was seen to rest and move again: all move at each step.
    assert rows["dead"] == ("4", "3", "0", "4", "7", "4", "9", "0", "1")
    assert rows["live"] == ("7", "0", "-", "-", "-", "-", "-", "0", "7")
    assert rows["all"] == ("11", "3", "0", "4", "7", "-", "9", "0", "8")
    assert {len(row) for row in table} == {10}
    assert caption.endswith("to the end of the recording.")
    assert median_freeze_steps(of) == {"dead": 5.5, "all": 5.5}  # of those that moved at all


def test_what_is_not_finite_is_not_called_frozen(run: Run) -> None:
    of = frozen_at(run, [5] * 11)
    norms = of.summary.norm_W.values.copy()
    norms[-1, :2] = np.nan, np.inf
    broken = replace(of, summary=of.summary.assign(norm_W=(("step", "token"), norms)))
    header, *rows = resting(broken)[0]
    assert header[-1] == "not finite"
    assert rows[-1][-10:] == ("11", "9", "5", "5", "5", "5", "8", "0", "0", "2")


def test_nothing_froze_in_a_run_that_still_moves_or_has_no_step(run: Run) -> None:
    assert median_freeze_steps(frozen_at(run, [13] * 11)) == {}

    initial = replace(run, summary=run.summary.isel(step=slice(1)))
    assert len(resting(initial)[0]) == 1


def rests_that_ended(token: int, steps: range) -> list[int]:
    """Return the lengths of the rests of a token between its moves at those steps."""
    sizes = np.abs(moves()[:, token]).sum(1)
    text = "".join(".m"[int(sizes[step] > 0)] for step in steps).strip(".")
    return [len(rest) for rest in text.split("m") if rest]


def test_a_rest_that_ended_is_told_beside_those_at_the_end(toy_path: Path) -> None:
    run = at_rest(toy_path)
    table, caption = resting(run)
    rows = {row[0]: row[1:] for row in table[1:]}
    for name, mask in run.members.items():
        ended = [rests_that_ended(token, range(1, 14)) for token in np.flatnonzero(mask)]
        longest = max((max(of, default=0) for of in ended), default=0)
        lengths = 13 - LATE[mask & (LATE < 13)]
        assert longest > 0
        assert rows[name][6:8] == (f"{np.median(lengths):,.0f}", str(longest))
        assert f"{longest} steps ({name})" in caption


def test_a_rest_is_of_steps_whose_change_is_known(toy_path: Path) -> None:
    whole = at_rest(toy_path)
    few = summed(whole.ds.sel(step=[*range(6), 9, 10]))
    expected = [max([*rests_that_ended(token, range(1, 6)), 0]) for token in range(len(LATE))]
    assert Rests.of(few, Exits.of(few)).ended.tolist() == expected
    assert Exits.of(few).last == 10


def test_weights_that_are_lost_are_at_rest_nowhere(toy_path: Path) -> None:
    ds = at_rest(toy_path).ds
    W = ds.W.values.copy()
    W[7:, 3] = np.nan
    with np.errstate(invalid="ignore"):
        run = summed(ds.assign(W=(ds.W.dims, W)))
    table, _ = resting(run)
    all_of = dict(zip(table[0], table[-1], strict=True))
    stack = layer_of(regimes(run).figures[0], Stack, group="all", label="")
    n_at_rest = stack.heights["frozen"][-1] * 11 / 100
    assert all_of["not finite"] == "1"
    # The picture's last step is one at which the last to move still do.
    assert int(all_of["at rest at the end"]) == round(n_at_rest)
    assert int(all_of["still moving at the end"]) == 11 - 1 - round(n_at_rest)


def test_the_largest_step_in_ulp_tells_of_the_weight_that_was_near_0(toy_path: Path) -> None:
    ds = at_rest(toy_path).ds
    W = ds.W.values.copy()
    W[4, 6, 2], W[5, 6, 2] = 2.0**-30, 1.5
    ulp = spacing_of(W, "bfloat16").astype(np.float32)
    run = summed(ds.assign(W=(ds.W.dims, W), ulp=(ds.W.dims, ulp)))
    told = largest_step(run, "l2_ulp")
    assert told.startswith('step 5, token 6 " t6": ')
    n_ulps = (1.5 - 2.0**-30) / 2.0**-37
    assert f"its farthest dim by {n_ulps:,.4g} ULP, from 9.313e-10 to 1.5" in told


def test_the_largest_step_is_found(run: Run, toy_history: History) -> None:
    change = np.linalg.norm(np.diff(toy_history["W"], axis=0), axis=2)
    row, token = np.unravel_index(change.argmax(), change.shape)
    text = largest_step(run, "norm_delta_W")
    assert text.startswith(f'step {row + 1}, token {token} " t{token}": ')
    assert f"|delta W| {change.max():.4g}," in text


def test_what_was_trained_is_told(run: Run) -> None:
    told = facts(run)
    assert told["parameter"].endswith("11 x 5, on cpu")
    assert told["steps"] == "0 to 13, 14 rows"
    assert told["tokens"] == "4 dead (never in the training text), 7 live (in it), 11 all"
    assert told["optimizer"].startswith("AdamW")
    assert "lines" not in told
    assert "up to 3 steps" in facts(replace(run, n_columns=5))["lines"]
    assert "learning rate 0.01, beta1" in told["hyper-parameters"]
    rates = np.append(np.nan, np.geomspace(0.5, 0.125, 13))
    decayed = replace(run, ds=run.ds.assign(learning_rate=("step", rates)))
    assert "learning rate 0.5 to 0.125, beta1" in facts(decayed)["hyper-parameters"]
