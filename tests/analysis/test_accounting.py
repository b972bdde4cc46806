"""The per-step table against independent arithmetic, and the verdict against planted faults."""

from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from tests.support import oracles
from tests.support.oracles import assert_same_table
from tests.support.reads import Reads
from tests.support.runs import N_STEPS, N_TOKENS, TINY_MEMORY, History, Loop, record
from tests.support.tuned import tuned
from thimble_zarr import Recorder, accounting, open_dataset
from thimble_zarr.analysis.audit.audit import Tally
from thimble_zarr.analysis.compute.windows import Window, _cut_evenly
from thimble_zarr.analysis.verdict import verdict
from thimble_zarr.errors import ConfigError, SelectionError
from thimble_zarr.optim.programs.compiled import is_available

STATES = ("W", "exp_avg", "exp_avg_sq")

TOY = {"lr": 1e-2, "weight_decay": 1e-2}
"""Hyper-parameters of the toy run."""

SUBSETS = {"dead": slice(7, 11), "live": slice(0, 7), "all": slice(None), "ids": [9, 0, 4]}


@pytest.fixture(
    scope="module", params=product([torch.bfloat16, torch.float32, torch.float64], [0.0, 0.5])
)
def decaying(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, History, torch.dtype, float]:
    """A run of a dtype and a weight decay, never to be written to, and what really happened."""
    dtype, weight_decay = request.param
    path = tmp_path_factory.mktemp("decaying") / "run.zarr"
    return path, record(path, dtype=dtype, weight_decay=weight_decay), dtype, weight_decay


@pytest.mark.parametrize("subset", SUBSETS)
def test_it_is_the_independent_computation(
    decaying: tuple[Path, History, torch.dtype, float], subset: str
) -> None:
    path, history, dtype, weight_decay = decaying
    part = open_dataset(path).isel(token=SUBSETS[subset])
    table = accounting(part)
    expected = oracles.in_float64(
        *(history[name][:, SUBSETS[subset]] for name in STATES),
        lr=1e-2,
        weight_decay=weight_decay,
    )
    assert_same_table(table, expected, dtype)
    assert table.step.values.tolist() == list(range(1, N_STEPS + 1))
    assert int(accounting(part, replay=False).n_beyond_rounding.sum()) == 0


@pytest.mark.parametrize("replay", [True, False])
def test_numpy_and_machine_code_agree(
    decaying: tuple[Path, History, torch.dtype, float],
    monkeypatch: pytest.MonkeyPatch,
    *,
    replay: bool,
) -> None:
    part = open_dataset(decaying[0])
    compiled = accounting(part, replay=replay)
    monkeypatch.setattr("thimble_zarr.analysis.compute.sums.is_available", lambda: False)
    xr.testing.assert_allclose(accounting(part, replay=replay), compiled, rtol=1e-6)


@pytest.mark.skipif(not is_available(), reason="there is no machine code here")
@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("part_bytes", [160, 2**19])
def test_what_machine_code_takes_at_once_has_the_bits_of_numpys_parts(
    decaying: tuple[Path, History, torch.dtype, float],
    monkeypatch: pytest.MonkeyPatch,
    part_bytes: int,
    *,
    replay: bool,
) -> None:
    tuned(monkeypatch, part_bytes=part_bytes)
    # A replay looks at how states begin, before step 1, part by part.
    ds = open_dataset(decaying[0]).isel(step=slice(1 + replay, None))
    real, taken = Tally.at_once, list[bool]()

    def at_once(tally: Tally, whole: Window) -> list[list[np.ndarray]] | None:
        found = real(tally, whole)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(Tally, "at_once", at_once)
    expected = accounting(ds, replay=replay)
    if not replay or decaying[2] == torch.bfloat16:  # of float32 torch's square roots may differ
        assert all(taken)
    monkeypatch.setattr("thimble_zarr.analysis.compute.sums._is_for_numpy", lambda part: True)
    xr.testing.assert_identical(accounting(ds, replay=replay), expected)


