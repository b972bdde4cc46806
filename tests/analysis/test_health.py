"""Health: planted conditions are found on runs that have them, from both sources, and no others."""

import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from tests.support.commands import check as run_check
from tests.support.commands import checked, outcome, strict_json
from tests.support.notebook_file import notebook_tensors, save
from tests.support.optimizers import IMPLEMENTATIONS
from tests.support.runs import History
from tests.support.summary_oracle import reference_summary
from tests.support.zoo import Recorded
from thimble_zarr import Recorder, TokenLabels, check, open_dataset
from thimble_zarr.analysis.compute.source import Source
from thimble_zarr.analysis.health import measurements
from thimble_zarr.analysis.health.condition import Concern
from thimble_zarr.analysis.health.conditions import CONDITIONS, concerns_of, stuck_mantissas
from thimble_zarr.analysis.health.summarized import health
from thimble_zarr.analysis.selection import select
from thimble_zarr.record.schedule import every
from thimble_zarr.sources.open import open_recording

N_TOKENS, N_DIMS, N_STEPS = 67, 5, 31

Scale = Callable[[int], float]


def always(step: int) -> float:
    return 1.0


@dataclass(frozen=True)
class Plan:
    """A run: by how much learning rate and gradient are multiplied at a step, and the loss logged.

    Of so large a share of the rows there is a gradient at a step.
    """

    dtype: torch.dtype = torch.float32
    std: float = 0.02
    lr: float = 1e-3
    rate: Scale = always
    gradient: Scale = always
    loss: Callable[[int], float | None] = lambda step: 3 / step
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW
    options: Mapping[str, object] | None = None
    share_of_rows: float = 1.0


def record(path: Path, plan: Plan, **recorder_options: object) -> Path:
    """Train an embedding on noise, and record it."""
    random = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(
        (plan.std * torch.randn(N_TOKENS, N_DIMS, generator=random)).to(plan.dtype)
    )
    optimizer = plan.optimizer([weight], lr=plan.lr, **(plan.options or {}))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda taken: plan.rate(taken + 1))
    labels = TokenLabels.from_counts(np.arange(N_TOKENS) % 3)
    options = {"labels": labels, "memory_bytes": 120_000, **recorder_options}
    with Recorder(path, optimizer, parameter=weight, **options) as recorder:
        for step in range(1, N_STEPS + 1):
            noise = torch.randn(weight.shape, generator=random)
            noise[torch.rand(N_TOKENS, generator=random) > plan.share_of_rows] = 0
            weight.grad = (1e-2 * plan.gradient(step) * noise).to(plan.dtype)
            optimizer.step()
            schedule.step()
            loss = plan.loss(step)
            if loss is not None:
                recorder.log(loss=loss)
    return path


BFLOAT16 = Plan(dtype=torch.bfloat16)
STATE = ("state-cannot-decay", 1)
NAN = float("nan")

