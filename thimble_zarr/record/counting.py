"""What a step was: taken, skipped or missed. Nothing else decides it.

An optimizer counts the steps it takes on each parameter; where torch's does not, the recorder does.
Where the count stays, the step was skipped: without a gradient, or by a GradScaler. Where it moves
back, or by more than the steps taken, one was missed. On a CUDA device it is judged by the block.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from thimble_zarr.errors import RecordingError


def number(value: float | Tensor) -> float | Tensor:
    """Return a number; one on a CUDA device stays there, because to read it would be to wait."""
    return value if isinstance(value, Tensor) and value.is_cuda else float(value)


@dataclass(frozen=True)
class StepCounts:
    """Steps that the optimizer had counted for each parameter, by group, at the row of a step."""

    step: int
    counts: Mapping[str, float | Tensor]

    @classmethod
    def before_all(cls, groups: Iterable[str]) -> Self:
        """Return what is known before the first row: a step of -1, and NaN for counts."""
        return cls(-1, dict.fromkeys(groups, math.nan))

    @classmethod
    def at_row(cls, row: int, steps: np.ndarray, counts: Mapping[str, np.ndarray]) -> Self:
        """Return the counts at a row, from those of all rows; before the first for a row of -1."""
        if row < 0:
            return cls.before_all(counts)
        return cls(int(steps[row]), {group: float(at[row]) for group, at in counts.items()})

    def _moved(self, group: str, before: "StepCounts") -> float | None:
        """Return by how much the count moved since an earlier row; None if it is on a device."""
        count, last = self.counts[group], before.counts[group]
        return None if isinstance(count, Tensor) or isinstance(last, Tensor) else count - last

    def check(self, before: "StepCounts") -> None:
        """Raise RecordingError if a step was missed since an earlier row, as far as is known."""
        for group, count in self.counts.items():
            moved = self._moved(group, before)
            if moved is not None and (moved < 0 or moved > self.step - before.step):
                raise RecordingError(
                    f"the optimizer counts {count:.0f} steps{f' for {group}' if group else ''}, "
                    f"and counted {before.counts[group]:.0f} at the last row: a step was not "
                    "recorded, or a state was loaded; start a new recording"
                )

    def consumed(self, group: str, grad: Tensor | None, before: "StepCounts") -> Tensor | None:
        """Return the gradient that the step consumed, None if it is known to have been skipped."""
        moved = self._moved(group, before)
        if grad is None and moved:
            raise RecordingError(
                f"the gradient{f' of {group}' if group else ''} of step {self.step} was gone "
                "before it could be recorded: it was cleared within the step; clear it after that"
            )
        return None if moved == 0 else grad


def judge_rows(
    counts: np.ndarray, steps: np.ndarray, *, before: tuple[float, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows whose step was skipped, and those before which one was missed.

    `before` are count and step of the row before. Of several steps between two rows nobody knows
    which were skipped, unless all were.
    """
    moved = np.diff(counts, prepend=before[0])
    taken = np.diff(steps, prepend=before[1])
    return np.flatnonzero(moved == 0), np.flatnonzero((moved < 0) | (moved > taken))


class StepCounter:
    """Reads an optimizer's counts under a key of torch's state; counts itself if that is None.

    `last` has what was counted at the last row.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], *, key: str | None
    ) -> None:
        self._optimizer, self._parameters, self._key = optimizer, parameters, key
        self._own: dict[str, float | Tensor] = {}
        for group, parameter in parameters.items() if key is None else ():
            self._own[group] = float(bool(optimizer.state.get(parameter)))
        self.last = StepCounts.before_all(parameters)

    def resume(self, last: StepCounts) -> None:
        """Go on from the counts at a row."""
        self.last, self._own = last, {group: last.counts[group] for group in self._own}

    def count(self, group: str) -> float | Tensor:
        """Return the count for a parameter, on its device if that is CUDA."""
        if self._key is None:
            return self._own[group]
        state = self._optimizer.state.get(self._parameters[group], {})
        return number(state.get(self._key, 0.0))

    def count_step(self) -> None:
        """Note that a step ended, where the optimizer itself does not."""
        for group in self._own:
            if self._parameters[group].grad is not None:
                # What a GradScaler sets on a fused optimizer: with 1 it skips the step.
                found_inf = number(getattr(self._optimizer, "found_inf", 0.0))
                self._own[group] = self._own[group] + (found_inf != 1)

    def counts(self, step: int) -> StepCounts:
        """Return the counts after a step; raise RecordingError if none leads there from `last`."""
        now = StepCounts(step, {group: self.count(group) for group in self._parameters})
        now.check(self.last)
        return now
