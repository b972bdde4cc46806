"""Rows of which training copied only the gradient: the writer thread takes their steps again.

Training copies the first and the last row of a block whole, its *keyframes*. From one to the other
the recorded gradients lead, step by step. If the last step ends with the bits of the keyframe, the
rows between are what they were, and the block goes on as if all of it had been copied. If not, they
are missing: nobody knows them, and nothing is made up.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from thimble_zarr.bits import decode, fill_value, is_nan, patterns
from thimble_zarr.format.schema import Schema, array_path
from thimble_zarr.optim.base import COUNT
from thimble_zarr.optim.programs.program import PortableProgram
from thimble_zarr.optim.programs.registry import program_of
from thimble_zarr.record.block import Block
from thimble_zarr.record.counting import StepCounts
from thimble_zarr.record.replay.torch_steps import Bits, TorchSteps, why_not


class Keyframes:
    """Fills in the rows of blocks, in their order, that training did not copy whole.

    All but `refused`, `groups`, `is_on`, `is_silent` and `news` belongs to the writer thread.

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
            group: _Steps(schema, ids.get(group))
            for group, schema in schemas.items()
            if not reasons[group]
        }
        self.groups = frozenset(self._steps)
        self.is_on = bool(self._steps)
        self._news: deque[str] = deque()

    def fill(self, block: Block, n_rows: int, before: StepCounts) -> None:
        """Fill in the first rows of a block as far as they were not copied whole.

        `before` are the counts at the row before the block. Rows behind the last whole one are
        missing until the block is filled again, with more rows.
        """
        whole = np.flatnonzero(block.is_whole[:n_rows]).tolist()
        for start, stop in itertools.pairwise(whole):
            if stop - start > 1:
                self._fill(block, slice(start + 1, stop + 1), before)
        block.is_whole[: whole[-1] + 1] = True
        for group, steps in self._steps.items():
            steps.leave_out(block, group, slice(whole[-1] + 1, n_rows))

    @property
    def is_silent(self) -> bool:
        """Whether there is nothing to report."""
        return not self._news

    def news(self) -> Iterator[str]:
        """Yield what training was not told yet."""
        while self._news:
            yield self._news.popleft()

    def _fill(self, block: Block, rows: slice, before: StepCounts) -> None:
        """Fill in consecutive rows, the last of which is whole, as is the one before the first."""
        for group, steps in self._steps.items():
            apart = steps.fill(block, group, rows, float(before.counts[group]))
            if apart is not None:
                self._news.append(apart)
                self.is_on = False


@dataclass(frozen=True)
class _Apart:
    """The first element of a row that is not what the gradients before it make of a keyframe."""

    name: str
    token: int
    dim: int
    recorded: np.ndarray
    computed: np.ndarray


class _Steps:
    """Takes the steps of one parameter again: by a portable program, if that has torch's bits."""

    def __init__(self, schema: Schema, ids: np.ndarray | None) -> None:
        self.schema, self._ids = schema, ids
        self._names = tuple(name for name in schema.dtypes if name != "grad")
        self._torch = TorchSteps(schema, ids)
        # Without vector instructions torch rounds otherwise, as it does elements that are alone.
        in_vectors = schema.cpu_capability != "DEFAULT"
        program = program_of(schema.optimizer, schema.dtypes) if in_vectors else None
        self._program = program if program is not None and program.replaces_torch else None

    @cached_property
    def _alone(self) -> np.ndarray:
        return self._torch.alone()

    def leave_out(self, block: Block, group: str, rows: slice) -> None:
        """Have rows of a block missing."""
        bits = block.bits()
        for name in self._names:
            bits[array_path(group, name)][rows] = fill_value(self.schema.dtypes[name])
        block.missing[group][rows] = True

    def fill(self, block: Block, group: str, rows: slice, count_before: float) -> str | None:
        """Fill in rows but for the last, which is there; return what is wrong, if anything is.

        `count_before` is what the optimizer counted at the row before the block.
        """
        every = block.bits()
        bits = {name: every[array_path(group, name)] for name in self.schema.dtypes}
        of_rows = {name: block.scalars[array_path(group, name)] for name in self.schema.numbers}
        taken = (np.diff(of_rows[COUNT], prepend=count_before) != 0)[rows]
        numbers = {name: values[rows] for name, values in of_rows.items()}
        filled = slice(rows.start, rows.stop - 1)
        apart = None
        if self._program is None or not self._predict(self._program, bits, rows, numbers, taken):
            apart = self._replay(bits, rows, numbers, taken, [*self._torch.parts()])
        elif len(self._alone):
            apart = self._replay(bits, rows, numbers, taken, [self._alone])
        block.missing[group][filled] = False
        if apart is None:
            return None
        self.leave_out(block, group, filled)
        return self._message(apart, group, block.steps[rows.start - 1 : rows.stop].tolist())

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
    ) -> _Apart | None:
        """Fill parts of rows in by torch's own code; return where they do not end as the last."""
        flat = {name: of.reshape(len(of), -1) for name, of in bits.items()}
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
            for name in (*self._names[1:], "W"):  # whatever is wrong in a state makes W wrong
                recorded = flat[name][rows.stop - 1, part]
                is_off = patterns(recorded) != patterns(after[name])
                is_off &= ~(is_nan(recorded) & is_nan(after[name]))
                if is_off.any():
                    place = int(is_off.argmax())
                    element = part.start + place if isinstance(part, slice) else int(part[place])
                    token, dim = divmod(element, self.schema.n_dims)
                    return _Apart(name, token, dim, recorded[place], after[name][place])
        return None

    def _message(self, apart: _Apart, group: str, steps: list[int]) -> str:
        recorded, computed = (
            float(decode(bits.reshape(1), self.schema.dtypes[apart.name], np.float64)[0])
            for bits in (apart.recorded, apart.computed)
        )
        of = self.schema.parameter or group
        token = apart.token if self._ids is None else int(self._ids[apart.token])
        where = f"step {steps[1]:,}" if len(steps) == 3 else f"steps {steps[1]:,} to {steps[-2]:,}"
        return (
            f"W and the states{f' of {of}' if of else ''} are missing at {where}: the recorded "
            f"gradients do not lead from step {steps[0]:,} to step {steps[-1]:,}, where at token "
            f"{token}, dim {apart.dim}, {apart.name} is {recorded!r}, and torch's steps give "
            f"{computed!r}. Something besides the optimizer changed W or a state. From now on "
            "every row is copied whole"
        )
