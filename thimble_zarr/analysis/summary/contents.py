"""What a summary has: its variables, their dims, and what they are, in words."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from thimble_zarr.analysis.compute.variables import derived_names, formula_inputs
from thimble_zarr.format.schema import Schema
from thimble_zarr.optim.base import Estimate

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
"""The quantiles over the tokens of a group that are kept of each number that a token has."""

LAST_STEPS: Mapping[str, str] = {
    "freeze_step": "last step at which a {row} moved, 0 if it never did",
    "last_early": "last step at which a {row} moved by more than an ULP a dim (L2 > sqrt(D))",
    "last_midlife": "last step at which a {row} moved by more than one ULP in any dim",
    "last_late": "last step at which a {row} moved, by one ULP at most in every dim",
}


@dataclass(frozen=True)
class Variable:
    """A variable of a summary: its dims, dtype, and what it is, in words."""

    dims: tuple[str, ...]
    dtype: type[np.generic]
    long_name: str


@dataclass(frozen=True)
class Contents:
    """What can be summed up of a run, by what was recorded of it."""

    schema: Schema

    @cached_property
    def has_gradient(self) -> bool:
        """Whether the gradient was recorded."""
        return "grad" in self.schema.dtypes

    @cached_property
    def has_formula(self) -> bool:
        """Whether there is a formula, and what it needs was recorded."""
        return "residual" in derived_names(self.schema)

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """The estimates of the optimizer that can be computed, by what their norm is called."""
        recorded = self.schema.dtypes
        return {
            f"norm_sqrt_{of.name}" if of.is_square else f"norm_{of.name}": of
            for of in self.schema.optimizer.estimates
            if {*of.inputs} <= {*recorded}
        }

    @cached_property
    def states(self) -> dict[str, str]:
        """The states of an optimizer that has no estimates, by what their norm is called."""
        optimizer = self.schema.optimizer
        known = () if optimizer.estimates else optimizer.states
        return {
            f"norm_{state.name}": state.name for state in known if state.name in self.schema.dtypes
        }

    @property
    def inputs(self) -> tuple[str, ...]:
        """The stored variables that it is computed from."""
        needed = {"W", "grad", *self.states.values()}
        needed |= {name for of in self.estimates.values() for name in of.inputs}
        if self.has_formula:
            needed |= {*formula_inputs(self.schema)}
        return tuple(name for name in self.schema.dtypes if name in needed)

    @property
    def of_token(self) -> dict[str, str]:
        """Numbers of each step and token, and what they are."""
        optimizer = self.schema.optimizer
        names = {
            "norm_W": "distance from the origin",
            "norm_delta_W": "size of the step",
            "l1_ulp": "L1 of the step in ULP at W[t-1]",
            "l2_ulp": "L2 of the step in ULP at W[t-1]",
            "max_ulp": "L-inf of the step in ULP at W[t-1]",
            "n_moved": "dims that moved",
        }
        if self.has_gradient:
            names["norm_grad"] = "norm of the gradient"
        for name, of in self.estimates.items():
            root = "square root of the " if of.is_square else ""
            names[name] = f"norm of the {root}{of.long_name}"
        words = {state.name: state.long_name for state in optimizer.states}
        for name, state in self.states.items():
            names[name] = f"norm of the {words[state]}"
        if self.has_formula:
            names["norm_residual"] = "norm of what the formula leaves of the step"
        return names

    @property
    def of_member(self) -> dict[str, str]:
        """Numbers of each step and token that are relative to its group."""
        return {
            "cosine_to_mean": "cosine of the step with the group's mean step",
            "centroid_distance": "distance from the group's centroid",
        }

    @property
    def of_dim(self) -> dict[str, str]:
        """Means over each group, by step and dim."""
        names = {"centroid": "mean of W", "mean_delta_W": "mean of delta_W"}
        return names | ({"mean_grad": "mean of grad"} if self.has_gradient else {})

    @property
    def counts(self) -> dict[str, str]:
        """Counts of each step and group."""
        row = self.schema.row_name
        return {
            "n_identical": f"{row}s whose weights are those of another, bit for bit",
            "largest_identical": f"most {row}s with the same weights, bit for bit",
        }

    @property
    def of_step(self) -> dict[str, str]:
        """Other numbers of each step and group."""
        names = {
            "norm_observed": "norm of the observed change of all weights of the group",
            "share_moved": "share of weights that moved",
        }
        if self.has_formula:
            names |= {
                "norm_predicted": "norm of the change that the formula predicts",
                "cosine_predicted": "cosine of predicted and observed change",
                "share_stalled": "share of weights that the formula moves and that stay",
                "share_below_half_ulp": "share of predicted changes below half an ULP at W[t-1]",
            }
        return names

    @property
    def variables(self) -> dict[str, Variable]:
        """Every variable of the summary."""
        row = self.schema.row_name
        per_token = self.of_token | self.of_member
        found: dict[str, Variable] = {}
        for names, dims, dtype in (
            (self.of_token, ("step", "token"), np.float32),
            (self.of_member, ("group", "step", "token"), np.float32),
            (self.of_dim, ("group", "step", "dim"), np.float64),
            (self.counts, ("group", "step"), np.int64),
            (self.of_step, ("group", "step"), np.float64),
            (
                {f"{name}_quantiles": f"{words}: quantiles" for name, words in per_token.items()},
                ("group", "step", "quantile"),
                np.float64,
            ),
            ({name: of.format(row=row) for name, of in LAST_STEPS.items()}, ("token",), np.int64),
            ({"is_member": f"whether a {row} is in the group"}, ("group", "token"), np.bool_),
        ):
            for name, words in names.items():
                found[name] = Variable(dims, dtype, words)
        return found
