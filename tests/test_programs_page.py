"""The page on programs is enough to write one: its code gives the bits of ours."""

import itertools
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from tests.support.documents import ROOT, blocks
from tests.support.optimizers import ELEMENTWISE, Kind, kinds, steps
from tests.support.portable import program
from thimble_zarr.bits import patterns
from thimble_zarr.optim.base import COUNT, Optimizer
from thimble_zarr.optim.programs.arithmetic import fma64, narrowed, widened
from thimble_zarr.optim.programs.program import PortableProgram
from thimble_zarr.optim.programs.registry import program_of
from thimble_zarr.optim.specs.adam import Adam
from thimble_zarr.optim.specs.sgd import SGD

PAGE = ROOT / "docs/programs.md"
SOURCE = [b.content for b in blocks(PAGE.read_text(encoding="utf-8")) if b.language == "python"]

NATIVES = ("bfloat16", "float16", "float32", "float64")
IMPLEMENTATIONS = ("single", "foreach", "fused")
TRUTHS = (False, True)

ADAMS: list[Optimizer] = [
    Adam(
        name="AdamW" if decoupled else "Adam",
        implementation=implementation,
        decoupled_weight_decay=decoupled,
        amsgrad=amsgrad,
        maximize=maximize,
    )
    for implementation, decoupled, amsgrad, maximize in itertools.product(
        IMPLEMENTATIONS, TRUTHS, TRUTHS, TRUTHS
    )
]

SGDS: list[Optimizer] = [
    SGD(
        name="SGD",
        implementation=implementation,
        has_momentum=has_momentum,
        nesterov=nesterov,
        maximize=maximize,
    )
    for implementation, has_momentum, nesterov, maximize in itertools.product(
        IMPLEMENTATIONS, TRUTHS, TRUTHS, TRUTHS
    )
    if has_momentum or not nesterov
]

OTHERS = sorted({*ELEMENTWISE} - {"Adam", "AdamW", "SGD"})
SQUARES = {"square_avg", "acc_delta", "sum", "exp_avg_sq", "exp_inf", "step_size"}

STEPS = [
    {"learning_rate": 0.01, "weight_decay": 0.1, "beta1": 0.9, "momentum": 0.9, COUNT: 3.0},
    {"learning_rate": 1e-3, "weight_decay": 0.0, "beta1": 0.3, "momentum": 0.0, COUNT: 1.0},
    {"learning_rate": 0.1, "weight_decay": 0.03, "beta1": 0.5, "momentum": 0.7, COUNT: 1.0},
]


def page_of(native: str, source: list[str]) -> dict[str, Any]:
    """Return what the page defines, for a dtype."""
    page: dict[str, Any] = {}
    for block in source:
        exec(block, page)
    page["fma64"] = fma64
    if native == "float64":
        page |= {"number": np.float64, "fma": fma64}
    page["r"] = {"bfloat16": page["to_bfloat16"], "float16": page["to_float16"]}.get(
        native, lambda x: x
    )
    return page


def stored(native: str, random: np.random.Generator, *, is_square: bool = False) -> np.ndarray:
    """Return numbers of every size as stored bits, with 0, infinity and NaN among them."""
    values = random.normal(size=300) * 10.0 ** random.integers(-9, 3, 300)
    values[:5] = 0.0, -0.0, np.inf, -np.inf, np.nan
    values[5:90] = random.normal(size=85)
    if is_square:
        values = values**2
    if native == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        return values.astype(native)


