"""What can be asked of a record whose rows do not follow: its rows, and what would mend them.

A cause is a claim that can be tried: "the gradient is twice what it was" means that with half of it
the replay gives the recorded rows. `Evidence` reads rows of a sample of the elements and replays
them under such claims. Everything is one row of the sample at a time.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from thimble_zarr import tuning
from thimble_zarr.bits import decode, is_nan, patterns
from thimble_zarr.causes.recorded_rows import RecordedRows
from thimble_zarr.causes.replay import Replay, bounds, recurrences, replayed_names
from thimble_zarr.format.indexing import Indices
from thimble_zarr.format.schema import Schema
from thimble_zarr.optim.formula import Consumed, Formula

_ROWS_KEPT, _WHOLE_ROWS_KEPT = 32, 8

Bits = dict[str, np.ndarray]


@dataclass(frozen=True)
class Failure:
    """Consecutive steps, given by their rows, that do not follow from the rows before.

    `names` are the recurrences, `counts` how many elements are wrong, shape `(step, recurrence)`,
    and `first` token and dim of the first of them, shape `(step, recurrence, 2)`, -1 where none is.
    The token is a position among those recorded.
    """

    steps: range
    names: tuple[str, ...]
    counts: np.ndarray
    first: np.ndarray

    @property
    def sampled(self) -> tuple[int, ...]:
        """A few of the steps: the first, the middle one and the last but one."""
        steps = self.steps
        return tuple(sorted({steps[0], steps[len(steps) // 2], steps[max(0, len(steps) - 2)]}))

    @property
    def wrong(self) -> tuple[str, ...]:
        """The recurrences that fail somewhere in it."""
        return tuple(name for name, n in zip(self.names, self.counts.sum(axis=0), strict=True) if n)

    @property
    def n_wrong(self) -> dict[str, int]:
        """How many elements of each recurrence are wrong at the first step, where any are."""
        return {name: n for name, n in zip(self.names, self.counts[0].tolist(), strict=True) if n}

    @property
    def states_are_right(self) -> bool:
        """Whether only the weights fail."""
        return self.wrong == ("W",)

    @property
    def is_one_element(self) -> bool:
        """Whether a single element fails."""
        places = np.unique(self.first[self.counts > 0], axis=0)
        return len(places) == 1 and bool(self.counts.max() == 1)

    def suspect(self, *, of_whole: bool) -> tuple[int, int] | None:
        """Return token and dim of what may be the only wrong element; None if there is none such.

        Where a step needs the whole parameter (`of_whole`), one wrong element makes many weights
        wrong, and a state along a row or a column. So its token is the largest among the places at
        which states are wrong first, and so is its dim.
        """
        if not of_whole:
            return self.start[1:3] if self.is_one_element else None
        names = [name for name in self.n_wrong if name != "W"]
        if not names:
            return self.start[1:3] if self.n_wrong["W"] == 1 else None
        token, dim = self.first[0, [self.names.index(name) for name in names]].max(axis=0).tolist()
        return token, dim

    @property
    def start(self) -> tuple[int, int, int, str]:
        """Step, token and dim of the first element that is wrong, and its recurrence."""
        at = {name: self.first[0, self.names.index(name)].tolist() for name in self.n_wrong}
        name = min(at, key=lambda name: at[name])
        return self.steps[0], *at[name], name


class Evidence:
    """A sample of a record's elements, row by row.

    Steps are given by their rows, and tokens by their positions among those recorded. `tokens` and
    `dims` are what was checked, and the rows in `sound` were found to follow from the rows before.
    The sample has `n_elements`, by default as many as the tuning says: `share` is the fraction of
    the checked tokens that are in it. It is the whole parameter where a step needs that
    (`is_whole`) and all of it was checked.
    """

    def __init__(
        self,
        source: RecordedRows,
        tokens: Indices,
        dims: Indices,
        failures: list[Failure],
        *,
        sound: Collection[int],
        n_elements: int | None = None,
    ) -> None:
        self.source = source
        self.failures = failures
        self.sound = sound
        self.schema: Schema = source.reader.schema
        self.dims, self.tokens = np.asarray(dims), np.unique(tokens)
        self.names = replayed_names(self.schema, self._positions)
        self.is_whole = self.names == recurrences(self.schema)
        self.is_whole &= not self.schema.optimizer.ELEMENTWISE
        n_checked = len(self.tokens)
        if not self.is_whole:
            n_most = max(1, (n_elements or tuning.TUNING.sample_elements) // len(self.dims))
            self.tokens = _sample(self.tokens, n_most, failures)
        self.share = len(self.tokens) / max(1, n_checked)
        self.row = lru_cache(_WHOLE_ROWS_KEPT if self.is_whole else _ROWS_KEPT)(self._read_row)

    @property
    def _positions(self) -> np.ndarray:
        positions: np.ndarray = (
            self.source.token_ids[self.tokens][:, np.newaxis] * self.schema.n_dims + self.dims
        )
        return positions

    def part(self, token: int, dim: int | None = None) -> "Evidence":
        """Return the evidence on a single token, or on an element of it.

        That is on everything, if a step needs everything.
        """
        if self.is_whole:
            return self
        dims = self.dims if dim is None else np.array([dim])
        tokens = np.array([token])
        return Evidence(self.source, tokens, dims, self.failures, sound=self.sound)

    @cached_property
    def _replay(self) -> Replay:
        return Replay(self.source, self._positions)

    def _read_row(self, name: str, row: int) -> np.ndarray:
        bits: np.ndarray = self.source.reader.read(name, (row, row + 1), self.tokens)[0]
        selected: np.ndarray = bits[:, self.dims]
        return selected

    def follows(self, row: int) -> bool:
        """Return whether there is such a row, and it is that of the step after the row before."""
        return 0 < row < self.source.reader.n_rows and bool(self.source.follows[row])

    def numbers(self, bits: Mapping[str, np.ndarray]) -> Bits:
        """Return the numbers that bits of variables stand for, float64."""
        dtypes = self.schema.dtypes
        return {name: decode(values, dtypes[name], np.float64) for name, values in bits.items()}

    def values(self, name: str, row: int) -> np.ndarray:
        """Return a variable's numbers at a row, float64."""
        return self.numbers({name: self.row(name, row)})[name]

    @property
    def formula(self) -> Formula:
        """The optimizer's formula, for causes that say they need one."""
        formula = self.schema.optimizer.formula
        assert formula is not None
        return formula

    def scalars(self, step: int) -> dict[str, np.ndarray]:
        """Return the recorded numbers of a step."""
        return {name: np.asarray(values[step]) for name, values in self.source.recorded.items()}

    def after(self, step: int) -> Bits:
        """Return what a step left, as recorded."""
        return {name: self.row(name, step) for name in self.names}

    def inputs(self, step: int) -> Bits:
        """Return what a step takes: the states of the row before, and its gradient."""
        before = {name: self.row(name, step - 1) for name in recurrences(self.schema)}
        return before | {"grad": self.row("grad", step)}

    def replay(
        self, step: int, inputs: Bits | None = None, scalars: dict[str, float] | None = None
    ) -> Bits:
        """Take a step again, with other inputs or hyper-parameters where some are given."""
        return self._replay.step(step, self.inputs(step) | (inputs or {}), scalars)

    def swapped(self, step: int) -> np.ndarray | None:
        """Return the weights before a step as the optimizer may have moved them; None if not."""
        return self._replay.swapped(step, self.inputs(step)) if self.follows(step) else None

    def mended(
        self,
        step: int,
        inputs: Bits | None = None,
        outcome: Bits | None = None,
        scalars: dict[str, float] | None = None,
    ) -> np.ndarray:
        """Return where a step leads to the recorded row, some of it being other than recorded.

        NaN is NaN. Bool, in the shape of a variable.
        """
        replayed = self.replay(step, inputs, scalars)
        recorded = self.after(step) | (outcome or {})
        same = [
            (patterns(bits) == patterns(recorded[name])) | (is_nan(bits) & is_nan(recorded[name]))
            for name, bits in replayed.items()
        ]
        every: np.ndarray = np.logical_and.reduce(same)
        return every

    def consumed(self, step: int) -> Consumed:
        """Return the gradient that would have led to the recorded row, up to rounding."""
        before, after = self.numbers(self.inputs(step)), self.numbers(self.after(step))
        return self.formula.consumed(before, after, self.scalars(step))

    def bounds(self, step: int, grad: np.ndarray) -> Bits:
        """Return how far two programs of the optimizer, given a gradient, can end apart."""
        before = self.numbers(self.after(step - 1))
        return bounds(self.schema, before, grad, self.scalars(step))


def _sample(tokens: np.ndarray, n_most: int, failures: list[Failure]) -> np.ndarray:
    """Return as many tokens as the sample has, with those that failed first among them."""
    if len(tokens) <= n_most:
        return tokens
    failed = {token for one in failures for token in one.first[..., 0].ravel().tolist()}
    known = np.array(sorted(failed - {-1}), dtype=np.int64)[: n_most // 2]
    others = np.setdiff1d(tokens, known)
    spread = others[np.linspace(0, len(others) - 1, n_most - len(known)).astype(np.int64)]
    return np.sort(np.concatenate([known, spread]))
