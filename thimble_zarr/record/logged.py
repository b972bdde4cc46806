"""What is logged of a step: which step it is, the one to come or the one just taken, and arrays."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from thimble_zarr.errors import ConfigError
from thimble_zarr.format.schema import array_path
from thimble_zarr.format.stored_array import LOGGED_DTYPES, MAX_LOGGED_BYTES, LoggedArray
from thimble_zarr.record.block import Block

Loss = float | Tensor | None
"""A loss, if there is one: a number or a tensor of one element."""

Loggable = Tensor | np.ndarray
"""What can be logged besides the loss."""


class Logged:
    """What was logged of the step to come, until its row is there; steps count from `start_step`.

    The first call tells on which side of its step something is logged. Arrays are `known` by name,
    those of a store that is resumed from the start, and `declare` is called with a new one; they
    belong to the parameter `group`.
    """

    def __init__(
        self,
        start_step: int,
        group: str,
        known: Mapping[str, LoggedArray],
        declare: Callable[[str, LoggedArray], None],
    ) -> None:
        self._start_step = self._last_step = start_step
        self._group, self._known, self._declare = group, {**known}, declare
        self._follows_step: bool | None = None
        self._loss: float | None = None
        self._arrays = dict[str, np.ndarray]()
        self._last_steps = dict[str, int]()

    def step_of(self, step: int | None, taken: int) -> int:
        """Return the step that something is logged of, when so many were taken.

        Raises ConfigError if it is neither of the two that it can be.
        """
        if step is None:
            if self._follows_step is None:
                self._follows_step = taken > self._start_step
            return taken if self._follows_step else taken + 1
        if step not in (taken, taken + 1):
            raise ConfigError(
                f"a loss of step {step} was logged when {taken} steps were taken; log it right "
                "before its step (step=recorder.next_step) or right after it (step=recorder.step)"
            )
        return step

    def add(
        self,
        loss: Loss,
        arrays: Mapping[str, Loggable],
        step: int,
        taken: int,
        block: Block,
    ) -> str:
        """Note loss and arrays of a step: in its row, the last of a block, if that is there.

        Return what to warn of, if anything. Raises ConfigError if an array is not as the first of
        its name, or is new after a commit.
        """
        self._add_arrays(arrays, step, taken, block)
        if loss is None:
            return ""
        value = float(torch.as_tensor(loss).item())
        if step > taken:
            self._loss = value
        elif step > self._last_step:
            block.set_last_loss(value)
            self._last_step = step
        if math.isfinite(value):
            return ""
        return f"the loss of step {step} is {value}: recorded, and any later ones silently"

    def _add_arrays(
        self, arrays: Mapping[str, Loggable], step: int, taken: int, block: Block
    ) -> None:
        found = {name: _array(name, values) for name, values in arrays.items()}
        for name, values in found.items():
            self._check(name, values)
        by_path = {array_path(self._group, name): values for name, values in found.items()}
        if step > taken:
            self._arrays |= by_path
        else:
            new = {path: of for path, of in by_path.items() if self._last_steps.get(path) != step}
            block.set_last_logged(new)
            self._last_steps |= dict.fromkeys(new, step)

    def _check(self, name: str, values: np.ndarray) -> None:
        found = LoggedArray(values.shape, values.dtype.name)
        if name not in self._known:
            self._declare(name, found)
            self._known[name] = found
        elif (known := self._known[name]) != found:
            raise ConfigError(
                f"{name} was logged with shape {known.shape} and dtype {known.dtype} first, and "
                f"now has {found.shape} and {found.dtype}; log it the same at every step"
            )

    def end_row(self, step: int, block: Block) -> None:
        """Put what waited for the row of a step into it, the last of a block."""
        if self._loss is not None:
            block.set_last_loss(self._loss)
            self._loss, self._last_step = None, step
        if self._arrays:
            block.set_last_logged(self._arrays)
            self._last_steps |= dict.fromkeys(self._arrays, step)
            self._arrays = {}

    def forget(self) -> None:
        """Forget what was logged of a step that is not reached."""
        self._loss, self._arrays = None, {}

    def is_late(self, taken: int) -> bool:
        """Return whether the last loss must have been that of a step that was taken."""
        return taken > self._start_step and self._loss is not None


def _array(name: str, values: Loggable) -> np.ndarray:
    """Return a copy of what is logged; of bfloat16 the same numbers in float32."""
    if isinstance(values, Tensor):
        values = values.detach()
        values = (values.float() if values.dtype == torch.bfloat16 else values).cpu().numpy()
    found = np.array(values)
    if found.dtype.name not in LOGGED_DTYPES:
        raise ConfigError(
            f"{name} is {found.dtype}; what is logged is {', '.join(LOGGED_DTYPES)} or bfloat16, "
            "which have NaN for steps without any"
        )
    if not 0 < found.nbytes <= MAX_LOGGED_BYTES:
        raise ConfigError(
            f"{name} has {found.nbytes:,} bytes, and what is logged of a step 1 to "
            f"{MAX_LOGGED_BYTES:,}; record it as a parameter, or log less of it"
        )
    return found
