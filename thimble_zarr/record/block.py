"""A block in memory: preallocated rows of everything recorded, filled by training, written whole.

Variables and scalars are named by their paths in the store (`format.schema.array_path`).
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from thimble_zarr.errors import OptimizerError
from thimble_zarr.format.schema import SCALARS, Schema, array_path
from thimble_zarr.record.capture import dtype_name


class Block:
    """Rows `first_row` to `first_row + n_rows - 1` of a run, in the dtypes torch holds.

    Attributes
    ----------
    first_row
        The run's row that lies at index 0.
    n_rows
        Complete rows.
    steps
        The step of each row, int64, shape `(block_steps,)`.
    scalars
        For each per-step scalar its values, float64, shape `(block_steps,)`, NaN where missing. The
        loss of all parameters is one array.

    Parameters
    ----------
    schemas
        Of each parameter, by its group.
    """

    def __init__(self, schemas: Mapping[str, Schema]) -> None:
        self.first_row = 0
        self.n_rows = 0
        (self.block_steps,) = {schema.layout.block_steps for schema in schemas.values()}
        self._tensors = {
            array_path(group, name): torch.empty(
                (self.block_steps, *schema.shape), dtype=getattr(torch, native)
            )
            for group, schema in schemas.items()
            for name, native in schema.dtypes.items()
        }
        self.steps = np.empty(self.block_steps, np.int64)
        self._loss = np.empty(self.block_steps)
        self.scalars = {
            array_path(group, name): self._loss if name == "loss" else np.empty(self.block_steps)
            for group in schemas
            for name in SCALARS
        }

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
        self,
        tensors: Mapping[str, Tensor | None],
        scalars: Mapping[str, float],
        *,
        step: int,
        rows: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Copy one row in. The row counts only when all of it is there.

        Parameters
        ----------
        tensors
            For each variable its values, of the parameter's shape, on any device; None is missing.
        scalars
            Per-step scalars; those not given are missing.
        step
            The step it is the row of.
        rows
            For variables of which only some rows are recorded, the indices of those, on the device
            of the variable.

        Raises
        ------
        OptimizerError
            If a tensor is not of the declared shape and dtype.
        """
        for name, of_name in self._tensors.items():
            row, tensor, chosen = of_name[self.n_rows], tensors[name], (rows or {}).get(name)
            if tensor is None:
                row.fill_(float("nan"))
                continue
            shape = tensor.shape if chosen is None else (len(chosen), *tensor.shape[1:])
            if shape != row.shape or tensor.dtype != row.dtype:
                raise OptimizerError(
                    f"{name} became {dtype_name(tensor)} {tuple(tensor.shape)} during the run, but "
                    f"{dtype_name(row)} {tuple(row.shape)} was declared; start a new recording"
                )
            if chosen is None:
                _copy(row, tensor)
            else:
                _take(row, tensor, chosen)
        for name, value in scalars.items():
            self.scalars[name][self.n_rows] = value
        self.steps[self.n_rows] = step
        self.n_rows += 1

    def set_loss(self, row: int, loss: float) -> None:
        """Note the loss of a row, counted from the first of the block."""
        self._loss[row] = loss

    def bits(self) -> dict[str, np.ndarray]:
        """Return each variable as stored: views, shape `(block_steps, token, dim)`."""
        return {name: as_rows(_bits(rows)) for name, rows in self._tensors.items()}


def as_rows(bits: np.ndarray) -> np.ndarray:
    """Return rows of a parameter of any rank as `(step, token, dim)`, a view."""
    n_steps, n_tokens = (*bits.shape, 1)[:2]
    return bits.reshape(n_steps, n_tokens, -1)


def _copy(row: Tensor, tensor: Tensor) -> None:
    """Copy a tensor from any device.

    On the CPU in one thread: torch takes several, and they wait for each other whenever the writer
    has one of their cores.
    """
    if tensor.is_cpu:
        np.copyto(_bits(row), _bits(tensor))
    else:
        row.copy_(tensor)


def _take(row: Tensor, tensor: Tensor, chosen: Tensor) -> None:
    """Copy some rows of a tensor from any device, as `_copy` copies all."""
    if tensor.is_cpu:
        # Clipped, which nothing is, so that NumPy writes into the row itself.
        np.take(_bits(tensor), chosen.numpy(), axis=0, out=_bits(row), mode="clip")
    else:
        row.copy_(tensor.index_select(0, chosen))


def _bits(tensor: Tensor) -> np.ndarray:
    """Return a tensor on the CPU as an array; NumPy knows no bfloat16, so that is as its bits."""
    stored = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    return stored.numpy(force=True)
