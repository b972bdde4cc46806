"""Causes that put values in a wrong place, or lose them: bits, rows and tokens.

Most prove themselves: with the fault undone the replay gives the recorded rows to the bit.
"""

import itertools
from collections.abc import Callable, Iterable

import numpy as np

from thimble_zarr.bits import is_nan
from thimble_zarr.causes.cause import Facts, cause
from thimble_zarr.causes.evidence import Evidence, Failure
from thimble_zarr.optim.base import COUNT

_MAX_MATCHED = 256
"""Tokens that are looked for among all others."""

_MAX_CANDIDATES = 64
"""Failing steps among which a row is looked for."""


@cause("schedule-free-swap", is_everywhere=True, is_fault=False)
def schedule_free_swap(evidence: Evidence, failure: Failure) -> Facts | None:
    """Before step {step} the optimizer moved the weights to their average and back.

    Its `eval` and `train` do, and round them. From weights so moved, every row follows.
    """
    for step in failure.steps:
        weights = evidence.swapped(step)
        if weights is None or not evidence.mended(step, {"W": weights}).all():
            return None
    return {"variable": "W"}


@cause("bit-flip", is_local=True)
def bit_flip(evidence: Evidence, failure: Failure) -> Facts | None:
    """One bit of {variable} is flipped: bit {bit} at step {step}, {place}.

    With it flipped back, every row follows from the row before.
    """
    place = failure.suspect(of_whole=evidence.is_whole)
    if len(failure.steps) > 2 or place is None:
        return None
    step, (token, dim) = failure.steps[0], place
    element = evidence.part(token, dim)
    at = (*np.nonzero(element.tokens == token)[0], *np.nonzero(element.dims == dim)[0])
    begin_at_zero = {s.name for s in element.schema.optimizer.states if s.first == 0}
    suspects = [(name, step) for name in (*element.names, "grad")]
    suspects += [(name, step - 1) for name in element.names]
    for name, row in suspects:
        recorded = element.row(name, row)
        unsigned = np.dtype(f"u{recorded.dtype.itemsize}")
        is_zero = name in begin_at_zero and element.source.steps[row] == 0
        for bit in range(8 * unsigned.itemsize):
            flipped = np.ascontiguousarray(recorded).view(unsigned).copy()
            flipped[at] ^= unsigned.type(1 << bit)
            possible = not (is_zero and flipped.any())
            if possible and _follows(element, name, row, flipped.view(recorded.dtype)):
                return {"variable": name, "bit": bit, "step": row, "token": token, "dim": dim}
    return None


def _follows(evidence: Evidence, name: str, row: int, mended: np.ndarray) -> bool:
    """Return whether the steps to and from a row hold with other bits of a variable in it."""
    other = {name: mended}
    if name == "grad":
        return bool(evidence.mended(row, other).all())
    if row in evidence.sound:  # with other bits it would not follow
        return False
    if evidence.follows(row) and not evidence.mended(row, outcome=other).all():
        return False
    return not evidence.follows(row + 1) or bool(evidence.mended(row + 1, other).all())


@cause("missing-row", is_local=True)
def missing_row(evidence: Evidence, failure: Failure) -> Facts | None:
    """Values of {variable} are missing at step {step}.

    They are NaN, and those of the steps around it are not: the row was not written, or was lost.
    """
    begin_later = {"grad", *(s.name for s in evidence.schema.optimizer.states if s.first is None)}
    for row in (failure.steps[0] - 1, failure.steps[0]):
        if row in evidence.sound and not evidence.follows(row):  # the row before is not at hand
            continue
        not_yet = begin_later if evidence.source.steps[row] == 0 else set()
        names = [name for name in ("grad", *evidence.names) if name not in not_yet]
        lost = {name: _lost(evidence, name, row) for name in names}
        missing = {name: where for name, where in lost.items() if where.any()}
        if missing:
            first = next(iter(missing.values()))
            facts = {"variable": ", ".join(missing), "step": row, "token": None, "dim": None}
            if not first.all():
                token, dim = np.argwhere(first)[0]
                facts |= {"token": evidence.tokens[token], "dim": evidence.dims[dim]}
            return facts
    return None


def _lost(evidence: Evidence, name: str, row: int) -> np.ndarray:
    """Return where a variable is NaN at a row and was not at the row before."""
    lost = is_nan(evidence.row(name, row))
    if evidence.follows(row) and evidence.source.steps[row] > 1:
        lost &= ~is_nan(evidence.row(name, row - 1))
    return lost