def test_windows_and_tasks_may_be_cut_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = record(tmp_path / "run.zarr", n_steps=40)
    expected = oracles.in_float64(*(history[name] for name in STATES), **TOY)
    for task_steps, window, part in ((1, 1, 4), (8, 60, 80), (256, 2**17, 2**18), (12, 111, 41)):
        tuned(monkeypatch, task_steps=task_steps)
        tuned(monkeypatch, window_elements=window, cached_elements=window, part_bytes=part)
        ds = open_dataset(tmp_path / "run.zarr")
        for replay in (True, False):
            assert_same_table(accounting(ds, replay=replay), expected)


def test_the_formula_alone_goes_through_a_block_a_few_chunks_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"memory_bytes": 32 * 2**20}
    sizes = {"n_tokens": 1999, "n_dims": 11, "n_live": 1500}
    record(tmp_path / "run.zarr", n_steps=70, **sizes, recorder_options=options)
    ds = open_dataset(tmp_path / "run.zarr")
    odd = np.arange(1999) % 3 == 1  # classes that lie among each other
    subsets = {"all": np.arange(1999), "odd": np.flatnonzero(odd), "some": np.arange(400, 1300)}
    expected = accounting(ds, replay=False, subsets=subsets)
    for elements, part in ((1, 2**12), (2**16, 2**30), (2**30, 2**19)):
        tuned(monkeypatch, cached_elements=elements, part_bytes=part)
        reads = Reads(monkeypatch)
        table = accounting(ds, replay=False, subsets=subsets)
        xr.testing.assert_allclose(table, expected, rtol=1e-12)
        assert set(reads.chunks) == {
            (f"{name}/c.{block}.0.0", chunk)
            for name in STATES
            for block in (0, 1)
            for chunk in range(21)
        }
        assert len(reads.chunks) == len(set(reads.chunks))
    some = {"step": [0, 3, 4, 9, 64, 65, 69], "dim": [7, 2]}
    by_default = accounting(ds.isel(some), replay=False)
    tuned(monkeypatch, cached_elements=1)
    xr.testing.assert_allclose(accounting(ds.isel(some), replay=False), by_default, rtol=1e-12)
    part = ds.isel(token=np.flatnonzero(odd)[::-1])
    alone = accounting(part, replay=False)
    xr.testing.assert_allclose(alone, expected.sel(subset="odd", drop=True), rtol=1e-12)


