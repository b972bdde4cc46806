"""The audit of a recording while it is made: every step is taken again, and what it tells of that.

What one parameter's rows are compared with is in `parameter`, and why rows do not follow is asked
of `causes`, as `check` does.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from thimble_zarr.errors import AuditError, ConfigError
from thimble_zarr.format.audited import AuditCounts
from thimble_zarr.format.schema import Schema, array_path
from thimble_zarr.optim.base import COUNT
from thimble_zarr.record.audit.finding import AuditFinding
from thimble_zarr.record.audit.held_rows import HeldRows
from thimble_zarr.record.audit.parameter import Difference, ParameterAudit
from thimble_zarr.record.block import Block
from thimble_zarr.record.counting import StepCounts
from thimble_zarr.record.replay.torch_steps import why_not
from thimble_zarr.store.reader import StoreReader

OnFinding = Literal["warn", "raise"] | Callable[[AuditFinding], object]
"""What is done about a finding: the first warns, or is raised; or each block's first is passed."""


class Audit:
    """Takes the steps of blocks again, in their order, and tells what it found.

    `check` and `tell` belong to one thread; training may ask for the rest.

    Attributes
    ----------
    unaudited
        By group, why a parameter cannot be audited.
    counts, of_block
        How many steps were audited so far, by this process, and in the block checked last.
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
            group: ParameterAudit(group, schema, ids.get(group))
            for group, schema in schemas.items()
            if not reasons[group]
        }
        self._before = self._last = StepCounts.before_all(self._parts)
        self._start(-1)
        self._finding: AuditFinding | None = None

    def _start(self, first_row: int) -> None:
        """Begin a block: nothing of it is checked, and nothing was found."""
        self._first_row, self._n_done, self._has_found = first_row, 0, False
        self._before, self.of_block = self._last, AuditCounts()

    def load(self, readers: Sequence[StoreReader], first_row: int, before: StepCounts) -> None:
        """Go on with a block of a store that there is: `before` are the counts before its rows."""
        self._last = before
        for reader in readers:
            if first_row and (part := self._parts.get(reader.group)):
                last = (first_row - 1, first_row)
                row = {name: reader.read(name, last)[0] for name in part.schema.dtypes}
                moved = np.diff(reader.read_steps()[:first_row], prepend=-2)[-1]
                part.keep(row, follows=bool(moved == 1))

    def check(self, block: Block, n_rows: int, path: Path) -> AuditCounts | None:
        """Take the steps of a block's first rows again; return what is known of all of them.

        What was checked of a block before is not checked again. None if nothing can be audited.
        Whatever goes wrong, the recording goes on.
        """
        self._finding = None
        if not self._parts:
            return None
        try:
            self._check(block, n_rows, path)
        except Exception as error:  # a run is worth more than its audit
            self._parts = {}
            self._news.append(
                f"the audit of {path} stopped at steps {block.steps[0]:,} to "
                f"{block.steps[n_rows - 1]:,}: {type(error).__name__}: {error}. The recording goes "
                f"on; `thimble-zarr check` looks at it when it has ended"
            )
            return None
        return self.of_block

    def add(self, finding: AuditFinding, n_steps: int) -> AuditCounts:
        """Take a finding of others about steps of the block, to be told first, and count them.

        Return what is known of the block.
        """
        unexplained = AuditCounts(n_steps, n_steps)
        self.counts += unexplained
        self.of_block += unexplained
        if callable(self._on_finding) or not self._has_told:
            self._finding = finding
        return self.of_block

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

    def _check(self, block: Block, n_rows: int, path: Path) -> None:
        if block.first_row != self._first_row:
            self._start(block.first_row)
        before, rows, self._n_done = self._before, slice(self._n_done, n_rows), n_rows
        bits = block.bits()
        follows = np.diff(block.steps[:n_rows], prepend=before.step) == 1
        follows[: int(block.first_row == 0)] = False
        checked, found = np.zeros(len(follows), bool), list[Difference]()
        for group, part in self._parts.items():
            missing = block.missing[group][:n_rows]
            are_there = follows & ~missing & ~np.append(False, missing[:-1])
            checked |= are_there
            numbers = {
                name: block.scalars[array_path(group, name)][rows] for name in part.schema.numbers
            }
            counts = block.scalars[array_path(group, COUNT)][:n_rows]
            taken = (np.diff(counts, prepend=float(before.counts[group])) != 0)[rows]
            of_part = {name: bits[array_path(group, name)] for name in part.schema.dtypes}
            found += part.check(of_part, rows, numbers, taken, are_there[rows])
        if found and not self._has_found:
            self._has_found = True
            if callable(self._on_finding) or not self._has_told:
                first = min(found, key=lambda one: one.row)
                self._finding = first.finding(path, self._held(first.part, block, n_rows))
        if n_rows == block.block_steps:
            self._last = block.counts(n_rows, before)
            for group, part in self._parts.items():
                last = {name: bits[array_path(group, name)][-1] for name in part.schema.dtypes}
                part.keep(last, follows=bool(follows[-1]), index=n_rows - 1)
        n_unexplained = len({one.row for one in found})
        of_rows = AuditCounts(int(checked[rows].sum()), n_unexplained)
        self.counts += of_rows
        self.of_block += of_rows

    def _held(self, part: ParameterAudit, block: Block, n_rows: int) -> HeldRows:
        """Return what there is in memory of a parameter's rows."""
        names = {name: array_path(part.group, name) for name in part.schema.dtypes}
        before = self._before
        known = {COUNT: float(before.counts[part.group])}
        steps = [block.steps[:n_rows]]
        scalars = {
            name: [block.scalars[array_path(part.group, name)][:n_rows]]
            for name in part.schema.scalars
        }
        if part.before:
            steps.insert(0, np.array([before.step]))
            for name, values in scalars.items():
                values.insert(0, np.array([known.get(name, np.nan)]))
        shift = len(steps) - 1 - block.first_row
        missing = block.marked_rows(n_rows)["missing"].get(part.group, [])
        bits = block.bits()
        return HeldRows(
            schema=part.schema,
            ids=part.ids,
            steps=np.concatenate(steps),
            scalars={name: np.concatenate(values) for name, values in scalars.items()},
            missing=[(first + shift, stop + shift) for first, stop in missing],
            before=part.before,
            bits={name: bits[path] for name, path in names.items()},
        )
