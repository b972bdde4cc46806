"""A replay by the optimizer's own class, which knows no formula, against torch's functions."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from lion_pytorch import Lion
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.support.optimizers import DTYPES, Kind, Step, bits_of, kinds, steps
from thimble_zarr import Recorder, check, open_dataset
from thimble_zarr.bits import is_nan, patterns
from thimble_zarr.errors import OptimizerError
from thimble_zarr.optim.base import COUNT
from thimble_zarr.optim.live import live_step
from thimble_zarr.optim.programs.registry import program_of
from thimble_zarr.optim.registry import REGISTRY
from thimble_zarr.store.reader import StoreReader

SHAPE = (11, 5)

OF_NS = "ns_coefficients"


def tensor(bits: np.ndarray, kind: Kind) -> torch.Tensor:
    return torch.from_numpy(bits.copy()).view(kind.dtype)


def taken(step: Step, kind: Kind) -> dict[str, torch.Tensor | None]:
    """The step, by an optimizer that was made for it alone."""
    absent = {of.name for of in step.spec.states if is_nan(step.before[of.name]).all()}
    tensors = {
        name: None if name in absent else tensor(bits, kind) for name, bits in step.before.items()
    }
    optimizer = kind.make(torch.nn.Parameter(tensors["W"]))
    scalars = dict(step.scalars)
    if "mu_product" in scalars:  # it is the one after the step, and torch wants the one before
        scalars["mu_product"] = step.previous["mu_product"]
    live_step(optimizer, step.spec, tensors, scalars)
    return tensors


@pytest.mark.parametrize("kind", kinds())
def test_it_ends_where_torchs_function_does(kind: Kind) -> None:
    previous: dict[str, float] = {"mu_product": 1.0}
    for step in steps(kind, 4, SHAPE):
        object.__setattr__(step, "previous", previous)
        replayed, after = step.replay(), taken(step, kind)
        for name, bits in replayed.items():
            ours = bits_of(after[name]).reshape(-1)
            assert (patterns(ours) == patterns(bits.reshape(-1))).all(), name
        previous = step.scalars


WHOLE: list[tuple[str, dict[str, object]]] = [
    ("muon", {}),
    ("muon", {"nesterov": False, "weight_decay": 0.0, "ns_steps": 3}),
    ("muon", {"adjust_lr_fn": "match_rms_adamw", "ns_coefficients": (3.0, -3.2, 1.2)}),
    ("adafactor", {}),
    ("adafactor", {"foreach": True, "weight_decay": 0.1}),
    ("adafactor", {"maximize": True, "eps": (1e-5, 1e-2), "d": 2.0, "beta2_decay": -0.5}),
]


@pytest.mark.parametrize("native", DTYPES)
@pytest.mark.parametrize(("function", "options"), WHOLE)
def test_on_whole_parameters_too(function: str, options: dict, native: str) -> None:
    name, dtype = function.capitalize(), DTYPES[native][0]
    generator = torch.Generator().manual_seed(7)
    weight = torch.nn.Parameter(torch.randn(SHAPE, generator=generator).to(dtype))
    weight.grad = torch.zeros_like(weight)
    (group,) = getattr(torch.optim, name)([weight], **options).param_groups
    spec = REGISTRY[name].from_group(group, getattr(torch.optim, name)).of_shape(SHAPE)
    numbers = {of.keyword: float(of.read(group)) for of in spec.SCALARS if of.key != OF_NS}
    scalars = {of.name: float(of.read(group)) for of in spec.SCALARS}
    kept = {"adjust_lr_fn", "nesterov", "foreach", "maximize", OF_NS} & group.keys()
    flags = {key: group[key] for key in kept} | {"has_complex": False}
    if function == "muon":
        numbers["ns_steps"] = int(numbers["ns_steps"])
    of_torch = getattr(importlib.import_module(f"torch.optim._{function}"), function)
    shapes = {"row_var": (11, 1), "col_var": (1, 5), "momentum_buffer": SHAPE}
    theirs = {of.name: torch.zeros(shapes[of.name], dtype=dtype) for of in spec.states}
    ours = {"W": weight.detach().clone()}
    ours |= {key: of.expand(SHAPE).clone() for key, of in theirs.items()}
    for count in range(1, 5):
        ours["grad"] = torch.randn(SHAPE, generator=generator).to(dtype)
        lists = [[weight], [ours["grad"].clone()], *([of] for of in theirs.values())]
        if function == "adafactor":
            lists += [[None], [torch.tensor(count - 1.0)]]
        with torch.no_grad():
            of_torch(*lists, **numbers, **flags)
        spec.step(ours, {**scalars, COUNT: count}, device="cpu")
        assert torch.equal(ours["W"], weight)
        for key, of in theirs.items():
            assert torch.equal(ours[key], of.expand(SHAPE)), key


def test_hooks_of_all_optimizers_are_not_called() -> None:
    told: list[object] = []
    (kind,) = kinds("SGD", natives=("float32",))[0].values
    (step,) = steps(kind, 1, SHAPE)
    hook = register_optimizer_step_post_hook(lambda *given: told.append(given))
    taken(step, kind)
    hook.remove()
    assert not told


def record(path: Path, native: str, *, scheduled: bool = False, **options) -> Path:
    generator = torch.Generator().manual_seed(7)
    weight = torch.nn.Parameter(torch.randn(SHAPE, generator=generator).to(DTYPES[native][0]))
    optimizer = Lion([weight], lr=3e-2, **options)
    with Recorder(path, optimizer, parameter=weight):
        for _ in range(13):
            weight.grad = torch.randn(SHAPE, generator=generator).to(weight.dtype)
            optimizer.step()
            if scheduled:
                optimizer.param_groups[0]["lr"] *= 0.8
    return path


@pytest.mark.parametrize("native", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1, "scheduled": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
    ],
)
def test_lion_is_replayed_to_the_bit(native: str, options: dict, tmp_path: Path) -> None:
    path = record(tmp_path / "run.zarr", native, **options)
    assert check(path, replay="torch").verdict.startswith("HOLDS to the bit: replayed by torch")
    result = check(path)
    assert result.verdict.startswith("HOLDS to the bit: replayed by lion-single/1"), result.verdict
    assert "Lion's formula agrees" in result.verdict
    ds = open_dataset(path)
    parts = ds["update"] + ds["decay"]
    tolerance = {"float64": 1e-7, "float32": 1e-6}.get(native, 2e-2)
    close = np.isclose(ds["delta_W"][1:], parts[1:], atol=tolerance)
    assert close.mean() > 0.99  # a sign may turn where rounding decides


def test_a_wrong_number_of_lion_is_found(tmp_path: Path) -> None:
    path = record(tmp_path / "run.zarr", "float32")
    schema = StoreReader.open(path).schema
    program = program_of(schema.optimizer, schema.dtypes)
    assert program is not None
    import zarr

    zarr.open_group(path)["learning_rate"][6] = 0.05
    result = check(path)
    assert not result.holds
    assert {finding.code for finding in result.findings} & {"other-learning-rate"}


def test_without_its_package_it_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = record(tmp_path / "run.zarr", "float32")
    monkeypatch.setitem(__import__("sys").modules, "lion_pytorch", None)
    assert check(path).holds  # by the portable program
    with pytest.raises(OptimizerError, match="taken by its own class, and that is not installed"):
        check(path, replay="torch", workers=1)
