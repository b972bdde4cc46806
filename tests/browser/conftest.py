"""Browser and pages for tests of what a person sees."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests.support import browser as browsers
from tests.support.browser import Watched


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser for the tests of a file: while it is open no other event loop can run."""
    with browsers.launched(browsers.executable()) as browser:
        yield browser


@pytest.fixture
def page(browser: Browser) -> Iterator[Watched]:
    """A page without a network; if it complains or asks for what is elsewhere, the test fails."""
    with browsers.watched(browser, is_offline=True) as watched:
        yield watched
        assert watched.faults == []
