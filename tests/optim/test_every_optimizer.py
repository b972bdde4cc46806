"""Every optimizer x implementation x dtype x options, replayed to the bit; and its documents."""

from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import pytest
import torch

from tests.support.documents import ROOT
from tests.support.optimizers import (
    DTYPES,
    ELEMENTWISE,
    IMPLEMENTATIONS,
    VARIANTS,
    Kind,
    Step,
    no_change,
    runnable,
    steps,
)
from thimble_zarr import Recorder
from thimble_zarr.bits import is_nan, patterns
from thimble_zarr.errors import OptimizerError
from thimble_zarr.optim.programs.registry import program_of
from thimble_zarr.optim.registry import REGISTRY

SHAPE = (11, 5)


def cells(name: str) -> Iterator[tuple[str, str, list[Kind]]]:
    """Every implementation and dtype of an optimizer, with its options."""
    for program, of_program in IMPLEMENTATIONS.items():
        for native in DTYPES:
            kinds = []
            for variant in VARIANTS[name].values():
                options = {**variant, **of_program}
                change = options.pop("change", no_change)
                kind = Kind(name, native, options, change)
                if program in runnable(kind):
                    kinds.append(kind)
            if kinds:
                yield program, native, kinds


CELLS = [
    pytest.param(kinds, id=f"{name}-{program}-{native}")
    for name in ELEMENTWISE
    for program, native, kinds in cells(name)
]


def n_different(step: Step, positions: np.ndarray | None) -> int:
    """Elements that a replay, of some positions or all, gets otherwise than torch got them."""
    where = slice(None) if positions is None else positions
    found = 0
    for name, bits in step.replay(positions).items():
        bits, recorded = bits.reshape(-1), step.after[name].reshape(-1)[where]
        differs = patterns(bits) != patterns(recorded)
        found += int((differs & ~(is_nan(bits) & is_nan(recorded))).sum())
    return found


def assert_replayed(kind: Kind, n_steps: int, shape: tuple[int, int]) -> None:
    n_elements = shape[0] * shape[1]
    some = np.random.default_rng(0).permutation(n_elements)[: n_elements // 3]
    for count, step in enumerate(steps(kind, n_steps, shape), 1):
        assert n_different(step, None) == 0
        if count % 6 == 2:
            assert n_different(step, some) == 0
            assert n_different(step, np.array([n_elements - 2])) == 0


@pytest.mark.parametrize("kinds", CELLS)
def test_every_step_is_replayed_to_the_bit(kinds: list[Kind]) -> None:
    for kind in kinds:
        assert_replayed(kind, 13, SHAPE)


@pytest.mark.soak
@pytest.mark.parametrize("kinds", CELLS)
def test_two_hundred_steps_are(kinds: list[Kind]) -> None:
    for kind in kinds:
        assert_replayed(kind, 200, (37, 19))


def test_a_replay_with_another_number_is_not() -> None:
    (kind, *_) = next(kinds for _, _, kinds in cells("NAdam"))
    step = list(steps(kind, 3, SHAPE))[-1]
    step.scalars["mu_product"] *= 1.5
    assert n_different(step, None) > 10


def row_of_exactness(name: str) -> str:
    """The row of the table in `docs/exactness.md`."""
    by_program: dict[str, list[str]] = {}
    for program, native, _ in cells(name):
        by_program.setdefault(program, []).append(native)
    wide = [program for program, natives in by_program.items() if len(natives) == len(DTYPES)]
    programs = ", ".join(
        program if program in wide else f"{program} in {' and '.join(natives)}"
        for program, natives in by_program.items()
    )
    return f"| `{name}` | {programs} | {'; '.join(VARIANTS[name])} |"


def row_of_format(name: str) -> str:
    """The row of the table in `docs/format.md`."""
    spec = REGISTRY[name]
    columns = (
        [state.name for state in spec.STATES],
        [scalar.name for scalar in spec.SCALARS],
        [of.name for of in spec.DERIVED],
        [field.name for field in fields(spec) if field.name not in ("name", "implementation")],
    )
    texts = (", ".join(f"`{word}`" for word in column) or "none" for column in columns)
    return f"| `{name}` | {' | '.join(texts)} |"


@pytest.mark.parametrize("name", REGISTRY)
def test_it_is_in_the_tables(name: str) -> None:
    rows = {"format": row_of_format(name)}
    if name in ELEMENTWISE:
        rows["exactness"] = row_of_exactness(name)
    for page, row in rows.items():
        assert row in (ROOT / f"docs/{page}.md").read_text(encoding="utf-8").splitlines(), row


@pytest.mark.parametrize("kind", [torch.optim.SparseAdam, torch.optim.LBFGS])
def test_it_is_refused_with_a_reason(kind: type[torch.optim.Optimizer], tmp_path) -> None:
    weight = torch.nn.Parameter(torch.ones(3, 2))
    reason = {"SparseAdam": "sparse", "LBFGS": "several times"}[kind.__name__]
    with pytest.raises(OptimizerError, match=f"{kind.__name__} cannot be recorded: .*{reason}"):
        Recorder(tmp_path / "run.zarr", kind([weight]), parameter=weight)


@pytest.mark.parametrize("name", [name for name, spec in REGISTRY.items() if spec.ELEMENTWISE])
def test_a_learning_rate_of_0_leaves_a_zero_its_sign(name: str) -> None:
    kind = Kind(name, "float32", {"lr": 0.0, "foreach": True})
    step = next(steps(kind, 1, SHAPE))
    step.before["W"][:] = [0.0, -0.0, 0.0, -0.0, 1.0]
    program = program_of(step.spec, dict.fromkeys(step.spec.variables, "float32"))
    assert program is not None
    before = {of: bits for of, bits in step.before.items() if of != "grad"}
    taken = program.step(before, step.before["grad"], step.scalars)
    replayed = step.replay()["W"].reshape(SHAPE)
    assert (patterns(taken["W"]) == patterns(replayed)).all()


def test_in_16_bits_programs_replace_torch() -> None:
    for name in set(ELEMENTWISE) - {"SGD"}:
        for program, native, (kind, *_) in cells(name):
            spec = next(steps(kind, 1, SHAPE)).spec
            found = program_of(spec, dict.fromkeys(spec.variables, native))
            assert found is not None
            assert spec.implementation == program
            if native in ("bfloat16", "float16"):
                assert native not in found.kernel.apart_in
