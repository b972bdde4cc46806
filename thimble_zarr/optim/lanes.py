"""How torch's CPU code divides a tensor.

It takes most elements of a tensor through vector instructions and the rest, at the end of what each
thread gets, one at a time; and a few programs (Adam with L2 decay in 16 bits; the fused one in 32
and 64) round differently on the two ways. So an element is replayed on the way it went: `Lanes`
knows which that was.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

_LANES = 64
"""A multiple of the elements that any CPU's vector code takes at once."""

_GRAIN = 2**15
"""torch's `at::internal::GRAIN_SIZE`: it divides no smaller tensor between threads."""


_settling = threading.Lock()


def one_thread() -> AbstractContextManager[None]:
    """Let torch use one thread for an operation, in the calling thread only.

    Replays run side by side on small tensors. Some operations would divide even those (a square
    root does), and then all wait for each other: a thousand times as long as the work takes.
    """
    return threads(1)


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Let torch use so many threads for an operation, in the calling thread only.

    `torch.set_num_threads` is about the calling thread and those that have not called torch yet. In
    the main thread it is put back; in others, which are here to replay, it stays, and what new
    threads get is asked and put back by such.
    """
    import torch

    n_threads = torch.get_num_threads()
    if n_threads == n:
        yield
        return
    is_main = threading.current_thread() is threading.main_thread()
    with _settling:
        of_new = n_threads if is_main else _in_a_new_thread(torch.get_num_threads)
        torch.set_num_threads(n)
        if not is_main:
            _in_a_new_thread(torch.set_num_threads, of_new)
    try:
        yield
    finally:
        if is_main:
            torch.set_num_threads(n_threads)


def _in_a_new_thread(call: Callable[..., Any], *given: object) -> Any:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call, *given).result()


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
    def of(cls, implementation: str, *, n_elements: int, n_threads: int) -> Self:
        """Return how a program went through a parameter, as `at::parallel_for` divides it."""
        if implementation == "fused" or n_elements < _GRAIN:
            # The fused program divides at cache lines, which hold whole vectors.
            return cls(n_elements, n_elements)
        n_used = min(n_threads, -(-n_elements // _GRAIN))
        return cls(n_elements, -(-n_elements // n_used))

    def split(self, positions: np.ndarray) -> "list[Piece]":
        """Cut elements into pieces that can each be replayed as one small tensor.

        Every element is in one of them. `positions` are those in the flattened parameter, int64.
        """
        thread, offset = np.divmod(positions, self.thread_elements)
        is_alone, pieces = self.are_alone(positions), []
        together = np.flatnonzero(~is_alone)
        if n := len(together):
            where = slice(n) if n == len(positions) else together
            pieces.append(Piece(where, slice(n), -(-n // _LANES) * _LANES))
        for number in np.unique(thread[is_alone]).tolist():
            indices = np.flatnonzero((thread == number) & is_alone)
            length = int(self._n_of(thread[indices[:1]])[0]) % _LANES
            pieces.append(Piece(indices, offset[indices] % _LANES, length))
        return pieces

    def are_alone(self, positions: np.ndarray) -> np.ndarray:
        """Return which elements torch takes one at a time: bool, the shape of `positions`."""
        thread, offset = np.divmod(positions, self.thread_elements)
        n_thread = self._n_of(thread)
        alone: np.ndarray = offset >= n_thread - n_thread % _LANES
        return alone

    def _n_of(self, thread: np.ndarray) -> np.ndarray:
        """Return how many elements threads get."""
        left = self.n_elements - thread * self.thread_elements
        n_elements: np.ndarray = np.minimum(left, self.thread_elements)
        return n_elements


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

    @classmethod
    def of_whole(cls, positions: np.ndarray) -> Self:
        """Return all elements of a parameter, which are at these positions of it."""
        n = len(positions)
        is_in_order = bool((positions == np.arange(n)).all())
        return cls(slice(n), slice(n) if is_in_order else positions, n)

    def place(self, bits: np.ndarray) -> np.ndarray:
        """Return the elements in place, a new flat array."""
        if self.is_all_of(bits):
            return bits.flatten()
        placed = np.zeros(self.length, dtype=bits.dtype)
        placed[self.offsets] = bits.reshape(-1)[self.indices]
        return placed

    def is_all_of(self, bits: np.ndarray) -> bool:
        """Return whether the tensor has all of an array's elements in their order, and no more."""
        is_in_order = isinstance(self.indices, slice) and isinstance(self.offsets, slice)
        return bits.size == self.length and is_in_order
