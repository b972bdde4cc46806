"""What holds of every optimizer in the registry: its formula, its bounds, its replay."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from tests.support.draws import SHAPE, draw, gradient
from tests.support.faults import Arrays, flip_bit, rewrite
from tests.support.optimizers import (
    DTYPES,
    ELEMENTWISE,
    Kind,
    Step,
    every_kind,
    kinds,
    runnable,
    steps,
)
from thimble_zarr import Recorder, accounting, check, open_dataset
from thimble_zarr.bits import patterns, unit_roundoff
from thimble_zarr.optim.base import COUNT, Optimizer
from thimble_zarr.optim.formula import W_BEFORE, Formula, Precision
from thimble_zarr.optim.registry import (
    REGISTRY,
    SCALARS,
    VARIABLES,
    read_optimizer,
    spec_of,
    step_scalars,
)
from thimble_zarr.optim.specs.adam import Adam
from thimble_zarr.optim.specs.sgd import SGD
from thimble_zarr.store.reader import StoreReader

names = pytest.mark.parametrize("name", REGISTRY)
in_float64 = pytest.mark.parametrize("kind", kinds(natives=("float64",)))
of_every_pair = pytest.mark.parametrize("kind", kinds())
N_ELEMENTS = int(np.prod(SHAPE))


def test_the_kinds_that_are_run_have_every_pair_that_matters() -> None:
    """Only a variant need not meet every implementation and every dtype."""

    def pairs(ids: Iterable[str]) -> set[tuple[str, ...]]:
        axes = [way.split("-", 3) for way in ids]
        by_axis = [pair for name, *of in axes for pair in combinations([name, *of], 2)]
        variants = {variant for *_, variant in axes}
        names = {name for name, *_ in axes}
        return {(one, two) for one, two in by_axis if two not in variants or one in names}

    every = [way for name in ELEMENTWISE for way in every_kind(name, tuple(DTYPES))]
    few = [param.id for param in kinds()]
    assert pairs(few) == pairs(every)
    assert set(few) <= set(every)
    assert pairs(few[1:]) < pairs(every)
    adams = {"-".join(way.split("-")[:3]) for way in every if way.startswith("Adam-")}
    assert adams <= {"-".join(way.split("-")[:3]) for way in few}


def formula(spec: Optimizer) -> Formula:
    if spec.formula is None:
        pytest.skip("it has no formula")
    return spec.formula


def formula_inputs(step: Step) -> dict[str, np.ndarray]:
    numbers = step.numbers({**step.before, **step.after})
    return numbers | {W_BEFORE: step.numbers(step.before)["W"]}


def predicted(step: Step) -> tuple[np.ndarray, np.ndarray]:
    """The formula's update, and the decay."""
    of, inputs = formula(step.spec), formula_inputs(step)
    update = of.update(inputs, of.coefficients(step.arrays))
    decay = of.decay_factor(step.arrays) * step.numbers(step.before)["W"]
    return update, decay + np.zeros_like(update)


def moved(step: Step) -> np.ndarray:
    return step.numbers(step.after)["W"] - step.numbers(step.before)["W"]


@names
def test_a_registered_name_is_one_of_torchs_classes(name: str) -> None:
    kind = getattr(torch.optim, name)
    assert spec_of(kind) is REGISTRY[name]
    assert spec_of(type("Mine", (kind,), {})) is REGISTRY[name]


@pytest.mark.parametrize("kind", [torch.optim.SparseAdam, torch.optim.LBFGS, object])
def test_others_are_none_that_is_known(kind: type) -> None:
    assert spec_of(kind) is None


@names
def test_its_names_are_in_the_format(name: str) -> None:
    spec = REGISTRY[name]
    assert {state.name for state in spec.STATES} <= {*VARIABLES} - {"W", "grad"}
    assert {scalar.name for scalar in spec.SCALARS} <= {*SCALARS} - {"loss", COUNT}
    assert {(of.name, of.long_name) for of in spec.STATES} <= {*VARIABLES.items()}
    # One name may be of another number in another optimizer.
    assert {(of.name, of.long_name) for of in spec.SCALARS} <= {*step_scalars(spec).items()}


