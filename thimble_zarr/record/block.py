"""A block in memory: preallocated rows of every variable, filled by training, written whole."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from thimble_zarr.errors import OptimizerError
from thimble_zarr.format.schema import SCALARS, Schema
from thimble_zarr.record.capture import dtype_name
from thimble_zarr.record.transfer import SideStream


class Block:
    """Rows `first_row` to `first_row + n_rows - 1` of a run, in the dtypes torch holds.

    Attributes
    ----------
    first_row
        The run's row that lies at index 0.
    n_rows
        Complete rows.
    scalars
        For each per-step scalar its values, float64, shape `(block_steps,)`, NaN where missing.
        Those that are copied from a device are there when the block is settled.

    Parameters
    ----------
    schema
        What a row holds.
    copies
        What copies tensors from a device; without it they are copied when they are appended.
    """

    def __init__(self, schema: Schema, copies: SideStream | None = None) -> None:
        self.first_row = 0
        self.n_rows = 0
        self.block_steps = schema.layout.block_steps
        shape = (self.block_steps, schema.n_tokens, schema.n_dims)
        self._copies = copies
        self._arrived: Callable[[], None] | None = None
        empty = copies.empty if copies is not None else _empty
        self._tensors = {
            name: empty(shape, getattr(torch, native)) for name, native in schema.dtypes.items()
        }
        self._scalars = {name: empty((self.block_steps,), torch.float64) for name in SCALARS}
        self.scalars = {name: values.numpy() for name, values in self._scalars.items()}

    @property
    def full(self) -> bool:
        """Whether every row is complete."""
        return self.n_rows == self.block_steps

    def start(self, first_row: int) -> None:
        """Forget all rows and begin at `first_row`."""
        self.first_row = first_row
        self.n_rows = 0
        for values in self.scalars.values():
            values.fill(np.nan)

    def append(
        self, tensors: Mapping[str, Tensor | None], scalars: Mapping[str, float | Tensor]
    ) -> None:
        """Copy one row in. The row counts only when all of it is there.

        Parameters
        ----------
        tensors
            For each variable its values, shape `(token, dim)`, on any device; None is missing.
        scalars
            Per-step scalars; those not given are missing. Those on a device stay there till it has
            come to them.

        Raises
        ------
        OptimizerError
            If a tensor is not of the declared shape and dtype.
        """
        if self._copies is not None:
            self._copies.start()
        for name, rows in self._tensors.items():
            row, tensor = rows[self.n_rows], tensors[name]
            if tensor is None:
                row.fill_(float("nan"))
                continue
            if tensor.shape != row.shape or tensor.dtype != row.dtype:
                raise OptimizerError(
                    f"{name} became {dtype_name(tensor)} {tuple(tensor.shape)} during the run, but "
                    f"{dtype_name(row)} {tuple(row.shape)} was declared; start a new recording"
                )
            self._take(name, row, tensor)
        for name, value in scalars.items():
            if isinstance(value, Tensor):
                self._take(name, self._scalars[name][self.n_rows], value)
            else:
                self.scalars[name][self.n_rows] = value
        if self._copies is not None:
            self._arrived = self._copies.send()
        self.n_rows += 1

    def _take(self, name: str, row: Tensor, tensor: Tensor) -> None:
        if self._copies is not None:
            self._copies.stage(name, row, tensor)
        else:
            _copy(row, tensor)

    def settle(self, count_before: float) -> int:
        """Wait until all rows are there, and take back the gradients that no step consumed.

        Where the optimizer's count did not move it skipped the step, as it does when a GradScaler
        found an infinity, and its gradient is none.

        Parameters
        ----------
        count_before
            `optimizer_step` of the row before the block; NaN before the first.

        Returns
        -------
        int
            Rows up to the first whose count is not that of the row before or the next.
        """
        if self._arrived is not None:
            self._arrived()
        moved = np.diff(self.scalars["optimizer_step"][: self.n_rows], prepend=count_before)
        for row in np.flatnonzero(moved == 0):
            self._tensors["grad"][row].fill_(float("nan"))
        wrong = (moved != 0) & (moved != 1) & ~np.isnan(moved)
        return int(wrong.argmax()) if wrong.any() else self.n_rows

    def bits(self) -> dict[str, np.ndarray]:
        """Return each variable as stored: views, shape `(block_steps, token, dim)`."""
        return {name: _bits(rows) for name, rows in self._tensors.items()}


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype)


def _copy(row: Tensor, tensor: Tensor) -> None:
    """Copy a tensor from any device.

    On the CPU in one thread: torch takes several, and they wait for each other whenever the writer
    has one of their cores.
    """
    if tensor.is_cpu:
        np.copyto(_bits(row), _bits(tensor))
    else:
        row.copy_(tensor)


def _bits(tensor: Tensor) -> np.ndarray:
    """Return a tensor on the CPU as an array; NumPy knows no bfloat16, so that is as its bits."""
    stored = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    return stored.numpy(force=True)
