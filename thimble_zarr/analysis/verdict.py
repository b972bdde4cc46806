"""The verdict: one line in plain words on what an accounting shows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from thimble_zarr.analysis.audit import NOT_FINITE
from thimble_zarr.analysis.findings import Finding
from thimble_zarr.analysis.table import AnyTable, counts, has_formula


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


def verdict(table: AnyTable, findings: Sequence[Finding] = ()) -> Verdict:
    """Judge an accounting.

    The replay judges where there is one: it is sharper than any bound on the formula's rounding.
    Either way a change that is not finite is none that can be accounted for.

    Parameters
    ----------
    table
        What `tabulated` returned, or `accounting`.
    findings
        What `find_causes` returned.

    Returns
    -------
    Verdict
    """
    judged = _of_replay(table) if "recurrence" in table else _of_formula(table)
    if judged.holds and findings:
        return Verdict(
            holds=False,
            text=f"FAILS: the rows follow from one another, but the store was altered after it "
            f"was recorded, first at step {findings[0].step}.",
            step=findings[0].step,
        )
    return judged


def _of_formula(table: AnyTable) -> Verdict:
    beyond, not_finite = counts(table, "n_beyond_rounding"), counts(table, NOT_FINITE)
    n_beyond = int(beyond.sum())
    if n_beyond and n_beyond == not_finite.sum():
        return _not_finite(table, "are AdamW's formula")
    if n_beyond:
        first = _first(table, beyond)
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


def _of_replay(table: AnyTable) -> Verdict:
    names, beyond = np.asarray(table["recurrence"]).tolist(), counts(table, "n_beyond")
    if beyond.any():
        n_beyond = dict(zip(names, beyond.sum(axis=0).tolist(), strict=True))
        listed = ", ".join(f"{n:,} of {name}" for name, n in n_beyond.items() if n)
        first = _first(table, beyond)
        return Verdict(
            holds=False,
            text=f"FAILS: the books do not balance from step {first} on. Of {_total(table):,} "
            f"values of each array {listed} do not follow from the row before.",
            step=first,
        )
    if counts(table, NOT_FINITE).any():
        return _not_finite(table, "replay")
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    total = f"{_total(table):,}"
    if counts(table, "n_different").any():
        max_ulp = np.nanmax(np.asarray(table["max_ulp"]))
        return Verdict(
            holds=True,
            text=f"HOLDS: replayed, all {total} values each of {listed} follow from the "
            "row before, within what rounding allows two programs: at most "
            f"{max_ulp:.0f} ULP apart. To the bit they need not agree, because "
            f"{table.attrs['not_exact_because']}.",
        )
    text = (
        f"HOLDS to the bit: replayed, all {total} values each of {listed} follow from the row "
        "before."
    )
    if has_formula(table):
        text += f" AdamW's formula leaves what rounding does; {_cosines(table)}."
    return Verdict(holds=True, text=text)


def _not_finite(table: AnyTable, others: str) -> Verdict:
    not_finite = counts(table, NOT_FINITE)
    first = _first(table, not_finite)
    return Verdict(
        holds=False,
        text=f"FAILS: {int(not_finite.sum()):,} of {_total(table):,} weight changes are "
        f"not finite, first at step {first}: the run diverged, or values are "
        f"missing. All others {others}.",
        step=first,
    )


def _total(table: AnyTable) -> int:
    n_steps = int(np.count_nonzero(~np.isnan(np.asarray(table[NOT_FINITE], np.float64))))
    return int(table["n_elements"]) * n_steps


def _first(table: AnyTable, wrong: np.ndarray) -> int:
    """Return the first step with a count, of shape `(step,)` or `(step, recurrence)`."""
    return int(np.asarray(table["step"])[np.nonzero(wrong)[0][0]])


def _cosines(table: AnyTable) -> str:
    steps, cosines = np.asarray(table["step"]), np.asarray(table["cosine_similarity"])
    moved = ~np.isnan(cosines)
    if not moved.any():
        swallowed = bool((np.asarray(table["norm_predicted"]) > 0).any())
        return "nothing moved, rounding swallowed every change" if swallowed else "nothing moved"
    steps, cosines = steps[moved], cosines[moved]
    shown = sorted({0, int(np.argmin(cosines)), len(steps) - 1})
    return "cosine " + ", ".join(f"{cosines[i]:.4f} at step {steps[i]}" for i in shown)
