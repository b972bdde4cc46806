"""Machine code has the sums of what a formula leaves that NumPy has, also of unusual numbers."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.portable import N_STEPS, drawn, needs_compiler
from thimble_zarr.bits import decode
from thimble_zarr.optim.base import COUNT
from thimble_zarr.optim.formula import Arrays, Formula, Rounding
from thimble_zarr.optim.programs.sums import FormulaSums, sums_in_order
from thimble_zarr.optim.registry import spec_of
from thimble_zarr.optim.specs.adam import Adam


def formula_of(kind: type[torch.optim.Optimizer], **options: Any) -> Formula:
    """The formula of a live optimizer."""
    optimizer = kind([torch.nn.Parameter(torch.zeros(3))], lr=1e-3, **options)
    spec = spec_of(kind)
    assert spec is not None
    formula = spec.of(optimizer, optimizer.param_groups[0]).formula
    assert formula is not None
    return formula


SCALARS = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "momentum", "dampening", COUNT)

FORMULAS: dict[str, Formula] = {
    "AdamW": formula_of(torch.optim.AdamW),
    "amsgrad": formula_of(torch.optim.AdamW, amsgrad=True),
    "SGD": formula_of(torch.optim.SGD, momentum=0.9, nesterov=True),
}
N_COEFFICIENTS = {
    formula: len(formula.coefficients(dict.fromkeys(SCALARS, 0.5))) for formula in FORMULAS.values()
}
DTYPES = {"bfloat16": "float32", "float16": "float32", "float32": "float64", "float64": "float64"}
N_TOKENS = 3


def sums_of(formula: Formula, native: str, **options: Any) -> FormulaSums:
    names = dict.fromkeys(("W", *formula.update_inputs))
    natives = tuple((name, native if name == "W" else "float32") for name in names)
    bounded = {"decays": True, "is_bounded": True, "shrinks": True, **options}
    return FormulaSums(formula, natives, DTYPES[native], N_COEFFICIENTS[formula], **bounded)


def given(sums: FormulaSums, n_dims: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Bits of all kinds, a token's side by side as in a chunk, and numbers of each step."""
    generator = np.random.default_rng(3)
    bits = {
        name: np.resize(drawn(native, generator), (N_TOKENS, N_STEPS + 1, n_dims))
        for name, native in sums.natives
    }
    numbers = generator.standard_normal((N_STEPS, sums.n_numbers))
    numbers[:, -4:] = np.abs(numbers[:, -4:]) * (1, 1, 1, 1e-30)
    return {name: of.transpose(1, 0, 2) for name, of in bits.items()}, numbers.astype(sums.dtype)


def by_numpy(
    sums: FormulaSums, bits: Arrays, numbers: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray]:
    """The products that are added up, of each element; and which are beyond their bound."""
    dtype = np.dtype(sums.dtype).type
    x: Any = {name: decode(bits[name], native, dtype) for name, native in sums.natives}
    before, now = x["W"][:-1], {name: of[1:] for name, of in x.items()}
    of_steps = [*numbers.T[:, :, np.newaxis, np.newaxis]]
    n = sums.n_coefficients
    update = sums.formula.update(now, of_steps[:n])
    predicted = of_steps[n] * before + update if sums.decays else update
    observed = now["W"] - before
    difference = observed - predicted
    pairs = ((predicted,) * 2, (observed,) * 2, (difference,) * 2, (predicted, observed))
    bound = Rounding(*of_steps[n + 1 :]).bound(update, now["W"], before)
    return [left * right for left, right in pairs], ~(np.abs(difference) <= bound)


@needs_compiler
@pytest.mark.parametrize("n_dims", [1, 16, 37])
@pytest.mark.parametrize("native", DTYPES)
@pytest.mark.parametrize("name", FORMULAS)
def test_they_are_those_of_numpy(name: str, native: str, n_dims: int) -> None:
    sums = sums_of(FORMULAS[name], native)
    bits, numbers = given(sums, n_dims)
    found = sums.run({of: rows[1:] for of, rows in bits.items()}, bits["W"][0], numbers)
    assert found is not None
    with np.errstate(all="ignore"):
        products, beyond = by_numpy(sums, bits, numbers)
        for made, of in zip(found[0], products, strict=True):
            sizes = np.abs(of.astype(np.float64)).sum(axis=-1)
            apart = np.abs(made - of.astype(np.float64).sum(axis=-1))
            finite = sizes < np.finfo(sums.dtype).max / 2
            assert (apart <= n_dims * np.finfo(sums.dtype).eps * sizes)[finite].all()
            assert not np.isfinite(made[~np.isfinite(of).all(axis=-1)]).any()
    assert (found[1] == beyond.sum(axis=-1)).all()
    assert n_dims == 1 or 0 < beyond.sum() < beyond.size


@needs_compiler
def test_the_order_of_sums_is_known() -> None:
    sums = sums_of(FORMULAS["AdamW"], "float32")
    bits, numbers = given(sums, 37)
    finite = {of: np.where(np.abs(rows) < 1e3, rows, 1.0) for of, rows in bits.items()}
    found = sums.run({of: rows[1:] for of, rows in finite.items()}, finite["W"][0], numbers)
    assert found is not None
    with np.errstate(all="ignore"):
        observed = by_numpy(sums, finite, numbers)[0][1]
    lanes = observed[..., :16] + observed[..., 16:32]
    while lanes.shape[-1] > 1:
        left, right = np.split(lanes, 2, axis=-1)
        lanes = left + right
    total = lanes[..., 0]
    for element in range(32, 37):
        total = total + observed[..., element]
    assert (sums_in_order(observed) == total).all()
    assert (found[0][1] == total).all()


def test_what_cannot_be_traced_or_has_no_hash_is_left_to_numpy() -> None:
    class Wavy(Adam):
        def update(self, arrays: Arrays, coefficients: Any, out: Any = None) -> np.ndarray:
            wavy: np.ndarray = np.sin(arrays["exp_avg"])
            return wavy

    class Asking(Adam):
        def update(self, arrays: Arrays, coefficients: Any, out: Any = None) -> np.ndarray:
            return super().update(arrays, coefficients) if coefficients[1] else arrays["exp_avg"]

    adamw: Any = FORMULAS["AdamW"]
    wavy, asking = (kind(**vars(adamw)) for kind in (Wavy, Asking))
    sums = replace(sums_of(adamw, "float32"), formula=wavy)
    bits, numbers = given(sums, 5)
    for formula in (wavy, asking, replace(adamw, betas_dtype=["float32"])):
        other = replace(sums, formula=formula)
        found = other.run({of: rows[1:] for of, rows in bits.items()}, bits["W"][0], numbers)
        assert found is None
