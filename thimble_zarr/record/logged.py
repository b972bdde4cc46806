"""Which step it is that a loss was logged of: the one to come, or the one just taken."""

from thimble_zarr.errors import ConfigError
from thimble_zarr.record.block import Block


class Logged:
    """What was logged of the step to come, until its row is there; steps count from `start_step`.

    The first call tells on which side of its step a loss is logged.
    """

    def __init__(self, start_step: int) -> None:
        self._start_step = self._last_step = start_step
        self._follows_step: bool | None = None
        self._loss: float | None = None

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

    def add(self, loss: float, step: int, taken: int, block: Block) -> None:
        """Note the loss of a step: in its row, the last of a block, if that is there."""
        if step > taken:
            self._loss = loss
        elif step > self._last_step:
            block.set_last_loss(loss)
            self._last_step = step

    def end_row(self, step: int, block: Block) -> None:
        """Put what waited for the row of a step into it, the last of a block."""
        if self._loss is not None:
            block.set_last_loss(self._loss)
            self._loss, self._last_step = None, step

    def forget(self) -> None:
        """Forget what was logged of a step that is not reached."""
        self._loss = None

    def is_late(self, taken: int) -> bool:
        """Return whether the last loss must have been that of a step that was taken."""
        return taken > self._start_step and self._loss is not None
