"""A parameter of two runs, and what both have of it: steps, tokens, variables.

Runs may have other blocks and chunks, other tokens, another length. What is compared are pairs of
rows and pairs of tokens; `pieces` cuts them so that each reads whole chunks and memory is bounded.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from thimble_zarr import tuning
from thimble_zarr.analysis.compute.source import Source
from thimble_zarr.bits import decode, patterns
from thimble_zarr.errors import ConfigError
from thimble_zarr.format.indexing import Indices, as_range, token_groups
from thimble_zarr.format.reader import Reader, Rows

Both = tuple[np.ndarray, np.ndarray]
"""Something of the one run and of the other."""


@dataclass(frozen=True)
class Pair:
    """A parameter of two runs.

    Attributes
    ----------
    sources
        The parameter in each run.
    steps, rows
        The steps that both have, ascending, and where each lies in either run.
    ids, tokens
        The ids that both have, ascending, and where each lies in either run.
    """

    sources: tuple[Source, Source]
    steps: np.ndarray
    rows: Both
    ids: np.ndarray
    tokens: Both

    @classmethod
    def of(cls, a: Reader, b: Reader) -> Self:
        """Return what two runs have in common of a parameter.

        Raises
        ------
        ConfigError
            If its rows have not the same shape, or no step or token is in both.
        StoreError
            If no step is committed in one of them.
        """
        sources = Source.of(a), Source.of(b)
        shapes = a.schema.shape, b.schema.shape
        if shapes[0][1:] != shapes[1][1:] or len(shapes[0]) != len(shapes[1]):
            raise ConfigError(
                f"{_named(a)} has shape {shapes[0]}, and {_named(b)} {shapes[1]}: what is compared "
                "must have rows of one shape; choose parameters with --parameter"
            )
        steps, *rows = np.intersect1d(
            sources[0].steps, sources[1].steps, assume_unique=True, return_indices=True
        )
        ids, *tokens = np.intersect1d(
            sources[0].token_ids, sources[1].token_ids, assume_unique=True, return_indices=True
        )
        for what, common in (("step", steps), (a.schema.row_name, ids)):
            if len(common) == 0:
                raise ConfigError(f"{_named(a)} and {_named(b)} have no {what} in common")
        return cls(sources, steps, (rows[0], rows[1]), ids, (tokens[0], tokens[1]))

    @property
    def readers(self) -> tuple[Reader, Reader]:
        """The parameter of each run."""
        return self.sources[0].reader, self.sources[1].reader

    @cached_property
    def variables(self) -> tuple[str, ...]:
        """What both have of each element, in the order of a store."""
        a, b = (reader.schema.dtypes for reader in self.readers)
        return tuple(name for name in a if name in b)

    @cached_property
    def scalars(self) -> tuple[str, ...]:
        """What both have of each step, but for what was recorded in neither."""
        a, b = (source.recorded for source in self.sources)
        return tuple(name for name in a if name in b)

    def scalar(self, name: str) -> Both:
        """Return a number of each step that both have."""
        a, b = (source.recorded[name] for source in self.sources)
        return a[self.rows[0]], b[self.rows[1]]

    @cached_property
    def logged(self) -> dict[str, Both]:
        """What was logged of each step that both have, where shapes and dtypes are the same."""
        a, b = (reader.read_logged() for reader in self.readers)
        return {
            name: (a[name][self.rows[0]], b[name][self.rows[1]])
            for name in a
            if name in b
            and (a[name].shape[1:], a[name].dtype) == (b[name].shape[1:], b[name].dtype)
        }

    def natives(self, name: str) -> tuple[str, str]:
        """Return the dtypes of a variable."""
        a, b = (reader.schema.dtypes[name] for reader in self.readers)
        return a, b

    @cached_property
    def is_alike(self) -> bool:
        """Whether chunks of both have the same elements, so that their checksums tell."""
        a, b = (reader.schema for reader in self.readers)
        is_cut_alike = (a.layout, a.shape, a.stored_last) == (b.layout, b.shape, b.stored_last)
        ids_a, ids_b = (source.token_ids for source in self.sources)
        return is_cut_alike and np.array_equal(ids_a, ids_b)

    def windows(self) -> Iterator[slice]:
        """Yield which of the steps lie in one block of either run, in their order.

        Where blocks are of different length, the longer ones.
        """
        length = max(reader.schema.layout.block_steps for reader in self.readers)
        blocks = np.stack(self.rows) // length
        cuts = np.flatnonzero((blocks[:, 1:] != blocks[:, :-1]).any(axis=0)) + 1
        starts, stops = [0, *cuts.tolist()], [*cuts.tolist(), len(self.steps)]
        yield from map(slice, starts, stops)

    @cached_property
    def groups(self) -> list[tuple[np.ndarray, Indices, Indices]]:
        """All tokens in pieces: which of `ids` they are, and where they lie in either run."""
        return self.groups_of(np.arange(len(self.ids)))

    def groups_of(self, which: np.ndarray) -> list[tuple[np.ndarray, Indices, Indices]]:
        """Return some tokens in pieces as `groups` does."""
        schema = self.readers[0].schema
        length = max(reader.schema.layout.block_steps for reader in self.readers)
        most = max(1, tuning.TUNING.window_elements // (length * schema.n_dims))
        chunk_tokens = schema.layout.chunk_tokens
        cut = token_groups(
            as_range(self.tokens[0][which]),
            max(most, chunk_tokens),
            places=schema.places,
            chunk_tokens=chunk_tokens,
        )
        return [(of := which[where], tokens, as_range(self.tokens[1][of])) for tokens, where in cut]


class OpenedPair:
    """Rows of both runs, for one thread. Use it as a context manager."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            a, b = (stack.enter_context(reader.opened()) for reader in self.pair.readers)
            self._opened, self._stack = (a, b), stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(self, name: str, steps: slice, tokens: tuple[Indices, Indices]) -> Both:
        """Return stored bits of both runs, of shape `(step, token, dim)`."""
        opened, rows = self._opened, self.pair.rows
        return (
            _read(opened[0], name, rows[0][steps], tokens[0]),
            _read(opened[1], name, rows[1][steps], tokens[1]),
        )


def _read(opened: Rows, name: str, rows: np.ndarray, tokens: Indices) -> np.ndarray:
    """Return rows of which some between the first and the last may be left out."""
    first, end = int(rows[0]), int(rows[-1]) + 1
    bits = opened.read(name, (first, end), tokens)
    return bits if len(rows) == end - first else bits[rows - first]


def different(bits: Both, natives: tuple[str, str]) -> np.ndarray:
    """Return where values differ: in a bit, or between two dtypes as numbers.

    Then NaN is NaN, and the two zeros are not the same.
    """
    if natives[0] == natives[1]:
        found: np.ndarray = patterns(bits[0]) != patterns(bits[1])
        return found
    a, b = numbers(bits, natives)
    unlike: np.ndarray = (a != b) | (np.signbit(a) != np.signbit(b))
    return unlike & ~(np.isnan(a) & np.isnan(b))


def numbers(bits: Both, natives: tuple[str, str]) -> Both:
    """Return the numbers that stored bits are, float64: exactly those."""
    return (
        decode(bits[0], natives[0], np.float64),
        decode(bits[1], natives[1], np.float64),
    )


def _named(reader: Reader) -> str:
    name = reader.schema.parameter
    return f"{name} of {reader.path}" if name else str(reader.path)
