"""Exact replay: torch's own optimizer, run again on one recorded row.

An optimizer needs the row before, the gradient and the hyper-parameters, all of which are recorded:
most element by element, some the whole parameter. So torch's functional optimizer is called on
them, with the flags of the run, and what it returns is compared with the next row bit by bit.
Nothing of its arithmetic is written again here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thimble_zarr.bits import is_nan
from thimble_zarr.optim.base import COUNT, Optimizer
from thimble_zarr.optim.lanes import Piece, one_thread, threads


@dataclass(frozen=True)
class Program:
    """One of torch's programs, ready to take a recorded step again.

    Attributes
    ----------
    optimizer
        Which program, with its flags.
    dtypes
        Native dtype of each recorded variable.
    device
        Where it runs, as torch names it.
    are_copies
        Whether variables may have been kept in another dtype than torch had them in: that of `W`.
    shape
        That of the parameter, whose whole step is taken; None where pieces are flat.
    n_threads
        Threads that torch has for an operation. Bits of sums over a whole parameter depend on it.
    """

    optimizer: Optimizer
    dtypes: Mapping[str, str]
    device: str
    are_copies: bool = False
    shape: tuple[int, ...] | None = None
    n_threads: int = 1

    def step(
        self,
        bits: Mapping[str, np.ndarray],
        pieces: Sequence[Piece],
        scalars: Mapping[str, float],
    ) -> dict[str, np.ndarray]:
        """Take one step.

        Parameters
        ----------
        bits
            Stored bits, any shape: the states before the step and the gradient that it consumes.
        pieces
            How to go through the elements (`Lanes.split`).
        scalars
            The numbers of the step, and the optimizer's count after it.

        Returns
        -------
        dict of str to numpy.ndarray
            Stored bits of the states after the step, new arrays of that shape.
        """
        states = self.optimizer.states
        absent = {
            state.name
            for state in states
            # A bit may have flipped in a missing value.
            if state.first is None and scalars[COUNT] <= 1 and is_nan(bits[state.name]).mean() > 0.5
        }
        after: dict[str, np.ndarray] = {}
        with threads(self.n_threads):
            for piece in pieces:
                tensors: dict[str, Tensor | None] = {
                    name: None if name in absent else self._load(name, piece.place(bits[name]))
                    for name in bits
                }
                self.optimizer.step(tensors, scalars, device=self.device)
                for name in ("W", *(state.name for state in states)):
                    held = self._bits(name, tensors[name])
                    if piece.is_all_of(bits[name]):
                        after[name] = held.reshape(bits[name].shape)
                    else:
                        into = after.setdefault(name, np.empty(bits[name].shape, held.dtype))
                        into.reshape(-1)[piece.indices] = held[piece.offsets]
        return after

    def swapped(
        self,
        bits: Mapping[str, np.ndarray],
        pieces: Sequence[Piece],
        scalars: Mapping[str, float],
    ) -> np.ndarray | None:
        """Return stored bits of `W` as `Optimizer.swapped` has it, from the arguments of `step`."""
        swapped = np.empty(bits["W"].shape, bits["W"].dtype)
        with one_thread():
            for piece in pieces:
                tensors = {name: self._load(name, piece.place(of)) for name, of in bits.items()}
                found = self.optimizer.swapped(tensors, scalars)
                if found is None:
                    return None
                held = self._bits("W", found)
                swapped.reshape(-1)[piece.indices] = held[piece.offsets]
        return swapped

    def _load(self, name: str, bits: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(bits).view(getattr(torch, self.dtypes[name]))
        held = self.dtypes["W" if self.are_copies else name]
        tensor = tensor.to(self.device, getattr(torch, held))
        # In memory of torch's own, which is aligned as training had it.
        return tensor if self.shape is None else tensor.reshape(self.shape).clone()

    def _bits(self, name: str, tensor: Tensor | None) -> np.ndarray:
        if tensor is None:
            raise RuntimeError(f"a step left no {name}")
        native = getattr(torch, self.dtypes[name])
        held = tensor.to("cpu", native).reshape(-1)
        bits: np.ndarray = (held.view(torch.uint16) if native == torch.bfloat16 else held).numpy()
        return bits