@pytest.mark.parametrize("kind", kinds(natives=("float32",)))
def test_it_survives_json_also_as_a_subclass(kind: Kind) -> None:
    spec = next(steps(kind, 1)).spec
    for one in (spec, replace(spec, name="Mine")):
        assert read_optimizer(json.loads(json.dumps(asdict(one)))) == one
    with pytest.raises(TypeError, match="implementation is 3"):
        read_optimizer(asdict(spec) | {"implementation": 3})
    with pytest.raises(TypeError):
        read_optimizer(asdict(spec) | {"name": "Mine", "unknown": True})


def test_a_store_of_before_names_no_function() -> None:
    adam = {"decoupled_weight_decay": False, "amsgrad": True, "betas_dtype": None}
    sgd = {"has_momentum": True, "nesterov": False, "maximize": True}
    for spec, content in {Adam: adam, SGD: sgd}.items():
        found = read_optimizer({"name": "Mine", "implementation": "single", **content})
        assert found == spec(name="Mine", implementation="single", **content)


@pytest.mark.parametrize("content", [{}, {"maximize": False}, {"lr_dtype": None}])
def test_what_nobody_registered_is_no_other_optimizer(content: dict[str, object]) -> None:
    with pytest.raises(TypeError, match="no optimizer is known that has name, implementation"):
        read_optimizer({"name": "Mine", "implementation": "single", **content})


@of_every_pair
def test_torch_has_these_states_and_counts_so(kind: Kind) -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 2, dtype=kind.dtype))
    optimizer = kind.make(parameter)
    spec = REGISTRY[kind.name].from_group(optimizer.param_groups[0], type(optimizer))
    begun = optimizer.state.get(parameter, {})
    for of in spec.states if begun else ():
        assert (begun[of.name] == torch.tensor(of.first, dtype=kind.dtype)).all()
    for count in (1, 2):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        state = optimizer.state.get(parameter, {})
        held = {name for name, value in state.items() if value is not None}
        numbers = {of.key for of in spec.SCALARS if of.held is not None}
        assert held == {*(of.name for of in spec.states), *numbers, spec.STEP_KEY} - {None}
        assert all(state[of.name].shape == parameter.shape for of in spec.states)
        if spec.STEP_KEY is not None:
            assert float(state[spec.STEP_KEY]) == count


def tolerance(step: Step) -> dict[str, float]:
    """That of float64, or of programs whose scalars are computed in float32."""
    if formula(step.spec).scalar_dtype == "float64":
        return {"rtol": 1e-10, "atol": 1e-15}
    return {"rtol": 1e-4, "atol": 1e-8}


@in_float64
def test_in_float64_the_formula_is_torchs_step(kind: Kind) -> None:
    for step in steps(kind, 20):
        update, decay = predicted(step)
        np.testing.assert_allclose(moved(step), update + decay, **tolerance(step))


@in_float64
def test_in_float64_the_recurrences_are_torchs(kind: Kind) -> None:
    for step in steps(kind, 5):
        before = step.numbers(step.before)
        after = formula(step.spec).advance(before, before["grad"], step.arrays)
        assert {*after} == {state.name for state in step.spec.states}
        for name, values in after.items():
            np.testing.assert_allclose(step.numbers(step.after)[name], values, **tolerance(step))


@pytest.mark.parametrize(
    "kind",
    [*kinds(natives=("bfloat16", "float32", "float64")), *kinds("Adam", natives=("float16",))],
)
def test_rounding_stays_within_its_bound(kind: Kind) -> None:
    for step in steps(kind, 20):
        update, decay = predicted(step)
        assert (np.abs(moved(step) - update - decay) <= bound(step, update)).all()


def bound(step: Step, update: np.ndarray) -> np.ndarray:
    of, after = formula(step.spec), formula_inputs(step)
    ours = unit_roundoff("float64")
    precision = Precision.of(step.native, scalars=of.scalar_dtype, ours=ours)
    rounding = of.rounding(step.arrays, precision) or of.rounding(
        step.arrays, precision, {name: after[name] for name in of.update_inputs}
    )
    assert rounding is not None
    return rounding.bound(update, after["W"], step.numbers(step.before)["W"])


@pytest.mark.parametrize("kind", kinds(natives=("bfloat16", "float32", "float64")))
def test_the_bound_hides_no_wrong_learning_rate(kind: Kind) -> None:
    for step in steps(kind, 3):
        update, decay = predicted(step)
        large = np.abs(update) > 0.05 * np.abs(step.numbers(step.before)["W"])
        residual = np.abs(moved(step) - 1.5 * update - decay)
        assert large.sum() > 50
        assert (residual > bound(step, 1.5 * update))[large].mean() > 0.9