def differing(native: str, optimizer: Optimizer, source: list[str] = SOURCE) -> set[str]:
    """Return the variables of which the page computes other bits than the program, at any step."""
    page, random = page_of(native, source), np.random.default_rng(0)
    program = program_of(optimizer, dict.fromkeys(optimizer.variables, native))
    assert isinstance(program, PortableProgram)
    program = replace(program, compiled=False)  # the bits are the same
    found = set()
    for step in STEPS:
        scalars = {"beta2": 0.99, "eps": 1e-4, "dampening": 0.2} | step
        scalars = {name: scalars[name] for name in (*optimizer.scalars, COUNT)}
        scalars |= optimizer.derived(scalars)
        bits = {
            name: stored(native, random, is_square=name.endswith("sq"))
            for name in optimizer.variables
        }
        grad = bits.pop("grad")
        expected = program.step(bits, grad, scalars)
        values = {name: widened(of, native) for name, of in bits.items()}
        flags, r = asdict(optimizer), page["r"]
        x = values["W"], widened(grad, native)
        if isinstance(optimizer, Adam):
            largest = values.get("max_exp_avg_sq", values["exp_avg_sq"])
            states = values["exp_avg"], values["exp_avg_sq"], largest
            after = page["adam"](flags, r, *x, *states, scalars)
        else:
            buffer = values.get("momentum_buffer", np.zeros_like(x[0]))
            after = page["sgd"](flags, r, *x, buffer, scalars)
        for name, result in zip(program.variables, after, strict=False):
            ours = np.empty_like(bits[name])
            narrowed(result, native, ours)
            kind = f"u{ours.dtype.itemsize}"
            if not np.array_equal(ours.view(kind), expected[name].view(kind)):
                found.add(name)
    return found


@pytest.mark.parametrize("native", NATIVES)
@pytest.mark.parametrize("optimizer", ADAMS, ids=str)
def test_adam_is_as_the_page_says(native: str, optimizer: Optimizer) -> None:
    assert differing(native, optimizer) == set()


@pytest.mark.parametrize("native", NATIVES)
@pytest.mark.parametrize("optimizer", SGDS, ids=str)
def test_sgd_is_as_the_page_says(native: str, optimizer: Optimizer) -> None:
    if optimizer.implementation == "fused" and native.endswith("16"):
        assert program_of(optimizer, dict.fromkeys(optimizer.variables, native)) is None
    else:
        assert differing(native, optimizer) == set()


def differing_of_others(kind: Kind, source: list[str] = SOURCE) -> set[str]:
    """Return the variables of which a function of the page computes other bits, at any step."""
    page, random = page_of(kind.native, source), np.random.default_rng(0)
    step = next(steps(kind, 1))
    optimizer, ours = step.spec, replace(program(kind), compiled=False)
    found = set()
    for changed in STEPS:
        scalars = {name: changed.get(name, value) for name, value in step.scalars.items()}
        scalars |= optimizer.derived(scalars)
        bits = {
            name: stored(kind.native, random, is_square=name in SQUARES) for name in step.before
        }
        x = {name: widened(of, kind.native) for name, of in bits.items()}
        expected = ours.step(bits, bits["grad"], scalars)
        after = page[ours.name.partition("-")[0]](asdict(optimizer), page["r"], x, scalars)
        assert after.keys() == expected.keys()
        for name, result in after.items():
            made = np.empty_like(bits[name])
            narrowed(result, kind.native, made)
            if not (patterns(made) == patterns(expected[name])).all():
                found.add(name)
    return found


@pytest.mark.parametrize("kind", kinds(*OTHERS))
def test_the_others_are_as_the_page_says(kind: Kind) -> None:
    assert differing_of_others(kind) == set()


def test_another_step_of_theirs_is_seen() -> None:
    source = [block.replace("each(np.sqrt(total))", "np.sqrt(total)") for block in SOURCE]
    assert source != SOURCE
    of_adagrad = [param.values[0] for param in kinds("Adagrad", natives=("bfloat16",))]
    assert any(differing_of_others(kind, source) for kind in of_adagrad)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("each(np.sqrt(used)) /", "np.sqrt(used) /"),
        ("+ added(s[", "+ number(s["),
        ("start = weight - number(1), grad", "start = weight, m"),
        ("r(number(x)) if is_foreach else number(x)", "number(x)"),
        ('np.multiply(a, b, dtype="f8")', '(a * b).astype("f8")'),
    ],
)
def test_another_rounding_is_seen(right: str, wrong: str) -> None:
    source = [block.replace(right, wrong) for block in SOURCE]
    assert source != SOURCE
    assert any(differing("bfloat16", optimizer, source) for optimizer in ADAMS)


def test_every_program_is_in_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for native, optimizer in itertools.product(NATIVES, (*ADAMS, *SGDS)):
        program = program_of(optimizer, dict.fromkeys(optimizer.variables, native))
        assert program is None or f"`{program.name}`" in page
