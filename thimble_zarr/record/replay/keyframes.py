"""Rows of which training copied only the gradient: the writer thread takes their steps again.

Training copies the first and the last row of a block whole, its *keyframes*. From one to the other
the recorded gradients lead, step by step. If the last step ends with the bits of the keyframe, the
rows between are taken for what they were, and the block goes on as if all of it had been copied. If
not, they are missing: nobody knows them, and nothing is made up. A change of a state that has faded
by the last row, and left no trace in `W`, is not seen.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from thimble_zarr.bits import fill_value, patterns
from thimble_zarr.causes.cause import ROWS_NOT_KEPT
from thimble_zarr.format.schema import Schema, array_path
from thimble_zarr.optim.base import COUNT
from thimble_zarr.optim.programs.program import PortableProgram
from thimble_zarr.optim.programs.registry import program_of
from thimble_zarr.record.audit.finding import AuditFinding
from thimble_zarr.record.block import Block
from thimble_zarr.record.counting import StepCounts
from thimble_zarr.record.replay.torch_steps import Bits, TorchSteps, Wrong, why_not


class Keyframes:
    """Fills in the rows of blocks, in their order, that training did not copy whole.

    `fill` belongs to the writer thread.

    Attributes
    ----------
    refused
        By group, why all rows of a parameter are copied whole.
    groups
        Those of the other parameters.
    is_on
        Whether training need not copy every row whole. Once a block does not end as its gradients
        say, it must.
    """

    def __init__(self, schemas: Mapping[str, Schema], ids: Mapping[str, np.ndarray]) -> None:
        reasons = {group: why_not(schema) for group, schema in schemas.items()}
        self.refused = {group: why for group, why in reasons.items() if why}
        self._steps = {
            group: _Steps(group, schema, ids.get(group))
            for group, schema in schemas.items()
            if not reasons[group]
        }
        self.groups = frozenset(self._steps)
        self.is_on = bool(self._steps)

    def fill(
        self, block: Block, n_rows: int, before: StepCounts, path: Path
    ) -> AuditFinding | None:
        """Fill in the first rows of a block as far as they were not copied whole.

        `before` are the counts at the row before the block. Rows behind the last whole one are
        missing until the block is filled again, with more rows. Return the first keyframe that the
        gradients do not lead to, if there is one.
        """
        whole, found = np.flatnonzero(block.is_whole[:n_rows]).tolist(), list[AuditFinding]()
        for start, stop in itertools.pairwise(whole):
            is_proof = stop - start > 1 or block.is_late[stop]
            for group, steps in self._steps.items() if is_proof else ():
                rows, count = slice(start + 1, stop + 1), float(before.counts[group])
                if (apart := steps.fill(block, rows, count)) is not None:
                    of_rows = block.steps[start : stop + 1]
                    unknown = block.steps[: stop + 1][block.missing[group][: stop + 1]]
                    found.append(steps.finding(apart, path, of_rows, unknown))
                    self.is_on = False
        block.is_whole[: whole[-1] + 1] = True
        block.is_late[:] = False
        for steps in self._steps.values():
            steps.leave_out(block, slice(whole[-1] + 1, n_rows))
        return found[0] if found else None

    def give_up(self, block: Block, n_rows: int) -> None:
        """Have all rows missing that were not copied whole, and every row to come copied whole."""
        self.is_on = False
        for row in np.flatnonzero(~block.is_whole[:n_rows]).tolist():
            for steps in self._steps.values():
                steps.leave_out(block, slice(row, row + 1))
        block.is_whole[:n_rows] = True


class _Steps:
    """Takes the steps of one parameter again: by a portable program, if that has torch's bits."""

    def __init__(self, group: str, schema: Schema, ids: np.ndarray | None) -> None:
        self.group, self.schema, self._ids = group, schema, ids
        self._names = tuple(name for name in schema.dtypes if name != "grad")
        self._torch = TorchSteps(schema, ids)
        # Without vector instructions torch rounds otherwise, as it does elements that are alone.
        in_vectors = schema.cpu_capability != "DEFAULT"
        program = program_of(schema.optimizer, schema.dtypes) if in_vectors else None
        self._program = program if program is not None and program.replaces_torch else None

    @cached_property
    def _alone(self) -> np.ndarray:
        return self._torch.alone()

    def leave_out(self, block: Block, rows: slice) -> None:
        """Have rows of a block missing."""
        bits = block.bits()
        for name in self._names:
            bits[array_path(self.group, name)][rows] = fill_value(self.schema.dtypes[name])
        block.missing[self.group][rows] = True

    def fill(self, block: Block, rows: slice, count_before: float) -> Wrong | None:
        """Fill in consecutive rows, the last of which is whole, as is the one before the first.

        `count_before` is what the optimizer counted at the row before the block. Return what is
        wrong with the last row, if anything is: then those before it are missing.
        """
        every, path = block.bits(), partial(array_path, self.group)
        bits = {name: every[path(name)] for name in self.schema.dtypes}
        counts = block.scalars[path(COUNT)]
        taken = (np.diff(counts, prepend=count_before) != 0)[rows]
        numbers = {name: block.scalars[path(name)][rows] for name in self.schema.numbers}
        filled, apart = slice(rows.start, rows.stop - 1), None
        if self._program is None or not self._predict(self._program, bits, rows, numbers, taken):
            apart = self._replay(bits, rows, numbers, taken, [*self._torch.parts()])
        elif len(self._alone):
            apart = self._replay(bits, rows, numbers, taken, [self._alone])
        block.missing[self.group][filled] = False
        block.filled[self.group][filled] = apart is None
        if apart is not None:
            self.leave_out(block, filled)
            # What was copied later than its step may not be what the step left.
            block.missing[self.group][rows.stop - 1] = block.is_late[rows.stop - 1]
        return apart

    def finding(
        self, apart: Wrong, path: Path, steps: np.ndarray, unknown: np.ndarray
    ) -> AuditFinding:
        """Return what is wrong in words and numbers.

        Given are the steps from keyframe to keyframe, and those whose rows are missing.
        """
        first, last = int(steps[0]), int(steps[-1])
        missing = [step for step in unknown.tolist() if step > first]
        which = f"{missing[0]:,}" if len(missing) == 1 else f"{missing[0]:,} to {missing[-1]:,}"
        return AuditFinding(
            path=path,
            parameter=self.schema.parameter or self.group,
            step=last,
            since=first,
            **apart.place(self.schema, self._ids),
            code=ROWS_NOT_KEPT.code,
            cause="Something besides the optimizer changed W or a state in between, or before the "
            f"last was copied. W and the states of step{'s' * (len(missing) > 1)} {which} are not "
            "known. From now on every row is copied whole.",
        )

    def _predict(
        self,
        program: PortableProgram,
        bits: Bits,
        rows: slice,
        numbers: Bits,
        taken: np.ndarray,
    ) -> bool:
        """Fill rows in by a program; return whether it ends with the bits of the last row.

        Elements that torch takes one at a time are not compared.
        """
        known = {name: values for name, values in numbers.items() if name != "loss"}
        of_steps, last = program.numbers(known, taken), rows.stop - 1
        before = {name: bits[name][rows.start - 1] for name in self._names}
        out = {name: bits[name][rows.start : last] for name in self._names}
        if last > rows.start:
            program.steps(before, bits["grad"][rows.start : last], of_steps[:-1], out=out)
        held = {name: bits[name][last - 1] for name in self._names}
        after = program.steps(held, bits["grad"][last : last + 1], of_steps[-1:])
        for name, made in after.items():
            is_off = (patterns(made[0]) != patterns(bits[name][last])).reshape(-1)
            is_off[self._alone] = False
            if is_off.any():
                return False
        return True

    def _replay(
        self,
        bits: Bits,
        rows: slice,
        numbers: Bits,
        taken: np.ndarray,
        parts: Sequence[slice | np.ndarray],
    ) -> Wrong | None:
        """Fill parts of rows in by torch's own code; return where they do not end as the last."""
        flat = {name: of.reshape(len(of), -1) for name, of in bits.items()}

        def filled() -> Iterator[tuple[slice | np.ndarray, Bits, Bits]]:
            for part in parts:
                after: Bits = {name: flat[name][rows.start - 1, part] for name in self._names}
                for index, row in enumerate(range(rows.start, rows.stop)):
                    if taken[index]:
                        scalars = {name: float(values[index]) for name, values in numbers.items()}
                        inputs = {**after, "grad": flat["grad"][row, part]}
                        after = self._torch.step(inputs, part, scalars)
                    if row < rows.stop - 1:
                        for name, of in after.items():
                            flat[name][row, part] = of
                yield part, {name: flat[name][rows.stop - 1, part] for name in self._names}, after

        return Wrong.of(self._names, filled())
