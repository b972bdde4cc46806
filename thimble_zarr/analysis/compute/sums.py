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
        squares = np.stack([self.predicted, self.observed, self.difference])
        return bool(((squares > least) & (squares < np.inf)).all())


def sums_of_products(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the sum of products of each token at each step.

    Where there is machine code they are added up in its order, so that it does not matter which
    parts it computed.
    """
    if is_available():
        return sums_in_order(left * right)
    found: np.ndarray = np.vecdot(left, right)
    return found


def step_sums(part: Window, *, bounded: bool) -> StepSums | None:
    """Return the sums of a part; None where NumPy must compute them."""
    if not is_available() or not part.follows.all() or len(part.of_rows(skipped)):
        return None
    if bounded and part.of_rows(known_rounding) is None:
        return None
    dtypes = part.source.reader.schema.dtypes
    formula = formula_of(part.source.reader.schema)
    names = dict.fromkeys(("W", *formula.update_inputs))
    sums = FormulaSums(
        formula,
        tuple((name, dtypes[name]) for name in names if name != W_BEFORE),
        np.dtype(part.dtype).name,
        len(part.of_rows(coefficients)),
        decays=bool(part.of_rows(decay_factor).any()),
        is_bounded=bounded,
        shrinks=bounded and part.of_rows(_shrinks),
    )
    found = _run(sums, part, part.of_rows(_bounded_numbers if bounded else _numbers))
    if found is None:
        return None
    sums_of_tokens, counts = found
    predicted, observed, difference, product = sums_of_tokens.sum(axis=-1, dtype=np.float64)
    n_beyond = counts.sum(axis=-1) if bounded else None
    return StepSums(predicted, observed, difference, product, n_beyond)


def _run(
    sums: FormulaSums, part: Window, numbers: np.ndarray
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


def _numbers(part: Window) -> np.ndarray:
    """Return what the formula computes with at each step, `(step, number)`."""
    numbers = [*part.of_rows(coefficients), part.of_rows(decay_factor)]
    return _table(part, numbers)


def _shrinks(part: Window) -> bool:
    rounding = part.of_rows(known_rounding)
    return rounding is not None and bool(np.any(rounding.before))


def _bounded_numbers(part: Window) -> np.ndarray:
    """Return those numbers, and those that the bound of rounding is computed with."""
    rounding = part.of_rows(known_rounding)
    assert rounding is not None
    of_rounding = rounding.update, rounding.after, rounding.before, rounding.least
    return np.hstack([part.of_rows(_numbers), _table(part, of_rounding)])


def _table(part: Window, numbers: Sequence[Any]) -> np.ndarray:
    table = np.empty((len(part.rows), len(numbers)), part.dtype)
    for index, values in enumerate(numbers):
        table[:, index] = np.broadcast_to(np.reshape(values, -1), len(part.rows))
    return table
