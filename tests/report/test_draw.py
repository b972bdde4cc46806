"""Figures as Bokeh draws them: what is sent to the browser, and what is shown of it."""

import re
from dataclasses import replace

import numpy as np
import pytest
from bokeh.document import Document
from bokeh.models import HoverTool, LinearScale, LogScale, LogTicker

from tests.support.pages import GROUPS, PIXELS, X, Y, hard_panels
from thimble_zarr.report.browser.columns import (
    BLANK,
    STILL,
    ColorScale,
    color_scale,
    pixels,
    tables_of,
)
from thimble_zarr.report.browser.controls import log_switch
from thimble_zarr.report.browser.draw import Drawn, draw, draw_panel
from thimble_zarr.report.browser.links import linked
from thimble_zarr.report.figure import Axis, Figure, Line, Panel

PANELS = {panel.name: panel for panel in hard_panels()}


def drawn(name: str) -> list[Drawn]:
    return draw_panel(PANELS[name], linked(GROUPS, first=0, last=60))


@pytest.mark.parametrize("name", PANELS)
def test_every_layer_is_drawn_and_reaches_the_browser(name: str) -> None:
    document, figures = Document(), drawn(name)
    for of, figure in zip(figures, PANELS[name].figures, strict=True):
        document.add_root(of.plot)
        assert len(of.plot.renderers) >= len(figure.layers)
    assert document.to_json()


def test_one_group_is_shown_and_what_is_of_none_always() -> None:
    left, right = drawn("size")
    links = linked(GROUPS, first=0, last=60)
    shown = [of for of in left.plot.renderers if of.visible]
    assert {of.group.name for of in shown if of.group} == {links.shown_group} == {"dead"}
    assert {of.group.name for of in left.plot.renderers if of.group} == {*GROUPS}
    assert [of.visible for of in right.plot.renderers if of.group is None] == [True]
    assert [legend.visible for legend in left.plot.legend] == [True]


def test_groups_with_other_entries_have_legends_of_their_own() -> None:
    (figure,) = PANELS["last"].figures
    layers = [replace(layer, label=f"{k} froze") for k, layer in enumerate(figure.layers)]
    of = draw(replace(figure, layers=layers), linked(GROUPS, first=0, last=60))
    assert [legend.visible for legend in of.plot.legend] == [True, False, False]
    assert [of.items[0].label.value for of in of.plot.legend] == ["0 froze", "1 froze", "2 froze"]


def test_layers_of_one_x_send_it_once() -> None:
    tables = tables_of(PANELS["size"].figures[0])
    assert [len(table.layers) for table in tables] == [2, 2, 2, 1]
    assert all("x" in table.columns for table in tables)


@pytest.mark.parametrize("is_log", [False, True])
def test_a_pixel_is_its_number_to_half_a_color(is_log: bool) -> None:
    values = np.geomspace(0.5, 80, 1000)
    scale = ColorScale(0.5, 80, is_log)
    share = (pixels(values, scale) - 1.0) / 253
    read = 0.5 * (80 / 0.5) ** share if is_log else 0.5 + 79.5 * share
    error = np.log(read / values) / np.log(160) if is_log else (read - values) / 79.5
    assert np.abs(error).max() <= 0.5 / 253 + 1e-9


def test_pixels_without_a_number_are_blank_and_others_are_not() -> None:
    scale = color_scale(PANELS["picture"].figures[0].layers)
    assert (scale.low, scale.high) == (pytest.approx(1e-3), pytest.approx(30))
    found = pixels(PIXELS, scale)
    assert (found == BLANK).tolist() == [[True, False, False], [False, False, False]]
    assert found[0, 1] == STILL
    assert found[1, 2] == 254  # infinite


def test_numbers_are_replaced_in_place() -> None:
    (of,) = drawn("last")
    (figure,) = PANELS["last"].figures
    before = of.sources
    layers = [replace(layer, heights=layer.heights * 100) for layer in figure.layers]
    of.update(replace(figure, layers=layers))
    assert [source.data["y0"].max() for source in of.sources[:1]] == [300]
    assert all(a is b for a, b in zip(before, of.sources, strict=True))
    with pytest.raises(ValueError, match="other layers"):
        of.update(replace(figure, layers=figure.layers[:1]))


