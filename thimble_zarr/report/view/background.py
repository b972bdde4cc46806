"""Work that takes longer than a click may, done beside the server."""

import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from bokeh.document import Document

Result = TypeVar("Result")

_one_at_a_time = threading.Lock()
"""Held by what is done: several at once would only wait for each other, and take more memory."""


class Background:
    """Does the work of one browser tab in threads, and shows what comes of it.

    Parameters
    ----------
    doc
        The tab's document.
    fail
        Shows an error.
    """

    def __init__(self, doc: Document, fail: Callable[[Exception], None]) -> None:
        self._doc, self._fail = doc, fail
        self._newest: dict[str, object] = {}
        self._n_begun = 0

    @property
    def is_idle(self) -> bool:
        """Whether all that was asked for was done, and shown."""
        return self._n_begun == 0

    def do(self, kind: str, work: Callable[[], Result], show: Callable[[Result], object]) -> None:
        """Do some work, and show its result unless newer work of its kind was asked for by then."""
        ticket = self._newest[kind] = object()
        self._n_begun += 1

        def run() -> None:
            then: Callable[[], object] = _nothing
            with _one_at_a_time:
                if self._newest[kind] is ticket:
                    try:
                        then = partial(show, work())
                    except Exception as error:  # a thread has no caller: whoever looks is told
                        then = partial(self._fail, error)
            self._doc.add_next_tick_callback(partial(self._finish, kind, ticket, then))

        # A thread that is a daemon does not keep the process from ending.
        threading.Thread(target=run, daemon=True).start()

    def _finish(self, kind: str, ticket: object, then: Callable[[], object]) -> None:
        self._n_begun -= 1
        if self._newest[kind] is ticket:
            then()


def _nothing() -> None:
    """Show nothing."""
