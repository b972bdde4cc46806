"""What the formula predicts of each token's step, and what it leaves of it.

Of 16-bit weights it is computed in float32, and in float64 only for those tokens where float32 may
give another count or a norm that is wrong by a millionth: where a predicted change is close to half
an ULP, or nothing, or where little of a change is left.
"""

from dataclasses import dataclass

import numpy as np

from thimble_zarr.analysis.compute.sums import LEAST_SQUARE
from thimble_zarr.analysis.compute.variables import (
    decay,
    decays,
    formula_of,
    step_scalars,
    update,
)
from thimble_zarr.analysis.compute.windows import Window
from thimble_zarr.analysis.summary.statistics import count_of_steps
from thimble_zarr.bits import decode
from thimble_zarr.optim.formula import W_BEFORE


@dataclass(frozen=True)
class Observed:
    """What the weights of a part did.

    `per_unit` is how many cells of the lattice a change of 1 has, over those from 1 to 2, and
    `weights` the squares of the lengths of the weights, shape `(step, token)`.
    """

    delta: np.ndarray
    per_unit: np.ndarray
    moved: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Compared:
    """Squares of what was predicted and what is left, products, shape `(step, token)`; counts."""

    predicted: np.ndarray
    product: np.ndarray
    left: np.ndarray
    n_stalled: np.ndarray
    n_below: np.ndarray


def compared(part: Window, observed: Observed, n_cells: float) -> Compared:
    """Compare the steps of a part with the formula; there are `n_cells` numbers from 1 to 2."""
    if part.dtype != np.float64 and formula_of(part.source.reader.schema).cancels:
        part = part.in_float64()
    predicted = update(part, out=(part.memory("update"), part.memory("term")))
    if part.of_rows(decays):
        predicted += decay(part)
    moves_all = bool(predicted.all())
    stalled = ~observed.moved if moves_all else np.greater(predicted != 0, observed.moved)
    doubtful = np.zeros(predicted.shape[:2], bool)
    if part.dtype != np.float64 and not moves_all:
        doubtful |= (predicted == 0).any(axis=-1)
    cells = np.multiply(predicted, observed.per_unit, out=part.memory("term"))
    np.abs(cells, out=cells)
    below = _below_half(part, cells, n_cells, doubtful)
    delta = observed.delta
    if delta.dtype != part.dtype:  # anew: float32 has not all bits of a way from close to zero
        before = part.previous("W")
        delta = np.subtract(part.current("W"), before, out=part.memory("term"))
    product, squares = (np.vecdot(predicted, of) for of in (delta, predicted))
    residual = np.subtract(delta, predicted, out=predicted)
    left = np.vecdot(residual, residual)
    squares, product, left = (of.astype(np.float64) for of in (squares, product, left))
    if part.dtype != np.float64:
        doubtful |= ~_is_fine(part, squares, left, observed.weights)
        doubtful &= part.follows[:, np.newaxis]
        if np.count_nonzero(doubtful) * _FEW > doubtful.size:
            return compared(part.in_float64(), observed, n_cells)
        if doubtful.any():
            _settle(part, observed, n_cells, doubtful, (squares, product, left, stalled, below))
    return Compared(squares, product, left, count_of_steps(stalled), count_of_steps(below))


def _below_half(
    part: Window, cells: np.ndarray, n_cells: float, doubtful: np.ndarray
) -> np.ndarray:
    """Return which moves are below half a cell, and note of which tokens that is not sure."""
    half = 0.5 / n_cells
    if part.dtype == np.float64:
        return cells < half
    # A decay that has cancelled is so many times half a cell at most.
    margin = _ROUNDING * (1 + 8 * n_cells * part.of_rows(_largest_decay))
    below, most = (cells < half * (1 + by) for by in (-margin, margin))
    for step in np.flatnonzero(count_of_steps(below) != count_of_steps(most)):
        doubtful[step] |= (below[step] != most[step]).any(axis=-1)
    return below


def _is_fine(
    part: Window, predicted: np.ndarray, left: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Return of which tokens float32 has the squares of what is predicted, and of what is left."""
    decayed = part.of_rows(_largest_decay) ** 2 * weights
    fine = (predicted >= np.maximum(decayed, LEAST_SQUARE)) & (left < np.inf)
    fine &= left >= _LEAST_LEFT * np.maximum(predicted, decayed)
    return fine


def _settle(
    part: Window,
    observed: Observed,
    n_cells: float,
    doubtful: np.ndarray,
    found: tuple[np.ndarray, ...],
) -> None:
    """Put in what `found` has of the tokens that are doubtful, computed in float64."""
    squares, product, left, stalled, below = found
    steps = np.nonzero(doubtful)[0]
    predicted = _predicted(part, doubtful, steps)
    before, after = part.previous("W")[doubtful], part.current("W")[doubtful]
    delta = np.subtract(after, before, dtype=np.float64)
    squares[doubtful] = np.vecdot(predicted, predicted)
    product[doubtful] = np.vecdot(predicted, delta)
    left[doubtful] = np.vecdot(delta - predicted, delta - predicted)
    stalled[doubtful] = (predicted != 0) & ~observed.moved[doubtful]
    below[doubtful] = np.abs(predicted) * observed.per_unit[doubtful] < 0.5 / n_cells


def _predicted(part: Window, tokens: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return what is predicted of some tokens, each at the step that goes with it, in float64."""
    schema, scalars = part.source.reader.schema, part.of_rows(step_scalars)
    formula = formula_of(schema)
    arrays = {
        name: part.previous("W")[tokens].astype(np.float64)
        if name == W_BEFORE
        else decode(part.bits(name)[tokens], schema.dtypes[name], np.float64)
        for name in formula.update_inputs
    }
    factors = [factor[steps, 0] for factor in formula.coefficients(scalars)]
    predicted = formula.update(arrays, factors)
    predicted[part.source.skipped[part.rows[steps]]] = 0
    factor = formula.decay_factor(scalars)[steps, 0]
    if factor.any():
        predicted += factor * part.previous("W")[tokens]
    return predicted


def _largest_decay(part: Window) -> float:
    """Return the largest share of the weights that decays in a step."""
    factor = formula_of(part.source.reader.schema).decay_factor(part.of_rows(step_scalars))
    return float(np.abs(factor[part.follows]).max(initial=0.0))


_ROUNDING = 2.0**-20
"""More than the relative error of what a formula predicts in float32: of 16 roundings."""

_LEAST_LEFT = 1 / 64
"""Share of the squares of what is predicted: if less is left, float32 has too few bits of that."""

_FEW = 4
"""If not one of so many tokens is doubtful, they are few."""
