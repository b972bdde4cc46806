"""Optimizers of which nobody wrote a spec: recorded, read without their class, checked as far."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from torch.optim.optimizer import register_optimizer_step_post_hook

from thimble_zarr import Recorder, check, diff, open_dataset, write_report
from thimble_zarr.cli.main import cli
from thimble_zarr.errors import DamagedStoreError, OptimizerError
from thimble_zarr.store.reader import StoreReader


class SignedMomentum(torch.optim.Optimizer):
    """Steps by the sign of a momentum in bfloat16; overwrites the gradient; counts nothing."""

    def __init__(self, params, lr=0.1, betas=(0.9, 0.5), nudge=3) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "nudge": nudge, "flag": True})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p, dtype=torch.bfloat16)
                    state["scale"] = torch.tensor(1.0)
                    state["rows"] = p.new_zeros(len(p))
                state["momentum"].mul_(group["betas"][0]).add_(p.grad)
                state["scale"] *= 0.5
                p.grad.mul_(0)
                p.sub_(group["lr"] * state["momentum"].sign())


def train(path: Path, optimizer: torch.optim.Optimizer, weight: torch.Tensor, **options) -> list:
    generator = torch.Generator().manual_seed(7)
    rows = [weight.detach().clone()]
    with Recorder(path, optimizer, parameter=weight, **options):
        for _ in range(13):
            weight.grad = torch.randn(11, 5, generator=generator).to(weight.dtype)
            optimizer.step()
            rows.append(weight.detach().clone())
    return rows


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(11, 5, generator=torch.Generator().manual_seed(3)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    path, weight = tmp_path_factory.mktemp("unknown") / "run.zarr", parameter()
    return path, train(path, SignedMomentum([weight]), weight)


def test_what_it_keeps_is_recorded(run: tuple[Path, list]) -> None:
    path, rows = run
    ds = open_dataset(path)
    np.testing.assert_array_equal(ds.W, torch.stack(rows))
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(11, 5, generator=generator) for _ in range(13)]
    np.testing.assert_array_equal(ds.grad[1:], torch.stack(grads))
    momentum = torch.zeros(11, 5, dtype=torch.bfloat16)
    for step, grad in enumerate(grads, 1):
        momentum.mul_(0.9).add_(grad)
        np.testing.assert_array_equal(ds.momentum[step], momentum.float())
    assert np.isnan(ds.momentum[0]).all()
    for name, value in {"learning_rate": 0.1, "beta1": 0.9, "beta2": 0.5, "nudge": 3.0}.items():
        assert (ds[name][1:] == value).all()
    np.testing.assert_array_equal(ds["scale"][1:], 0.5 ** np.arange(1, 14))
    assert not {"update", "unexplained", "rounding", "rows", "flag"} & {*ds.data_vars}
    assert {"delta_W", "moved", "ulp"} <= {*ds.data_vars}


def test_check_says_what_it_could_check(run: tuple[Path, list], capsys) -> None:
    result = check(run[0])
    assert result.holds
    assert result.verdict.startswith("HOLDS as far as it can be checked: all 715 weights are ")
    assert "How SignedMomentum takes a step is not known here" in result.verdict
    with pytest.raises(SystemExit) as exit_code:
        cli(["check", str(run[0])])
    assert exit_code.value.code in (0, None)


def test_it_is_read_without_its_class(run: tuple[Path, list]) -> None:
    code = f"import thimble_zarr; print(dict(thimble_zarr.open_dataset({str(run[0])!r}).sizes))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'step': 14" in shown.stdout


def test_a_changed_file_and_a_number_that_is_none_are_found(
    run: tuple[Path, list], tmp_path: Path
) -> None:
    weight = parameter()
    train(tmp_path / "run.zarr", SignedMomentum([weight]), weight)
    zarr.open_group(tmp_path / "run.zarr")["momentum"][5, 3, 2] = 7
    result = check(tmp_path / "run.zarr")
    assert not result.holds
    assert result.findings[0].variable == "momentum"
    weight = parameter()
    with torch.no_grad():
        weight[3, 3] = torch.inf
    train(tmp_path / "infinite.zarr", SignedMomentum([weight]), weight)
    assert "not finite" in check(tmp_path / "infinite.zarr").verdict


def test_it_has_a_summary_and_a_report(run: tuple[Path, list], tmp_path: Path) -> None:
    write_report(run[0], tmp_path / "run.html")
    assert "HOLDS as far as it can be checked" in (tmp_path / "run.html").read_text()


def test_predicted_coding_holds_what_it_cannot_predict(
    run: tuple[Path, list], tmp_path: Path
) -> None:
    weight = parameter()
    rows = train(tmp_path / "p.zarr", SignedMomentum([weight]), weight, coding="predicted")
    assert StoreReader.open(tmp_path / "p.zarr").schema.coding.program is None
    np.testing.assert_array_equal(open_dataset(tmp_path / "p.zarr").W, torch.stack(rows))
    assert check(tmp_path / "p.zarr").holds


def test_finding_out_changes_nothing() -> None:
    weight = parameter()
    weight.grad = torch.ones_like(weight)
    optimizer = SignedMomentum([weight])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before, state = weight.detach().clone(), torch.random.get_rng_state()
    from thimble_zarr.record.trial import tried

    spec = tried(optimizer, weight).optimizer
    assert (spec.kept, spec.held, spec.counts, spec.overwrites) == (
        ("momentum",),
        ("scale",),
        "",
        True,
    )
    assert torch.equal(weight, before)
    assert (weight.grad == 1).all()
    assert not optimizer.state
    assert torch.equal(torch.random.get_rng_state(), state)
    assert scheduler.last_epoch == 0


class Remembering(SignedMomentum):
    """Draws its own random numbers, counts, and steps what it has noted besides its groups."""

    def __init__(self, params) -> None:
        super().__init__(params)
        self.generator, self.counted = torch.Generator().manual_seed(1), [0]
        self.weights = [*params]

    @torch.no_grad()
    def step(self, closure=None):
        self.counted[0] += 1
        for weight in self.weights:
            if weight.grad is not None:
                weight -= torch.rand(weight.shape, generator=self.generator) * weight.grad


class Around(torch.optim.Optimizer):
    """Has another optimizer step."""

    def __init__(self, inner) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = [inner]

    def step(self, closure=None):
        self.inner[0].step()


def test_finding_out_changes_nothing_that_an_optimizer_has_besides(tmp_path: Path) -> None:
    weights = [parameter(), parameter()]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    before, told = weights[0].detach().clone(), []
    optimizer, state = Remembering(weights), torch.Generator().manual_seed(1).get_state()
    hook = register_optimizer_step_post_hook(lambda *given: told.append(given))
    with Recorder(tmp_path / "run.zarr", optimizer, parameter=weights[0]):
        assert optimizer.counted == [0]
        assert torch.equal(optimizer.generator.get_state(), state)
        inner = torch.optim.AdamW(weights)
        with pytest.raises(OptimizerError, match="Around cannot be recorded: AdamW takes its"):
            Recorder(tmp_path / "around.zarr", Around(inner), parameter=weights[0])
        assert all(torch.equal(weight, before) for weight in weights)
        assert not inner.state
        assert not told
        optimizer.step()
        assert [of for of, *_ in told] == [optimizer]
    hook.remove()


def test_it_is_resumed(tmp_path: Path) -> None:
    weight = parameter()
    optimizer = SignedMomentum([weight])
    train(tmp_path / "run.zarr", optimizer, weight)
    train(tmp_path / "run.zarr", optimizer, weight, resume=True)
    assert open_dataset(tmp_path / "run.zarr").sizes["step"] == 27
    assert check(tmp_path / "run.zarr").holds


def test_schedule_free_which_overwrites_the_gradient(tmp_path: Path) -> None:
    from schedulefree import SGDScheduleFree

    weight = parameter()
    optimizer = SGDScheduleFree([weight])
    with pytest.raises(OptimizerError, match="not in train mode"):
        Recorder(tmp_path / "run.zarr", optimizer, parameter=weight)
    optimizer.train()
    train(tmp_path / "run.zarr", optimizer, weight)
    ds = open_dataset(tmp_path / "run.zarr")
    generator = torch.Generator().manual_seed(7)
    np.testing.assert_array_equal(ds.grad[1], torch.randn(11, 5, generator=generator))
    assert {"z", "weight_sum", "learning_rate", "momentum"} <= {*ds.data_vars}
    assert check(tmp_path / "run.zarr").holds


def test_nothing_takes_its_steps_again_while_it_is_recorded(tmp_path: Path) -> None:
    weight = parameter()
    why = "nobody told how SignedMomentum takes a step"
    for name, option in {"audit": "raise", "keep": "keyframes"}.items():
        path = tmp_path / f"{name}.zarr"
        with pytest.warns(UserWarning, match=why):
            rows = train(path, SignedMomentum([weight]), weight, **{name: option})
        np.testing.assert_array_equal(open_dataset(path).W, torch.stack(rows))


def test_where_two_runs_differ_is_found(run: tuple[Path, list], tmp_path: Path) -> None:
    weight = parameter()
    with torch.no_grad():
        weight[3, 2] += 1
    train(tmp_path / "other.zarr", SignedMomentum([weight]), weight)
    found = diff(run[0], tmp_path / "other.zarr")
    assert not found.is_equal
    assert found.cause is not None
    assert found.cause.code == "initial-weights"
    shutil.copytree(run[0], tmp_path / "changed.zarr")
    zarr.open_group(tmp_path / "changed.zarr")["W"][5, 3, 2] += 1
    assert not diff(run[0], tmp_path / "changed.zarr", values=True).is_equal


class Doubled(torch.optim.Optimizer):
    """Has no learning rate, and names of groups and states that are the same, or have a dot."""

    def __init__(self, params) -> None:
        super().__init__(params, {"momentum": 0.5, "betas": (0.9,), "beta1": 0.1, "a.b": 1.0})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            self.state[p].setdefault("with.dot", torch.zeros_like(p))
            p.sub_(momentum.mul_(0.5).add_(p.grad))


def test_names_that_are_the_same_are_told_apart(tmp_path: Path) -> None:
    weight = parameter()
    train(tmp_path / "run.zarr", Doubled([weight]), weight)
    ds = open_dataset(tmp_path / "run.zarr")
    assert ds["momentum"].dims == ("step", "token", "dim")
    for name, value in {"momentum_of_group": 0.5, "beta1": 0.9, "beta1_of_group": 0.1}.items():
        np.testing.assert_array_equal(ds[name][1:], value)
    assert check(tmp_path / "run.zarr").holds


class Failing(SignedMomentum):
    def step(self, closure=None):
        closure()


def test_one_that_cannot_step_is_refused(tmp_path: Path) -> None:
    weight = parameter()
    with pytest.raises(OptimizerError, match=r"found out by a step of a copy, which failed \(Type"):
        Recorder(tmp_path / "run.zarr", Failing([weight]), parameter=weight)


def test_a_name_that_is_a_path_is_not_read(run: tuple[Path, list], tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    shutil.copytree(run[0], path)
    text = (path / "zarr.json").read_text().replace('"momentum"', '"../momentum"')
    assert json.loads(text)
    (path / "zarr.json").write_text(text)
    with pytest.raises(DamagedStoreError):
        StoreReader.open(path)