def test_parts_are_alike_and_not_much_larger_than_asked_for() -> None:
    for length in (1, 7, 128):
        for stop in range(5, 600, 7):
            parts = _cut_evenly(5, stop, length)
            sizes = [part.stop - part.start for part in parts]
            assert sum(sizes) == stop - 5
            assert all(before.stop == after.start for before, after in pairwise(parts))
            assert all(0 < size <= 1.25 * length for size in sizes)
            assert len(parts) <= -(-(stop - 5) // length)


def test_steps_and_dims_may_be_selected(toy_path: Path, toy_history: History) -> None:
    ds = open_dataset(toy_path)
    whole = accounting(ds)
    for steps in (slice(5, 9), [3, 11, 4], [0, 13]):
        part = accounting(ds.sel(step=steps))
        xr.testing.assert_allclose(part, whole.sel(step=part.step), rtol=1e-12)
    one = accounting(ds.sel(step=6))
    assert one.step.values.tolist() == [6]
    np.testing.assert_allclose(one.ratio, whole.ratio.sel(step=[6]))
    expected = oracles.in_float64(*(toy_history[name][..., [4, 1]] for name in STATES), **TOY)
    assert_same_table(accounting(ds.isel(dim=[4, 1])), expected)
    one_token = oracles.in_float64(*(toy_history[name][:, [3]] for name in STATES), **TOY)
    assert_same_table(accounting(ds.sel(token=3)), one_token)


def test_a_changing_learning_rate_is_used(tmp_path: Path) -> None:
    loop = Loop(dtype=torch.float64)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(loop.optimizer, 0.5)
    with Recorder(tmp_path / "run.zarr", loop.optimizer, parameter=loop.weight):
        for _ in range(5):
            loop.step()
            scheduler.step()
    np.testing.assert_allclose(accounting(open_dataset(tmp_path / "run.zarr")).ratio, 1, rtol=1e-9)


def test_what_does_not_move_has_no_cosine(tmp_path: Path) -> None:
    record(tmp_path / "run.zarr", lr=0.0)
    table = accounting(open_dataset(tmp_path / "run.zarr"))
    assert np.isnan(table.cosine_similarity).all()
    assert verdict(table).text.endswith("no weight moved.")


def test_an_empty_selection_is_an_error(toy_path: Path) -> None:
    ds = open_dataset(toy_path)
    no_step = (ds.isel(step=[]), ds.sel(step=0), ds.sel(step=[0]), ds.sel(step=slice(9, 5)))
    for empty in (ds.isel(token=[]), ds.sel(token=slice(5, 3)), *no_step):
        with pytest.raises(SelectionError, match="nothing is selected"):
            accounting(empty)


def test_a_dataset_that_is_no_longer_lazy_is_an_error(toy_path: Path) -> None:
    ds = open_dataset(toy_path)
    for changed in (ds.compute(), ds * 2, ds.drop_vars("W")):
        with pytest.raises(SelectionError, match="needs the lazy variables"):
            accounting(changed)


@pytest.mark.parametrize("replay", [True, False])
def test_a_sound_run_holds(toy_path: Path, replay: bool) -> None:
    table = accounting(open_dataset(toy_path), replay=replay)
    found = verdict(table)
    assert found.holds
    n_elements = N_STEPS * N_TOKENS * 5
    assert found.text.startswith(
        f"HOLDS to the bit: replayed by {table.attrs['replayed_by']}, all {n_elements:,} values "
        "each of W, exp_avg and exp_avg_sq "
        if replay
        else f"HOLDS: all {n_elements:,} weight changes"
    )
    assert "at step 13" in found.text


class Faulty:
    """A recording in which one thing is not as it was."""

    def __init__(self, path: Path, *, dtype: torch.dtype) -> None:
        self.loop = Loop(dtype=dtype)
        self.recorder = Recorder(
            path, self.loop.optimizer, parameter=self.loop.weight, memory_bytes=TINY_MEMORY
        )

    def run(self, fault: str) -> None:
        weight = self.loop.weight
        group = self.loop.optimizer.param_groups[0]
        with self.recorder:
            for step in range(1, N_STEPS + 1):
                self.loop.backward()
                if fault == "another learning rate than recorded" and step == 4:
                    group["lr"] = 3e-2
                    hook = self.loop.optimizer.register_step_post_hook(
                        lambda *a: group.update(lr=1e-2)
                    )
                    self.loop.optimizer._optimizer_step_post_hooks.move_to_end(hook.id, last=False)
                self.loop.optimizer.step()
                if fault == "weights changed by something else" and step == 4:
                    with torch.no_grad():
                        weight[7, 2] += 0.5
                if fault == "states changed after the step" and step == 4:
                    self.loop.optimizer.state[weight]["exp_avg"].mul_(-2)
                self.loop.optimizer.zero_grad()


PLANTED = [
    ("another learning rate than recorded", 4),
    ("weights changed by something else", 5),
]
"""Faults, and the first step whose weights do not follow."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("fault", "first"), PLANTED)
def test_a_planted_fault_fails_where_it_begins(
    tmp_path: Path, fault: str, first: int, dtype: torch.dtype
) -> None:
    Faulty(tmp_path / "run.zarr", dtype=dtype).run(fault)
    table = accounting(open_dataset(tmp_path / "run.zarr"), replay=False)
    found = verdict(table)
    assert not found.holds
    assert found.text.startswith("FAILS")
    assert f"first at step {first}." in found.text
    assert found.step == first
    assert int(table.n_beyond_rounding.sel(step=slice(1, first - 1)).sum()) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("fault", "first"), PLANTED)
def test_the_replay_fails_where_a_planted_fault_begins(
    tmp_path: Path, fault: str, first: int, dtype: torch.dtype
) -> None:
    Faulty(tmp_path / "run.zarr", dtype=dtype).run(fault)
    table = accounting(open_dataset(tmp_path / "run.zarr"))
    found = verdict(table)
    assert not found.holds
    assert found.text.startswith(f"FAILS: from step {first} on, ")
    assert found.step == first
    assert int(table.n_different.sel(step=slice(1, first - 1)).sum()) == 0
    assert (table.n_different.sel(recurrence=["exp_avg", "exp_avg_sq"]) == 0).all()
    xr.testing.assert_equal(table.n_beyond, table.n_different.rename("n_beyond"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_replay_sees_states_that_were_changed_between_steps(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    Faulty(tmp_path / "run.zarr", dtype=dtype).run("states changed after the step")
    table = accounting(open_dataset(tmp_path / "run.zarr"))
    n_different = table.n_different.sel(recurrence="exp_avg")
    # The change made after step 4 is in what step 5 starts from, not in what step 4 recorded.
    assert np.flatnonzero(n_different).tolist() == [4]
    assert int(n_different.sel(step=5)) > 50
    assert verdict(table).text.startswith("FAILS: from step 5 on, ")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fault", ["none", "states changed after the step", PLANTED[1][0]])
def test_the_replay_alone_is_that_beside_the_formula(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, dtype: torch.dtype
) -> None:
    Faulty(tmp_path / "run.zarr", dtype=dtype).run(fault)
    ds = open_dataset(tmp_path / "run.zarr")
    subsets = {"some": np.array([7, 8]), "all": np.arange(11)}
    both = accounting(ds, subsets=subsets)
    # Nothing of the formula is computed.
    monkeypatch.delattr("thimble_zarr.analysis.audit.audit.update")
    alone = accounting(ds, subsets=subsets, formula=False)
    xr.testing.assert_identical(alone, both.drop_vars(oracles.COLUMNS))
    assert (
        verdict(alone.sel(subset="all")).text
        == (verdict(both.sel(subset="all")).text.partition(" AdamW's formula agrees")[0])
    )
    assert verdict(alone.sel(subset="all")).holds == (fault == "none")


def test_without_the_formula_weights_that_are_not_finite_fail(tmp_path: Path) -> None:
    loop = Loop()
    with Recorder(tmp_path / "run.zarr", loop.optimizer, parameter=loop.weight):
        for step in range(1, 5):
            loop.backward()
            if step == 3:
                loop.weight.grad[2, 4] = torch.inf
            loop.optimizer.step()
            loop.optimizer.zero_grad()
    ds = open_dataset(tmp_path / "run.zarr")
    table = accounting(ds, formula=False)
    assert not table.n_different.any()  # as replayed
    assert table.n_not_finite.values.tolist() == [0, 0, 1, 1]
    assert "2 of 220 weight changes are not finite, first at step 3" in verdict(table).text
    assert not verdict(table).holds
    assert verdict(accounting(ds.drop_sel(token=2), formula=False)).holds


def test_what_leaves_nothing_to_check_is_an_error(toy_path: Path) -> None:
    ds = open_dataset(toy_path)
    with pytest.raises(ConfigError, match="nothing is left to check"):
        accounting(ds, formula=False, replay=False)
    with pytest.raises(ConfigError, match="extended columns are of the formula's table"):
        accounting(ds, formula=False, extended=True)


@pytest.mark.parametrize("replay", [True, False])
def test_the_same_loop_without_a_fault_holds(tmp_path: Path, replay: bool) -> None:
    Faulty(tmp_path / "run.zarr", dtype=torch.float32).run("none")
    assert verdict(accounting(open_dataset(tmp_path / "run.zarr"), replay=replay)).holds


def test_one_changed_element_is_found(tmp_path: Path) -> None:
    Faulty(tmp_path / "run.zarr", dtype=torch.float32).run("weights changed by something else")
    ds = open_dataset(tmp_path / "run.zarr")
    assert int(accounting(ds, replay=False).n_beyond_rounding.sel(step=5)) == 1
    table = accounting(ds)
    found = table.sel(recurrence="W")
    assert found.n_different.values.tolist() == [0] * 4 + [1] + [0] * 8
    assert (int(found.first_token[4]), int(found.first_dim[4])) == (7, 2)
    assert float(table.norm_unexplained.sel(step=5)) == pytest.approx(
        0.5 * (1 - 1e-2 * 1e-2), rel=1e-6
    )
    untouched = open_dataset(tmp_path / "run.zarr").sel(token=[0, 1, 6, 8])
    for replay in (True, False):
        assert verdict(accounting(untouched, replay=replay)).holds


@pytest.mark.parametrize("replay", [True, False])
def test_rows_shifted_by_one_step_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replay: bool
) -> None:
    """States of step t+1 stored under step t, as an alias that is copied too late would be."""
    from thimble_zarr.record.capture import LiveOptimizer

    real = LiveOptimizer.states
    late: list[dict[str, torch.Tensor]] = []

    def states(*args: object) -> dict[str, torch.Tensor]:
        late.append({name: tensor.clone() for name, tensor in real(*args).items()})
        shifted = late[-2] if len(late) > 2 else late[-1]
        return shifted | {"W": late[-1]["W"]}

    monkeypatch.setattr(LiveOptimizer, "states", states)
    record(tmp_path / "run.zarr")
    assert not verdict(accounting(open_dataset(tmp_path / "run.zarr"), replay=replay)).holds


def test_missing_values_are_not_explained(tmp_path: Path) -> None:
    loop = Loop(dtype=torch.float32)
    with Recorder(tmp_path / "run.zarr", loop.optimizer, parameter=loop.weight):
        loop.step()
        with torch.no_grad():
            loop.weight[3] = torch.nan
        loop.step()
    ds = open_dataset(tmp_path / "run.zarr")
    table = accounting(ds)
    assert int(table.n_not_finite.sel(step=2)) >= 5
    assert int(accounting(ds, replay=False).n_beyond_rounding.sel(step=2)) >= 5
    found = verdict(table)
    assert not found.holds
    assert "are not finite, first at step 2: the run diverged" in found.text
    assert found.step == 2


@pytest.mark.parametrize("lr", [1e-20, 1e18])
def test_changes_beyond_float32_squares_are_summed_in_float64(tmp_path: Path, lr: float) -> None:
    """The square of a 16-bit change may be no float32 number: 1e-40, or 1e40."""
    history = record(tmp_path / "run.zarr", lr=lr, n_steps=1)
    assert_same_table(
        accounting(open_dataset(tmp_path / "run.zarr")),
        oracles.in_float64(*(history[name] for name in STATES), lr=lr, weight_decay=1e-2),
    )


SUBSETS_IN_ONE_PASS = {"dead": [7, 8, 9, 10], "all": list(range(11)), "ids": [9, 0, 4], "one": [3]}


def test_subsets_in_one_pass_are_as_each_alone(
    toy_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support.reads import Reads

    ds = open_dataset(toy_path)
    subsets = {name: np.array(ids) for name, ids in SUBSETS_IN_ONE_PASS.items()}
    alone = {name: accounting(ds.sel(token=ids), extended=True) for name, ids in subsets.items()}
    reads = Reads(monkeypatch)
    table = accounting(ds, subsets=subsets, extended=True)
    n_chunks = len(reads.chunks)
    assert len(set(reads.chunks)) == n_chunks  # one pass: no chunk twice
    assert table.subset.values.tolist() == list(subsets)
    for name, expected in alone.items():
        assert int(table.sel(subset=name).n_elements) == int(expected.n_elements)
        xr.testing.assert_allclose(table.sel(subset=name, drop=True), expected, rtol=1e-6)


def test_a_subset_that_is_not_selected_is_an_error(toy_path: Path) -> None:
    ds = open_dataset(toy_path).isel(token=[1, 2])
    with pytest.raises(SelectionError, match="subset far has tokens that are not selected: 9"):
        accounting(ds, subsets={"near": np.array([1]), "far": np.array([9])})
    with pytest.raises(SelectionError, match="subset none is empty"):
        accounting(ds, subsets={"none": np.array([], int)})
