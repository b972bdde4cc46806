"""The report, opened in a browser as a person does: from a file, without a network."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from tests.browser.conftest import N_STEPS
from tests.support.browser import (
    Watched,
    frame,
    is_different,
    n_colored,
    names,
    opened,
    place,
    watched,
)
from thimble_zarr.report.panels.registry import PANELS

OF_STEPS = ("loss-0", "regimes-0", "token_image-0", "step_size-0", "radius-1", "accounting-0")
"""Figures of several panels whose x is the step."""

LEAST_DRAWN = 40
"""Pixels with a color in a figure in which something is drawn."""


@pytest.fixture(scope="module")
def report(browser: Browser, real_report: Path) -> Iterator[Watched]:
    with watched(browser, is_offline=True) as page:
        opened(page, real_report.as_uri())
        assert page.faults == []
        yield page


@pytest.fixture
def page(report: Watched) -> Iterator[Page]:
    """The open report. A test fails in which it complains or asks for what is elsewhere."""
    n_before = len(report.faults)
    yield report.page
    assert report.faults[n_before:] == []


def pictures(page: Page, names: list[str]) -> dict[str, object]:
    return {name: frame(page, name) for name in names}


def changed(page: Page, before: dict) -> set[str]:
    return {name for name, was in before.items() if is_different(frame(page, name), was)}


def spans(page: Page) -> set[tuple[float, float]]:
    """Return which steps are in view, of all figures by step."""
    of = "Bokeh.documents[0].get_model_by_name(name).x_range"
    code = f"(name) => [{of}.start, {of}.end]"
    return {tuple(page.evaluate(code, name)) for name in OF_STEPS}


def test_every_panel_is_there_and_every_figure_is_drawn(page: Page) -> None:
    figures = names(page, "Figure")
    shown = dict.fromkeys(name.rpartition("-")[0] for name in figures)
    hidden = {panel.__name__ for panel in PANELS} - {*shown}
    assert [*shown] == [panel.__name__ for panel in PANELS if panel.__name__ not in hidden]
    assert hidden <= {"identical"}
    assert {*OF_STEPS} <= {*figures}
    blank = [name for name in figures if n_colored(frame(page, name)) < LEAST_DRAWN]
    assert [name for name in blank if "last_steps" not in name] == []  # nothing froze in few steps


def test_a_figure_without_its_layers_is_found_blank(page: Page) -> None:
    show = """(fill_alpha) => {
      const plot = Bokeh.documents[0].get_model_by_name("regimes-0")
      plot.renderers.forEach((of) => { of.glyph.fill_alpha = fill_alpha })
    }"""
    page.evaluate(show, 0)
    assert n_colored(frame(page, "regimes-0")) < LEAST_DRAWN
    page.evaluate(show, 1)
    assert n_colored(frame(page, "regimes-0")) > LEAST_DRAWN


def test_the_page_says_what_was_recorded_and_found(page: Page) -> None:
    text = page.locator("body").inner_text()
    for words in ("HOLDS to the bit", "AdamW", "10,000 x 64", "seed 42", "Health", "bfloat16"):
        assert words in text, words


def test_another_group_is_shown(page: Page) -> None:
    before = pictures(page, ["loss-0", "radius-0", "token_image-0", "accounting-0"])
    page.get_by_role("button", name="live", exact=True).click()
    assert changed(page, before) == {"radius-0", "token_image-0", "accounting-0"}
    page.get_by_role("button", name="dead", exact=True).click()
    assert changed(page, before) == set()


def test_an_axis_is_logarithmic_or_linear(page: Page) -> None:
    def scale() -> str:
        return page.evaluate("Bokeh.documents[0].get_model_by_name('step_size-0').y_scale.type")

    before = pictures(page, ["step_size-0", "radius-0"])
    button = page.locator("#step_size").get_by_role("button", name="log y")
    assert scale() == "LogScale"
    button.click()
    assert changed(page, before) == {"step_size-0"}
    assert scale() == "LinearScale"
    button.click()
    assert changed(page, before) == set()


def test_every_kind_of_switch_keeps_its_figures_drawn(page: Page, report: Watched) -> None:
    """Each is switched, every group shown, and each is switched back."""
    panels = ("step_size", "phase_space", "histograms")  # of y, of both axes, of x
    assert {f"{panel}-log" for panel in panels} <= {*names(page, "Toggle")}
    figures = [of for of in names(page, "Figure") if of.rpartition("-")[0] in panels]
    switches = [page.locator(f"#{panel}").get_by_role("button", name="log ") for panel in panels]
    groups = [
        page.get_by_role("button", name=group, exact=True).first
        for group in ("live", "all", "dead")
    ]
    for buttons in (switches, *([group] for group in groups), switches):
        for button in buttons:
            button.click()
        shown = {name: n_colored(frame(page, name)) for name in figures}
        assert {name for name in shown if shown[name] < LEAST_DRAWN} == set()
        assert report.faults == []


def test_presets_zoom_all_figures_to_the_same_steps(page: Page) -> None:
    before, (whole,) = pictures(page, [*OF_STEPS]), spans(page)
    page.get_by_role("button", name="first 10 %").click()
    ((first, last),) = spans(page)
    assert first <= 0
    assert last - first < 0.2 * (whole[1] - whole[0])
    assert changed(page, before) == {*OF_STEPS}
    page.get_by_role("button", name="all", exact=True).last.click()
    assert spans(page) == {whole}


def test_a_drag_zooms_all_figures_to_the_same_steps(page: Page) -> None:
    (whole,) = spans(page)
    box = place(page, "radius-1")
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.25 * box["width"], y)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.75 * box["width"], y, steps=5)
    page.mouse.up()
    ((first, last),) = spans(page)
    assert whole[0] < first < last < whole[1]
    assert last - first == pytest.approx(0.5 * (whole[1] - whole[0]), rel=0.05)
    page.get_by_role("button", name="first 10 %").click()
    page.get_by_role("button", name="all", exact=True).last.click()
    assert spans(page) == {whole}


def test_the_cursor_is_in_all_figures_and_tells_the_numbers(page: Page) -> None:
    before = pictures(page, ["radius-1"])
    box = place(page, "radius-0")
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
    label = page.locator(".bk-tooltip-row-label:visible")
    label.first.wait_for()
    told = dict(
        zip(
            (text.strip(" :") for text in label.all_inner_texts()),
            page.locator(".bk-tooltip-row-value:visible").all_inner_texts(),
            strict=True,
        )
    )
    assert told.keys() >= {"step", "median", "quartiles"}
    assert int(told["step"]) == N_STEPS // 2
    assert changed(page, before) == {"radius-1"}  # its cursor
