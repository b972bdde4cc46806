"""The audit of a recording while it is made: every step is taken again before its block is written.

A portable program takes the steps where there is one. Rows of which it does not explain every bit,
and all rows where there is none, torch's own code takes (`optim.replay`), a part at a time; where
the program is known to get other bits than torch now and then, of a row only the elements that it
does not explain. What torch does not explain either is a finding.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from thimble_zarr.bits import decode, is_nan, patterns
from thimble_zarr.errors import AuditError, ConfigError
from thimble_zarr.format.audited import AuditCounts
from thimble_zarr.format.layout import AUDIT_ELEMENTS
from thimble_zarr.format.schema import Schema, array_path
from thimble_zarr.optim.base import COUNT
from thimble_zarr.optim.programs.compiled import is_available
from thimble_zarr.optim.programs.kernel import StepNumbers
from thimble_zarr.optim.programs.program import PortableProgram
from thimble_zarr.optim.programs.registry import program_of
from thimble_zarr.record.block import Block
from thimble_zarr.record.counting import StepCounts
from thimble_zarr.record.finding import AuditFinding, likely_cause
from thimble_zarr.record.replay.torch_steps import Bits, TorchSteps, why_not
from thimble_zarr.store.reader import StoreReader

_MOST_ROWS = 16
"""Rows that a portable program takes at once."""

_MOST_PLACES = 4 * AUDIT_ELEMENTS
"""Elements of all these rows that are noted. In float32 a fiftieth of a row is."""

OnFinding = Literal["warn", "raise"] | Callable[[AuditFinding], object]
"""What is done about a finding: the first warns, or is raised; or each block's first is passed."""


class Audit:
    """Takes the steps of blocks again, in their order, and tells what it found.

    All but `unaudited`, `counts`, `is_silent` and `news` belongs to the writer thread.

    Attributes
    ----------
    unaudited
        By group, why a parameter cannot be audited.
    counts
        How many steps were audited so far, by this process.
    """

    def __init__(
        self,
        schemas: Mapping[str, Schema],
        ids: Mapping[str, np.ndarray],
        on_finding: OnFinding,
    ) -> None:
        if not (callable(on_finding) or on_finding in ("warn", "raise")):
            raise ConfigError(
                f"audit is {on_finding!r}; give 'warn', 'raise', a function of an AuditFinding, "
                "or None"
            )
        reasons = {group: why_not(schema) for group, schema in schemas.items()}
        self.unaudited = {group: why for group, why in reasons.items() if why}
        self.counts = AuditCounts()
        self._on_finding, self._has_told = on_finding, False
        self._news: deque[str | AuditError] = deque()
        self._parts = {
            group: _ParameterAudit(group, schema, ids.get(group))
            for group, schema in schemas.items()
            if not reasons[group]
        }
        self._first_row, self._n_done, self._of_block = -1, 0, AuditCounts()
        self._finding: AuditFinding | None = None

    def load(self, readers: Sequence[StoreReader], first_row: int) -> None:
        """Go on with a block of a store that there is: its first row follows that before it."""
        for reader in readers:
            if first_row and (part := self._parts.get(reader.group)):
                part.keep(
                    {name: reader.read(name, (first_row - 1, first_row))[0] for name in part.names}
                )

    def check(
        self, block: Block, n_rows: int, before: StepCounts, path: Path
    ) -> AuditCounts | None:
        """Take the steps of a block's first rows again; return what is known of all of them.

        What was checked of a block before is not checked again. `before` are the counts at the row
        before the block. None if nothing can be audited. Whatever goes wrong, the recording goes
        on.
        """
        self._finding = None
        if not self._parts:
            return None
        try:
            return self._check(block, n_rows, before, path)
        except Exception as error:  # a run is worth more than its audit
            self._parts = {}
            self._news.append(
                f"the audit of {path} stopped at steps {block.steps[0]:,} to "
                f"{block.steps[n_rows - 1]:,}: {type(error).__name__}: {error}. The recording goes "
                f"on; `thimble-zarr check` looks at it when it has ended"
            )
            return None

    def tell(self) -> None:
        """Tell what `check` found, now that it is committed."""
        finding, self._finding = self._finding, None
        if finding is None:
            return
        if callable(self._on_finding):
            try:
                self._on_finding(finding)
            except Exception as error:
                failed = AuditError(
                    f"what the audit calls failed: {error!r}; it was told: {finding}"
                )
                failed.__cause__ = error
                self._news.append(failed)
        elif not self._has_told:
            later = "later steps are counted, and not told"
            message = f"{finding}; {later}"
            self._news.append(message if self._on_finding == "warn" else AuditError(message))
        self._has_told = True

    @property
    def is_silent(self) -> bool:
        """Whether there is nothing to report."""
        return not self._news

    def news(self) -> Iterator[str]:
        """Yield what training was not told yet, to warn of it; raise AuditError where that is due.

        Each is told once.
        """
        while self._news:
            news = self._news.popleft()
            if isinstance(news, AuditError):
                raise news
            yield news

    def _check(self, block: Block, n_rows: int, before: StepCounts, path: Path) -> AuditCounts:
        if block.first_row != self._first_row:
            self._first_row, self._n_done, self._of_block = block.first_row, 0, AuditCounts()
        rows, self._n_done = slice(self._n_done, n_rows), n_rows
        bits = block.bits()
        steps = block.steps[:n_rows]
        follows = (np.diff(steps, prepend=before.step) == 1)[rows]
        follows[: int(block.first_row == 0 and rows.start == 0)] = False
        unexplained = np.zeros(len(follows), bool)
        found: list[_Difference] = []
        for group, part in self._parts.items():
            numbers = {
                name: block.scalars[array_path(group, name)][rows] for name in part.schema.numbers
            }
            counts = block.scalars[array_path(group, COUNT)][:n_rows]
            taken = (np.diff(counts, prepend=float(before.counts[group])) != 0)[rows]
            of_part = {name: bits[array_path(group, name)] for name in part.schema.dtypes}
            is_off, first = part.check(of_part, rows, numbers, taken, follows)
            unexplained |= is_off
            found += [] if first is None else [first]
            if n_rows == block.block_steps:
                part.keep({name: of_part[name][-1] for name in part.names})
        if found:
            first = min(found, key=lambda one: one.row)
            self._finding = first.finding(path, int(steps[first.row]))
        of_rows = AuditCounts(int(follows.sum()), int(unexplained.sum()))
        self.counts += of_rows
        self._of_block += of_rows
        return self._of_block