PLANTED: dict[str, tuple[Plan, list[tuple[str, int]]]] = {
    "float32": (Plan(), []),
    "warm-up": (Plan(rate=lambda step: (step - 1) / N_STEPS), []),
    "few rows have gradients": (Plan(optimizer=torch.optim.SGD, share_of_rows=0.1), []),
    "most updates are zero": (
        replace(
            BFLOAT16,
            lr=1e-4,
            options={"betas": (0.0, 0.9), "weight_decay": 0.0},
            share_of_rows=0.1,
        ),
        [],
    ),
    "rare rows, whose moments fade": (
        Plan(options={"betas": (0.2, 0.9), "weight_decay": 0.0}, share_of_rows=0.03),
        [],
    ),
    "every tenth loss": (Plan(loss=lambda step: None if step % 10 else 1.0), []),
    "losses ever rarer": (
        Plan(loss=lambda step: 1.0 if step < 5 or step in (8, 16) else None),
        [],
    ),
    "last loss": (Plan(loss=lambda step: 1.0 if step < N_STEPS else None), []),
    "logging stops": (Plan(loss=lambda step: 1.0 if step < 9 else None), []),
    "no loss": (Plan(loss=lambda step: None), []),
    "bfloat16": (BFLOAT16, [STATE]),
    "bfloat16, beta2 0.9": (replace(BFLOAT16, options={"betas": (0.9, 0.9)}), []),
    "rate 0 at the end": (
        Plan(rate=lambda step: max(0.0, 1 - step / 20)),
        [("learning-rate-zero", 20)],
    ),
    "rate 0 once": (
        Plan(rate=lambda step: float(step != 7)),
        [("learning-rate-zero", 7)],
    ),
    "init std 1": (
        replace(BFLOAT16, std=1.0),
        [STATE, ("updates-vanish-at-the-start", 1), ("updates-below-half-ulp", 1)],
    ),
    "init std 1, float32": (Plan(std=1.0), []),
    "gradient explodes": (
        Plan(gradient=lambda step: 50.0 if step in (17, 19) else 1.0),
        [("gradient-explodes", 17)],
    ),
    "gradient is infinite": (
        Plan(gradient=lambda step: float("inf") if step >= 9 else 1.0),
        [("gradient-explodes", 9)],
    ),
    "loss infinite": (
        Plan(loss=lambda step: float("inf") if step == 9 else 1.0),
        [("loss-not-finite", 9)],
    ),
    "loss NaN": (
        Plan(loss=lambda step: NAN if step in (9, 11) else 1.0),
        [("loss-not-finite", 9)],
    ),
    "loss NaN from some step on": (
        Plan(
            loss=lambda step: NAN if step >= 10 else 1.0,
            gradient=lambda step: NAN if step >= 10 else 1.0,
        ),
        [("loss-not-finite", 10), ("gradient-explodes", 10)],
    ),
    "updates vanish in the warm-up": (
        replace(BFLOAT16, rate=lambda step: 1.0 if step >= 10 else 0.02),
        [STATE],
    ),
    "updates vanish late": (
        replace(BFLOAT16, rate=lambda step: 1.0 if step < 15 else 0.02),
        [STATE, ("updates-below-half-ulp", 15)],
    ),
}
"""By name a run, and what is found with the step at which it begins."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("health")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the loss of step", UserWarning)
        return {
            name: record(directory / f"{name}.zarr", plan) for name, (plan, _) in PLANTED.items()
        }


def found(concerns: tuple[Concern, ...]) -> list[tuple[str, int]]:
    order = [condition.code for condition in CONDITIONS]
    return sorted(((one.code, one.step) for one in concerns), key=lambda one: order.index(one[0]))


def in_order(expected: list[tuple[str, int]]) -> list[tuple[str, int]]:
    order = [condition.code for condition in CONDITIONS]
    return sorted(expected, key=lambda one: order.index(one[0]))


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_found_and_nothing_else(runs: dict[str, Path], name: str) -> None:
    result = check(runs[name], tokens="all", replay=False)
    assert found(result.health) == in_order(PLANTED[name][1])
    for concern in result.health:
        assert "{" not in concern.message
        assert "nan" not in concern.message.replace("it is nan", "")
        assert concern.evidence


def summed_up(ds: xr.Dataset, groups: Mapping[str, np.ndarray]) -> xr.Dataset:
    """Return the summary of a run, of what is stored, which is read at once."""
    stored = [name for name in ds if ds[name].chunks is None]
    in_memory = ds[[*stored, "W", "grad", "exp_avg", "exp_avg_sq"]].compute()
    with np.errstate(invalid="ignore"):
        return reference_summary(in_memory, ds.attrs["dtype"], groups)


ADAM = [name for name, (plan, _) in PLANTED.items() if plan.optimizer is torch.optim.AdamW]


@pytest.mark.parametrize("name", ADAM)
def test_a_summary_leads_to_the_same(runs: dict[str, Path], name: str) -> None:
    ds = open_dataset(runs[name])
    summary = summed_up(ds, {"dead": ds.dead.values, "all": np.ones(N_TOKENS, bool)})
    concerns = health(ds, summary)
    assert found(concerns) == in_order(PLANTED[name][1])
    sampled = {one.code: one for one in check(runs[name], tokens="all", replay=False).health}
    for concern in concerns:
        other = sampled[concern.code].evidence
        assert concern.evidence.keys() == other.keys()
        for key, value in concern.evidence.items():
            if isinstance(value, float):
                assert value == pytest.approx(other[key], rel=1e-3, nan_ok=True), key


def test_a_group_that_alone_is_concerned_is_named(runs: dict[str, Path]) -> None:
    ds = open_dataset(runs["updates vanish late"])
    summary = summed_up(ds, {"few": np.arange(N_TOKENS) < 3, "all": np.ones(N_TOKENS, bool)})
    every_group = health(ds, summary)
    assert all("of few" not in concern.message for concern in every_group)
    summary.share_below_half_ulp.loc[{"group": "all"}] = 0
    *_, concern = health(ds, summary)
    assert concern.code == "updates-below-half-ulp"
    assert f"{N_STEPS} steps of the 3 tokens of few" in concern.message


def test_the_numbers_are_those_of_the_weights(runs: dict[str, Path]) -> None:
    concerns = {one.code: one for one in check(runs["init std 1"], tokens="all").health}
    evidence = concerns["updates-vanish-at-the-start"].evidence
    ds = open_dataset(runs["init std 1"])
    W, wanted = ds.W[0].values.astype(float), ds.adam_update[1] + ds.adam_decay[1]
    assert evidence["std"] == pytest.approx(W.std())
    assert evidence["size"] == pytest.approx(float(np.sqrt((wanted**2).mean())), rel=1e-5)
    assert evidence["ulp"] == 2.0 ** (np.floor(np.log2(W.std())) - 7)
    small = np.abs(wanted.values) < 2.0 ** (np.floor(np.log2(np.abs(W))) - 8)
    assert evidence["share"] == pytest.approx(small.mean(), abs=1e-3)
    concern = check(runs["gradient explodes"], tokens="all").health[0]
    norms = np.sqrt((open_dataset(runs["gradient explodes"]).grad.values[1:] ** 2).sum((1, 2)))
    assert concern.evidence["median"] == pytest.approx(np.median(norms))
    assert concern.evidence["largest"] == pytest.approx(norms.max())
    assert concern.evidence["largest_step"] == norms.argmax() + 1
    assert concern.evidence["n_steps"] == 2


@pytest.mark.parametrize("native", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("factor", [0.5, 0.9, 0.99, 0.996, 0.999, 0.9999, 1 - 2**-20, 1.0])
def test_mantissas_are_stuck_where_torch_leaves_them(native: str, factor: float) -> None:
    n_stuck, n_mantissas = stuck_mantissas(factor, native)
    numbers = torch.linspace(1, 2, n_mantissas + 1)[:-1].to(getattr(torch, native))
    assert len(numbers.unique()) == n_mantissas
    stuck = int((numbers.clone().mul_(factor) == numbers).sum())
    assert n_stuck == (0 if factor == 1 else stuck)


@pytest.mark.parametrize("program", IMPLEMENTATIONS)
@pytest.mark.parametrize("beta2", [0.99, 0.997, 0.998, 0.999])
def test_states_are_stuck_that_the_live_optimizer_does_not_let_fall(
    program: str, beta2: float, tmp_path: Path
) -> None:
    weight = torch.nn.Parameter(torch.zeros(128, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([weight], betas=(0.9, beta2), **IMPLEMENTATIONS[program])
    numbers = torch.linspace(1, 2, 129)[:-1].bfloat16()
    with Recorder(tmp_path / "run.zarr", optimizer, parameter=weight):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        optimizer.state[weight]["exp_avg_sq"].copy_(numbers)
        optimizer.step()
    n_stuck = int((optimizer.state[weight]["exp_avg_sq"] == numbers).sum())
    found = check(tmp_path / "run.zarr", tokens="all", replay=False).health
    counts = [of.evidence["n_stuck"] for of in found if of.code == "state-cannot-decay"]
    assert counts == ([n_stuck] if n_stuck else [])


def test_what_sgd_keeps_is_looked_at_too(tmp_path: Path) -> None:
    plan = replace(BFLOAT16, optimizer=torch.optim.SGD, lr=0.1, options={"momentum": 0.999})
    (concern,) = check(record(tmp_path / "sgd.zarr", plan), tokens="all").health
    assert concern.code == "state-cannot-decay"
    assert concern.evidence["variable"] == "momentum_buffer"
    assert concern.message == (
        "momentum_buffer cannot decay in bfloat16. 0.999 times a number is rounded back to that "
        "number, for 128 of 128 mantissas."
    )


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": every(5)},
        {"tokens": [3, 5, 60]},
        {"variables": ("W", "exp_avg", "exp_avg_sq")},
    ],
)
def test_of_a_partial_recording_what_is_there_is_looked_at(
    tmp_path: Path, options: dict[str, object]
) -> None:
    plan, _ = PLANTED["init std 1"]
    path = record(tmp_path / "run.zarr", plan, **options)
    codes = [concern.code for concern in check(path, tokens="all").health]
    assert codes == [STATE[0], "updates-vanish-at-the-start", "updates-below-half-ulp"]
    assert check(record(tmp_path / "sound.zarr", Plan(), **options), tokens="all").health == ()


def test_of_few_steps_and_of_every_kind_of_parameter(
    runs: dict[str, Path], zoo: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    for steps in ("1", "9", "17", "5:6"):
        assert check(runs["float32"], steps=steps).health == ()
    codes = {of.parameter: {one.code for one in of.health} for of in check(zoo.path)}
    stuck = {"state-cannot-decay"}
    assert {name for name, of in codes.items() if of & stuck} == {
        *("wte.weight", "up", "filter")
    }  # of bfloat16 and beta2 0.999
    assert set().union(*codes.values()) <= stuck | {"updates-below-half-ulp"} | {
        "updates-vanish-at-the-start"
    }


def test_a_sample_of_steps_and_tokens_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thimble_zarr.format.layout.TARGET_CHUNK_BYTES", 500)
    paths = {
        name: record(tmp_path / f"{name}.zarr", PLANTED[name][0])
        for name in ("updates vanish late", "gradient explodes")
    }
    monkeypatch.setattr(measurements, "SAMPLED_STEPS", 7)
    result = check(paths["updates vanish late"], tokens="all")
    state, late = result.health
    assert (state.code, late.code) == (STATE[0], "updates-below-half-ulp")
    assert late.step in (16, 17, 18, 19, 20)
    assert re.search(r"\(7 steps of [1-5]?[0-9] of 67 tokens\)", late.message)
    (explodes,) = check(paths["gradient explodes"], tokens="all").health
    assert explodes.step == 17
    assert re.search(r"\([1-5]?[0-9] of 67 tokens\)", explodes.message)


@pytest.mark.filterwarnings("ignore:the loss of step")
def test_tokens_that_still_step_do_not_hide_a_lost_loss(tmp_path: Path) -> None:
    path = record(tmp_path / "run.zarr", PLANTED["loss NaN from some step on"][0])
    (reader,) = open_recording(path)
    (of,) = measurements.measured([select(Source.of(reader), "all", None)[0]])
    still = replace(of.updates, size=np.ones_like(of.updates.size))
    codes = [concern.code for concern in concerns_of(replace(of, updates=still))]
    assert "loss-not-finite" in codes


def test_a_notebooks_file_without_losses_has_none(tmp_path: Path, toy_history: History) -> None:
    tensors = notebook_tensors(toy_history)
    tensors["losses"] = torch.full_like(tensors["losses"], NAN)
    codes = [concern.code for concern in check(save(tmp_path / "run.st", tensors)).health]
    assert "loss-not-finite" not in codes


def test_it_is_told_and_changes_no_answer(runs: dict[str, Path], tmp_path: Path) -> None:
    sick, sound = runs["init std 1"], runs["float32"]
    exit_code, stdout, _ = outcome("check", sick, "--tokens=all")
    assert exit_code == 0
    *_, verdict, state, start, late = stdout.splitlines()
    assert verdict.startswith("HOLDS to the bit")
    assert state.startswith("Health: exp_avg_sq cannot decay in bfloat16. ")
    assert start.startswith("Health: At step 1, ")
    assert late.startswith("Health: From step 1 on, ")
    assert "Health" not in outcome("check", sound)[1]
    content = checked(sick, "--tokens=all")
    assert content["holds"] is True
    assert [one["code"] for one in content["health"]] == [
        *(STATE[0], "updates-vanish-at-the-start", "updates-below-half-ulp")
    ]
    assert content["health"][0]["evidence"]["n_stuck"] == 128
    csv = outcome("check", sick, "--tokens=all", "--format=csv", "--quiet")[1]
    assert "Health" not in csv
    together = run_check(sick, sound, runs["bfloat16"], "--tokens=all").stdout.split("\n\n")[-1]
    first, *_ = together.splitlines()
    assert first.startswith(f"Health: {runs['bfloat16']}, all: exp_avg_sq cannot decay")
    assert first.endswith(" And 1 more.")


def test_what_is_only_sampled_may_be_damaged(runs: dict[str, Path], tmp_path: Path) -> None:
    store = Path(shutil.copytree(runs["gradient explodes"], tmp_path / "run.zarr"))
    for file in (store / "grad").glob("c*"):
        file.write_bytes(b"")
    result = check(store, tokens="all", replay=False)
    assert result.holds
    assert result.health == ()


@pytest.mark.parametrize("factor", [np.nan, np.inf])
def test_a_gradient_that_is_no_number_is_told_in_json(factor: float, tmp_path: Path) -> None:
    plan = Plan(gradient=lambda step: factor if step == 20 else 1.0)
    path = record(tmp_path / "run.zarr", plan)
    told = strict_json(outcome("check", path, "--format=json")[1])
    (explodes,) = [one for one in told["health"] if one["code"] == "gradient-explodes"]
    assert explodes["evidence"]["largest"] is None
