"""What conditions are judged by: a few numbers a step, wherever they come from.

`measured` takes them from a recording: what is one number a step at all steps, and what needs
arrays on a sample, so small that a check hardly takes longer. `summarized.summarized` has them of
all steps and tokens, where there is a summary.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from thimble_zarr.analysis.compute.reduction import Reduction, Statistics
from thimble_zarr.analysis.compute.source import Selected, Source
from thimble_zarr.analysis.compute.variables import (
    delta_W,
    derived_names,
    formula_inputs,
    predicted,
    ulp_before,
)
from thimble_zarr.analysis.compute.windows import Window
from thimble_zarr.errors import ThimbleError
from thimble_zarr.format.indexing import as_range
from thimble_zarr.format.schema import Schema
from thimble_zarr.optim.base import LEARNING_RATE

SAMPLED_STEPS = 32
"""Steps whose updates are looked at."""

SAMPLED_CHUNKS = 8
"""Chunks of tokens whose updates are looked at, of all subsets together. Of 10,000 x 64 elements
they are 520 tokens, and a share of their updates is that of all tokens to 0.04."""

GRADIENT_CHUNKS = 4
"""Chunks whose gradient is read at every step."""

SAMPLED_ELEMENTS = 2**19
"""Elements that they have at most; of large chunks there are fewer."""


@dataclass(frozen=True, kw_only=True)
class Updates:
    """What the optimizer wanted to do to weights, a number a step.

    NaN where nothing was to be done, or where nobody looked.

    Attributes
    ----------
    share_small
        Share of the updates that are smaller than half the spacing of the weights before them.
        Updates that are zero are none.
    lost
        The norm of observed minus predicted change, by that of the predicted one.
    size
        Root mean square of the predicted change.
    std
        Standard deviation of the weights before the step.
    looked_at
        Of which steps and tokens these numbers are, in words.
    """

    share_small: np.ndarray
    lost: np.ndarray
    size: np.ndarray
    std: np.ndarray
    looked_at: str

    @classmethod
    def of(cls, numbers: np.ndarray, n_elements: int, looked_at: str) -> "Updates":
        """Return them from sums over so many elements, shape `(number, step)`."""
        n_updates, n_small, wanted, missed, weights, squares = numbers
        with np.errstate(divide="ignore", invalid="ignore"):
            return cls(
                share_small=n_small / n_updates,
                lost=np.sqrt(missed / wanted),
                size=np.sqrt(wanted / n_elements),
                std=np.sqrt(np.maximum(squares / n_elements - (weights / n_elements) ** 2, 0)),
                looked_at=looked_at,
            )


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What is known of a run and a group of its tokens, by step; the initial state is none.

    Attributes
    ----------
    schema
        What was recorded.
    steps
        The steps, int64, shape `(step,)`, as all that follows.
    scalars
        Per-step scalars as recorded, by name.
    taken
        Whether the step is known to have been taken, and not skipped.
    grad_norm
        Norm of the gradient; NaN where there is none.
    updates
        What the steps did. Of some of them all is NaN.
    first_update
        Index of the first step that counts for how it all began; None if that is not among them.
    grad_looked_at
        Of which tokens the gradient's norm is, in words.
    """

    schema: Schema
    steps: np.ndarray
    scalars: Mapping[str, np.ndarray]
    taken: np.ndarray
    grad_norm: np.ndarray
    updates: Updates
    first_update: int | None
    grad_looked_at: str

    @classmethod
    def of(
        cls,
        source: Source,
        rows: np.ndarray,
        updates: Updates,
        grad_norm: np.ndarray,
        grad_looked_at: str,
    ) -> "Measurements":
        """Return them at some rows of a recording."""
        start = np.flatnonzero(rows == first_update_row(source))
        return cls(
            schema=source.reader.schema,
            steps=source.steps[rows],
            scalars={name: values[rows] for name, values in source.recorded.items()},
            taken=(source.follows & ~source.skipped)[rows],
            grad_norm=grad_norm,
            updates=updates,
            first_update=int(start[0]) if len(start) else None,
            grad_looked_at=grad_looked_at,
        )


