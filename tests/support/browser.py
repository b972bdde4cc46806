"""A real browser, headless, and what its pages asked for, complained of and showed."""

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import PIL.Image
import PIL.ImageChops
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

VARIABLE = "THIMBLE_ZARR_BROWSER"
"""If it is "required", tests fail where there is no browser; else they are skipped."""


def found() -> str | None:
    """Return the path of a browser, if this machine has one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def executable() -> str:
    """Return the path of a browser; without one skip the test, or fail it where it is required."""
    if path := found():
        return path
    stop = pytest.fail if os.environ.get(VARIABLE) == "required" else pytest.skip
    stop(f"no browser: PATH has none of {', '.join(NAMES)} (Debian: apt install chromium)")


@contextmanager
def launched(path: str) -> Iterator[Browser]:
    """Start a browser. Meanwhile no other event loop can run in this thread: Playwright's does."""
    with sync_playwright() as playwright:
        # Without a sandbox because it needs rights that containers lack; the pages are our own.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Watched:
    """A page, and what it asked for and complained of since it was opened."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """What it complained of, and what it asked for that is not on this machine."""
        return self.complaints + [f"asked for {url}" for url in self.requests if not is_local(url)]

    def hear(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning", "assert"):
            self.complaints.append(f"{message.type}: {message.text}")


def is_local(url: str) -> bool:
    """Return whether what a URL names is on this machine."""
    parts = urlsplit(url)
    return parts.scheme in ("file", "data", "blob", "about") or parts.hostname == "127.0.0.1"


@contextmanager
def watched(browser: Browser, *, is_offline: bool) -> Iterator[Watched]:
    """Open an empty page, with or without a network."""
    context = browser.new_context(offline=is_offline, viewport={"width": 1280, "height": 900})
    context.set_default_timeout(120_000)  # a slow machine is no failure
    page = context.new_page()
    found = Watched(page)
    page.on("console", found.hear)
    page.on("pageerror", lambda error: found.complaints.append(f"uncaught: {error}"))
    page.on("crash", lambda _: found.complaints.append("the page crashed"))
    page.on("request", lambda request: found.requests.append(request.url))
    page.on("websocket", lambda socket: found.requests.append(socket.url))
    page.on(
        "requestfailed",
        lambda request: found.complaints.append(f"failed: {request.url} {request.failure}"),
    )
    yield found
    context.close()


def as_image(screenshot: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(screenshot)).convert("RGB")


def n_colored(image: PIL.Image.Image) -> int:
    """Return how many pixels have a color: not white, grey or black, as paper, axes and text."""
    red, green, blue = image.split()
    lighter, darker = PIL.ImageChops.lighter, PIL.ImageChops.darker
    spread = PIL.ImageChops.difference(
        lighter(lighter(red, green), blue), darker(darker(red, green), blue)
    )
    return sum(spread.histogram()[LEAST_SPREAD:])


LEAST_SPREAD = 24
"""Between the greatest and the least of a pixel's red, green and blue, of 255: a color."""


def is_different(one: PIL.Image.Image, other: PIL.Image.Image) -> bool:
    return one.size != other.size or PIL.ImageChops.difference(one, other).getbbox() is not None


DRAWN = "window.Bokeh?.documents.length > 0 && Bokeh.documents.every((of) => of.is_idle)"
"""Whether all figures of Bokeh are drawn."""

FRAME = """(name) => {
  const figures = [...Bokeh.documents[0].all_models].filter((of) => of.type == "Figure")
  const called = (of) => [of.name, of.title.text, of.left[0]?.axis_label].includes(name)
  const of = figures.find(called)
  const {el, frame} = Bokeh.index.find_one(of)
  el.scrollIntoView({block: "center"})
  const {x, y} = el.getBoundingClientRect(), {left, top, width, height} = frame.bbox
  return {x: x + left, y: y + top, width, height}
}"""
"""Where what is between the axes of a figure, by its name, title or y, is now."""


def opened(watched: Watched, url: str) -> Page:
    """Open a page of Bokeh figures and wait until they are drawn."""
    watched.page.goto(url)
    watched.page.wait_for_function(DRAWN)
    return watched.page


def names(page: Page, kind: str) -> list[str]:
    """Return the names of the models of some type that lie in the page itself, as they follow."""
    roots = page.evaluate("Bokeh.documents[0].roots().map((of) => [of.type, of.name])")
    return [name for found, name in roots if found == kind]


def place(page: Page, name: str) -> dict[str, float]:
    """Return where on the screen what is between the axes of a figure is, and scroll there."""
    found: dict[str, float] = page.evaluate(FRAME, name)
    page.wait_for_function(DRAWN)
    return found


def frame(page: Page, name: str) -> PIL.Image.Image:
    """Return what is seen between the axes of a figure."""
    return as_image(page.screenshot(clip=place(page, name)))
