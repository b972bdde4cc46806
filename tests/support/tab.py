"""A tab of the viewer without a browser: its document, and what the server's loop would do."""

import time
from collections.abc import Sequence

import pytest
from bokeh.document import Document
from bokeh.server.callbacks import NextTickCallback, TimeoutCallback

from thimble_zarr.report.view import page as module
from thimble_zarr.report.view.live import Live
from thimble_zarr.report.view.page import Page


def page_of(live: Live, *, n_shown: int = 0) -> Page:
    """Return the page of a run, with its first panels and all that is computed beside it shown."""
    doc = Document()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "N_SHOWN_FIRST", n_shown)
        page = Page(doc, live, live.snapshot)
    doc.add_root(page.root())
    settle(page)
    return page


def settle(page: Page) -> None:
    """Call what the loop would call until there is nothing left to do."""
    doc = page.status.document
    assert doc is not None
    deadline = time.monotonic() + 60
    while not page.background.is_idle or _once(doc):
        assert time.monotonic() < deadline, "the page does not come to rest"
        for callback in _once(doc):
            if isinstance(callback, NextTickCallback):
                doc.remove_next_tick_callback(callback)
            else:
                doc.remove_timeout_callback(callback)
            callback.callback()
        time.sleep(0.001)


def _once(doc: Document) -> Sequence[NextTickCallback | TimeoutCallback]:
    return [
        of for of in doc.session_callbacks if isinstance(of, NextTickCallback | TimeoutCallback)
    ]
