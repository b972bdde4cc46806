"""A layer of a figure drawn with Bokeh's glyphs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import TYPE_CHECKING, Any

from bokeh.models import ColumnDataSource, LinearColorMapper
from bokeh.models.glyph import Glyph
from bokeh.models.glyphs import Image as GlyphImage
from bokeh.models.renderers import GlyphRenderer
from bokeh.palettes import viridis
from bokeh.plotting import figure as Plot

from thimble_zarr.report.browser.columns import BLANK
from thimble_zarr.report.figure import (
    GRAY,
    PALETTE,
    Band,
    Bars,
    Figure,
    Image,
    Layer,
    Line,
    Points,
    Rule,
    Stack,
)

N_COLORS = BLANK
"""Colors of a picture, one for each number that a pixel can have."""


if TYPE_CHECKING:
    Renderer = GlyphRenderer[Any]  # Bokeh's class takes a parameter for type checkers only
else:
    Renderer = GlyphRenderer

_Style = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class LogProperty:
    """A property of a glyph that is another where the axis is logarithmic, which shows no 0."""

    glyph: Glyph
    name: str
    linear: object
    log: object


@dataclass(frozen=True, kw_only=True)
class Glyphs:
    """What draws a layer.

    Attributes
    ----------
    renderers
        The lowest first.
    entries
        Of the legend: what shows how something is drawn, by its name.
    log_properties
        What is drawn in another way where y is logarithmic.
    """

    renderers: Sequence[Renderer]
    entries: Mapping[str, Renderer] = field(default_factory=dict)
    log_properties: Sequence[LogProperty] = ()


def label_colors(figures: Sequence[Figure]) -> dict[str, str]:
    """Return the color of each label, the same in all figures of a panel and for all groups."""
    colors: dict[str, str] = {}
    palette = cycle(PALETTE)
    for layer in (layer for figure in figures for layer in figure.layers):
        is_reference = isinstance(layer, Rule) or (isinstance(layer, Line) and layer.is_dashed)
        if layer.label not in colors and not isinstance(layer, Stack | Image):
            colors[layer.label] = layer.color or (GRAY if is_reference else next(palette))
    return colors


def glyphs_of(
    plot: Plot, i: int, layer: Layer, source: ColumnDataSource, colors: Mapping[str, str]
) -> Glyphs:
    """Draw layer `i` of a figure from the columns that `columns.tables_of` gave it."""
    color = layer.color or colors.get(layer.label, GRAY)
    match layer:
        case Line():
            return _line(plot, i, layer, source, color)
        case Band():
            return _with_entry(layer, *_area(plot, i, source, color, alpha=0.25))
        case Stack():
            return _stack(plot, i, layer, source)
        case Bars():
            bars = plot.quad(
                left="left",
                right="right",
                top=f"y{i}",
                bottom=0,
                source=source,
                fill_color=color,
                fill_alpha=0.55,
                line_color=color,
            )
            floor = LogProperty(
                glyph=bars.glyph, name="bottom", linear={"value": 0}, log={"field": f"floor{i}"}
            )
            return _with_entry(layer, bars, floor)
        case Points():
            dots = plot.scatter(
                "x", f"y{i}", source=source, size=4, color=color, alpha=0.5, line_color=None
            )
            return _with_entry(layer, dots)
        case Rule():
            style: _Style = {"line_color": color, "line_dash": "dashed", "line_width": 1.2}
            if layer.x is not None:
                return _with_entry(layer, plot.vspan(x="at", source=source, **style))
            return _with_entry(layer, plot.hspan(y="at", source=source, **style))
        case Image():
            return Glyphs(renderers=[_image(plot, source)])
    raise TypeError(f"a figure has no layer of the kind {type(layer).__name__}")


def _with_entry(layer: Layer, renderer: Renderer, *properties: LogProperty) -> Glyphs:
    entries = {layer.label: renderer} if layer.label else {}
    return Glyphs(renderers=[renderer], entries=entries, log_properties=properties)


def _area(
    plot: Plot, i: int, source: ColumnDataSource, color: str, *, alpha: float, on: str = "default"
) -> tuple[Renderer, LogProperty]:
    """Draw the area between the columns `low` and `high`."""
    area = plot.varea(
        "x",
        f"low{i}",
        f"high{i}",
        source=source,
        fill_color=color,
        fill_alpha=alpha,
        y_range_name=on,
    )
    return area, LogProperty(
        glyph=area.glyph, name="y1", linear={"field": f"low{i}"}, log={"field": f"floor{i}"}
    )


def _line(plot: Plot, i: int, layer: Line, source: ColumnDataSource, color: str) -> Glyphs:
    on = "right" if layer.on_right else "default"
    renderers, properties = [], []
    if layer.low is not None:
        area, floor = _area(plot, i, source, color, alpha=0.18, on=on)
        renderers, properties = [area], [floor] if on == "default" else []
    line = plot.line(
        "x",
        f"y{i}",
        source=source,
        line_color=color,
        line_dash="dashed" if layer.is_dashed else "solid",
        line_width=1.2 if layer.is_dashed else 1.6,
        y_range_name=on,
    )
    entries = {layer.label: line} if layer.label else {}
    return Glyphs(renderers=[*renderers, line], entries=entries, log_properties=properties)


def _stack(plot: Plot, i: int, layer: Stack, source: ColumnDataSource) -> Glyphs:
    palette, areas = cycle(PALETTE), {}
    for k, name in enumerate(layer.heights):
        color = layer.colors.get(name) or next(palette)
        areas[name] = plot.varea(
            "x",
            f"edge{i}_{k}",
            f"edge{i}_{k + 1}",
            source=source,
            fill_color=color,
            fill_alpha=0.85,
        )
    return Glyphs(renderers=[*areas.values()], entries=areas)


def _image(plot: Plot, source: ColumnDataSource) -> Renderer:
    """Draw pixels, which are bytes; that of no number is beyond the colors, and so seen through."""
    shades = LinearColorMapper(
        palette=viridis(N_COLORS), low=0, high=N_COLORS - 1, high_color="rgba(0, 0, 0, 0)"
    )
    image = GlyphImage(image="value", x="x", y="y", dw="width", dh="height", color_mapper=shades)
    return plot.add_glyph(source, image)
