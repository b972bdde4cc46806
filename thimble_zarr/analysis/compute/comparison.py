"""The recorded recurrences against their exact replay, window by window.

A step takes the row before and the gradient to the row after, by one recurrence for each variable
that it changes. Here the step is taken again and the outcome is compared with the record. A row
that a portable program (`optim.programs`) takes to the recorded bits follows, whatever torch may
do. torch (`optim.replay`) takes the others, and is imported only for them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np

from thimble_zarr.analysis.compute.source import Source
from thimble_zarr.analysis.compute.windows import Window
from thimble_zarr.bits import (
    decode,
    encode,
    is_nan,
    patterns,
    same_bits,
    ulp_distance,
    unit_roundoff,
)
from thimble_zarr.causes.replay import (
    Replay,
    bounds,
    recurrences,
    replay_device,
    replayed_names,
)
from thimble_zarr.format.schema import Schema
from thimble_zarr.optim.base import COUNT
from thimble_zarr.optim.whole import Whole, processor_of

_FUSED_MULTIPLY_ADD = {"AVX2", "AVX512"}
"""Vector instructions, by torch's names, with which it rounds alike."""


def replayed(window: Window) -> dict[str, np.ndarray]:
    """Take the steps of a window again; all of the whole one when the first of its parts asks.

    Returns for each recurrence that can be taken again (`replayed_names`) the stored bits after the
    step, of shape `(step, token, dim)`, missing at rows that follow none. Do not write to them.
    """
    return window.of_whole(_replayed)


def _replayed(window: Window) -> dict[str, np.ndarray]:
    schema = window.source.reader.schema
    names = replayed_names(schema, window.positions)
    recorded = {name: window.bits(name) for name in names}
    after = dict(recorded)  # what is replayed is as recorded, until it is not
    indices = np.flatnonzero(_may_differ(window)).tolist()
    if not indices:
        return after
    inputs = {name: list(window.bits_before(name)) for name in recurrences(schema)}
    inputs["grad"] = list(window.bits("grad"))
    replay = window.of_tokens(_replay_of)
    for index in indices:
        row = int(window.rows[index])
        states = replay.step(row, {name: bits[index] for name, bits in inputs.items()})
        for name, bits in states.items():
            if not same_bits(bits, recorded[name][index]):
                if after[name] is recorded[name]:
                    after[name] = recorded[name].copy(order="K")
                after[name][index] = bits
    return after


def _may_differ(window: Window) -> np.ndarray:
    """Return which rows a portable program does not take to the recorded bits, shape `(step,)`.

    All where there is no program, and those that follow none.
    """
    source, rows = window.source, window.rows
    if source.program is None or source.step_numbers is None:
        return np.ones(len(rows), bool)
    names = recurrences(source.reader.schema)
    differs, is_known = ~window.follows, window.predicted
    # The rows before are in the memory of the rows, but for the first one.
    consecutive = bool((np.diff(rows) == 1).all())
    cuts = [slice(0, 1), slice(1, len(rows))] if consecutive else [slice(0, len(rows))]
    for steps in cuts[: len(rows)]:
        if is_known[steps].all():
            continue
        if steps.start:
            before = {name: window.bits(name)[:-1] for name in names}
        else:
            held = {name: window.bits_before(name) for name in names}
            before = {name: np.stack([*islice(bits, steps.stop)]) for name, bits in held.items()}
        found = source.program.differs(
            before,
            window.bits("grad")[steps],
            source.step_numbers[rows[steps]],
            {name: window.bits(name)[steps] for name in names},
        )
        differs[steps] |= np.logical_or.reduce([*found.values()])
    return differs


def _replay_of(window: Window) -> Replay:
    return Replay(window.source, window.positions)


def not_exact_because(source: Source) -> str:
    """Return why a replay cannot be expected to give the recorded bits; empty where it must."""
    import torch

    schema = source.reader.schema
    made_by, here = schema.software.get("torch"), torch.__version__
    recorded_on, device = (on.partition(":")[0] for on in (schema.device, replay_device(source)))
    vectors = {schema.cpu_capability, torch.backends.cpu.get_cpu_capability()}
    reasons = []
    if made_by is None:
        reasons.append("the record does not say which torch made it")
        if recorded_on in ("unknown", "mps") and recorded_on != device:
            where = "was" if recorded_on == "mps" else "may have been"
            reasons.append(f"it {where} recorded on Apple's MPS, which rounds otherwise than a CPU")
    elif made_by.partition("+")[0] != here.partition("+")[0]:
        reasons.append(f"it was recorded with torch {made_by}")
    if made_by is not None and recorded_on != device:
        reasons.append(f"it was recorded on {schema.device}")
    elif recorded_on == "cpu" and len(vectors - {None}) > 1 and not vectors <= _FUSED_MULTIPLY_ADD:
        reasons.append(f"it was recorded on a CPU that torch used as {schema.cpu_capability}")
    if not schema.contiguous:
        reasons.append("its parameter was not contiguous")
    if not reasons and isinstance(schema.optimizer, Whole):
        return _other_sums(schema, schema.optimizer.processor)
    return " and ".join(reasons)


