"""The variables of a recording, stored and derived, as functions of a window.

A derived variable is a formula with a name. It is evaluated in float64 on the window it is asked
for and rounded once, to float32.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from thimble_zarr.analysis.compute.comparison import replayed
from thimble_zarr.analysis.compute.windows import Floats, Window
from thimble_zarr.bits import decode, encode, ordered, spacing, unit_roundoff
from thimble_zarr.causes.replay import why_in_part
from thimble_zarr.errors import SelectionError, all_listed
from thimble_zarr.format.schema import Schema
from thimble_zarr.optim.base import Estimate
from thimble_zarr.optim.formula import (
    W_BEFORE,
    Arrays,
    Formula,
    Precision,
    Rounding,
    like,
)
from thimble_zarr.optim.registry import SPECS, variable_name


@dataclass(frozen=True)
class Derived:
    """A variable of shape `(step, token, dim)` that is computed in float64 from stored `inputs`."""

    long_name: str
    inputs: Callable[[Schema], tuple[str, ...]]
    compute: Callable[[Window], Floats]


class OfFormula(Derived):
    """One that takes the optimizer's formula, which not every one has."""


def delta_W(window: Window) -> Floats:
    """Return the observed change of the weights."""
    previous = window.previous("W")  # before `current`, so that both come from one read
    return window.current("W") - previous


def formula_of(schema: Schema) -> Formula:
    """Return the formula of a run's optimizer; raise SelectionError if it has none."""
    formula = schema.optimizer.formula
    if formula is None:
        raise SelectionError(f"no formula of {schema.optimizer.name} is known; replay it instead")
    return formula


def _formula(window: Window) -> Formula:
    return formula_of(window.source.reader.schema)


def update(
    window: Window, out: tuple[np.ndarray, np.ndarray] | tuple[None, None] = (None, None)
) -> Floats:
    """Return the change that the formula predicts, without the decay of the weights.

    It is computed in the arrays `out`, if they are given, and is in the first.
    """
    formula = _formula(window)
    memories = dict(zip(formula.update_inputs, out, strict=False))
    arrays = {name: _input(window, name, memories.get(name)) for name in formula.update_inputs}
    change = formula.update(arrays, window.of_rows(coefficients), out[0])
    if len(steps := window.of_rows(skipped)):
        change[steps] = 0  # and there need not be any gradient
    return change


def _input(window: Window, name: str, memory: np.ndarray | None = None) -> Floats:
    """Return what a formula is computed from, in `memory` if that is given."""
    return window.previous("W") if name == W_BEFORE else window.decoded(name, memory)


def skipped(window: Window) -> np.ndarray:
    """Return which of the window's steps the optimizer skipped."""
    return np.flatnonzero(window.source.skipped[window.rows])


def coefficients(window: Window) -> Sequence[np.ndarray]:
    """Return what the formula's update computes with besides arrays, shape `(step, 1, 1)`."""
    factors = _formula(window).coefficients(window.of_rows(step_scalars))
    return [factor.astype(window.dtype) for factor in factors]


def step_scalars(window: Window) -> dict[str, np.ndarray]:
    """Return the scalars of the window's steps, as the formula takes them (`Window.scalar`)."""
    return {name: window.scalar(name) for name in window.source.scalars}


def decay_factor(window: Window) -> np.ndarray:
    """Return what weight decay multiplies `W` with, float64, shape `(step, 1, 1)`."""
    factor: np.ndarray = _formula(window).decay_factor(window.of_rows(step_scalars))
    return factor


def decays(window: Window) -> bool:
    """Return whether weight decay acts on the weights at any of the steps."""
    return bool(window.of_rows(decay_factor).any())


def decay(window: Window) -> Floats:
    """Return the change that the decay of the weights predicts."""
    previous = window.previous("W")
    change: Floats = like(previous, window.of_rows(decay_factor)) * previous
    return change


def predicted(window: Window) -> Floats:
    """Return update and decay together."""
    return update(window) + decay(window)


def residual(window: Window) -> Floats:
    """Return what the formula leaves of the observed change."""
    return delta_W(window) - predicted(window)


def unexplained(window: Window) -> Floats:
    """Return what the exact replay leaves of the observed change: zero in a sound record."""
    schema = window.source.reader.schema
    bits = replayed(window).get("W")
    if bits is None:
        raise SelectionError(f"nothing is replayed: {why_in_part(schema, window.positions)}")
    replay = decode(bits, schema.dtypes["W"], np.float64)
    current = window.current("W")
    # Infinite weights of a diverged run, replayed as such, leave nothing.
    return np.where(current == replay, 0.0, current - replay)


