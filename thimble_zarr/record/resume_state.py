"""Resume a recording: do model and optimizer stand where it ended, and what is taken up from it?

The wrong checkpoint is the likeliest mistake, and its rows would fit no optimizer's arithmetic. So
the live tensors must be the recorded ones, bit by bit, before anything is changed on disk.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from thimble_zarr.bits import patterns
from thimble_zarr.errors import ResumeError
from thimble_zarr.format.schema import array_path
from thimble_zarr.optim.base import COUNT
from thimble_zarr.record.capture import LiveOptimizer, as_rows, tensor_bits
from thimble_zarr.record.counting import StepCounts, live_count
from thimble_zarr.store.reader import StoreReader


@dataclass(frozen=True)
class ResumeState:
    """What a recorder takes up from the rows that are kept.

    That is the rows of the unfinished block, by paths in the store, with their steps, if there are
    any, and the optimizer's counts at the last row and at the row before that block.
    """

    bits: Mapping[str, np.ndarray]
    scalars: Mapping[str, np.ndarray]
    steps: np.ndarray
    last: StepCounts
    before: StepCounts


def resume_state(live: LiveOptimizer, readers: Sequence[StoreReader], n_rows: int) -> ResumeState:
    """Return what a recorder needs of the `n_rows` rows that are kept.

    Raise ResumeError unless parameters and states are those of the last row, bit by bit, as far as
    they are recorded: of other rows and variables nothing is known, nor of the count of an
    optimizer that keeps none.
    """
    _check_state(live, readers, n_rows)
    first_row = n_rows - n_rows % readers[0].schema.layout.block_steps
    steps = readers[0].read_steps()
    scalars = {reader.group: reader.read_scalars() for reader in readers}

    def counts(row: int) -> StepCounts:
        if row < 0:
            return StepCounts.before_all(scalars)
        at_row = {group: float(values[COUNT][row]) for group, values in scalars.items()}
        return StepCounts(int(steps[row]), at_row)

    return ResumeState(
        {
            array_path(reader.group, name): reader.read(name, (first_row, n_rows))
            for reader in readers
            for name in reader.schema.dtypes
            if first_row < n_rows
        },
        {
            array_path(reader.group, name): scalars[reader.group][name][first_row:n_rows]
            for reader in readers
            for name in reader.schema.scalars
        },
        steps[first_row:n_rows],
        last=counts(n_rows - 1),
        before=counts(first_row - 1),
    )


def _check_state(live: LiveOptimizer, readers: Sequence[StoreReader], n_rows: int) -> None:
    counts = {reader.group: reader.read_scalars()[COUNT] for reader in readers}
    key = live.spec.STEP_KEY

    def differences(row: int) -> Iterator[tuple[str, str]]:
        for reader in readers:
            recorded, parameter = float(counts[reader.group][row]), live.parameters[reader.group]
            count = float(live_count(live.optimizer, parameter, key)) if key else recorded
            if count != recorded:
                yield array_path(reader.group, COUNT), f"is {count:.0f}, not {recorded:.0f}"
            tensors = live.states(reader.group, reader.schema.optimizer)
            yield from _differences(tensors, reader, row)

    if not (found := dict(differences(n_rows - 1))):
        return
    rows = reversed(range(readers[0].n_rows))
    stands_at = next((row for row in rows if next(differences(row), None) is None), None)
    listed = "; ".join(f"{name} {how}" for name, how in found.items())
    raise ResumeError(
        f"cannot resume {readers[0].path} after step {n_rows - 1}: model and optimizer are not "
        f"as they were after it ({listed}); restore the checkpoint of that step before the "
        f"recorder is made, {_alternative(stands_at, readers, found)}"
    )


def _alternative(
    stands_at: int | None, readers: Sequence[StoreReader], differences: Mapping[str, str]
) -> str:
    """Return what else may be done, or may be wrong, where the loop does not stand at the end."""
    last = readers[0].n_rows - 1
    if stands_at is not None:
        first = stands_at + 1
        dropped = f"step{f's {first} to' if first < last else ''} {last}"
        drops = f", which drops {dropped}" if first <= last else ""
        return f"or resume from where they are, with after_step={stands_at}{drops}"
    advice = "or that of an earlier one, and pass its step as after_step="
    if any(array_path(reader.group, "W") in differences for reader in readers):
        advice += "; or another parameter of that shape was passed than the one recorded"
    return advice


def _differences(
    tensors: Mapping[str, Tensor | None], reader: StoreReader, row: int
) -> Iterator[tuple[str, str]]:
    """Yield how variables differ from a row, by their paths in the store."""
    ids = None if reader.schema.whole_tokens is None else reader.read_token_ids()
    W = cast(Tensor, tensors["W"])
    for name in reader.schema.dtypes:
        if name == "grad":
            continue
        live = tensors[name]
        tensor = W.new_full((), torch.nan).expand(W.shape) if live is None else live
        rows = tensor if ids is None else tensor[torch.from_numpy(ids).to(tensor.device)]
        now = as_rows(tensor_bits(rows.detach().unsqueeze(0)))
        recorded = reader.read(name, (row, row + 1))
        path = array_path(reader.group, name)
        if now.dtype != recorded.dtype:
            yield path, f"is {tensor.dtype}"
        elif n_differing := (patterns(now) != patterns(recorded)).sum():
            yield path, f"differs in {n_differing:,} of {now.size:,} elements"
