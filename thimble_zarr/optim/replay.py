"""Exact replay: torch's own optimizer, run again on one recorded row.

Element by element, Adam needs the row before, the gradient and the hyper-parameters, all of which
are recorded. So the functional `torch.optim.adam.adam` is called on them, with the flags of the
run, and what it returns is compared with the next row bit by bit. Nothing of its arithmetic is
written again here.

One thing must be put back by hand. On a CPU torch takes most elements of a tensor through vector
instructions and the rest, at the end of what each thread gets, one at a time; and a few programs
(Adam with L2 decay in 16 bits; the fused one in 32 and 64) round differently on the two ways. So an
element is replayed on the way it went: `Lanes` knows which that was.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.optim.adam import adam

from thimble_zarr.format.schema import OptimizerInfo

STATES = ("W", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
"""What a step changes, each by a recurrence of its own; the last with amsgrad only."""

_LANES = 64
"""A multiple of the elements that any CPU's vector code takes at once."""

_GRAIN = 2**15
"""torch's `at::internal::GRAIN_SIZE`: it divides no smaller tensor between threads."""


_settling = threading.Lock()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread for an operation, in the calling thread only.

    Replays run side by side on small tensors. Some operations would divide even those (a square
    root does), and then all wait for each other: a thousand times as long as the work takes.
    `torch.set_num_threads` is about the calling thread and those that have not called torch yet. In
    the main thread it is put back; in others, which are here to replay, it stays, and what new
    threads get is put back by one of them.
    """
    n_threads = torch.get_num_threads()
    if n_threads == 1:
        yield
        return
    with _settling:
        torch.set_num_threads(1)
        if threading.current_thread() is not threading.main_thread():
            other = threading.Thread(target=torch.set_num_threads, args=(n_threads,))
            other.start()
            other.join()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            torch.set_num_threads(n_threads)


@dataclass(frozen=True)
class Lanes:
    """Which elements of a parameter torch's CPU code takes together, and which one at a time.

    Attributes
    ----------
    n_elements
        Elements of the whole parameter.
    thread_elements
        Elements that each thread gets; the last may get fewer.
    """

    n_elements: int
    thread_elements: int

    @classmethod
    def of(cls, optimizer: OptimizerInfo, *, n_elements: int, n_threads: int) -> Self:
        """Return how `optimizer` went through a parameter, as `at::parallel_for` divides it."""
        if optimizer.implementation == "fused" or n_elements < _GRAIN:
            # The fused program divides at cache lines, which hold whole vectors.
            return cls(n_elements, n_elements)
        n_used = min(n_threads, -(-n_elements // _GRAIN))
        return cls(n_elements, -(-n_elements // n_used))

    def split(self, positions: np.ndarray) -> "list[Piece]":
        """Cut elements into pieces that can each be replayed as one small tensor.

        Parameters
        ----------
        positions
            Indices of elements in the flattened parameter, int64.

        Returns
        -------
        list of Piece
            Every element is in one of them.
        """
        thread, offset = np.divmod(positions, self.thread_elements)
        n_thread = np.minimum(self.n_elements - thread * self.thread_elements, self.thread_elements)
        rest = n_thread % _LANES
        in_vectors = offset < n_thread - rest
        pieces = []
        together = np.flatnonzero(in_vectors)
        if n := len(together):
            where = slice(n) if n == len(positions) else together
            pieces.append(Piece(where, slice(n), -(-n // _LANES) * _LANES))
        for number in np.unique(thread[~in_vectors]).tolist():
            indices = np.flatnonzero((thread == number) & ~in_vectors)
            length = int(rest[indices[0]])
            pieces.append(Piece(indices, offset[indices] % _LANES, length))
        return pieces


@dataclass(frozen=True)
class Piece:
    """Elements that are replayed as one flat tensor.

    Attributes
    ----------
    indices
        Which of the given elements.
    offsets
        Where in the tensor each of them lies.
    length
        Length of the tensor; elements beside those are zero.
    """

    indices: np.ndarray | slice
    offsets: np.ndarray | slice
    length: int

    def place(self, bits: np.ndarray) -> np.ndarray:
        """Return the elements in place, a new flat array."""
        if self.is_all_of(bits):
            return bits.flatten()
        placed = np.zeros(self.length, dtype=bits.dtype)
        placed[self.offsets] = bits.reshape(-1)[self.indices]
        return placed

    def is_all_of(self, bits: np.ndarray) -> bool:
        """Return whether the tensor has all of an array's elements in their order, and no more."""
        return bits.size == self.length and isinstance(self.indices, slice)


