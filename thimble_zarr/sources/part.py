"""A part of a run, some of its steps and tokens, as a store of its own.

It is what a recorder would have written with a schedule and with `tokens`: it has the row before
its first step, by which that step is checked, and says how many tokens the whole has.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from thimble_zarr.errors import SelectionError, StoreExistsError
from thimble_zarr.format.coding import CodingName
from thimble_zarr.format.indexing import Indices, as_range
from thimble_zarr.format.location import on_disk
from thimble_zarr.format.reader import History
from thimble_zarr.format.schema import Schema, TokenLabels
from thimble_zarr.sources.recode import Bits, Progress, recoded_schemas, write_rows
from thimble_zarr.store.contents import StorePath, is_begun
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.writer import StoreWriter

PART_OF = "part_of"
"""The attribute of a part that says of which run it is."""


@dataclass(frozen=True)
class Part:
    """Some rows of a parameter and some of its tokens, by their positions, ascending."""

    whole: StoreReader
    rows: range
    tokens: np.ndarray | None

    @property
    def group(self) -> str:
        """The parameter's name, if the recording holds several; else empty."""
        return self.whole.group

    @property
    def n_rows(self) -> int:
        """How many rows it has."""
        return len(self.rows)

    @cached_property
    def schema(self) -> Schema:
        """What is in it."""
        whole = self.whole.schema
        attrs = {**whole.attrs, PART_OF: str(self.whole.path)}
        schema = replace(whole, schedule=self._schedule, attrs=attrs)
        if self.tokens is None:
            return schema
        schema = replace(
            schema,
            shape=(len(self.tokens), *whole.shape[1:]),
            whole_tokens=whole.whole_tokens or whole.n_tokens,
            stored_last=None,
        )
        return schema.labelled(self.read_labels())

    @property
    def _schedule(self) -> str | None:
        whole = self.whole.schema.schedule
        if len(self.rows) == self.whole.n_rows:
            return whole
        first, *others = self.read_steps().tolist()  # the first is there for the second
        window = f"windows(({others[0] if others else first}, {others[-1] if others else first}))"
        return window if whole is None else f"{window} of {whole}"

    def read_labels(self) -> TokenLabels:
        """Return what is known of its tokens."""
        labels = self.whole.read_labels()
        return labels if self.tokens is None else labels.of(self.tokens)

    def read_token_ids(self) -> np.ndarray:
        """Return which row of the parameter each token is."""
        ids = self.whole.read_token_ids()
        return ids if self.tokens is None else ids[self.tokens]

    def read_numbers(self) -> dict[str, np.ndarray]:
        """Return the scalars of each row, and what a prediction needs besides."""
        return {name: self._of_rows(of) for name, of in self.whole.read_numbers().items()}

    def read_logged(self) -> dict[str, np.ndarray]:
        """Return what was logged of each row besides the loss."""
        return {name: self._of_rows(of) for name, of in self.whole.read_logged().items()}

    def read_steps(self) -> np.ndarray:
        """Return the step of each row."""
        return self._of_rows(self.whole.read_steps())

    def _of_rows(self, values: np.ndarray) -> np.ndarray:
        return values[self.rows.start : self.rows.stop]

    def read_history(self) -> History:
        """Return which rows were filled in, or are missing: nothing else is of a part."""
        history, start = self.whole.read_history(), self.rows.start

        def moved(marked: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
            return [(max(first - start, 0), stop - start) for first, stop in marked if stop > start]

        return History(filled=moved(history.filled), missing=moved(history.missing))

    @contextmanager
    def opened(self) -> Iterator["_PartBits"]:
        """Return its bits for one thread."""
        with self.whole.opened() as whole:
            yield _PartBits(whole, self.rows.start, self.tokens)


@dataclass(frozen=True)
class _PartBits:
    """Bits of a part, whose rows and tokens are counted from 0."""

    whole: Bits
    first_row: int
    tokens: np.ndarray | None

    def read(self, name: str, rows: tuple[int, int], tokens: Indices) -> np.ndarray:
        """Return stored bits of a variable."""
        chosen = tokens if self.tokens is None else as_range(self.tokens[np.asarray(tokens)])
        first, stop = rows
        return self.whole.read(name, (first + self.first_row, stop + self.first_row), chosen)


def fetch_part(
    source: StorePath,
    path: StorePath,
    *,
    rows: range | None = None,
    tokens: np.ndarray | None = None,
    on_progress: Progress = lambda n_done, n_total: None,
) -> Sequence[StoreReader]:
    """Write some rows of a store and the row before them, and some of its tokens, as a new one.

    Of the source nothing is read but the chunks that have them. Every chunk is compared with its
    checksum when it is read.

    Parameters
    ----------
    source, path
        The store, on a server or on this machine, and where the new one is to lie.
    rows, tokens
        Positions of the rows and the tokens, ascending; all by default.
    on_progress
        Called with the bytes that were written, and those there are to write.

    Raises
    ------
    StoreExistsError
        If something is at `path`: what was cut off is begun again elsewhere, or once it is gone.
    SelectionError
        If tokens are chosen of a store of several parameters.
    """
    path, readers = on_disk(path).absolute(), StoreReader.open_each(source)
    if is_begun(path):
        raise StoreExistsError(f"{path} is there already; remove it or choose another path")
    if tokens is not None and len(readers) > 1:
        raise SelectionError(
            f"{source} holds {len(readers)} parameters, and tokens can be chosen of one only; "
            "choose steps alone"
        )
    found = range(readers[0].n_rows) if rows is None else range(max(0, rows.start - 1), rows.stop)
    coding: CodingName = "predicted" if readers[0].schema.coding.is_predicted else "plain"
    parts = [Part(reader, found, tokens) for reader in readers]
    schemas = recoded_schemas(parts, coding)
    ids = {one.group: one.read_token_ids() for one in parts if one.schema.whole_tokens is not None}
    labels = {one.group: one.read_labels() for one in parts if one.schema.has_tokens}
    schema = schemas.get("", schemas)
    writer = StoreWriter.create(path, schema, labels=labels, token_ids=ids, n_rows=len(found))
    with ExitStack() as undo:
        undo.callback(writer.discard)
        write_rows(parts, schemas, writer, on_progress)
        undo.pop_all()
    return StoreReader.open_each(path)
