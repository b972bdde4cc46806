"""The audit of one parameter: which rows of a block do not follow, and what is wrong with them.

A portable program takes the steps where there is one. Rows of which it does not explain every bit,
and all rows where there is none, torch's own code takes (`optim.replay`), a part at a time; where
the program is known to get other bits than torch now and then, of a row only the elements that it
does not explain. What torch does not explain either is wrong.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from thimble_zarr.bits import patterns
from thimble_zarr.causes.catalogue import Finding, explain
from thimble_zarr.causes.evidence import Evidence, Failure
from thimble_zarr.causes.recorded_rows import RecordedRows
from thimble_zarr.causes.replay import recurrences
from thimble_zarr.format.layout import AUDIT_ELEMENTS
from thimble_zarr.format.schema import Schema
from thimble_zarr.optim.programs.compiled import is_available
from thimble_zarr.optim.programs.kernel import StepNumbers
from thimble_zarr.optim.programs.program import PortableProgram
from thimble_zarr.optim.programs.registry import program_of
from thimble_zarr.record.audit.finding import AuditFinding
from thimble_zarr.record.audit.held_rows import HeldRows
from thimble_zarr.record.replay.torch_steps import Bits, TorchSteps, Wrong

_MOST_ROWS = 16
"""Rows that a portable program takes at once."""

_SAMPLE_ELEMENTS = AUDIT_ELEMENTS // 4
"""Elements that causes are tried on, each with some thirty numbers."""

_MOST_PLACES = 4 * AUDIT_ELEMENTS
"""Elements of all these rows that are noted. In float32 a fiftieth of a row is."""


@dataclass(frozen=True)
class Difference:
    """What is wrong with the step to a row of a block."""

    part: "ParameterAudit"
    row: int
    wrong: Wrong

    def finding(self, path: Path, held: HeldRows) -> AuditFinding:
        """Return it in words and numbers, with its cause."""
        schema = self.part.schema
        try:
            cause = self.part.explain(self, held)
            code, message = cause.code, cause.message
        except Exception as error:  # what was found matters more than its name
            code, message = "unknown", f"Looking for its cause failed: {error!r}."
        return AuditFinding(
            path=path,
            parameter=schema.parameter or self.part.group,
            step=int(held.steps[held.n_before + self.row]),
            **self.wrong.place(schema, self.part.ids),
            code=code,
            cause=message,
        )


class ParameterAudit:
    """Takes the steps of one parameter again.

    Attributes
    ----------
    names
        The variables that a step changes.
    before
        The row before the block, by variable; empty where there is none.
    """

    def __init__(self, group: str, schema: Schema, ids: np.ndarray | None) -> None:
        self.group, self.schema, self.ids = group, schema, ids
        self.names = recurrences(schema)
        self.before: dict[str, np.ndarray] = {}
        self._is_before_sound = False
        self._found: dict[int, Difference] = {}
        self._torch = TorchSteps(schema, ids)

    def keep(self, row: Bits, *, follows: bool, index: int | None = None) -> None:
        """Keep the last row of a block, which the first of the next one follows.

        `follows` says whether the row before it is that of the step before; its index in the block
        is given if it was checked.
        """
        for name, bits in row.items():
            np.copyto(self.before.setdefault(name, np.empty_like(bits)), bits)
        self._is_before_sound = follows and index not in self._found
        self._found = {}

    def check(
        self, bits: Bits, rows: slice, numbers: Bits, taken: np.ndarray, follows: np.ndarray
    ) -> list[Difference]:
        """Return what is wrong with those of some rows of a block that do not follow."""
        found: list[Difference] = []
        for start in range(0, len(follows), self._n_rows_at_once):
            some = slice(start, min(start + self._n_rows_at_once, len(follows)))
            at = slice(rows.start + some.start, rows.start + some.stop)
            of_some = {name: values[some] for name, values in numbers.items()}
            asked = self._not_predicted(bits, at, of_some, taken[some], follows[some])
            for index, elements in asked.items():
                scalars = {name: float(values[index]) for name, values in of_some.items()}
                row, is_taken = at.start + index, bool(taken[some][index])
                difference = self._difference(bits, row, elements, scalars, is_taken=is_taken)
                found += [] if difference is None else [difference]
        self._found |= {one.row: one for one in found}
        return found

    def explain(self, difference: Difference, held: HeldRows) -> Finding:
        """Name what is wrong with a row and those after it that do not follow either."""
        wrong = {held.n_before + row: one.wrong for row, one in self._found.items()}
        first = held.n_before + difference.row
        failing = [*itertools.takewhile(wrong.__contains__, range(first, held.n_rows))]
        none, n_dims = (-1, -1), self.schema.n_dims
        failure = Failure(
            range(first, first + len(failing)),
            self.names,
            np.array([[wrong[row].n_wrong.get(name, 0) for name in self.names] for row in failing]),
            np.array(
                [
                    [divmod(at[name], n_dims) if name in at else none for name in self.names]
                    for at in (wrong[row].first for row in failing)
                ]
            ),
        )
        rows = RecordedRows(held)
        sound = {*np.flatnonzero(rows.follows).tolist()} - {*wrong}
        sound |= {0} if held.n_before and self._is_before_sound else set()
        every = np.arange(self.schema.n_tokens), np.arange(n_dims)
        evidence = Evidence(rows, *every, [failure], sound=sound, n_elements=_SAMPLE_ELEMENTS)
        return explain(evidence, failure)

    @property
    def _n_rows_at_once(self) -> int:
        n_elements = self.schema.n_tokens * self.schema.n_dims
        return max(1, min(_MOST_ROWS, 32 * _MOST_PLACES // n_elements))

    @cached_property
    def _program(self) -> PortableProgram | None:
        program = program_of(self.schema.optimizer, self.schema.dtypes)
        return program if is_available() else None  # NumPy takes longer than torch

    def _not_predicted(
        self, bits: Bits, rows: slice, numbers: Bits, taken: np.ndarray, follows: np.ndarray
    ) -> dict[int, np.ndarray | None]:
        """Return the rows that a portable program does not take to the recorded bits.

        Of each the elements that are not: None if they are many, or not known.
        """
        asked: dict[int, np.ndarray | None] = dict.fromkeys(np.flatnonzero(follows).tolist())
        if self._program is None:
            return asked
        ends = [rows.start, rows.stop] if rows.start else [0, 1, rows.stop]
        for start, stop in itertools.pairwise(ends):
            some = slice(start - rows.start, stop - rows.start)
            if not follows[some].any():
                continue
            before = {name: self._rows_before(bits, name, start, stop) for name in self.names}
            after = {name: bits[name][start:stop] for name in self.names}
            made_of = {name: values[some] for name, values in numbers.items() if name != "loss"}
            given = (before, bits["grad"][start:stop], self._program.numbers(made_of, taken[some]))
            if self._program.replaces_torch:
                differs = np.logical_or.reduce([*self._program.differs(*given, after).values()])
                explained = np.flatnonzero(~differs).tolist()
            else:
                elements = self._elements_not_predicted(*given, after)
                asked |= {some.start + index: of for index, of in elements.items()}
                explained = [
                    index for index, of in elements.items() if of is not None and not len(of)
                ]
            for index in explained:
                asked.pop(some.start + index, None)
        return {index: of for index, of in asked.items() if follows[index]}

    def _elements_not_predicted(
        self, before: Bits, grads: np.ndarray, numbers: StepNumbers, after: Bits
    ) -> dict[int, np.ndarray | None]:
        """Return for each row the elements that a program does not take to the recorded bits.

        They are places in the flattened row, ascending; None if they are many.
        """
        assert self._program is not None
        length = max(1, AUDIT_ELEMENTS // (len(grads) * self.schema.n_dims))
        found: dict[int, np.ndarray | None] = dict.fromkeys(
            range(len(grads)), np.empty(0, np.int64)
        )
        most = _MOST_PLACES // self._n_rows_at_once
        for start in range(0, self.schema.n_tokens, length):
            some = slice(start, start + length)
            held = {name: of[:, some] for name, of in before.items()}
            predicted = self._program.predict(held, grads[:, some], numbers)
            is_off = np.logical_or.reduce(
                [patterns(of) != patterns(after[name][:, some]) for name, of in predicted.items()]
            )
            for index, known in found.items():
                if known is not None:
                    more = np.flatnonzero(is_off[index]) + start * self.schema.n_dims
                    is_few = len(known) + len(more) <= most
                    found[index] = np.concatenate([known, more]) if is_few else None
        return found

    def _rows_before(self, bits: Bits, name: str, start: int, stop: int) -> np.ndarray:
        """Return the rows before some rows: a view."""
        return bits[name][start - 1 : stop - 1] if start else self.before[name][np.newaxis]

    def _difference(
        self,
        bits: Bits,
        row: int,
        elements: np.ndarray | None,
        scalars: Mapping[str, float],
        *,
        is_taken: bool,
    ) -> Difference | None:
        """Return what is wrong with the step to a row, by torch's own code; None if nothing is.

        It takes the step of some elements of the flattened row, or of all.
        """
        before = {name: self._rows_before(bits, name, row, row + 1)[0] for name in self.names}
        inputs = {
            name: of.reshape(-1) for name, of in (before | {"grad": bits["grad"][row]}).items()
        }
        recorded = {name: bits[name][row].reshape(-1) for name in self.names}

        def parts() -> Iterator[tuple[slice | np.ndarray, Bits, Bits]]:
            for of_all in self._torch.parts(None if elements is None else len(elements)):
                part = of_all if elements is None else elements[of_all]
                of_part = {name: of[part] for name, of in inputs.items()}
                after: Bits = of_part
                if is_taken:
                    after = self._torch.step(of_part, part, scalars)
                yield part, {name: of[part] for name, of in recorded.items()}, after

        wrong = Wrong.of(self.names, parts())
        return None if wrong is None else Difference(self, row, wrong)