@of_every_pair
def test_programs_stay_within_the_bound_of_each_other(kind: Kind) -> None:
    """torch's, those of other implementations, and the same in float64."""
    for step in steps(kind, 4):
        others = [of for of in runnable(kind) if of != step.spec.implementation]
        before, after = step.numbers(step.before), step.numbers(step.after)
        precision = Precision.of(step.native, scalars="float32", ours=unit_roundoff("float64"))
        scalars = step.arrays
        bounds = formula(step.spec).bounds(
            {name: of for name, of in before.items() if name != "grad"},
            before["grad"],
            scalars,
            precision,
        )
        assert {*bounds} == {"W", *(state.name for state in step.spec.states)}
        programs = [replace(step, native="float64", before=before)]
        programs += [replace(step, spec=replace(step.spec, implementation=of)) for of in others]
        for program in programs:
            replayed = program.numbers(program.replay())
            for name, allowed in bounds.items():
                other = replayed[name].reshape(SHAPE)
                apart = np.abs(after[name] - other)
                known = np.isfinite(after[name]) & np.isfinite(other)
                assert (apart <= allowed)[known].all(), name


@pytest.mark.parametrize("kind", kinds(natives=("float64",)))
def test_the_consumed_gradient_is_found(kind: Kind) -> None:
    for step in steps(kind, 4):
        before, after = step.numbers(step.before), step.numbers(step.after)
        consumed = formula(step.spec).consumed(before, after, step.arrays)
        known = np.isfinite(consumed.gradient)
        assert known.mean() > 0.4
        expected = before["grad"][known]
        np.testing.assert_allclose(consumed.gradient[known], expected, rtol=1e-3, atol=1e-4)
        assert consumed.variable in after


