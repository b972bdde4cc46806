"""The checks of a page see what is wrong with it, and a machine without a browser is told of."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.support import browser as browsers
from tests.support.browser import Watched, as_image, is_different, is_local, n_colored, watched

DRAWN = "const pen = document.querySelector('canvas').getContext('2d'); pen.fillStyle = '#0072b2';"

FAULTS = {
    "console.error('an error')": "error: an error",
    "console.warn('a warning')": "warning: a warning",
    "throw new Error('an exception')": "uncaught: an exception",
    "Promise.reject(new Error('a promise'))": "uncaught: a promise",
    "fetch('https://example.com/').catch(() => 0)": "asked for https://example.com/",
    "new Image().src = 'http://192.0.2.1/x.png'": "asked for http://192.0.2.1/x.png",
    "new WebSocket('ws://example.com/')": "asked for ws://example.com/",
    "new Image().src = 'missing.png'": "failed: file:",
}


@pytest.fixture
def at_fault(browser: Browser) -> Iterator[Watched]:
    with watched(browser, is_offline=True) as page:
        yield page


def shown(page: Watched, folder: Path, script: str) -> None:
    file = folder / "page.html"
    file.write_text(f"<title>page</title><canvas></canvas><script>{script}</script>")
    page.page.goto(file.as_uri())


@pytest.mark.parametrize("script", FAULTS)
def test_a_page_at_fault_fails(script: str, at_fault: Watched, tmp_path: Path) -> None:
    shown(at_fault, tmp_path, script)
    for _ in range(100):
        if FAULTS[script] in "\n".join(at_fault.faults):
            return
        at_fault.page.wait_for_timeout(100)
    pytest.fail(f"what is seen is {at_fault.faults}")


def test_a_sound_page_passes_and_a_blank_canvas_is_told_from_a_drawn_one(
    at_fault: Watched, tmp_path: Path
) -> None:
    pictures = []
    for pen in ("pen.strokeRect(9, 9, 99, 99)", "pen.fillRect(9, 9, 20, 10)"):
        shown(at_fault, tmp_path, f"{DRAWN} {pen}")
        pictures.append(as_image(at_fault.page.locator("canvas").screenshot()))
    assert [*map(n_colored, pictures)] == [0, 200]
    assert is_different(*pictures)
    assert not is_different(pictures[0], pictures[0].copy())
    assert at_fault.faults == []
    assert len(at_fault.requests) == 2


def test_urls_of_this_machine_are_told_from_others() -> None:
    local = ("file:///x", "data:,x", "blob:null/x", "http://127.0.0.1:5/x", "ws://127.0.0.1:5/")
    others = ("http://127.0.0.1.example.com/", "https://cdn.bokeh.org/x.js", "//example.com/x")
    assert [*map(is_local, local)] == [True] * 5
    assert [*map(is_local, others)] == [False] * 3


def test_without_a_browser_tests_are_skipped_or_may_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browsers, "NAMES", ("no-such-browser",))
    outcomes = {"": pytest.skip.Exception, "required": pytest.fail.Exception}
    for value, outcome in outcomes.items():
        monkeypatch.setenv(browsers.VARIABLE, value)
        with pytest.raises(outcome, match="no browser: PATH has none of no-such-browser"):
            browsers.executable()
