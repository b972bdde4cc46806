"""A block in memory: preallocated rows of everything recorded, filled by training, written whole.

Variables and scalars are named by their paths in the store (`format.schema.array_path`).
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from thimble_zarr.errors import OptimizerError
from thimble_zarr.format.schema import Schema, array_path
from thimble_zarr.optim.base import COUNT
from thimble_zarr.record.capture import as_rows, dtype_name, tensor_bits
from thimble_zarr.record.counting import StepCounts, judge_rows
from thimble_zarr.record.resume_state import ResumeState
from thimble_zarr.record.transfer import SideStream


class Block:
    """Rows `first_row` to `first_row + n_rows - 1` of a run, in the dtypes torch holds.

    Attributes
    ----------
    steps
        The step of each row, int64, shape `(block_steps,)`.
    scalars
        For each per-step scalar its values, float64, shape `(block_steps,)`, NaN where missing. The
        loss of all parameters is one array. Those from a device are there when it is settled.

    Parameters
    ----------
    schemas
        Of each parameter, by its group.
    streams
        What copies tensors from a device, by its name; from all others `append` copies them.
    rows
        For variables of which only some rows are recorded, their indices, on their device.
    """

    def __init__(
        self,
        schemas: Mapping[str, Schema],
        streams: Mapping[str, SideStream],
        rows: Mapping[str, Tensor],
    ) -> None:
        self.first_row = 0
        self.n_rows = 0
        (self.block_steps,) = {schema.layout.block_steps for schema in schemas.values()}
        self._groups = tuple(schemas)
        self.steps = np.empty(self.block_steps, np.int64)
        self._streams, self._rows = streams, rows
        self._arrived: list[Callable[[], None]] = []
        self._early: set[str] = set()
        self._stream_of: dict[str, SideStream] = {}
        self._tensors: dict[str, Tensor] = {}
        self._scalars: dict[str, Tensor] = {}
        loss = torch.empty(self.block_steps, dtype=torch.float64)
        for group, schema in schemas.items():
            stream = self._streams.get(schema.device)
            empty = torch.empty if stream is None else stream.empty
            for name, native in schema.dtypes.items():
                shape = (self.block_steps, *schema.shape)
                self._tensors[array_path(group, name)] = empty(shape, dtype=getattr(torch, native))
            for name in schema.scalars:
                values = loss if name == "loss" else empty((self.block_steps,), dtype=torch.float64)
                self._scalars[array_path(group, name)] = values
            if stream is not None:
                paths = (array_path(group, name) for name in (*schema.dtypes, *schema.scalars))
                self._stream_of |= dict.fromkeys(paths, stream)
        self._loss = loss.numpy()
        self.scalars = {path: values.numpy() for path, values in self._scalars.items()}

    @property
    def is_full(self) -> bool:
        """Whether every row is complete."""
        return self.n_rows == self.block_steps

    def start(self, first_row: int) -> None:
        """Forget all rows and begin at `first_row`."""
        self.first_row = first_row
        self.n_rows = 0
        for values in self.scalars.values():
            values.fill(np.nan)

    def load(self, resumed: ResumeState) -> None:
        """Take rows that are stored already as the first of the block."""
        self.n_rows = len(resumed.steps)
        self.steps[: self.n_rows] = resumed.steps
        bits = self.bits()
        for name, rows in resumed.bits.items():
            bits[name][: self.n_rows] = rows
        for name, values in resumed.scalars.items():
            self.scalars[name][: self.n_rows] = values

    def take_early(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Copy variables of the next row, which the step will overwrite: `append` leaves them out.

        What was taken for a step that failed is forgotten.
        """
        for stream in self._streams.values():
            stream.start()
        for name, tensor in tensors.items():
            self._take_row(name, tensor)
        self._early = {*tensors}

    def append(
        self,
        tensors: Mapping[str, Tensor | None],
        scalars: Mapping[str, float | Tensor],
        *,
        step: int,
    ) -> None:
        """Copy the row of a step in. It counts only when all of it is there.

        Variables are of the parameter's shape, on any device. What is None, or a scalar that is not
        given, is missing. Raise OptimizerError if a shape or dtype is not the declared one.
        """
        if not self._early:
            for stream in self._streams.values():
                stream.start()
        for name in self._tensors:
            if name not in self._early or tensors[name] is None:
                self._take_row(name, tensors[name])
        self._early = set()
        for name, value in scalars.items():
            if isinstance(value, Tensor):
                self._take(name, self._scalars[name][self.n_rows], value)
            else:
                self.scalars[name][self.n_rows] = value
        self._arrived = [stream.send() for stream in self._streams.values()]
        self.steps[self.n_rows] = step
        self.n_rows += 1

    def set_last_loss(self, loss: float) -> None:
        """Note the loss of the last row."""
        self._loss[self.n_rows - 1] = loss

    def _take_row(self, name: str, tensor: Tensor | None) -> None:
        row, indices = self._tensors[name][self.n_rows], self._rows.get(name)
        if tensor is None:
            row.fill_(float("nan"))
            return
        shape = tensor.shape if indices is None else (len(indices), *tensor.shape[1:])
        if shape != row.shape or tensor.dtype != row.dtype:
            raise OptimizerError(
                f"{name} became {dtype_name(tensor)} {tuple(tensor.shape)} during the run, but "
                f"{dtype_name(row)} {tuple(row.shape)} was declared; start a new recording"
            )
        self._take(name, row, tensor, indices)

    def _take(self, path: str, row: Tensor, tensor: Tensor, indices: Tensor | None = None) -> None:
        if path in self._stream_of:
            self._stream_of[path].stage(path, row, tensor, indices)
        else:
            _copy(row, tensor, indices)

    def settle(self, before: StepCounts) -> int:
        """Wait until all rows are there, and take back the gradients that no step consumed.

        Given the counts at the row before, return how many rows come before a missed step.
        """
        for arrived in self._arrived:
            arrived()
        n_sound, steps = self.n_rows, self.steps[: self.n_rows]
        for group, count in before.counts.items():
            counts = self.scalars[array_path(group, COUNT)][: self.n_rows]
            first = (float(count), before.step)
            skipped, missed = judge_rows(counts, steps, before=first)
            if (grad := array_path(group, "grad")) in self._tensors:
                for row in skipped:
                    self._tensors[grad][row].fill_(float("nan"))
            n_sound = min([n_sound, *missed.tolist()])
        return n_sound

    def counts(self, row: int) -> StepCounts:
        """Return how many steps the optimizer had counted at a row, from the block's first."""
        counts = {
            group: float(self.scalars[array_path(group, COUNT)][row]) for group in self._groups
        }
        return StepCounts(int(self.steps[row]), counts)

    def bits(self) -> dict[str, np.ndarray]:
        """Return each variable as stored: views, shape `(block_steps, token, dim)`."""
        return {name: as_rows(tensor_bits(rows)) for name, rows in self._tensors.items()}


def _copy(row: Tensor, tensor: Tensor, indices: Tensor | None) -> None:
    """Copy a tensor, or some rows of it, from any device.

    On the CPU in one thread: torch takes several, and they wait for each other whenever the writer
    has one of their cores.
    """
    if not tensor.is_cpu:
        row.copy_(tensor if indices is None else tensor.index_select(0, indices))
    elif indices is None:
        np.copyto(tensor_bits(row), tensor_bits(tensor))
    else:
        # Clipped, which nothing is, so that NumPy writes into the row itself.
        np.take(tensor_bits(tensor), indices.numpy(), axis=0, out=tensor_bits(row), mode="clip")
