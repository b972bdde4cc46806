"""Go on with a recording: do model and optimizer stand where it ended?

The wrong checkpoint is the likeliest mistake, and its rows would fit no optimizer's arithmetic. So
the live tensors must be the recorded ones, bit by bit, before anything is changed on disk.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thimble_zarr.errors import ResumeError
from thimble_zarr.format.schema import array_path
from thimble_zarr.record.block import Counted, row_bits
from thimble_zarr.record.capture import optimizer_step, state_tensors
from thimble_zarr.store.reader import StorePath, StoreReader


def check_beginning(path: StorePath, after_step: int | None) -> None:
    """Raise ResumeError if a loop that has taken steps resumes where nothing is recorded."""
    if after_step:
        raise ResumeError(
            f"cannot resume after step {after_step}: nothing is recorded at {path}; check the path "
            "or leave `after_step` out to record from here on"
        )


@dataclass(frozen=True)
class Kept:
    """What a recorder takes up from the rows that are kept.

    Attributes
    ----------
    bits, scalars, steps
        Rows of the unfinished block, by paths in the store, and their steps; empty where the last
        block is full.
    last, before
        How far the optimizer had counted at the last row, and at the row before the unfinished
        block.
    """

    bits: Mapping[str, np.ndarray]
    scalars: Mapping[str, np.ndarray]
    steps: np.ndarray
    last: Counted
    before: Counted


def read_kept(readers: Sequence[StoreReader], n_rows: int) -> Kept:
    """Return what a recorder needs of the `n_rows` rows that are kept."""
    first_row = n_rows - n_rows % readers[0].schema.layout.block_steps
    bits: dict[str, np.ndarray] = {}
    scalars: dict[str, np.ndarray] = {}
    last: dict[str, float] = {}
    before: dict[str, float] = {}
    for reader in readers:
        values = reader.read_scalars()
        counts = values["optimizer_step"].tolist()
        last[reader.group] = counts[n_rows - 1]
        before[reader.group] = counts[first_row - 1] if first_row else math.nan
        if first_row == n_rows:
            continue
        for name in reader.schema.dtypes:
            bits[array_path(reader.group, name)] = reader.read(name, (first_row, n_rows))
        for name in values:
            scalars[array_path(reader.group, name)] = values[name][first_row:n_rows]
    steps = readers[0].read_steps()
    return Kept(
        bits,
        scalars,
        steps[first_row:n_rows],
        last=Counted(int(steps[n_rows - 1]), last),
        before=Counted(int(steps[first_row - 1]) if first_row else -1, before),
    )


def check_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    readers: Sequence[StoreReader],
    n_rows: int,
) -> None:
    """Raise ResumeError unless parameters and moments are those of the last row, bit by bit.

    As far as they are recorded: of other rows and variables nothing is known.

    Parameters
    ----------
    optimizer
        What trains them.
    parameters
        By group.
    readers
        Of each parameter.
    n_rows
        Rows that are kept.
    """
    differences: dict[str, str] = {}
    is_counted = np.ones(readers[0].n_rows, dtype=bool)
    for reader in readers:
        parameter = parameters[reader.group]
        counts = reader.read_scalars()["optimizer_step"]
        count, recorded = float(optimizer_step(optimizer, parameter)), counts[n_rows - 1]
        is_counted &= counts == count
        if count != recorded:
            name = array_path(reader.group, "optimizer_step")
            differences[name] = f"is {count:.0f}, not {recorded:.0f}"
        differences |= _unequal(optimizer, parameter, reader, n_rows - 1)
    if not differences:
        return
    steps = np.flatnonzero(is_counted)[::-1].tolist()
    stands_at = (
        step
        for step in steps
        if not any(_unequal(optimizer, parameters[of.group], of, step) for of in readers)
    )
    listed = "; ".join(f"{name} {how}" for name, how in differences.items())
    raise ResumeError(
        f"cannot resume {readers[0].path} after step {n_rows - 1}: model and optimizer are not "
        f"as they were after it ({listed}); restore the checkpoint of that step before the "
        f"recorder is made, {_or_else(next(stands_at, None), readers, differences)}"
    )


def _or_else(
    stands_at: int | None, readers: Sequence[StoreReader], differing: Iterable[str]
) -> str:
    """Return what else may be done, or may be wrong, where the loop does not stand at the end.

    A recorded step is offered only where all that is recorded of it is there.
    """
    last = readers[0].n_rows - 1
    if stands_at is not None:
        first = stands_at + 1
        dropped = f"step{f's {first} to' if first < last else ''} {last}"
        drops = f", which drops {dropped}" if first <= last else ""
        return f"or resume from where they are, with after_step={stands_at}{drops}"
    advice = "or that of an earlier one, and pass its step as after_step="
    if {array_path(reader.group, "W") for reader in readers} & {*differing}:
        advice += "; or another parameter of that shape was passed than the one recorded"
    return advice


def _unequal(
    optimizer: torch.optim.Optimizer, parameter: Tensor, reader: StoreReader, row: int
) -> dict[str, str]:
    """Return how variables differ from a row, by their paths in the store."""
    differing: dict[str, str] = {}
    zeros = torch.zeros_like(parameter)
    states = state_tensors(optimizer, parameter)
    is_whole, ids = reader.schema.whole_tokens is None, reader.read_token_ids()
    for name in reader.schema.dtypes:
        if name == "grad":
            continue
        recorded = reader.read(name, (row, row + 1))
        tensor = states.get(name, zeros)
        now = row_bits(tensor if is_whole else tensor[torch.from_numpy(ids).to(tensor.device)])
        path = array_path(reader.group, name)
        if now.dtype != recorded.dtype:
            differing[path] = f"is {tensor.dtype}"
            continue
        n_differing = (_patterns(now) != _patterns(recorded)).sum()
        if n_differing:
            differing[path] = f"differs in {n_differing:,} of {now.size:,} elements"
    return differing


def _patterns(values: np.ndarray) -> np.ndarray:
    """Return values as integers: NaN differs from itself, and bits do not."""
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
