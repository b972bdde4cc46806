"""The verdict: one line in plain words about what an accounting shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from thimble_zarr.analysis.audit.audit import NOT_FINITE
from thimble_zarr.analysis.audit.table import AnyTable, counts, has_formula
from thimble_zarr.causes.catalogue import NO_FAULTS, Finding
from thimble_zarr.causes.cause import ROWS_NOT_KEPT
from thimble_zarr.errors import all_listed
from thimble_zarr.format.reader import Reader, State


@dataclass(frozen=True)
class Verdict:
    """Whether every recorded row follows from the row before, and the same in words.

    `step` is the first step that fails. `has_ended` says whether the recording has; if not, `text`
    says so.
    """

    holds: bool
    text: str
    step: int | None = None
    has_ended: bool = True


def verdict(
    table: AnyTable, findings: Sequence[Finding] = (), reader: Reader | None = None
) -> Verdict:
    """Judge an accounting, `find_causes` of it, and with its reader whether the recording ended.

    Where there is a replay it decides, because it is sharper than any bound on the formula's
    rounding. In both cases a change that is not finite fails.
    """
    judged, known = _judged(table), [of for of in findings if of.code in NO_FAULTS]
    if known and len(known) == len(findings):
        judged = _holds_but_for(known, table) or judged
    elif judged.holds and findings:
        first = min(findings, key=lambda finding: finding.step)
        why = (
            "every row follows from the row before, but the store was changed after it was recorded"
        )
        if first.code == ROWS_NOT_KEPT.code:
            why = "every row that is there follows from the row before, but rows are missing"
        judged = _failed(first.step, f"{why}, first at step {first.step}.")
    if reader is None:
        return judged
    if reader.schema.caveat and not judged.holds:
        text = f"{judged.text} It cannot hold: {reader.schema.caveat}."
        judged = replace(judged, text=text)
    if judged.holds and (n_filled := _n_filled(table, reader)):
        text = (
            f"{judged.text} {n_filled:,} of these rows were not copied (keep='keyframes'): the "
            "recorded gradients lead from keyframe to keyframe."
        )
        judged = replace(judged, text=text)
    if unended := _unended(reader):
        return replace(judged, text=f"{judged.text} {unended}", has_ended=False)
    if planned := stopped_of(reader):
        stopped = f"The run was stopped after step {reader.read_steps()[-1]}{planned}."
        return replace(judged, text=f"{judged.text} {stopped}")
    return judged


def _holds_but_for(known: Sequence[Finding], table: AnyTable) -> Verdict | None:
    """Judge steps that are right though they do not follow; None if others do not, either."""
    n_failing = int(counts(table, "n_beyond").any(axis=1).sum())
    if n_failing != sum(of.n_steps for of in known) or counts(table, NOT_FINITE).any():
        return None
    return Verdict(
        holds=True,
        text=f"HOLDS: every row follows from the row before, {n_failing:,} of them from weights "
        f"that the optimizer itself had moved ({known[0].code}), first at step {known[0].step}.",
    )


def _judged(table: AnyTable) -> Verdict:
    if "recurrence" in table:
        found = _replay_verdict(table)
        return replace(found, text=f"{found.text} {_not_replayed(table)}".rstrip())
    return _formula_verdict(table) if "n_beyond_rounding" in table else _bare_verdict(table)


def _bare_verdict(table: AnyTable) -> Verdict:
    if counts(table, NOT_FINITE).any():
        return _not_finite(table, "are finite")
    why = _not_replayed(table) or (
        f"How {table.attrs['optimizer']} takes a step is not known here, so whether rows follow "
        "from the row before was not checked."
    )
    return Verdict(holds=True, text=f"{_AS_FAR} {_of_record(table)}. {why}")


_AS_FAR = "HOLDS as far as it can be checked:"


def _of_record(table: AnyTable) -> str:
    """Return what is known of rows that were not replayed."""
    return (
        f"all {_total(table):,} weights are finite, no recorded row is missing, and every chunk "
        "has its recorded checksum"
    )


def _not_replayed(table: AnyTable) -> str:
    """Return what of the rows was not replayed, and why; nothing if all was."""
    why = table.attrs.get("not_replayed")
    return f"{why}." if why else ""


def _n_filled(table: AnyTable, reader: Reader) -> int:
    """Return how many of the checked rows were worked out between keyframes."""
    filled = reader.read_history().filled
    if not filled:
        return 0
    steps, checked = reader.read_steps(), np.asarray(table["step"])
    return int(sum(np.isin(steps[first:stop], checked).sum() for first, stop in filled))


def _failed(step: int, text: str) -> Verdict:
    return Verdict(holds=False, text=f"FAILS: {text}", step=step)


def stopped_of(reader: Reader) -> str:
    """Return ` of N` where a run of N steps recorded fewer, and nothing elsewhere."""
    planned = _planned_steps(reader)
    is_short = planned is not None and reader.schema.schedule is None and reader.n_rows <= planned
    return f" of {planned:,}" if is_short else ""


def _unended(reader: Reader) -> str:
    """Return that a recording has not ended, and why; nothing if it has."""
    recording = reader.recording
    if recording.state is State.CLOSED:
        return ""
    planned, is_imported = _planned_steps(reader), reader.schema.is_imported
    last = f"{reader.read_steps()[-1]}{'' if planned is None else f' of {planned}'}"
    what = "import" if is_imported else "recording"
    how_on = " Import the file again, with --overwrite." if is_imported else ""
    return {
        State.RECORDING: f"The {what} is still running: step {last} is the last one committed.",
        State.UNKNOWN: f"The {what} did not end by step {last}: it is {recording}.",
        State.CUT_OFF: f"The {what} did not end: it was cut off after step {last}.{how_on}",
    }[recording.state]


def _planned_steps(reader: Reader) -> int | None:
    """Return how many steps a run was to take; None where its settings are not kept with it."""
    config = reader.schema.attrs.get("config")
    steps = config.get("steps") if isinstance(config, Mapping) else None
    return steps if isinstance(steps, int) else None


def _formula_verdict(table: AnyTable) -> Verdict:
    beyond, not_finite = counts(table, "n_beyond_rounding"), counts(table, NOT_FINITE)
    n_beyond, formula, dtype = int(beyond.sum()), _formula(table), table.attrs["dtype"]
    if n_beyond and n_beyond == not_finite.sum():
        return _not_finite(table, f"agree with {formula}")
    if n_beyond:
        step = _first(table, beyond)
        return _failed(
            step,
            f"{n_beyond:,} of {_total(table):,} weight changes differ from {formula} by more than "
            f"{dtype} rounding can explain, first at step {step}. These weights do not come from "
            "the recorded states.",
        )
    n_unbounded = int(counts(table, "n_unbounded_rounding").sum())
    but = ", but those that are not judged," if n_unbounded else ""
    return Verdict(
        holds=True,
        text=f"{_AS_FAR if n_unbounded else 'HOLDS:'} all {_total(table):,} weight changes{but} "
        f"agree with {formula} within {dtype} rounding; {_cosines(table)}."
        + (f" Not judged: {n_unbounded:,}. {_OVERFLOWS}" if n_unbounded else ""),
    )


def _replay_verdict(table: AnyTable) -> Verdict:
    names, beyond = np.asarray(table["recurrence"]).tolist(), counts(table, "n_beyond")
    if beyond.any():
        n_beyond = dict(zip(names, beyond.sum(axis=0).tolist(), strict=True))
        listed = ", ".join(f"{n:,} of {name}" for name, n in n_beyond.items() if n)
        step = _first(table, beyond)
        return _failed(
            step,
            f"from step {step} on, rows do not follow from the row before. Of "
            f"{_total(table):,} values in each array, {listed} differ.",
        )
    if counts(table, NOT_FINITE).any():
        return _not_finite(table, "follow from the row before")
    # Tables of several runs have it only if it is the same of all.
    by = f" by {name}" if (name := table.attrs.get("replayed_by")) else ""
    n_different = counts(table, "n_different").sum(axis=0)
    not_judged = table.attrs.get("not_judged", "").split(", ")
    if any(n for name, n in zip(names, n_different, strict=True) if name in not_judged):
        return _verdict_without_bound(table, by, [*not_judged])
    unbounded = _unbounded(table, names)
    but = ", but those that are not judged," if unbounded else ""
    follow = f"replayed{by}, all {_values(table, names)}{but} follow from the row before"
    if n_different.any():
        max_ulp = np.nanmax(np.asarray(table["max_ulp"]))
        text = (
            f"{_AS_FAR if unbounded else 'HOLDS within rounding:'} {follow}, at most "
            f"{max_ulp:.0f} ULP apart. They need not be equal to the bit, because "
            f"{table.attrs['not_exact_because']}.{unbounded}"
        )
    elif table.attrs.get("not_replayed"):
        text = f"{_AS_FAR} {follow}."
    else:
        text = f"HOLDS to the bit: {follow}."
        if has_formula(table):
            text += f" {_formula(table)} agrees within rounding; {_cosines(table)}."
    return Verdict(holds=True, text=text)


def _unbounded(table: AnyTable, names: Sequence[str]) -> str:
    """Return which values differ without a bound to judge them by, a sentence; empty if none."""
    n_unbounded = counts(table, "n_unbounded").sum(axis=0).tolist()
    listed = [f"{n:,} of {name}" for name, n in zip(names, n_unbounded, strict=True) if n]
    if not listed:
        return ""
    return f" Not judged: {all_listed(listed)}. {_OVERFLOWS} Check them where the run was recorded."


_OVERFLOWS = "There rounding may overflow, so nothing bounds it."


def _verdict_without_bound(table: AnyTable, by: str, not_judged: Sequence[str]) -> Verdict:
    """Judge a replay that differs in variables for which no bound is known."""
    names = np.asarray(table["recurrence"]).tolist()
    at = [index for index, name in enumerate(names) if name in not_judged]
    judged = [name for name in names if name not in not_judged]
    n_different = counts(table, "n_different").sum(axis=0)
    differ = ", ".join(f"{n_different[index]:,} of {names[index]}" for index in at)
    max_ulp = np.nanmax(np.asarray(table["max_ulp"])[:, at])
    known = _of_record(table)
    if judged:
        known += f"; replayed{by}, all {_values(table, judged)} follow from the row before"
    return Verdict(
        holds=True,
        text=f"{_AS_FAR} {known}. Of {_total(table):,} values in each array the replay gives other "
        f"bits for {differ}, at most {max_ulp:.0f} ULP apart. That does not tell whether these "
        f"follow, because {table.attrs['not_exact_because']}, and how far rounding then carries "
        f"{table.attrs['optimizer']} is not known. Check it where it was recorded.",
    )


def _values(table: AnyTable, names: Sequence[str]) -> str:
    each = " each" if len(names) > 1 else ""
    return f"{_total(table):,} values{each} of {all_listed(names)}"


def _formula(table: AnyTable) -> str:
    return f"{table.attrs.get('optimizer', 'the optimizer')}'s formula"


def _not_finite(table: AnyTable, others: str) -> Verdict:
    not_finite = counts(table, NOT_FINITE)
    step = _first(table, not_finite)
    return _failed(
        step,
        f"{int(not_finite.sum()):,} of {_total(table):,} weight changes are not finite, first at "
        f"step {step}: the run diverged, or values are missing. All others {others}.",
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
        return "no weight moved: every change was rounded away" if swallowed else "no weight moved"
    steps, cosines = steps[moved], cosines[moved]
    shown = sorted({0, int(np.argmin(cosines)), len(steps) - 1})
    return "cosine " + ", ".join(f"{cosines[i]:.4f} at step {steps[i]}" for i in shown)
