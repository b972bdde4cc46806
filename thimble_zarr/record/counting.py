"""What a step was: taken, skipped or missed. Nothing else decides it.

An optimizer counts the steps it takes on each parameter; where torch's does not, the recorder does.
Where the count stays, the step was skipped, as it is without a gradient or when a GradScaler found
an infinity. Where it moves back, or by more than the steps that were taken, one was missed. A count
on a CUDA device is looked at when it has arrived with its block, in the writer's thread.
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
    """How many steps the optimizer had counted for each parameter, by group, at the row of a step.

    Where there is no row yet the step is -1, and counts are NaN.
    """

    step: int
    counts: Mapping[str, float | Tensor]

    @classmethod
    def before_all(cls, groups: Iterable[str]) -> Self:
        """Return what is known before the first row."""
        return cls(-1, dict.fromkeys(groups, math.nan))

    def moved(self, group: str, before: "StepCounts") -> float | None:
        """Return by how much the count moved since an earlier row; None if it is on a device."""
        count, last = self.counts[group], before.counts[group]
        return None if isinstance(count, Tensor) or isinstance(last, Tensor) else count - last

    def check(self, before: "StepCounts") -> None:
        """Raise RecordingError if a step was missed since an earlier row, as far as is known."""
        for group, count in self.counts.items():
            moved = self.moved(group, before)
            if moved is not None and _is_missed(moved, self.step - before.step):
                raise RecordingError(
                    f"the optimizer counts {count:.0f} steps{f' for {group}' if group else ''}, "
                    f"and counted {before.counts[group]:.0f} at the last row: a step was not "
                    "recorded, or a state was loaded; start a new recording"
                )

    def consumed(self, group: str, grad: Tensor | None, before: "StepCounts") -> Tensor | None:
        """Return the gradient that a step consumed: none where it is known to have been skipped.

        Raise RecordingError if the step was taken and there is none.
        """
        moved = self.moved(group, before)
        if grad is None and moved:
            raise RecordingError(
                f"the gradient{f' of {group}' if group else ''} of step {self.step} was gone "
                "before it could be recorded: something within the step cleared it; clear it after "
                "the step"
            )
        return None if moved == 0 else grad


def _is_missed(moved: float | np.ndarray, taken: int | np.ndarray) -> bool | np.ndarray:
    return (moved < 0) | (moved > taken)


def judge_rows(
    counts: np.ndarray, steps: np.ndarray, *, before: tuple[float, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return at which rows the optimizer skipped, and at which a step was missed.

    `before` are count and step of the row before. Where the count moved, some steps after a row,
    nobody knows on which of them.
    """
    moved = np.diff(counts, prepend=before[0])
    taken = np.diff(steps, prepend=before[1])
    return np.flatnonzero(moved == 0), np.flatnonzero(_is_missed(moved, taken))


def live_count(optimizer: torch.optim.Optimizer, parameter: Tensor, key: str) -> float | Tensor:
    """Return the optimizer's own count for a parameter, on its device if that is CUDA."""
    return number(optimizer.state.get(parameter, {}).get(key, 0.0))


class StepCounter:
    """Reads the counts of an optimizer, or counts in its place.

    `key` is where torch's state has them, and `last` what was counted at the last row.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, Tensor],
        *,
        key: str | None,
        last: StepCounts,
    ) -> None:
        self._optimizer = optimizer
        self._parameters = parameters
        self.last = last
        self._key = key
        self._own: dict[str, float | Tensor] = {}
        for group, parameter in parameters.items() if key is None else ():
            begun = float(bool(optimizer.state.get(parameter)))
            self._own[group] = begun if last.step < 0 else last.counts[group]

    def count_step(self) -> None:
        """Note that a step ended, where the optimizer itself does not."""
        for group in self._own:
            if self._parameters[group].grad is not None:
                # What a GradScaler sets on a fused optimizer: with 1 it skips the step.
                found_inf = number(getattr(self._optimizer, "found_inf", 0.0))
                self._own[group] = self._own[group] + (found_inf != 1)

    def counts(self, step: int) -> StepCounts:
        """Return the counts after a step; raise RecordingError if one was missed."""
        counts = dict(self._own)
        if self._key is not None:
            for group, parameter in self._parameters.items():
                counts[group] = live_count(self._optimizer, parameter, self._key)
        now = StepCounts(step, counts)
        now.check(self.last)
        return now