@dataclass(frozen=True)
class _Difference:
    """What is wrong with the step to a row of a block: of the first element all that is known."""

    part: "_ParameterAudit"
    row: int
    n_wrong: Mapping[str, int]
    name: str
    token: int
    dim: int
    recorded: np.ndarray
    computed: np.ndarray

    def finding(self, path: Path, step: int) -> AuditFinding:
        """Return it in words and numbers."""
        schema, ids = self.part.schema, self.part.ids
        recorded, computed = (
            float(decode(bits.reshape(1), schema.dtypes[self.name], np.float64)[0])
            for bits in (self.recorded, self.computed)
        )
        return AuditFinding(
            path=path,
            parameter=schema.parameter or self.part.group,
            step=step,
            token=self.token if ids is None else int(ids[self.token]),
            dim=self.dim,
            variable=self.name,
            recorded=recorded,
            computed=computed,
            n_wrong=self.n_wrong,
            cause=likely_cause(schema.optimizer, self.n_wrong, schema.n_tokens * schema.n_dims),
        )


class _ParameterAudit:
    """Takes the steps of one parameter again; `names` are the variables that a step changes."""

    def __init__(self, group: str, schema: Schema, ids: np.ndarray | None) -> None:
        self.group, self.schema, self.ids = group, schema, ids
        self.names = tuple(name for name in schema.dtypes if name != "grad")
        self._before: dict[str, np.ndarray] = {}
        self._torch = TorchSteps(schema, ids)

    def keep(self, row: Bits) -> None:
        """Keep a row, which the first of the next block follows."""
        for name, bits in row.items():
            np.copyto(self._before.setdefault(name, np.empty_like(bits)), bits)

    def check(
        self, bits: Bits, rows: slice, numbers: Bits, taken: np.ndarray, follows: np.ndarray
    ) -> tuple[np.ndarray, _Difference | None]:
        """Return which of some rows of a block do not follow, and what is wrong with the first."""
        unexplained, first = np.zeros(len(follows), bool), None
        for start in range(0, len(follows), self._n_rows_at_once):
            some = slice(start, min(start + self._n_rows_at_once, len(follows)))
            at = slice(rows.start + some.start, rows.start + some.stop)
            of_some = {name: values[some] for name, values in numbers.items()}
            asked = self._not_predicted(bits, at, of_some, taken[some], follows[some])
            for index, elements in asked.items():
                scalars = {name: float(values[index]) for name, values in of_some.items()}
                row, is_taken = at.start + index, bool(taken[some][index])
                difference = self._difference(bits, row, elements, scalars, is_taken=is_taken)
                unexplained[start + index] = difference is not None
                first = first or difference
        return unexplained, first

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
        return bits[name][start - 1 : stop - 1] if start else self._before[name][np.newaxis]

    def _difference(
        self,
        bits: Bits,
        row: int,
        elements: np.ndarray | None,
        scalars: Mapping[str, float],
        *,
        is_taken: bool,
    ) -> _Difference | None:
        """Return what is wrong with the step to a row, by torch's own code; None if nothing is.

        It takes the step of some elements of the flattened row, or of all.
        """
        before = {name: self._rows_before(bits, name, row, row + 1)[0] for name in self.names}
        inputs = {
            name: of.reshape(-1) for name, of in (before | {"grad": bits["grad"][row]}).items()
        }
        recorded = {name: bits[name][row].reshape(-1) for name in self.names}
        n_wrong: dict[str, int] = {}
        firsts: list[tuple[int, str, np.ndarray, np.ndarray]] = []
        for of_all in self._torch.parts(None if elements is None else len(elements)):
            part = of_all if elements is None else elements[of_all]
            after: Bits = {name: inputs[name][part] for name in self.names}
            if is_taken:
                after = self._torch.step(
                    {name: of[part] for name, of in inputs.items()}, part, scalars
                )
            for name in (*self.names[1:], "W"):  # whatever is wrong in a state makes W wrong
                held = recorded[name][part]
                is_off = patterns(held) != patterns(after[name])
                is_off &= ~(is_nan(held) & is_nan(after[name]))
                if places := np.flatnonzero(is_off).tolist():
                    n_wrong[name] = n_wrong.get(name, 0) + len(places)
                    one = places[0]
                    element = part.start + one if isinstance(part, slice) else int(part[one])
                    firsts.append((element, name, held[one], after[name][one]))
        if not firsts:
            return None
        element, name, *values = min(firsts, key=lambda first: first[0])
        ordered = {name: n_wrong[name] for name in self.names if name in n_wrong}
        return _Difference(self, row, ordered, name, *divmod(element, self.schema.n_dims), *values)
