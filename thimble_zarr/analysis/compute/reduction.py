"""A selection reduced to a few numbers a step: cut into tasks, which run anywhere, and merged.

A task goes through some tokens at some hundred steps, window by window (`windows`), and
returns its numbers. There is no intermediate of the size of a run, and the numbers are the same bit
for bit wherever the tasks run and whichever ends first. NumPy is all that this needs, so that the
processes of a check start at once (`compute.run`); `dataset.lazy` makes a Dask graph of it.
"""

import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from thimble_zarr import tuning
from thimble_zarr.analysis.compute.served import reads_together
from thimble_zarr.analysis.compute.source import Selected, Source
from thimble_zarr.analysis.compute.windows import Window, row_groups, token_groups, windows_of
from thimble_zarr.format.indexing import Indices, TokenGroup
from thimble_zarr.format.schema import Schema

Part = functools.partial[np.ndarray]
"""A task: what to call, with everything it needs, which pickles small."""

_NEUTRAL: dict[np.ufunc, float] = {np.add: 0.0, np.maximum: -np.inf, np.minimum: np.inf}


@dataclass(frozen=True)
class Statistics:
    """A few numbers a step, and how those of two parts of a selection become those of both.

    Attributes
    ----------
    compute
        From a part of a window to one array a number, float64, shape `(step,)`. It must pickle.
    combine
        For each number `np.add`, `np.maximum` or `np.minimum`.
    dtype
        Of the part's numbers.
    inputs
        The stored variables that they are computed from; those that are named are read ahead.
    cached
        Whether windows may be so small that what they read stays in the cache. Not what computes on
        whole windows (`Window.of_whole`), which takes long for each.
    at_once
        From all tokens of a class in a window to what `compute` returns of each part of them
        (`Window.tokens_of_parts`), in one call. None if there is none, or where it returns None.
    """

    compute: Callable[[Window], Iterable[np.ndarray]]
    combine: tuple[np.ufunc, ...]
    dtype: type[np.floating] = np.float64
    inputs: tuple[str, ...] = ()
    cached: bool = False
    at_once: Callable[[Window], Sequence[Iterable[np.ndarray]] | None] | None = None

    def of_window(
        self, window: Window, classes: np.ndarray
    ) -> Iterator[tuple[int, slice, Iterable[np.ndarray]]]:
        """Yield the class of each part of a window, its rows and its numbers."""
        if self.at_once is not None:
            found = [
                (classes[tokens.start], rows, self.at_once(whole))
                for (rows, tokens), whole in window.parts(classes, self.dtype, sys.maxsize)
            ]
            if all(parts is not None for _, _, parts in found):
                yield from ((one, rows, of) for one, rows, parts in found for of in parts or ())
                return
        for (rows, tokens), part in window.parts(classes, self.dtype):
            yield classes[tokens.start], rows, self.compute(part)

    def merge(self, *parts: np.ndarray) -> np.ndarray:
        """Return the numbers of several parts together, in their order."""
        if len(parts) == 1:
            return parts[0]
        merged = parts[0].copy()
        for part in parts[1:]:
            for index, ufunc in enumerate(self.combine):
                ufunc(merged[:, index], part[:, index], out=merged[:, index])
        return merged


