"""Where torch tells of a step: before and after each call of `optimizer.step()`."""

import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from thimble_zarr.errors import OptimizerError


class StepHooks:
    """Calls the recorder around each step of an optimizer, and once only where steps are nested.

    That is `before` a step and `after` it, ahead of all other hooks, which may clear the gradient
    or change the learning rate. `before_update`, if needed, is called when the gradient is final
    and the optimizer has not moved yet: after a closure, if there is one.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        before: Callable[[], None],
        after: Callable[[], None],
        before_update: Callable[[], None] | None = None,
    ) -> None:
        self._before, self._after, self._before_update = before, after, before_update
        # The call of `optimizer.step()` that training is in; of one that failed it is left behind.
        self._stepping: FrameType | None = None
        self._pre = optimizer.register_step_pre_hook(self._before_step)
        self._post = optimizer.register_step_post_hook(self._after_step)
        hooks: Any = optimizer._optimizer_step_post_hooks
        hooks.move_to_end(self._post.id, last=False)

    @property
    def within_step(self) -> bool:
        """Whether a step has begun, and not ended; it may have failed."""
        return self._stepping is not None

    def remove(self) -> None:
        """Call nothing any more."""
        self._pre.remove()
        self._post.remove()

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # Only in a frame that torch compiles, as it does this one with the step, is this true.
        if torch.compiler.is_compiling():
            _refuse_compiled()
        calling, outer = sys._getframe(1), self._stepping
        if outer and outer in (caller for caller, _ in traceback.walk_stack(calling.f_back)):
            return None  # a subclass whose step calls that of its base class: hooks run for both
        self._before()
        self._stepping = calling
        if (before_update := self._before_update) is None:
            return None
        hooks = optimizer._optimizer_step_pre_hooks
        later = [hook for key, hook in hooks.items() if key > self._pre.id]
        if not all(isinstance(getattr(hook, "__self__", None), StepHooks) for hook in later):
            raise OptimizerError(
                f"{type(optimizer).__name__} overwrites the gradient, so it is recorded before the "
                "step, and a hook that was registered after the recorder may change it still; "
                "register yours (register_step_pre_hook) before the recorder is made"
            )
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            before_update()
            return None

        def closure_and_then() -> object:
            loss = closure()
            before_update()
            return loss

        return args[:1], {**kwargs, "closure": closure_and_then}

    def _after_step(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        if self._stepping is sys._getframe(1):  # and not of a base class, within that of a subclass
            self._stepping = None
            self._after()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _refuse_compiled() -> None:
    raise OptimizerError(
        "optimizer.step() is compiled, which rounds differently from any replay; "
        "compile the model and call the step uncompiled"
    )
