"""Panels drawn with matplotlib: what is drawn is what the layers say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from matplotlib.axes import Axes
from matplotlib.cbook import is_math_text
from matplotlib.colors import LogNorm, to_hex

from thimble_zarr.report.figure import (
    GREEN,
    STILL,
    Axis,
    Band,
    Bars,
    Figure,
    Image,
    Layer,
    Line,
    Panel,
    Points,
    Rule,
    Stack,
)
from thimble_zarr.report.pyplot import draw, write_png

X = np.arange(13.0)
Y = np.random.default_rng(0).uniform(0.5, 2, 13)
LOG = Axis(label="size", is_log=True, can_switch=True)
PLAIN = Axis(label="size")


def panel(*layers: Layer, y: Axis = PLAIN, right: Axis | None = None, note: str = "") -> Panel:
    figure = Figure(y=y, right=right, layers=layers)
    return Panel(name="size", title="The size", code="", figures=[figure], note=note)


def axes(*layers: Layer, group: str | None = None, y: Axis = PLAIN) -> Axes:
    return draw(panel(*layers, y=y), group=group).axes[0]


def test_a_line_goes_through_its_points_and_its_range_lies_around_it() -> None:
    ax = axes(Line(label="a", x=X, y=Y, low=Y - 0.25, high=Y + 0.5))
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), np.stack([X, Y], 1))
    outline = ax.collections[0].get_paths()[0].vertices
    assert {*zip(X, Y - 0.25, strict=True)} | {*zip(X, Y + 0.5, strict=True)} <= {
        *map(tuple, outline)
    }


def test_a_logarithmic_axis_has_no_place_for_0() -> None:
    y = np.where(X < 5, 0, Y)
    ax = axes(Line(label="a", x=X, y=y), Band(label="b", x=X, low=y, high=Y), y=LOG)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), np.where(X < 5, np.nan, Y))
    assert ax.collections[0].get_paths()[0].vertices[:, 0].min() == 5
    np.testing.assert_array_equal(axes(Line(x=X, y=y)).lines[0].get_ydata(), y)


def test_a_point_between_unknown_ones_is_seen() -> None:
    y = np.where(X % 3 == 1, Y, np.nan)
    line = axes(Line(x=X, y=y)).lines[0]
    assert line.get_marker() == "."
    np.testing.assert_array_equal(line.get_markevery(), X % 3 == 1)
    assert axes(Line(x=X, y=Y)).lines[0].get_marker() in ("", "None")


def test_an_area_of_a_single_step_is_seen() -> None:
    layers = Band(x=X[:1], low=Y[:1], high=2 * Y[:1]), Stack(x=X[:1], heights={"a": Y[:1]})
    assert [axes(layer).dataLim.width for layer in layers] == [1, 1]


def test_areas_points_bars_images_and_rules_are_where_they_say() -> None:
    ax = axes(
        Band(x=X, low=Y, high=2 * Y),
        Points(x=X, y=Y, tokens=np.arange(13)),
        Bars(edges=np.append(X, 13), heights=Y),
        Rule(y=3.0),
        Rule(x=7.0),
    )
    band, points = ax.collections
    assert {*zip(X, 2 * Y, strict=True)} <= {*map(tuple, band.get_paths()[0].vertices)}
    np.testing.assert_array_equal(points.get_offsets(), np.stack([X, Y], 1))
    np.testing.assert_array_equal(ax.patches[0].get_data().values, Y)
    across, up = ax.lines
    assert (list(across.get_ydata()), list(up.get_xdata())) == ([3, 3], [7, 7])
    assert {line.get_linestyle() for line in ax.lines} == {"--"}


def test_a_stack_is_one_on_the_other_in_its_colors() -> None:
    drawing = draw(panel(Stack(x=X, heights={"a": Y, "b": 2 * Y}, colors={"b": GREEN})), group=None)
    below, above = drawing.axes[0].collections
    assert {*zip(X, 3 * Y, strict=True)} <= {*map(tuple, above.get_paths()[0].vertices)}
    assert to_hex(above.get_facecolor()[0]) == GREEN != to_hex(below.get_facecolor()[0])
    assert [text.get_text() for text in drawing.legends[0].texts] == ["a", "b"]


@pytest.mark.parametrize("is_log", [False, True])
def test_an_image_lies_where_it_says_its_lowest_row_first(is_log: bool) -> None:
    values = np.array([[1, 10, np.nan], [0, 1000, 100]], np.float32)
    drawing = draw(
        panel(Image(values=values, x=(2, 5), y=(0, 90), unit="ULP", is_log=is_log)), group=None
    )
    (image,) = drawing.axes[0].images
    assert (image.get_extent(), image.origin) == ([2, 5, 0, 90], "lower")
    shown = image.get_array()
    np.testing.assert_array_equal(shown.mask, np.isnan(values))
    expected = np.where(is_log & (values == 0), 0.5, values)  # below all others, and so grey
    np.testing.assert_array_equal(shown.compressed(), expected[~shown.mask])
    grey = image.to_rgba(shown)[1, 0, :3]
    assert (to_hex(grey) == STILL) == is_log
    assert isinstance(image.norm, LogNorm) == is_log
    assert (image.norm.vmin, image.norm.vmax) == (1 if is_log else 0, 1000)
    assert drawing.axes[1].get_ylabel() == "ULP"


def test_one_group_is_shown_and_what_is_of_none() -> None:
    layers = [
        Line(label="reference", x=X, y=Y),
        *(Line(label="median", group=group, x=X, y=Y * k) for group, k in (("a", 1), ("b", 2))),
    ]
    drawn = {group: axes(*layers, group=group).lines for group in ("a", "b", None)}
    assert [len(lines) for lines in drawn.values()] == [2, 2, 1]
    np.testing.assert_array_equal(drawn["b"][1].get_ydata(), 2 * Y)
    assert drawn["a"][1].get_color() == drawn["b"][1].get_color() != drawn["a"][0].get_color()
    title = draw(panel(*layers), group="a").get_suptitle()
    assert title == "The size (a)"
    (text,) = axes(*layers[1:], group="c").texts
    assert text.get_text() == "nothing of this group"


def test_labels_have_one_color_in_all_figures() -> None:
    figures = [
        Figure(title=f"step {i}", x=PLAIN, y=PLAIN, layers=[Line(label=label, x=X, y=Y)])
        for i, label in enumerate("aabba")
    ]
    several = Panel(name="size", title="$1 of $2", code="", figures=figures)
    drawing = draw(several, group=None)
    assert [ax.get_title() for ax in drawing.axes] == [f"step {i}" for i in range(5)]
    colors = [ax.lines[0].get_color() for ax in drawing.axes]
    assert colors[0] == colors[1] == colors[4] != colors[2] == colors[3]
    assert [ax.get_legend().texts[0].get_text() for ax in drawing.axes] == [*"aabba"]
    assert not is_math_text(drawing.get_suptitle())
    assert drawing._repr_png_().startswith(b"\x89PNG")  # as a notebook does


def test_figures_that_look_alike_have_one_legend() -> None:
    figures = [Figure(y=PLAIN, layers=[Line(label="a", x=X, y=Y)])] * 2
    drawing = draw(Panel(name="size", title="", code="", figures=figures), group=None)
    assert [text.get_text() for text in drawing.legends[0].texts] == ["a"]
    assert [ax.get_legend() for ax in drawing.axes] == [None, None]


def test_figures_may_have_the_same_axes() -> None:
    figures = [Figure(x=PLAIN, y=PLAIN, layers=[Line(x=X * k, y=Y * k)]) for k in (1, 5)]
    for is_same in (False, True):
        several = Panel(name="", title="", code="", figures=figures, has_same_axes=is_same)
        ends = {(ax.get_xlim(), ax.get_ylim()) for ax in draw(several, group=None).axes}
        assert len(ends) == 2 - is_same


def test_a_second_axis_is_on_the_right() -> None:
    layers = [Line(label="loss", x=X, y=Y), Line(label="rate", x=X, y=Y / 1e3, on_right=True)]
    drawing = draw(panel(*layers, right=Axis(label="rate", is_log=True)), group=None)
    left, right = drawing.axes
    assert (left.get_ylabel(), right.get_ylabel()) == ("size", "rate")
    assert (left.get_yscale(), right.get_yscale()) == ("linear", "log")
    np.testing.assert_array_equal(right.lines[0].get_ydata(), Y / 1e3)
    assert left.lines[0].get_color() != right.lines[0].get_color()


AWKWARD = {
    "nothing finite": (X, np.full(13, np.nan)),
    "zeros": (X, np.zeros(13)),
    "infinities": (X, np.where(X > 9, np.inf, Y)),
    "one step": (X[:1], Y[:1]),
    "no step": (X[:0], Y[:0]),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_numbers_are_drawn_without_a_warning(name: str) -> None:
    x, y = AWKWARD[name]
    layers = [
        Line(label="line", x=x, y=y, low=y, high=y),
        Band(label="band", x=x, low=y, high=y),
        Stack(x=x, heights={"a": y, "b": y}),
        Image(
            values=np.tile(y, (2, 1)).astype(np.float32), x=(0, 9), y=(0, 9), unit="", is_log=True
        ),
        Bars(label="bars", edges=np.append(x, 99), heights=y),
        Points(label="points", x=x, y=y),
    ]
    figures = [Figure(y=LOG, layers=[layer]) for layer in layers]
    drawing = draw(Panel(name="size", title="", code="", figures=figures), group=None)
    drawing.set_layout_engine("none")  # which draws all twice more
    assert drawing._repr_png_()
    scales = {ax.get_yscale() for ax in drawing.axes[:2]}
    assert scales == {"log" if np.any(np.isfinite(y) & (y > 0)) else "linear"}


def test_a_file_a_panel_is_written_and_pyplot_knows_of_no_figure(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    line = panel(Line(label="a", x=X, y=Y), note="How $to$ read it. " * 20)
    nothing = Panel(name="nothing", title="Nothing", code="", figures=[], note="None was recorded.")
    paths = write_png([line, nothing], tmp_path / "new" / "folder", group=None)
    assert [path.name for path in paths] == ["size.png", "nothing.png"]
    pictures = [PIL.Image.open(path).convert("RGB") for path in paths]
    n_colors = [len(picture.getcolors(picture.width * picture.height)) for picture in pictures]
    assert min(n_colors) > 10
    assert plt.get_fignums() == []


def test_figures_that_have_the_same_axes_have_the_same_ranges() -> None:
    figures = [Figure(y=LOG, layers=[Line(x=scale * X, y=scale * Y)]) for scale in (1, 7)]
    two = Panel(name="size", title="", code="", figures=figures)
    first, second = draw(replace(two, has_same_axes=True), group=None).axes
    assert first.get_xlim() == second.get_xlim()
    assert first.get_ylim() == second.get_ylim()
    assert second.get_xlim()[1] >= 7 * X.max()
    first, second = draw(two, group=None).axes
    assert first.get_xlim() != second.get_xlim()