@dataclass(frozen=True)
class Program:
    """One of torch's Adam programs, ready to take a recorded step again.

    Attributes
    ----------
    optimizer
        Which program, with its flags.
    dtypes
        Native dtype of each recorded variable. The program runs in that of `W`.
    device
        Where it runs, as torch names it.
    """

    optimizer: OptimizerInfo
    dtypes: Mapping[str, str]
    device: str

    @property
    def states(self) -> tuple[str, ...]:
        """The variables that a step changes."""
        return tuple(name for name in STATES if name in self.dtypes)

    def step(
        self,
        bits: Mapping[str, np.ndarray],
        pieces: list[Piece],
        *,
        hyperparameters: Mapping[str, float],
        optimizer_step: float,
    ) -> dict[str, np.ndarray]:
        """Take one step.

        Parameters
        ----------
        bits
            Stored bits, any shape: the states before the step and the gradient that it consumes.
        pieces
            How to go through the elements (`Lanes.split`).
        hyperparameters
            `learning_rate`, `beta1`, `beta2`, `eps` and `weight_decay` of the step.
        optimizer_step
            The optimizer's count after the step.

        Returns
        -------
        dict of str to numpy.ndarray
            Stored bits of the states after the step, new arrays of that shape.
        """
        after: dict[str, np.ndarray] = {}
        with one_thread():
            for piece in pieces:
                tensors = {name: self._load(name, piece.place(bits[name])) for name in bits}
                self._run(tensors, hyperparameters, optimizer_step)
                for name in self.states:
                    held = self._bits(name, tensors[name])
                    if piece.is_all_of(bits[name]):
                        after[name] = held.reshape(bits[name].shape)
                    else:
                        into = after.setdefault(name, np.empty(bits[name].shape, held.dtype))
                        into.reshape(-1)[piece.indices] = held[piece.offsets]
        return after

    def _load(self, name: str, bits: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(bits).view(getattr(torch, self.dtypes[name]))
        return tensor.to(self.device, getattr(torch, self.dtypes["W"]))

    def _bits(self, name: str, tensor: Tensor) -> np.ndarray:
        native = getattr(torch, self.dtypes[name])
        held = tensor.to("cpu", native)
        bits: np.ndarray = (held.view(torch.uint16) if native == torch.bfloat16 else held).numpy()
        return bits

    def _run(
        self, tensors: Mapping[str, Tensor], hyperparameters: Mapping[str, float], count: float
    ) -> None:
        """Call torch's functional optimizer; it changes the states in place."""
        flags = self.optimizer
        on_device = flags.capturable and self.device != "cpu"  # no CPU can be captured
        counts_on_device = on_device or (flags.implementation == "fused")
        step = torch.tensor(
            count - 1, dtype=torch.float32, device=self.device if counts_on_device else "cpu"
        )
        numbers = dict(hyperparameters)
        lr = self._number(numbers.pop("learning_rate"), flags.lr_dtype, on_device=on_device)
        beta1, beta2 = (
            self._number(numbers.pop(name), flags.betas_dtype, on_device=on_device)
            for name in ("beta1", "beta2")
        )
        adam(
            [tensors["W"]],
            [tensors["grad"]],
            [tensors["exp_avg"]],
            [tensors["exp_avg_sq"]],
            [tensors["max_exp_avg_sq"]] if flags.amsgrad else [],
            [step],
            foreach=flags.implementation == "foreach",
            fused=flags.implementation == "fused",
            capturable=on_device,
            differentiable=flags.differentiable,
            decoupled_weight_decay=flags.decoupled_weight_decay,
            amsgrad=flags.amsgrad,
            maximize=flags.maximize,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=numbers["eps"],
            weight_decay=numbers["weight_decay"],
        )

    def _number(self, value: float, dtype: str | None, *, on_device: bool) -> float | Tensor:
        if dtype is None:
            return value
        device = self.device if on_device else "cpu"
        return torch.tensor(value, dtype=getattr(torch, dtype), device=device)