def measured(subsets: Sequence[Selected]) -> list[Measurements]:
    """Measure subsets of a recording, all at the same rows, on samples of their steps and tokens.

    The gradient is measured at all steps, on a sample of the whole parameter.
    """
    source, rows = subsets[0].source, np.asarray(subsets[0].rows, np.int64)
    rows = rows[source.steps[rows] > 0]
    whole = replace(subsets[0], rows=as_range(rows), tokens=range(len(source.token_ids)))
    grad_norm, tokens = _grad_norm(whole)
    some, n_chunks = _spread(source, rows), max(1, SAMPLED_CHUNKS // len(subsets))
    found = []
    for subset in subsets:
        sample = _sample(subset, n_chunks)
        looked_at = f"{len(some):,} steps of {_words(sample, len(subset.tokens))}"
        n_elements = len(sample.tokens) * len(sample.dims)
        updates = Updates.of(_updates(sample, rows, some), n_elements, looked_at)
        found.append(Measurements.of(source, rows, updates, grad_norm, tokens))
    return found


def first_update_row(source: Source) -> int:
    """Return the first row whose update is as large as updates are in this run, 0 if there is none.

    While the learning rate grows to half its largest value, updates may be lost without harm.
    """
    rate = np.nan_to_num(np.where(source.follows, source.scalars[LEARNING_RATE.name], 0.0))
    large = np.flatnonzero((rate >= rate.max() / 2) & (rate > 0))
    return int(large[0]) if len(large) else 0


def _spread(source: Source, rows: np.ndarray) -> np.ndarray:
    """Return some of the rows whose steps were to move weights.

    The first, the last and `first_update_row` are among them.
    """
    rate = source.scalars[LEARNING_RATE.name]  # 0 of a step that was skipped
    rows = rows[source.follows[rows] & (rate[rows] != 0)]
    if len(rows) <= SAMPLED_STEPS:
        return rows
    spread = rows[np.linspace(0, len(rows) - 1, SAMPLED_STEPS).astype(np.int64)]
    return np.union1d(spread, rows[rows == first_update_row(source)])


def _sample(selected: Selected, n_chunks: int) -> Selected:
    """Return a selection with the tokens of some of its chunks only, which lie apart."""
    schema, tokens = selected.source.reader.schema, np.asarray(selected.tokens, np.int64)
    chunk_tokens, places = schema.layout.chunk_tokens, schema.places
    n_most = max(1, min(n_chunks, SAMPLED_ELEMENTS // (chunk_tokens * schema.n_dims)))
    chunks = (tokens if places is None else places[tokens]) // chunk_tokens
    known = np.unique(chunks)
    if len(known) <= n_most:
        return selected
    spread = known[np.linspace(0, len(known) - 1, n_most + 2).astype(np.int64)[1:-1]]
    return replace(selected, tokens=as_range(tokens[np.isin(chunks, spread)]))


def _words(sample: Selected, n_tokens: int) -> str:
    """Return of which of so many tokens a sample is."""
    n_sampled, name = len(sample.tokens), sample.source.reader.schema.row_name
    some = f"{n_sampled:,} of " if n_sampled < n_tokens else ""
    return f"{some}{n_tokens:,} {name}{'s' if n_tokens > 1 else ''}"


def _grad_norm(whole: Selected) -> tuple[np.ndarray, str]:
    """Return the norm of the gradient at each row, and of which tokens it is, in words.

    NaN where it was not recorded, or cannot be read: it may be no part of what was asked for.
    """
    sample = _sample(whole, GRADIENT_CHUNKS)
    norms = np.full(len(sample.rows), np.nan)
    if "grad" in sample.source.reader.schema.dtypes and len(norms):
        statistics = Statistics(_of_gradient, (np.add,), inputs=("grad",), cached=True)
        with contextlib.suppress(ThimbleError, OSError):
            norms = np.sqrt(Reduction(sample, statistics).compute()[0, 0])
    return norms, _words(sample, len(whole.tokens))


def _of_gradient(part: Window) -> Iterator[np.ndarray]:
    grad = part.current("grad")
    yield np.einsum("tnd,tnd->t", grad, grad)


def _updates(sample: Selected, rows: np.ndarray, some: np.ndarray) -> np.ndarray:
    """Return what `Updates.of` takes, of some of the rows; NaN for the others."""
    schema = sample.source.reader.schema
    numbers = np.full((6, len(rows)), np.nan)
    if "residual" in derived_names(schema) and len(some):
        looked_at = replace(sample, rows=as_range(some))
        add, needed = (np.add,) * len(numbers), formula_inputs(schema)
        statistics = Statistics(_of_updates, add, inputs=needed, cached=True)
        numbers[:, np.isin(rows, some)] = Reduction(looked_at, statistics).compute()[0]
    return numbers


def _of_updates(part: Window) -> Iterator[np.ndarray]:
    """Yield the numbers of a part that `Updates.of` takes."""
    observed, wanted = delta_W(part), predicted(part)
    before = part.previous("W")
    is_update = wanted != 0
    small = is_update & (np.abs(wanted) < ulp_before(part) / 2)
    of_elements = (
        *(is_update, small),
        *(wanted**2, (observed - wanted) ** 2, before, before**2),
    )
    for values in of_elements:
        yield values.sum(axis=(1, 2), dtype=np.float64)
