"""Sums over elements of what a formula says and leaves, by machine code where that can be had."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from thimble_zarr.analysis.compute.variables import (
    coefficients,
    decay_factor,
    formula_of,
    known_rounding,
    skipped,
)
from thimble_zarr.analysis.compute.windows import Window
from thimble_zarr.optim.formula import W_BEFORE
from thimble_zarr.optim.programs.compiled import is_available
from thimble_zarr.optim.programs.sums import FormulaSums, sums_in_order

LEAST_SQUARE = 1e-25
"""Sums of squares below are computed in float64: some squares may be no float32 number."""


@dataclass(frozen=True)
class StepSums:
    """Of the steps of a part of a window: float64, shape `(step,)`.

    Attributes
    ----------
    predicted, observed, difference
        Sums of squares of what was predicted, of what was observed and of what that leaves.
    product
        Sum of the products of the first two.
    n_beyond
        Elements of which more is left than rounding can make; None if that was not asked.
    """

    predicted: np.ndarray
    observed: np.ndarray
    difference: np.ndarray
    product: np.ndarray
    n_beyond: np.ndarray | None

    def are_exact(self, dtype: type[np.floating]) -> bool:
        """Return whether all is finite, and no square underflowed or overflowed in a dtype."""
        least = LEAST_SQUARE if dtype == np.float32 else -1.0
        squares = self.predicted, self.observed, self.difference
        return all(of.min() > least and of.max() < np.inf for of in squares)  # NaN is neither


def sums_of_products(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the sum of products of each token at each step.

    Where there is machine code they are added up in its order, so that it does not matter which
    parts it computed.
    """
    if is_available():
        return sums_in_order(left * right)
    found: np.ndarray = np.vecdot(left, right)
    return found


def step_sums(part: Window, tokens: Sequence[slice], *, bounded: bool) -> list[StepSums] | None:
    """Return the sums of some of a part's tokens and of others; None where NumPy must compute.

    However many they are, all are computed at once.
    """
    steps = part.of_rows(_bounded_steps if bounded else _steps)
    found = None if steps is None else _run(*steps, part)
    if found is None:
        return None
    sums_of_tokens, counts = found
    sums = []
    for some in tokens:
        squares_and_product = sums_of_tokens[..., some].sum(axis=-1, dtype=np.float64)
        predicted, observed, difference, product = squares_and_product
        n_beyond = counts[:, some].sum(axis=-1) if bounded else None
        sums.append(StepSums(predicted, observed, difference, product, n_beyond))
    return sums if all(of.are_exact(part.dtype) for of in sums) else None


def _steps(part: Window) -> tuple[FormulaSums, np.ndarray] | None:
    """Return what computes sums at the steps of a part, and the numbers that it takes.

    The numbers have the shape `(step, number)`. None where NumPy must compute.
    """
    return None if _is_for_numpy(part) else _sums_at_steps(part, [])


def _bounded_steps(part: Window) -> tuple[FormulaSums, np.ndarray] | None:
    """Return the same with the bound of rounding."""
    rounding = None if _is_for_numpy(part) else part.of_rows(known_rounding)
    if rounding is None:
        return None
    of_rounding = [rounding.update, rounding.after, rounding.before, rounding.least]
    return _sums_at_steps(part, of_rounding, shrinks=bool(np.any(rounding.before)))


def _is_for_numpy(part: Window) -> bool:
    """Return whether there is no machine code, or a step that does not follow or was skipped."""
    return not (is_available() and part.follows.all()) or len(part.of_rows(skipped)) > 0


def _sums_at_steps(
    part: Window, of_rounding: Sequence[Any], *, shrinks: bool = False
) -> tuple[FormulaSums, np.ndarray]:
    schema = part.source.reader.schema
    formula, of_update = formula_of(schema), part.of_rows(coefficients)
    factor = part.of_rows(decay_factor)
    names = dict.fromkeys(("W", *formula.update_inputs))
    sums = FormulaSums(
        formula,
        tuple((name, schema.dtypes[name]) for name in names if name != W_BEFORE),
        np.dtype(part.dtype).name,
        len(of_update),
        decays=bool(factor.any()),
        is_bounded=bool(of_rounding),
        shrinks=shrinks,
    )
    numbers = np.empty((len(part.rows), sums.n_numbers), part.dtype)
    for index, values in enumerate([*of_update, factor, *of_rounding]):
        numbers[:, index] = np.broadcast_to(np.reshape(values, -1), len(part.rows))
    return sums, numbers


def _run(
    sums: FormulaSums, numbers: np.ndarray, part: Window
) -> tuple[np.ndarray, np.ndarray] | None:
    """Take the rows of a part at once if each has the one before it beside it, or one by one."""
    bits = {name: part.bits(name) for name, _ in sums.natives}
    if part.is_consecutive:
        return sums.run(bits, next(part.bits_before("W")), numbers)
    found = []
    for row, before in enumerate(part.bits_before("W")):
        at = slice(row, row + 1)
        of_row = sums.run({name: of[at] for name, of in bits.items()}, before, numbers[at])
        if of_row is None:
            return None
        found.append(of_row)
    return np.concatenate([of for of, _ in found], axis=1), np.concatenate([of for _, of in found])
