"""What can be asked of a record whose rows do not follow: its rows, and what would mend them.

A cause is a claim that can be tried: "the gradient is twice what it was" means that with half of it
the replay gives the recorded rows. `Evidence` reads rows of a sample of the elements and replays
them under such claims. Everything is one row of the sample at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from thimble_zarr import tuning
from thimble_zarr.analysis.compute.replayed import Replay, bounds, recurrences
from thimble_zarr.analysis.compute.source import Source
from thimble_zarr.analysis.compute.variables import formula_of
from thimble_zarr.bits import decode, is_nan, patterns
from thimble_zarr.format.indexing import Indices
from thimble_zarr.format.schema import Schema
from thimble_zarr.optim.base import Consumed, Formula

_ROWS_KEPT = 32

Bits = dict[str, np.ndarray]


@dataclass(frozen=True)
class Failure:
    """Consecutive steps at which recorded rows do not follow from the rows before.

    Attributes
    ----------
    steps
        Their rows.
    counts
        For each recurrence how many elements are wrong, by step.
    first
        For each recurrence the token and dim of the first of them, by step; -1 where none is. The
        token is a position among those recorded.
    """

    steps: range
    counts: Mapping[str, np.ndarray]
    first: Mapping[str, np.ndarray]

    @property
    def sampled(self) -> tuple[int, ...]:
        """A few of the steps: the first, the middle one and the last but one."""
        steps = self.steps
        return tuple(sorted({steps[0], steps[len(steps) // 2], steps[max(0, len(steps) - 2)]}))

    @property
    def wrong(self) -> tuple[str, ...]:
        """The recurrences that fail somewhere in it."""
        return tuple(name for name, counts in self.counts.items() if counts.any())

    @property
    def states_are_right(self) -> bool:
        """Whether only the weights fail."""
        return self.wrong == ("W",)

    @property
    def is_one_element(self) -> bool:
        """Whether a single element fails."""
        places = {
            tuple(place)
            for name in self.wrong
            for place in self.first[name][self.counts[name] > 0].tolist()
        }
        return len(places) == 1 and all(counts.max() <= 1 for counts in self.counts.values())

    @property
    def start(self) -> tuple[int, int, int, str]:
        """Step, token and dim of the first element that is wrong, and its recurrence."""
        at = {name: self.first[name][0] for name in self.wrong if self.counts[name][0]}
        name = min(at, key=lambda name: tuple(at[name]))
        return self.steps[0], int(at[name][0]), int(at[name][1]), name


class Evidence:
    """A sample of a record's elements, row by row.

    Steps are given by their rows, and tokens by their positions among those recorded.

    Parameters
    ----------
    source
        The recording.
    tokens, dims
        What was checked.
    failures
        Where it failed.
    """

    def __init__(
        self, source: Source, tokens: Indices, dims: Indices, failures: list[Failure]
    ) -> None:
        self.source = source
        self.failures = failures
        self.schema: Schema = source.reader.schema
        self.names = recurrences(self.schema)
        self.n_rows = source.reader.n_rows
        self.dims = np.asarray(dims)
        self.tokens = _sample(np.unique(tokens), len(self.dims), failures)
        self.row = lru_cache(_ROWS_KEPT)(self._read_row)

    def part(self, token: int, dim: int | None = None) -> "Evidence":
        """Return the evidence on a single token, or on an element of it."""
        dims = self.dims if dim is None else np.array([dim])
        return Evidence(self.source, np.array([token]), dims, self.failures)

    @cached_property
    def _replay(self) -> Replay:
        ids = self.source.token_ids[self.tokens]
        return Replay(self.source, ids[:, np.newaxis] * self.schema.n_dims + self.dims)

    def _read_row(self, name: str, row: int) -> np.ndarray:
        bits: np.ndarray = self.source.reader.read(name, (row, row + 1), self.tokens)[0]
        selected: np.ndarray = bits[:, self.dims]
        return selected

    def follows(self, row: int) -> bool:
        """Return whether there is such a row, and it is that of the step after the row before."""
        return 0 < row < self.n_rows and bool(self.source.follows[row])

    def values(self, name: str, bits: np.ndarray) -> np.ndarray:
        """Return the numbers that bits of a variable stand for, float64."""
        return decode(bits, self.schema.dtypes[name], np.float64)

    def numbers(self, bits: Mapping[str, np.ndarray]) -> Bits:
        """Return the numbers of several variables."""
        return {name: self.values(name, values) for name, values in bits.items()}

    @property
    def formula(self) -> Formula:
        """The optimizer's formula."""
        return formula_of(self.schema)

    def scalars(self, step: int) -> dict[str, np.ndarray]:
        """Return the recorded numbers of a step."""
        return {name: np.asarray(values[step]) for name, values in self.source.recorded.items()}

    def inputs(self, step: int) -> Bits:
        """Return what a step takes: the states of the row before, and its gradient."""
        before = {name: self.row(name, step - 1) for name in self.names}
        return before | {"grad": self.row("grad", step)}

    def after(self, step: int) -> Bits:
        """Return what a step left, as recorded."""
        return {name: self.row(name, step) for name in self.names}

    def replay(
        self, step: int, changed: Mapping[str, np.ndarray] | None = None, **hyperparameters: float
    ) -> Bits:
        """Take a step again, with some of its inputs or hyper-parameters changed."""
        return self._replay.step(step, self.inputs(step) | dict(changed or {}), **hyperparameters)

    def share_mended(
        self, step: int, changed: Mapping[str, np.ndarray], **hyperparameters: float
    ) -> float:
        """Return the share of elements that a step leads to once its inputs are changed."""
        replayed = self.replay(step, changed, **hyperparameters)
        return float(np.mean(equal(replayed, self.after(step))))

    def mends(self, step: int, changed: Mapping[str, np.ndarray], **hyperparameters: float) -> bool:
        """Return whether a step leads to the recorded row once its inputs are changed."""
        return self.share_mended(step, changed, **hyperparameters) == 1

    def consumed(self, step: int) -> Consumed:
        """Return the gradient that would have led to the recorded row, up to rounding."""
        before, after = self.numbers(self.inputs(step)), self.numbers(self.after(step))
        return self.formula.consumed(before, after, self.scalars(step))

    def bounds(self, step: int, grad: np.ndarray) -> Bits:
        """Return how far two programs of the optimizer, given a gradient, can end apart."""
        before = self.numbers({name: self.row(name, step - 1) for name in self.names})
        return bounds(self.schema, before, grad, self.scalars(step))


def equal(bits: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return where all variables have the same bits, NaN being NaN: bool, shape of a variable."""
    same = [
        (patterns(bits[name]) == patterns(other[name])) | (is_nan(bits[name]) & is_nan(other[name]))
        for name in bits
    ]
    both: np.ndarray = np.logical_and.reduce(same)
    return both


def _sample(tokens: np.ndarray, n_dims: int, failures: list[Failure]) -> np.ndarray:
    """Return as many tokens as the sample has, with those that failed first among them."""
    n_most = max(1, tuning.TUNING.sample_elements // n_dims)
    if len(tokens) <= n_most:
        return tokens
    failed = {
        int(token) for one in failures for first in one.first.values() for token in first[:, 0]
    }
    known = np.array(sorted(failed - {-1}), dtype=np.int64)[: n_most // 2]
    others = np.setdiff1d(tokens, known)
    spread = others[np.linspace(0, len(others) - 1, n_most - len(known)).astype(np.int64)]
    return np.sort(np.concatenate([known, spread]))
