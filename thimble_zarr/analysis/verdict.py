"""The verdict: one line in plain words on what an accounting shows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from thimble_zarr.analysis.findings import Finding


@dataclass(frozen=True)
class Verdict:
    """What an accounting shows.

    Attributes
    ----------
    holds
        Whether the books balance: every recorded row follows from the one before.
    text
        The same in words.
    step
        The first step that fails; None where the books balance.
    """

    holds: bool
    text: str
    step: int | None = None


def verdict(table: xr.Dataset, findings: Sequence[Finding] = ()) -> Verdict:
    """Judge an accounting.

    The replay judges where there is one: it is sharper than any bound on the formula's rounding.
    Either way a change that is not finite is none that can be accounted for.

    Parameters
    ----------
    table
        What `accounting` returned.
    findings
        What `find_causes` returned.

    Returns
    -------
    Verdict
    """
    judged = _of_replay(table) if "recurrence" in table.dims else _of_formula(table)
    if judged.holds and findings:
        return Verdict(
            holds=False,
            text=f"FAILS: the rows follow from one another, but the store was altered after it "
            f"was recorded, first at step {findings[0].step}.",
            step=findings[0].step,
        )
    return judged


def _of_formula(table: xr.Dataset) -> Verdict:
    n_beyond, n_not_finite = int(table.n_beyond_rounding.sum()), int(table.n_not_finite.sum())
    if n_beyond and n_beyond == n_not_finite:
        return _not_finite(table, "are AdamW's formula")
    if n_beyond:
        first = _first(table.n_beyond_rounding)
        return Verdict(
            holds=False,
            text=f"FAILS: {n_beyond:,} of {_total(table):,} weight changes differ from AdamW's "
            f"formula by more than {table.attrs['dtype']} rounding can explain, first at step "
            f"{first}. The recorded states did not make these weights.",
            step=first,
        )
    return Verdict(
        holds=True,
        text=f"HOLDS: all {_total(table):,} weight changes are AdamW's formula within what "
        f"{table.attrs['dtype']} rounding can explain; {_cosines(table)}.",
    )


def _of_replay(table: xr.Dataset) -> Verdict:
    wrong = [str(name) for name in table.recurrence.values if _count(table.n_beyond, name)]
    if wrong:
        counts = ", ".join(f"{_count(table.n_beyond, name):,} of {name}" for name in wrong)
        first = _first(table.n_beyond.sum("recurrence"))
        return Verdict(
            holds=False,
            text=f"FAILS: the books do not balance from step {first} on. Of {_total(table):,} "
            f"values of each array {counts} do not follow from the row before.",
            step=first,
        )
    if table.n_not_finite.any():
        return _not_finite(table, "replay")
    names = _listed(table.recurrence.values.tolist())
    if table.n_different.any():
        return Verdict(
            holds=True,
            text=f"HOLDS: replayed, all {_total(table):,} values each of {names} follow from the "
            "row before, within what rounding allows two programs: at most "
            f"{float(table.max_ulp.max()):.0f} ULP apart. To the bit they need not agree, because "
            f"{table.attrs['not_exact_because']}.",
        )
    text = (
        f"HOLDS to the bit: replayed, all {_total(table):,} values each of {names} follow from the "
        "row before."
    )
    if "cosine_similarity" in table:
        text += f" AdamW's formula leaves what rounding does; {_cosines(table)}."
    return Verdict(holds=True, text=text)


def _not_finite(table: xr.Dataset, others: str) -> Verdict:
    first = _first(table.n_not_finite)
    return Verdict(
        holds=False,
        text=f"FAILS: {int(table.n_not_finite.sum()):,} of {_total(table):,} weight changes are "
        f"not finite, first at step {first}: the run diverged, or values are "
        f"missing. All others {others}.",
        step=first,
    )


def _total(table: xr.Dataset) -> int:
    total: int = int(table.n_elements) * table.sizes["step"]
    return total


def _count(counts: xr.DataArray, name: str) -> int:
    return int(counts.sel(recurrence=name).sum())


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


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
