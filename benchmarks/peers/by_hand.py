"""The tasks as a good hand-written loop does them, for whatever can read pieces of the arrays.

The formula is one fused pass: a few steps of a few tokens at a time, in float32, in buffers that
are used again and stay in the cache; sums of pieces are added in float64. Threads share the tokens.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from benchmarks.peers.inputs import EXACT, SMALL, TABLES, VARIABLES, Inputs, columns
from thimble_zarr.format.layout import split_range

Answer = np.ndarray
Task = Callable[[Inputs], Answer]

PASS_ELEMENTS = 2**15
"""Elements of a variable in one go: five buffers of 128 KiB. Found by trying."""

N_THREADS = os.cpu_count() or 1
MOMENTS = ("W", "exp_avg", "exp_avg_sq")


class Rows(Protocol):
    """The stored bits of a run.

    Attributes
    ----------
    piece
        Steps and tokens that are best read together.
    places
        Where each token lies, None where they lie in order.
    """

    piece: tuple[int, int]
    places: np.ndarray | None

    def read(
        self, names: Sequence[str], rows: tuple[int, int], tokens: tuple[int, int]
    ) -> list[np.ndarray]:
        """Return bits of variables, uint16, `(step, token, dim)`; not to be written to."""


def reading(open_rows: Callable[[Inputs], Rows]) -> dict[str, Task]:
    """Return the tasks for one way to read."""
    return {
        TABLES[0]: lambda inputs: formula(open_rows(inputs), inputs, inputs.dead),
        TABLES[1]: lambda inputs: formula(open_rows(inputs), inputs, inputs.all_tokens),
        EXACT: lambda inputs: exact(open_rows(inputs), inputs),
        SMALL[0]: lambda inputs: history(open_rows(inputs), inputs),
        SMALL[1]: lambda inputs: residual(open_rows(inputs), inputs),
        SMALL[2]: lambda inputs: row(open_rows(inputs), inputs),
    }


def formula(rows: Rows, inputs: Inputs, ids: np.ndarray) -> Answer:
    """Return the table of some tokens."""
    n_rows = inputs.shape[0]
    scalars = inputs.formula_scalars()
    ids = ids if rows.places is None else np.sort(rows.places[ids])

    def sums(piece: tuple[slice, tuple[int, int], np.ndarray | slice]) -> np.ndarray:
        where, tokens, take = piece
        n_elements = (where.stop - where.start) * inputs.shape[2]
        n_steps = min(max(1, PASS_ELEMENTS // n_elements), rows.piece[0])
        fused = _Pass(scalars, n_rows, n_elements, n_steps)
        for start, stop in split_range(0, n_rows, rows.piece[0]):
            bits = rows.read(MOMENTS, (start, stop), tokens)
            if start == 0:
                fused.begin(bits[0][0, take])
            for first, end in split_range(max(start, 1), stop, n_steps):
                fused.add(slice(first, end), *(b[first - start : end - start, take] for b in bits))
        return fused.sums

    with ThreadPoolExecutor(N_THREADS) as pool:
        return columns(sum(pool.map(sums, pieces(rows, inputs, ids)), np.zeros(()))[1:])


def pieces(
    rows: Rows, inputs: Inputs, ids: np.ndarray
) -> Iterator[tuple[slice, tuple[int, int], np.ndarray | slice]]:
    """Cut sorted ids at the pieces; yield where they are among the ids, what to read and take."""
    for first, end in split_range(0, inputs.shape[1], rows.piece[1]):
        start, stop = np.searchsorted(ids, (first, end)).tolist()
        if start < stop:
            low, high = int(ids[start]), int(ids[stop - 1]) + 1
            together = stop - start == high - low
            take = slice(None) if together else ids[start:stop] - low
            yield slice(start, stop), (low, high), take


class _Pass:
    """Sums of squares and products of predicted and observed change, by step."""

    def __init__(
        self, scalars: dict[str, np.ndarray], n_rows: int, n_elements: int, n_steps: int
    ) -> None:
        self.sums = np.zeros((n_rows, 4))
        self._scalars = {name: values[:, np.newaxis] for name, values in scalars.items()}
        self._decays = bool(scalars["decay"].any())
        self._W = np.empty((n_steps + 1, n_elements), np.float32)
        self._buffers = np.empty((3, n_steps, n_elements), np.float32)

    def begin(self, W: np.ndarray) -> None:
        """Take the initial weights."""
        decode(W, self._W[0])

    def add(self, rows: slice, W: np.ndarray, exp_avg: np.ndarray, exp_avg_sq: np.ndarray) -> None:
        """Add some tokens at some rows, which follow those before."""
        n_steps = len(W)
        m, v, observed = self._buffers[:, :n_steps]
        previous, current = self._W[:n_steps], self._W[1 : n_steps + 1]
        decode(W, current)
        np.subtract(current, previous, out=observed)
        predicted = predict(
            m, v, exp_avg, exp_avg_sq, {n: values[rows] for n, values in self._scalars.items()}
        )
        if self._decays:
            predicted += self._scalars["decay"][rows] * previous
        sums = self.sums[rows]
        sums[:, 0] += np.vecdot(predicted, predicted)
        sums[:, 1] += np.vecdot(observed, observed)
        sums[:, 3] += np.vecdot(predicted, observed)
        np.subtract(observed, predicted, out=predicted)
        sums[:, 2] += np.vecdot(predicted, predicted)
        self._W[0] = current[-1]


def predict(
    m: np.ndarray,
    v: np.ndarray,
    exp_avg: np.ndarray,
    exp_avg_sq: np.ndarray,
    scalars: dict[str, np.ndarray],
) -> np.ndarray:
    """Decode the moments into `m` and `v`; return the formula's update, which is in `m`."""
    decode(exp_avg, m)
    decode(exp_avg_sq, v)
    np.sqrt(v, out=v)
    v += scalars["eps"]
    m /= v
    m *= scalars["scale"]
    return m