def test_colors_are_replaced_with_the_numbers() -> None:
    (of,) = drawn("picture")
    (figure,) = PANELS["picture"].figures
    layers = [replace(layer, values=layer.values * 4) for layer in figure.layers]
    of.update(replace(figure, layers=layers))
    assert of.colors.high == pytest.approx(120)


def test_an_axis_is_logarithmic_and_can_be_switched() -> None:
    left, _ = drawn("size")
    (switch,) = left.switches
    assert isinstance(left.plot.y_scale, LogScale)
    assert isinstance(left.plot.left[0].ticker, LogTicker)
    assert {of.scale.__class__ for of in switch.states.values()} == {LinearScale, LogScale}
    assert log_switch([switch]).active


def test_on_a_logarithmic_axis_areas_from_0_on_have_no_height() -> None:
    figure = PANELS["size"].figures[0]
    columns = tables_of(figure)[0].columns
    assert columns["low0"].max() == 0
    np.testing.assert_array_equal(columns["floor0"], columns["high0"])
    switch = draw(figure, linked(GROUPS, first=0, last=60)).axes["y"]
    areas = [glyph.y1 for glyph, _ in switch.glyphs]
    assert areas[0].field == "floor0"


def test_numbers_that_are_sent_are_right_to_four_digits() -> None:
    values = np.geomspace(1e-35, 1e35, 999) * np.resize([1, -1], 999)
    line = Line(x=np.arange(999) + 2**20, y=values)
    (table,) = tables_of(Figure(y=Axis(label="y"), layers=[line]))
    assert (table.columns["x"] == line.x).all()
    np.testing.assert_allclose(table.columns["y0"], values, rtol=2e-5)
    (hard,) = tables_of(Figure(y=Axis(label="y"), layers=[Line(x=X, y=Y)]))
    np.testing.assert_allclose(hard.columns["y0"], Y, rtol=2e-5)


def test_points_know_their_tokens() -> None:
    first, _ = drawn("space")
    assert len(first.points) == len(GROUPS)
    assert first.points[1].data_source.data["token"].tolist() == [*range(2, 9)]


def test_figures_share_steps_cursor_and_where_they_say_so_their_axes() -> None:
    links = linked(GROUPS, first=0, last=60)
    left, right = draw_panel(PANELS["size"], links)
    assert left.plot.x_range is right.plot.x_range is links.steps
    assert left.plot.y_range is not right.plot.y_range
    one, other = draw_panel(PANELS["space"], links)
    assert one.plot.x_range is other.plot.x_range
    assert one.plot.y_range is other.plot.y_range


def test_what_is_everywhere_the_same_is_shown_at_its_size() -> None:
    rate = Line(x=np.arange(3), y=np.full(3, 1e-3))
    figure = Figure(y=Axis(label="learning rate"), layers=[rate])
    panel = Panel(name="rate", title="Rate", code="", figures=[figure])
    (of,) = draw_panel(panel, linked(["all"], first=0, last=2))
    assert of.plot.y_range.default_span == pytest.approx(2e-3)


def test_a_run_of_one_step_has_something_in_view() -> None:
    steps = linked(["all"], first=5, last=5).steps
    assert steps.start < 5 < steps.end


@pytest.mark.parametrize("name", ["size", "regimes", "last", "picture", "space"])
def test_every_number_under_the_mouse_is_formatted(name: str) -> None:
    """Without a format a column is shown as it is sent: of a picture bytes, not its numbers."""
    for of, figure in zip(drawn(name), PANELS[name].figures, strict=True):
        tools = [tool for tool in of.plot.tools if isinstance(tool, HoverTool)]
        texts = [text for tool in tools for _, text in tool.tooltips]
        assert len(tools) == len(GROUPS) + (figure.right is not None)
        assert all(re.fullmatch(r"([@$]\w+\{[^}]+\}| %| \(?| to |\))+", text) for text in texts)
        assert name != "picture" or {"@value{custom}"} <= {*texts}


def test_the_mouse_is_over_pixels_and_not_over_a_line_that_nobody_sees() -> None:
    (of,) = drawn("picture")
    targets = [tool.renderers[0].glyph for tool in of.plot.tools if isinstance(tool, HoverTool)]
    assert [type(glyph).__name__ for glyph in targets] == ["Image"] * len(GROUPS)


def test_figures_beside_each_other_begin_and_end_at_the_same_heights() -> None:
    left, right = (of.plot for of in drawn("size"))
    assert left.height == right.height
    assert left.min_border_top == right.min_border_top > 0