@cause("permuted-tokens")
def permuted_tokens(evidence: Evidence, failure: Failure) -> Facts | None:
    """The {row}s of {variable} are permuted at step {step}.

    The values of {place} are those of {other}, and so on.
    """
    # At the first step of all the states are the gradient, and permuted as it is.
    step = failure.sampled[len(failure.sampled) // 2]
    step = step if len(failure.steps) > 2 else failure.steps[0]
    replayed, recorded = evidence.replay(step), evidence.after(step)
    for name in failure.wrong:
        places = _matches(recorded[name], replayed[name], evidence.share)
        if places is not None:
            break
    else:
        if failure.states_are_right or evidence.schema.optimizer.formula is None:
            return None
        name, places = "grad", _gradient_places(evidence, step)
    if places is None:
        return None
    first = int(np.flatnonzero(places != np.arange(len(places)))[0])
    other = evidence.source.token_ids[evidence.tokens[places[first]]]
    return {
        "variable": name,
        "token": evidence.tokens[first],
        "other": evidence.schema.place(int(other)),
        "dim": None,
    }


def _matches(rows: np.ndarray, others: np.ndarray, share: float) -> np.ndarray | None:
    """Return for each row which other it is, bit for bit, if nearly all are and not their own.

    If the rows are a sample, `share` is its fraction of all: no larger fraction of them can match.
    """
    place = {row.tobytes(): index for index, row in enumerate(others)}
    places = np.array([place.get(row.tobytes(), -1) for row in rows])
    own, moved = np.arange(len(rows)), np.any(rows != others, axis=1)
    if moved.sum() < 2 or (places[moved] >= 0).mean() < 0.9 * share:
        return None
    places = np.where(places < 0, own, places)
    return places if (places != own).sum() >= 2 else None


def _gradient_places(evidence: Evidence, step: int) -> np.ndarray | None:
    """Return whose gradient each token has, if the replay with those gradients is the record.

    The gradients of tokens that do not occur are nearly equal, so only tokens with large wrong
    gradients are matched, and only where the match is clear.
    """
    rows, others = evidence.consumed(step).gradient, evidence.values("grad", step)
    own = np.arange(len(rows))
    if len(own) < 2:
        return None
    wrong = ~evidence.mended(step).all(axis=1)
    size = np.where(wrong, np.abs(rows).sum(axis=1), 0)
    places = own.copy()
    for index in np.argsort(-size)[:_MAX_MATCHED].tolist():
        distance = np.abs(others - rows[index]).sum(axis=1)
        first, second = np.argpartition(distance, 1)[:2].tolist()
        if distance[first] < 0.5 * distance[second]:
            places[index] = first
    moved = places != own
    if moved.sum() < 2:
        return None
    same = evidence.mended(step, {"grad": evidence.row("grad", step)[places]})[moved].all(axis=1)
    return places if same.mean() > 0.9 else None


@cause("torn-row", is_local=True)
def torn_row(evidence: Evidence, failure: Failure) -> Facts | None:
    """The row of step {step} was overwritten, in part or whole: {n} values of {variable}.

    With the values that the replay computes in their place, the next row follows.
    """
    step = failure.steps[0]
    if len(failure.steps) != 2 or not evidence.mended(step + 1, evidence.replay(step)).all():
        return None
    return {"variable": ", ".join(failure.n_wrong), "n": f"{sum(failure.n_wrong.values()):,}"}


@cause("shifted-rows", is_everywhere=True)
def shifted_rows(evidence: Evidence, failure: Failure) -> Facts | None:
    """The rows of {variable} are shifted: row t holds what belongs to row t{by:+d}.

    Shifted back, every row follows from the row before.
    """

    def mended(step: int, names: tuple[str, ...], by: int) -> np.ndarray:
        before = {name: evidence.row(name, step - by - (name != "grad")) for name in names}
        after = {name: evidence.row(name, step - by) for name in names if name != "grad"}
        return evidence.mended(step, before, after)

    states = tuple(name for name in evidence.names if name != "W")
    groups = (("grad",), ("W",), states, *((name,) for name in states))
    return _shifted(evidence, failure, groups, mended)


@cause("shifted-hyperparameters", is_everywhere=True)
def shifted_hyperparameters(evidence: Evidence, failure: Failure) -> Facts | None:
    """The hyper-parameters are shifted: row t holds those of step t{by:+d}.

    Shifted back, every row follows from the row before.
    """

    def mended(step: int, names: tuple[str, ...], by: int) -> np.ndarray:
        shifted = {name: float(evidence.source.recorded[name][step - by]) for name in names}
        return evidence.mended(step, scalars=shifted)

    if _counted_late(evidence, failure):
        return {"variable": COUNT, "by": -1}
    numbers = evidence.schema.optimizer.scalars
    return _shifted(evidence, failure, (numbers, (COUNT,), (*numbers, COUNT)), mended)


def _counted_late(evidence: Evidence, failure: Failure) -> bool:
    """Return whether a step was taken that is only counted at the next one.

    Where nothing else depends on the count, no other step fails.
    """
    step, count = failure.steps[0], evidence.source.recorded[COUNT]
    if (
        len(failure.steps) > 1
        or not evidence.source.skipped[step]
        or not evidence.follows(step + 1)
    ):
        return False
    later = float(count[step + 1])
    return later == count[step] + 1 and bool(evidence.mended(step, scalars={COUNT: later}).all())


def _shifted(
    evidence: Evidence,
    failure: Failure,
    groups: Iterable[tuple[str, ...]],
    mended: Callable[[int, tuple[str, ...], int], np.ndarray],
) -> Facts | None:
    """Try claims: what is in row t of some variables belongs to row t + `by`."""
    if len(failure.steps) < 3:
        return None
    for names, by in itertools.product(groups, (-1, 1)):
        late, early = max(by, 0), min(by, 0)
        steps = [
            step
            for step in failure.sampled
            if evidence.follows(step - late)
            and evidence.follows(step - early)
            and evidence.source.steps[step] - late > 1
        ]
        if steps and all(mended(step, names, by).all() for step in steps):
            return {"variable": ", ".join(names), "by": by}
    return None


@cause("permuted-rows", is_everywhere=True)
def permuted_rows(evidence: Evidence, failure: Failure) -> Facts | None:
    """Rows are permuted: the row after step {before} is recorded as step {other}.

    There it follows, to the bit, from the row before and its own gradient.
    """

    def is_row_of(part: Evidence, other: int) -> bool:
        grad = {"grad": part.row("grad", other)}
        return bool(part.mended(step, grad, part.after(other)).all())

    step, token, _, _ = failure.start
    one = evidence.part(token)
    steps = [other for failed in evidence.failures for other in failed.steps]
    for other in steps[:_MAX_CANDIDATES]:
        if other != step and is_row_of(one, other) and is_row_of(evidence, other):
            labels = evidence.source.steps
            return {"before": labels[step - 1], "other": labels[other], "variable": None}
    return None