def decode(bits: np.ndarray, out: np.ndarray) -> None:
    """Turn bfloat16 bits into float32; `out` has as many elements, in the same order."""
    wide = out.view(np.uint32).reshape(bits.shape)
    np.copyto(wide, bits)
    np.left_shift(wide, 16, out=wide)


def gather(rows: Rows, inputs: Inputs, names: Sequence[str], ids: np.ndarray) -> Answer:
    """Return variables of some tokens at every step: float32, `(variable, step, token, dim)`."""
    n_rows, _, n_dims = inputs.shape
    values = np.empty((len(names), n_rows, len(ids), n_dims), np.float32)
    order = slice(None) if rows.places is None else np.argsort(rows.places[ids])
    ids = ids if rows.places is None else rows.places[ids[order]]

    def fill(piece: tuple[slice, tuple[int, int], np.ndarray | slice]) -> None:
        where, tokens, take = piece
        for start, stop in split_range(0, n_rows, rows.piece[0]):
            for into, bits in zip(values, rows.read(names, (start, stop), tokens), strict=True):
                decoded = np.empty((stop - start, where.stop - where.start, n_dims), np.float32)
                decode(bits[:, take], decoded)
                into[start:stop, where] = decoded

    with ThreadPoolExecutor(N_THREADS) as pool:
        list(pool.map(fill, pieces(rows, inputs, ids)))
    if rows.places is not None:
        values[:, :, order] = values.copy()
    return values


def history(rows: Rows, inputs: Inputs) -> Answer:
    """Return the four variables of one token."""
    return gather(rows, inputs, VARIABLES, np.array([inputs.token]))[:, :, 0]


def residual(rows: Rows, inputs: Inputs) -> Answer:
    """Return what the formula leaves, NaN in row 0."""
    scalars = {n: s[1:, np.newaxis, np.newaxis] for n, s in inputs.formula_scalars().items()}
    W, m, v = gather(rows, inputs, MOMENTS, inputs.random)
    left: Answer = np.full_like(W, np.nan)
    np.subtract(W[1:], W[:-1], out=left[1:])
    left[1:] -= m[1:] / (np.sqrt(v[1:]) + scalars["eps"]) * scalars["scale"]
    left[1:] -= scalars["decay"] * W[:-1]
    return left


def row(rows: Rows, inputs: Inputs) -> Answer:
    """Return the four variables at one step."""
    _, n_tokens, n_dims = inputs.shape
    values = np.empty((len(VARIABLES), n_tokens, n_dims), np.float32)
    read = rows.read(VARIABLES, (inputs.row, inputs.row + 1), (0, n_tokens))
    for into, bits in zip(values, read, strict=True):
        decode(bits[0], into)
    return values if rows.places is None else values[:, rows.places]


def exact(rows: Rows, inputs: Inputs) -> Answer:
    """Return how many elements of weights and moments differ from the replay."""
    from benchmarks.peers.replay import Replay, from_bits

    replay = Replay(inputs)
    for start, stop in split_range(0, inputs.shape[0], rows.piece[0]):
        bits = rows.read((*MOMENTS, "grad"), (start, stop), (0, inputs.shape[1]))
        for row_bits in zip(*bits, strict=True):
            replay.compare(*from_bits(*row_bits))
    return replay.n_different