@dataclass(frozen=True)
class Reduction:
    """Every row of a selection reduced to a few numbers, in one pass.

    Attributes
    ----------
    selected
        What is reduced.
    statistics
        The numbers.
    classes
        Which class each selected token is of, int, counted from zero; the numbers are of each class
        alone. One class if None.
    """

    selected: Selected
    statistics: Statistics
    classes: np.ndarray | None = None

    @cached_property
    def n_classes(self) -> int:
        """Classes there are."""
        return 1 if self.classes is None else int(self.classes.max(initial=0)) + 1

    @cached_property
    def of_rows(self) -> list[Indices]:
        """The rows, cut as tasks are."""
        rows, source = self.selected.rows, self.selected.source
        return row_groups(rows, reduction_steps(source.reader.schema))

    @cached_property
    def _of_tokens(self) -> list[tuple[Indices, np.ndarray | None]]:
        """The tokens, cut as tasks are, and their classes where there are several.

        On a server a task has all of them, so that it asks for what it needs of a file at once.

        What tasks have in common is one object for all of them, so that a graph pickles small.
        """
        classes, source, tokens = self.classes, self.selected.source, self.selected.tokens
        narrow = np.min_scalar_type(-self.n_classes)
        groups = token_groups(source, tokens)
        if reads_together(source.reader, tokens):
            groups = [(tokens, slice(0, len(tokens)))]
        return [
            (ids, None if classes is None or self.n_classes == 1 else classes[where].astype(narrow))
            for ids, where in groups
        ]

    @property
    def n_parts(self) -> int:
        """Tasks there are."""
        return len(self.of_rows) * len(self._of_tokens)

    def parts(self) -> Iterator[list[Part]]:
        """Yield for each of `of_rows` its tasks, whose numbers are to be merged in their order."""
        source, dims = self.selected.source, self.selected.dims
        for rows in self.of_rows:
            yield [
                Part(_reduce, source, self.statistics, rows, ids, dims, classes, self.n_classes)
                for ids, classes in self._of_tokens
            ]

    def compute(self) -> np.ndarray:
        """Return the numbers, `(class, number, step)`, computed here, one task after the other."""
        numbers = [self.statistics.merge(*(part() for part in parts)) for parts in self.parts()]
        return np.concatenate(numbers, axis=-1)


def task_steps(schema: Schema, n_steps: int) -> int:
    """Return at most so many steps, but at least one block of them, in whole blocks."""
    block_steps = schema.layout.block_steps
    return max(1, n_steps // block_steps) * block_steps


def reduction_steps(schema: Schema) -> int:
    """Return the steps that a task of a reduction goes through at most."""
    return task_steps(schema, tuning.TUNING.task_steps)


def _reduce(
    source: Source,
    statistics: Statistics,
    rows: Indices,
    tokens: Indices,
    dims: Indices,
    classes: np.ndarray | None,
    n_classes: int,
) -> np.ndarray:
    """Reduce tokens group by group (`token_groups`), those of a class after those of another."""
    neutral = np.array([_NEUTRAL[ufunc] for ufunc in statistics.combine])
    classes = np.zeros(len(tokens), np.int8) if classes is None else classes
    numbers, groups = list[np.ndarray](), list[TokenGroup]()
    into = list[tuple[np.ndarray, np.ndarray]]()
    for ids, at in token_groups(source, tokens):
        numbers.append(np.tile(neutral[:, np.newaxis], (n_classes, 1, len(rows))))
        small: list[TokenGroup] = [(ids, slice(0, len(ids)))]
        if statistics.cached:
            small = token_groups(source, ids, cached=True)
        groups += [by_class(group, classes[at]) for group in small]
        into += [(numbers[-1], classes[at])] * len(small)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        np.setbufsize(_UFUNC_BUFFER)  # until the block ends
        windows = windows_of(source, rows, groups, dims, statistics.inputs)
        for (of_group, of_ids), ((steps, where), window) in zip(itertools.cycle(into), windows):
            of_window = of_group[..., steps]
            for of_class, part_rows, found in statistics.of_window(window, of_ids[where]):
                of_part = of_window[of_class, :, part_rows]
                for combine, of_steps, values in zip(
                    statistics.combine, of_part, found, strict=True
                ):
                    combine(of_steps, values, out=of_steps)
    return statistics.merge(*numbers)


def by_class(group: TokenGroup, classes: np.ndarray) -> TokenGroup:
    """Return a group with the tokens of a class after those of another."""
    tokens, where = group
    of_tokens = classes[where]
    if (np.diff(of_tokens) >= 0).all():
        return group
    order = np.argsort(of_tokens, kind="stable")
    return np.asarray(tokens)[order], np.arange(len(classes))[where][order]


_UFUNC_BUFFER = 512
"""Elements that NumPy copies to have scalars of steps beside them where rows are shorter than half
of its buffer, which takes longer than to compute."""
