"""The verdict: one line in plain words on what an accounting shows."""

from dataclasses import dataclass

import numpy as np
import xarray as xr


@dataclass(frozen=True)
class Verdict:
    """What an accounting shows.

    Attributes
    ----------
    holds
        Whether the formula, with the rounding of the dtype, explains every weight change.
    text
        The same in words.
    """

    holds: bool
    text: str


def verdict(table: xr.Dataset) -> Verdict:
    """Judge an accounting.

    Parameters
    ----------
    table
        What `accounting` returned.

    Returns
    -------
    Verdict
    """
    total = table.attrs["n_elements"] * table.sizes["step"]
    n_unexplained, n_not_finite = int(table.n_unexplained.sum()), int(table.n_not_finite.sum())
    if n_unexplained and n_unexplained == n_not_finite:
        return Verdict(
            holds=False,
            text=f"FAILS: {n_not_finite:,} of {total:,} weight changes are not finite, first at "
            f"step {_first(table.n_not_finite)}: the run diverged, or values are missing. All "
            "others are AdamW's formula.",
        )
    if n_unexplained:
        return Verdict(
            holds=False,
            text=f"FAILS: {n_unexplained:,} of {total:,} weight changes differ from AdamW's "
            f"formula by more than {table.attrs['dtype']} rounding can explain, first at step "
            f"{_first(table.n_unexplained)}. The recorded states did not make these weights.",
        )
    return Verdict(
        holds=True,
        text=f"HOLDS: all {total:,} weight changes are AdamW's formula within what "
        f"{table.attrs['dtype']} rounding can explain; {_cosines(table)}.",
    )


def _first(counts: xr.DataArray) -> int:
    """Return the first step with a count."""
    return int(counts.step.values[np.flatnonzero(counts.values)[0]])


def _cosines(table: xr.Dataset) -> str:
    moved = table.cosine_similarity.dropna("step")
    if moved.size == 0:
        swallowed = bool((table.norm_predicted > 0).any())
        return "nothing moved, rounding swallowed every change" if swallowed else "nothing moved"
    steps, cosines = moved.step.values, moved.values
    shown = sorted({0, int(np.argmin(cosines)), len(steps) - 1})
    return "cosine " + ", ".join(f"{cosines[i]:.4f} at step {steps[i]}" for i in shown)