def rounding(window: Window) -> Floats:
    """Return what the exact replay does beyond the formula.

    It is taken as what `unexplained` leaves of the residual, both in float32, so that the two add
    up to it in that precision: to the bit in a sound record, where `unexplained` is zero.
    """
    return residual(window).astype(np.float32) - unexplained(window).astype(np.float32)


def moved(window: Window) -> Floats:
    """Return 1 where the weight is not the number that it was, else 0; NaN of what is not known."""
    previous, current = window.previous("W"), window.current("W")
    unknown = np.isnan(previous) | np.isnan(current)
    return np.where(unknown, np.nan, current != previous)


def ulp(window: Window, lattice: str | None = None) -> Floats:
    """Return the spacing of the weights' dtype, or of another, at the weight after the step."""
    return spacing(window.bits("W"), window.source.reader.schema.dtypes["W"], lattice)


def ulp_before(window: Window, lattice: str | None = None) -> Floats:
    """Return the spacing at the weight before the step, where its move starts."""
    before = np.stack([*window.bits_before("W")])
    return spacing(before, window.source.reader.schema.dtypes["W"], lattice)


def displacement_ulp(window: Window, lattice: str | None = None) -> Floats:
    """Return the observed change in units of the spacing at the weight before the step."""
    return delta_W(window) / ulp_before(window, lattice)


def cell(window: Window, lattice: str) -> np.ndarray:
    """Return the place of the weight among all numbers of a dtype (`bits.ordered`)."""
    bits, native = window.bits("W"), window.source.reader.schema.dtypes["W"]
    if lattice != native:
        bits = encode(decode(bits, native, np.float64), lattice)
    return ordered(bits)


def _estimate(name: str, schema: Schema) -> Estimate | None:
    return next((found for found in schema.optimizer.estimates if found.name == name), None)


class OfStates(Derived):
    """An estimate of the optimizer's, which not every one has."""

    @classmethod
    def of(cls, estimate: Estimate) -> "OfStates":
        """Return an estimate, as each run's optimizer has it, as a variable."""
        name = estimate.name
        return cls(estimate.long_name, partial(_estimated_from, name), partial(_estimated, name))


def _estimated_from(name: str, schema: Schema) -> tuple[str, ...]:
    estimate = _estimate(name, schema)
    return () if estimate is None else estimate.inputs


def _estimated(name: str, window: Window) -> Floats:
    estimate = _estimate(name, window.source.reader.schema)
    assert estimate is not None
    arrays = {state: window.current(state) for state in estimate.inputs}
    return estimate.compute(arrays, window.of_rows(step_scalars))


def stalled(window: Window) -> Floats:
    """Return 1 where the formula wants a move and the weight did not move, else 0."""
    observed = delta_W(window)
    stands = (predicted(window) != 0) & (observed == 0)
    return np.where(np.isnan(observed), np.nan, stands)