def _other_sums(schema: Schema, processor: str) -> str:
    """Return why sums over a whole parameter may be others here; empty if they must be the same."""
    import torch

    here, made_by = processor_of(torch.device(schema.device)), schema.software["torch"]
    vectors = torch.backends.cpu.get_cpu_capability()
    if made_by != torch.__version__:
        return f"it was recorded with torch {made_by}"
    if schema.device == "cpu" and schema.cpu_capability != vectors:
        return f"it was recorded on a CPU that torch used as {schema.cpu_capability}"
    return "" if processor == here else f"it was recorded on {processor}"


@dataclass(frozen=True)
class Comparison:
    """One recurrence, recorded and replayed, of a shape that broadcasts to `(step, token, dim)`.

    `differs` is where the bits are not the same (NaN is NaN), `beyond` where they differ by more
    than they may: at all if the replay is exact, else by more than rounding allows two programs
    (`Formula.bounds`). It is `unbounded` where they differ and no bound is known. `distance` is
    between recorded and replayed number, in ULP, float64.
    """

    differs: np.ndarray
    beyond: np.ndarray
    unbounded: np.ndarray
    distance: np.ndarray


def compare(
    window: Window, after: Mapping[str, np.ndarray], *, exact: bool | None
) -> dict[str, Comparison]:
    """Compare the rows of a window with their replay (`replayed`), recurrence by recurrence.

    Where a state did not begin as the optimizer has it, that counts as a difference of the first
    step. Nothing differs at rows that follow none. `exact` says whether the replay must give the
    recorded bits. If None that is found out (`not_exact_because`) where some differ.
    """
    if is_as_recorded(window, after):
        return dict.fromkeys(after, _SAME)
    source, schema = window.source, window.source.reader.schema
    follows = window.follows[:, np.newaxis, np.newaxis]
    is_first, same = _is_first(window)[:, np.newaxis, np.newaxis], _same(window, after)
    if exact is None:
        exact = all(same.values()) or not not_exact_because(source)
    allowed = {}
    if not exact:
        before = {name: window.previous(name) for name in after}
        scalars = {name: window.scalar(name) for name in source.recorded}
        allowed = bounds(
            schema, before, window.current("grad"), scalars, ours=unit_roundoff("float64")
        )
    begins = {of.name: of.first for of in schema.optimizer.states if of.name in after}
    comparisons = {}
    for name, bits in after.items():
        recorded = window.bits(name)
        differs, distance = np.zeros(follows.shape, bool), np.zeros(follows.shape)
        if not same[name]:
            differs = (patterns(bits) != patterns(recorded)) & follows
            differs &= ~(is_nan(bits) & is_nan(recorded))
            distance = np.zeros(differs.shape)
            distance[differs] = ulp_distance(bits[differs], recorded[differs])
        beyond, unbounded = differs, np.zeros_like(differs)
        if not exact:
            apart = np.abs(window.current(name) - decode(bits, schema.dtypes[name], np.float64))
            beyond = differs & ~(apart <= allowed[name])
            unbounded = differs & ~beyond & np.isposinf(allowed[name])  # NaN is beyond any bound
        if is_first.any() and name in begins:
            wrong = ~_has_begun_as(begins[name], window, name) & is_first
            differs, beyond = differs | wrong, beyond | wrong
        comparisons[name] = Comparison(differs, beyond, unbounded, distance)
    return comparisons


def is_as_recorded(window: Window, after: Mapping[str, np.ndarray]) -> bool:
    """Return whether a replay gave the recorded bits everywhere, and no state begins here."""
    return all(_same(window, after).values()) and not _is_first(window).any()


def _same(window: Window, after: Mapping[str, np.ndarray]) -> dict[str, bool]:
    """Return what `replayed` found equal: that is what was recorded, not a copy."""
    return {name: np.may_share_memory(of, window.bits(name)) for name, of in after.items()}


def _is_first(window: Window) -> np.ndarray:
    """Return which row is that of the first step, whose states begin before it."""
    begins = bool(window.source.recorded[COUNT][0] == 0)
    is_first: np.ndarray = (window.rows == 1) & window.follows & begins
    return is_first


_SAME = Comparison(*(np.zeros((1, 1, 1), dtype) for dtype in (bool, bool, bool, float)))


def _has_begun_as(first: float | None, window: Window, name: str) -> np.ndarray:
    """Return where a state has, at the row before, the bits with which it begins."""
    before = np.stack([*window.bits_before(name)])
    if first is None:
        return is_nan(before)
    begins = encode(np.array(first), window.source.reader.schema.dtypes[name])
    begun: np.ndarray = patterns(before) == patterns(begins)
    return begun
