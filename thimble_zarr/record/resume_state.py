"""Resume a recording, if model and optimizer stand where it ended.

The wrong checkpoint is the likeliest mistake, and its rows would fit no optimizer's arithmetic. So
the live tensors must be the recorded ones, bit by bit, before anything is changed on disk.
"""

from collections.abc import Iterator, Sequence

import torch

from thimble_zarr.bits import patterns
from thimble_zarr.errors import ResumeError
from thimble_zarr.format.schema import array_path
from thimble_zarr.optim.base import COUNT
from thimble_zarr.record.capture import LiveOptimizer, as_rows, tensor_bits
from thimble_zarr.record.counting import StepCounts
from thimble_zarr.store.reader import StoreReader


def take_up(live: LiveOptimizer, readers: Sequence[StoreReader], n_rows: int) -> None:
    """Count on from the last of `n_rows` rows, or raise ResumeError if this is not where we are.

    Parameters and states must be those of the row, bit by bit, as far as they are recorded: of
    other rows and variables nothing is known, nor of the count of an optimizer that keeps none.
    """
    counts = {reader.group: reader.read_scalars()[COUNT] for reader in readers}

    def differences(row: int) -> Iterator[tuple[str, str]]:
        for reader in readers:
            yield from _differences(live, reader, row, count=float(counts[reader.group][row]))

    if not (found := dict(differences(n_rows - 1))):
        return live.counter.resume(StepCounts.at_row(n_rows - 1, readers[0].read_steps(), counts))
    last = readers[0].n_rows - 1
    stands_at = (row for row in range(last, -1, -1) if next(differences(row), None) is None)
    if (row := next(stands_at, None)) is not None:
        dropped = f"step{f's {row + 1} to' if row + 1 < last else ''} {last}"
        drops = f", which drops {dropped}" if row < last else ""
        other = f"or resume from where they are, with after_step={row}{drops}"
    else:
        other = "or that of an earlier one, and pass its step as after_step="
        if any(array_path(reader.group, "W") in found for reader in readers):
            other += "; or another parameter of that shape was passed than the one recorded"
    listed = "; ".join(f"{name} {how}" for name, how in found.items())
    raise ResumeError(
        f"cannot resume {readers[0].path} after step {n_rows - 1}: model and optimizer are not "
        f"as they were after it ({listed}); restore the checkpoint of that step before the "
        f"recorder is made, {other}"
    )


def _differences(
    live: LiveOptimizer, reader: StoreReader, row: int, *, count: float
) -> Iterator[tuple[str, str]]:
    """Yield how a parameter, its states and their count differ from a row, by path."""
    group, schema, parameter = reader.group, reader.schema, live.parameters[reader.group]
    if live.spec.STEP_KEY and (now := float(live.counter.count(group))) != count:
        yield array_path(group, COUNT), f"is {now:.0f}, not {count:.0f}"
    ids = None if schema.whole_tokens is None else torch.from_numpy(reader.read_token_ids())
    for name, state in live.states(group, schema.optimizer).items():
        if name not in schema.dtypes:
            continue
        missing = parameter.new_full((), torch.nan).expand(parameter.shape)
        tensor = (missing if state is None else state).detach()
        rows = tensor if ids is None else tensor[ids.to(tensor.device)]
        bits, recorded = as_rows(tensor_bits(rows[None])), reader.read(name, (row, row + 1))
        path = array_path(group, name)
        if bits.dtype != recorded.dtype:
            yield path, f"is {tensor.dtype}"
        elif n_differing := (patterns(bits) != patterns(recorded)).sum():
            yield path, f"differs in {n_differing:,} of {bits.size:,} elements"
