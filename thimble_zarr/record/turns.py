"""One thing at a time: whoever calls the recorder finds it between two pieces of its work.

Training calls it, and torch does from within the optimizer's step. But other threads may call it,
too, and so may a handler of a signal, as of a scheduler's warning that time is up, which comes
between any two bytecodes of that work. And a process that is forked off has a copy of everything.
"""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

from thimble_zarr.errors import RecordingError
from thimble_zarr.interrupts import interrupts_held

P = ParamSpec("P")
T = TypeVar("T")


class Turns:
    """Gives turns, one after the other. Ctrl-C is held back while one lasts."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._lock = threading.RLock()  # a handler of a signal runs in the thread that has it
        self._at_work: int | None = None
        self._later: list[Callable[[], None]] = []
        self._doing: set[Callable[[], None]] = set()

    @property
    def is_forked(self) -> bool:
        """Whether this process was forked from the one that records."""
        return os.getpid() != self._process

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for other threads, and at the end do what was put off.

        Raises
        ------
        RecordingError
            In a process that was forked off, and within another turn of the same thread.
        """
        if self.is_forked:
            raise RecordingError(
                "this process was forked from the one that records, and only that one can; "
                "make a recorder of its own here, with another path"
            )
        with interrupts_held(), self._lock:
            if self._at_work is not None:
                raise RecordingError("the recorder was called from within its own work")
            self._at_work = threading.get_ident()
            try:
                yield
            finally:
                self._at_work = None
                self._catch_up()

    def put_off(self, method: Callable[[], None]) -> bool:
        """Return whether this thread is within a turn; then the method is called at its end."""
        if self._at_work != threading.get_ident():
            return False
        self._later.append(method)
        return True

    def _catch_up(self) -> None:
        """Do what was put off, once each: what is asked for again meanwhile is being done."""
        while method := self._next_put_off():
            if method not in self._doing:
                self._doing.add(method)
                try:
                    method()
                finally:
                    self._doing.discard(method)

    def _next_put_off(self) -> Callable[[], None] | None:
        try:  # a handler may come between any look and the pop
            return self._later.pop(0)
        except IndexError:
            return None


def in_turn(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Let a method of something with `_turns` take a turn."""

    @functools.wraps(method)
    def taking_a_turn(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._turns.turn():
            return method(self, *args, **kwargs)

    return taking_a_turn


def in_turn_or_later(method: Callable[[Any], None]) -> Callable[[Any], None]:
    """Let a method take a turn, or put it off to the end of the one that a signal came into."""

    @functools.wraps(method)
    def taking_a_turn(self: Any, /) -> None:
        if not self._turns.put_off(getattr(self, method.__name__)):
            with self._turns.turn():
                method(self)

    return taking_a_turn