def rounding_bound(
    window: Window, update: np.ndarray, out: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Return the largest residual that rounding can leave, computed in `out` (`Rounding.bound`)."""
    rounding = window.of_rows(known_rounding)
    if rounding is None:
        names = _formula(window).update_inputs
        rounding = _rounding(window, {name: _input(window, name) for name in names})
    assert rounding is not None
    return rounding.bound(update, window.current("W"), window.previous("W"), out)


def known_rounding(window: Window) -> Rounding | None:
    """Return how far rounding can carry steps from the formula; None where elements decide."""
    return _rounding(window)


def _rounding(window: Window, arrays: Arrays | None = None) -> Rounding | None:
    formula, dtypes = _formula(window), window.source.reader.schema.dtypes
    native = max(dtypes.values(), key=unit_roundoff)
    ours = unit_roundoff(np.dtype(window.dtype).name)  # besides torch's rounding
    precision = Precision.of(native, scalars=formula.scalar_dtype, ours=ours)
    return formula.rounding(window.of_rows(step_scalars), precision, arrays)


def freeze_step(window: Window) -> np.ndarray:
    """Return the last step of the window at which any of a token's elements moved, or 0."""
    moved = (delta_W(window) != 0).any(axis=2) & window.follows[:, np.newaxis]
    last: np.ndarray = (moved * window.source.steps[window.rows, np.newaxis]).max(axis=0)
    return last


def _weights(schema: Schema) -> tuple[str, ...]:
    return ("W",)


def _update_inputs(schema: Schema) -> tuple[str, ...]:
    needed = {"W" if name == W_BEFORE else name for name in formula_of(schema).update_inputs}
    return tuple(name for name in schema.optimizer.variables if name in needed)


def formula_inputs(schema: Schema) -> tuple[str, ...]:
    """Return the stored variables that the formula and the change it predicts need."""
    return tuple(dict.fromkeys(("W", *_update_inputs(schema))))


def replay_inputs(schema: Schema) -> tuple[str, ...]:
    """Return the stored variables that the exact replay needs."""
    return schema.optimizer.variables


_OF_FORMULA = {
    "update": OfFormula(
        "change predicted by the formula, weight decay aside", _update_inputs, update
    ),
    "decay": OfFormula("change predicted by weight decay", _weights, decay),
    "residual": OfFormula("observed change minus update and decay", formula_inputs, residual),
}

_ALIASES = {
    alias: replace(_OF_FORMULA[name], long_name=long_name)
    for spec in SPECS
    for alias, (name, long_name) in spec.ALIASES.items()
}

DERIVED: Mapping[str, Derived] = {
    "delta_W": Derived("observed change of the weight, W[t] - W[t-1]", _weights, delta_W),
    **_OF_FORMULA,
    **_ALIASES,
    **{of.name: OfStates.of(of) for spec in SPECS for of in spec.ESTIMATES},
    "rounding": OfFormula(
        "part of the residual that torch's rounding makes", replay_inputs, rounding
    ),
    "unexplained": Derived(
        "part of the residual that the exact replay leaves", replay_inputs, unexplained
    ),
    "moved": Derived("1 where the weight changed, else 0", _weights, moved),
    "ulp": Derived("spacing of the dtype at W[t]", _weights, ulp),
    "displacement_ulp": Derived(
        "observed change in units of the spacing at W[t-1]", _weights, displacement_ulp
    ),
    "stalled": OfFormula(
        "1 where the formula moves the weight and it stays, else 0", formula_inputs, stalled
    ),
}
"""Every derived variable there can be; a run has those that `derived_names` lists."""


OF_REPLAY = ("rounding", "unexplained")
"""Those that the exact replay gives."""

ON_LATTICE: Mapping[str, Callable[[Window, str], np.ndarray]] = {
    "cell": cell,
    "ulp": ulp,
    "displacement_ulp": displacement_ulp,
}
"""What can be measured on the lattice of any dtype."""


def derived_names(schema: Schema) -> tuple[str, ...]:
    """Return the derived variables that a run has, those of what was not recorded left out."""
    optimizer = schema.optimizer
    return tuple(
        name
        for name, variable in DERIVED.items()
        if (name not in _ALIASES or name in optimizer.ALIASES)
        and not (name in OF_REPLAY and not optimizer.CAN_BE_REPLAYED)
        and not (isinstance(variable, OfFormula) and optimizer.formula is None)
        and not (isinstance(variable, OfStates) and _estimate(name, schema) is None)
        and not missing_inputs(name, schema)
    )


def long_name(name: str) -> str:
    """Return what a variable is, in words."""
    return DERIVED[name].long_name if name in DERIVED else variable_name(name)


def inputs(name: str, schema: Schema) -> tuple[str, ...]:
    """Return the stored variables that one is computed from; of a stored one itself."""
    if name in ON_LATTICE:
        return _weights(schema)
    return DERIVED[name].inputs(schema) if name in DERIVED else (name,)


def missing_inputs(name: str, schema: Schema) -> tuple[str, ...]:
    """Return the variables that were not recorded and without which there is not this one.

    None of what no optimizer of that kind has.
    """
    if isinstance(DERIVED.get(name), OfFormula) and schema.optimizer.formula is None:
        return ()
    return tuple(needed for needed in inputs(name, schema) if needed not in schema.dtypes)


def unknown_scalars(schema: Schema, scalars: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Return the hyper-parameters that are known of no step, of those that the optimizer uses."""
    names = (scalar.name for scalar in schema.optimizer.SCALARS)
    return tuple(name for name in names if np.isnan(scalars[name]).all())


def how_to_record(missing: Sequence[str], schema: Schema) -> str:
    """Return what was not recorded, and how it would be."""
    others = (name for name in schema.optimizer.variables if name in schema.dtypes)
    variables = ", ".join(f'"{name}"' for name in (*others, *missing))
    were = f"{all_listed(missing)} {'were' if len(missing) > 1 else 'was'} not recorded"
    return f"{were}; record with variables=({variables}), or with all of them"


def evaluate(name: str, window: Window, lattice: str | None = None) -> np.ndarray:
    """Return a variable on a window, shape `(step, token, dim)`; on a dtype's lattice, if given.

    Derived variables are float32, without negative zeros, so that what adds up does so bit by bit.
    Stored ones are float64, exact, and cells are integers.
    """
    if lattice is None and name not in DERIVED:
        return window.current(name)
    values = DERIVED[name].compute(window) if lattice is None else ON_LATTICE[name](window, lattice)
    if values.dtype.kind == "i":
        return values
    numbers: np.ndarray = values.astype(np.float32) + np.float32(0)
    return numbers