class Training:
    """A parameter whose steps a test takes, with drawn gradients."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.generator = torch.Generator().manual_seed(7)
        self.parameter = nn.Parameter(draw(SHAPE, self.generator, size=0.02).to(kind.dtype))
        self.optimizer = kind.make(self.parameter)
        self.taken = 0

    def record(self, path: Path, n_steps: int, *, skip: tuple[int, ...] = (), **options) -> Path:
        with Recorder(path, self.optimizer, parameter=self.parameter, **options):
            for _ in range(n_steps):
                self.step(skip=self.taken + 1 in skip)
        return path

    def step(self, *, skip: bool = False) -> None:
        grad = gradient(SHAPE, self.generator).to(self.kind.dtype)
        self.parameter.grad = None if skip else grad
        self.optimizer.step()
        self.taken += 1
        self.kind.change(self.optimizer, self.taken)


def assert_holds(ds: xr.Dataset) -> None:
    table = accounting(ds)
    assert table.attrs["not_exact_because"] == ""
    assert not table.n_different.any()
    assert not table.n_beyond.any()
    assert not table.max_ulp.any()


@of_every_pair
def test_a_recording_of_it_holds_to_the_bit(kind: Kind, tmp_path: Path) -> None:
    ds = open_dataset(Training(kind).record(tmp_path / "run.zarr", 5))
    assert_holds(ds)
    assert_holds(ds.isel(step=[2, 4], token=[210, 3, 17], dim=[4, 2]))
    if kind.native != "float16":  # where squares underflow, which the fused program has not stored
        assert not accounting(ds, replay=False).n_beyond_rounding.any()


one_dtype = pytest.mark.parametrize("kind", kinds(natives=("float32",), flags=False))


@one_dtype
@pytest.mark.filterwarnings("ignore:no gradient")
def test_steps_without_a_gradient_are_skipped_the_first_too(kind: Kind, tmp_path: Path) -> None:
    path = Training(kind).record(tmp_path / "run.zarr", 6, skip=(1, 4))
    ds = open_dataset(path)
    assert ds[COUNT].values.tolist() == [0, 0, 1, 2, 2, 3, 4]
    assert_holds(ds)
    assert not ds["residual"].sel(step=[1, 4]).any()


@one_dtype
def test_recording_may_begin_in_the_middle_and_be_resumed(kind: Kind, tmp_path: Path) -> None:
    training = Training(kind)
    for _ in range(3):
        training.step()
    training.record(tmp_path / "run.zarr", 3)
    training.record(tmp_path / "run.zarr", 2, resume=True)
    ds = open_dataset(tmp_path / "run.zarr")
    assert ds.sizes["step"] == 6
    assert np.diff(ds[COUNT]).tolist() == [1] * 5
    assert_holds(ds)


@one_dtype
def test_a_dataset_has_its_variables(kind: Kind, tmp_path: Path) -> None:
    training = Training(kind)
    ds = open_dataset(training.record(tmp_path / "run.zarr", 3))
    spec = REGISTRY[kind.name].from_group(training.optimizer.param_groups[0], type(kind))
    assert {*spec.variables, *spec.scalars, COUNT, "update", "decay", "residual"} <= {*ds.data_vars}
    foreign = {*VARIABLES} - {*spec.variables} | {*SCALARS} - {*spec.scalars, COUNT, "loss"}
    assert not foreign & {*ds.data_vars}
    parts = ds["update"] + ds["decay"] + ds["residual"]
    np.testing.assert_allclose(parts[1:], ds["delta_W"][1:], rtol=1e-5, atol=1e-9)
    for state in spec.states:
        first = np.float32(np.nan if state.first is None else state.first)
        np.testing.assert_array_equal(ds[state.name][0], np.full(SHAPE, first))


@pytest.mark.parametrize("kind", kinds(natives=("bfloat16",), flags=False))
def test_a_fault_is_found_where_it_begins(kind: Kind, tmp_path: Path) -> None:
    training = Training(kind)
    path = training.record(tmp_path / "run.zarr", 7)
    for name in StoreReader.open(path).schema.dtypes:
        if (kind.name, name) == ("Rprop", "grad"):
            continue  # `prev` is a copy of it, and either may be the one that is wrong

        def fault(bits: Arrays, scalars: Arrays, name: str = name) -> None:
            flip_bit(bits[name], (4, 18, 3), 14)

        rewrite(path, tmp_path / "f.zarr", fault)
        result = check(tmp_path / "f.zarr")
        assert not result.holds
        (finding,) = result.findings
        assert (finding.code, finding.variable, finding.step) == ("bit-flip", name, 4)
        assert (finding.token, finding.dim) == (18, 3)
        shutil.rmtree(tmp_path / "f.zarr")


def assert_same(step: Step, positions: np.ndarray) -> None:
    replayed = step.replay(positions)
    assert {*replayed} == {*step.after}
    for name, bits in replayed.items():
        expected = step.after[name].reshape(-1)[positions]
        np.testing.assert_array_equal(patterns(bits), patterns(expected), err_msg=name)


@of_every_pair
def test_every_program_is_replayed_to_the_bit(kind: Kind) -> None:
    """The whole, and selections that put elements elsewhere than they lay."""
    whole, random = np.arange(N_ELEMENTS), np.random.default_rng(0)
    some = random.permutation(N_ELEMENTS)[:301]
    for step in steps(kind):
        for positions in (whole, some, whole[::-1], whole[-3:], whole[1000:1001]):
            assert_same(step, positions)


@pytest.mark.parametrize("kind", kinds(natives=("bfloat16", "float32"), flags=False))
def test_a_flipped_bit_is_found(kind: Kind) -> None:
    """A row with one in it does not follow from the row before, or the next one from it."""
    taken = list(steps(kind, 3))
    random = np.random.default_rng(1)
    step = taken[1]
    for name in step.after:
        width = 8 * step.after[name].dtype.itemsize
        for bit in range(width):
            place = tuple(int(random.integers(length)) for length in SHAPE)
            faulty = {of: bits.copy() for of, bits in step.after.items()}
            flip_bit(faulty[name], place, bit)
            differs = {
                of: patterns(bits.reshape(SHAPE)) != patterns(faulty[of])
                for of, bits in step.replay().items()
            }
            assert [of for of in differs if differs[of].any()] == [name]
            assert np.argwhere(differs[name]).tolist() == [[*place]]


@of_every_pair
def test_a_wrong_number_is_found(kind: Kind) -> None:
    """Another learning rate than the recorded one moves most weights elsewhere."""
    *_, step = steps(kind, 3)
    if kind.name == "Rprop":
        pytest.skip("only its first step takes the learning rate")
    rate = step.spec.RATE
    replayed = step.replay(**{rate: 1.7 * step.scalars[rate]})["W"].reshape(SHAPE)
    update, _ = predicted(step)
    large = np.abs(update) > 0.05 * np.abs(step.numbers(step.before)["W"])
    assert (patterns(replayed) != patterns(step.after["W"]))[large].mean() > 0.9
