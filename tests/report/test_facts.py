"""What is told of a run first, against what really happened to it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import thimble_zarr
from tests.support.runs import History
from thimble_zarr.report.browser.facts import facts, freezing, largest_step, median_freeze_steps
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
    rows = {row[0]: row[1:] for row in freezing(of)[1:]}
    assert rows["dead"] == ("4", "3", "0", "4", "7", "4", "1")
    assert rows["live"] == ("7", "0", "-", "-", "-", "-", "7")
    assert rows["all"] == ("11", "3", "0", "4", "7", "-", "8")
    assert median_freeze_steps(of) == {"dead": 5.5, "all": 5.5}  # of those that moved at all


def test_what_is_not_finite_is_not_called_frozen(run: Run) -> None:
    of = frozen_at(run, [5] * 11)
    norms = of.summary.norm_W.values.copy()
    norms[-1, :2] = np.nan, np.inf
    broken = replace(of, summary=of.summary.assign(norm_W=(("step", "token"), norms)))
    header, *rows = freezing(broken)
    assert header[-1] == "not finite"
    assert rows[-1][-8:] == ("11", "9", "5", "5", "5", "5", "0", "2")


def test_nothing_froze_in_a_run_that_still_moves_or_has_no_step(run: Run) -> None:
    assert median_freeze_steps(frozen_at(run, [13] * 11)) == {}

    initial = replace(run, summary=run.summary.isel(step=slice(1)))
    assert len(freezing(initial)) == 1


def test_the_largest_step_is_found(run: Run, toy_history: History) -> None:
    change = np.linalg.norm(np.diff(toy_history["W"], axis=0), axis=2)
    row, token = np.unravel_index(change.argmax(), change.shape)
    text = largest_step(run)
    assert text.startswith(f'step {row + 1}, token {token} " t{token}": ')
    assert f"|delta W| {change.max():.4g}," in text


def test_what_was_trained_is_told(run: Run) -> None:
    told = facts(run)
    assert told["parameter"].endswith("11 x 5, on cpu")
    assert told["steps"] == "0 to 13, 14 rows"
    assert told["tokens"] == "4 dead, 7 live, 11 all"
    assert told["optimizer"].startswith("AdamW")
    assert "learning rate 0.01, beta1" in told["hyper-parameters"]
    rates = np.append(np.nan, np.geomspace(0.5, 0.125, 13))
    decayed = replace(run, ds=run.ds.assign(learning_rate=("step", rates)))
    assert "learning rate 0.5 to 0.125, beta1" in facts(decayed)["hyper-parameters"]
