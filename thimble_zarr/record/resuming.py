"""Go on with a recording: do model and optimizer stand where it ended?

The wrong checkpoint is the likeliest mistake, and its rows would fit no optimizer's arithmetic. So
the live tensors must be the recorded ones, bit by bit, before anything is changed on disk.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thimble_zarr.errors import ResumeError
from thimble_zarr.format.schema import array_path
from thimble_zarr.format.store import StorePath, StoreReader
from thimble_zarr.record.block import Counted, row_bits
from thimble_zarr.record.capture import optimizer_step, state_tensors


def check_beginning(path: StorePath, after_step: int | None) -> None:
    """Raise ResumeError if a loop that has taken steps goes on where nothing is recorded."""
    if after_step:
        raise ResumeError(
            f"cannot go on after step {after_step}: nothing is recorded at {path}; check the path, "
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
    differences: list[str] = []
    hints: set[str] = set()
    for reader in readers:
        parameter = parameters[reader.group]
        counts = reader.read_scalars()["optimizer_step"][:n_rows]
        count, recorded = optimizer_step(optimizer, parameter), counts[-1]
        if count != recorded:
            name = array_path(reader.group, "optimizer_step")
            differences.append(f"{name} is {count:.0f}, not {recorded:.0f}")
            hints |= {f", with after_step={row}" for row in np.flatnonzero(counts == count)[-1:]}
        differences += _unequal(optimizer, parameter, reader, n_rows)
    if differences:
        raise ResumeError(
            f"cannot go on with {readers[0].path} after step {n_rows - 1}: model and optimizer are "
            f"not as they were after it ({'; '.join(differences)}); restore the checkpoint of that "
            f"step before the recorder is made, or go on from an earlier one{', '.join(hints)}"
        )


def _unequal(
    optimizer: torch.optim.Optimizer, parameter: Tensor, reader: StoreReader, n_rows: int
) -> Iterator[str]:
    zeros = torch.zeros_like(parameter)
    states = state_tensors(optimizer, parameter)
    is_whole, ids = reader.schema.whole_tokens is None, reader.read_token_ids()
    for name in reader.schema.dtypes:
        if name == "grad":
            continue
        recorded = reader.read(name, (n_rows - 1, n_rows))
        tensor = states.get(name, zeros)
        now = row_bits(tensor if is_whole else tensor[torch.from_numpy(ids).to(tensor.device)])
        path = array_path(reader.group, name)
        if now.dtype != recorded.dtype:
            yield f"{path} is {tensor.dtype}"
            continue
        differing = (_patterns(now) != _patterns(recorded)).sum()
        if differing:
            yield f"{path} differs in {differing:,} of {now.size:,} elements"


def _patterns(values: np.ndarray) -> np.ndarray:
    """Return values as integers: NaN differs from itself, and bits do not."""
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
