"""A layer of a figure drawn with Bokeh's glyphs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle

from bokeh.models import ColumnDataSource, GlyphRenderer, LinearColorMapper, Plot
from bokeh.models import glyphs as shapes
from bokeh.models.glyph import Glyph
from bokeh.palettes import viridis

from thimble_zarr.report.browser.columns import BLANK
from thimble_zarr.report.figure import (
    GRAY,
    PALETTE,
    STILL,
    Band,
    Bars,
    Image,
    Layer,
    Line,
    Points,
    Rule,
    Stack,
)

N_COLORS = BLANK - 1
"""Colors of a picture, one for each number but 0 that a pixel can have."""


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

    renderers: Sequence[GlyphRenderer]
    entries: Mapping[str, GlyphRenderer] = field(default_factory=dict)
    log_properties: Sequence[LogProperty] = ()


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
            return _bars(plot, i, layer, source, color)
        case Points():
            dots = shapes.Scatter(
                x="x", y=f"y{i}", size=4, fill_color=color, fill_alpha=0.5, line_color=None
            )
            if layer.tokens is None:  # not one of many
                dots.update(size=13, fill_alpha=1.0, line_color="#ffffff", line_width=2)
            return _with_entry(layer, plot.add_glyph(source, dots))
        case Rule():
            rule = shapes.VSpan(x="at") if layer.x is not None else shapes.HSpan(y="at")
            rule.update(line_color=color, line_dash="dashed", line_width=1.2)
            return _with_entry(layer, plot.add_glyph(source, rule))
        case Image():
            return Glyphs(renderers=[_image(plot, source)])
    raise TypeError(f"a figure has no layer of the kind {type(layer).__name__}")


def _with_entry(layer: Layer, renderer: GlyphRenderer, *properties: LogProperty) -> Glyphs:
    entries = {layer.label: renderer} if layer.label else {}
    return Glyphs(renderers=[renderer], entries=entries, log_properties=properties)


def _bars(plot: Plot, i: int, layer: Bars, source: ColumnDataSource, color: str) -> Glyphs:
    shape = shapes.Quad(
        left="left",
        right="right",
        top=f"y{i}",
        bottom=0,
        fill_color=color,
        fill_alpha=0.55,
        line_color=color,
    )
    floor = LogProperty(glyph=shape, name="bottom", linear={"value": 0}, log={"field": f"floor{i}"})
    top = LogProperty(glyph=shape, name="top", linear={"field": f"y{i}"}, log={"field": f"top{i}"})
    return _with_entry(layer, plot.add_glyph(source, shape), floor, top)


def _area(
    plot: Plot, i: int, source: ColumnDataSource, color: str, *, alpha: float, on: str = "default"
) -> tuple[GlyphRenderer, LogProperty]:
    """Draw the area between the columns `low` and `high`."""
    area = shapes.VArea(x="x", y1=f"low{i}", y2=f"high{i}", fill_color=color, fill_alpha=alpha)
    bottom = f"floor{i}" if f"floor{i}" in source.data else f"low{i}"
    floor = LogProperty(glyph=area, name="y1", linear={"field": f"low{i}"}, log={"field": bottom})
    return plot.add_glyph(source, area, y_range_name=on), floor


def _line(plot: Plot, i: int, layer: Line, source: ColumnDataSource, color: str) -> Glyphs:
    on = "right" if layer.on_right else "default"
    renderers, properties = [], []
    if layer.low is not None:
        area, floor = _area(plot, i, source, color, alpha=0.18, on=on)
        renderers, properties = [area], [floor] if on == "default" else []
    line = shapes.Line(
        x="x",
        y=f"y{i}",
        line_color=color,
        line_dash="dashed" if layer.is_dashed else "solid",
        line_width=1.2 if layer.is_dashed else 1.6,
    )
    drawn = plot.add_glyph(source, line, y_range_name=on)
    entries = {layer.label: drawn} if layer.label else {}
    return Glyphs(renderers=[*renderers, drawn], entries=entries, log_properties=properties)


def _stack(plot: Plot, i: int, layer: Stack, source: ColumnDataSource) -> Glyphs:
    palette, areas = cycle(PALETTE), {}
    for k, name in enumerate(layer.heights):
        color = layer.colors.get(name) or next(palette)
        area = shapes.VArea(
            x="x",
            y1=f"edge{i}_{k}",
            y2=f"edge{i}_{k + 1}",
            fill_color=color,
            fill_alpha=0.85,
        )
        areas[name] = plot.add_glyph(source, area)
    return Glyphs(renderers=[*areas.values()], entries=areas)


def _image(plot: Plot, source: ColumnDataSource) -> GlyphRenderer:
    """Draw pixels, which are bytes; that of no number is beyond the colors, and so seen through."""
    shades = LinearColorMapper(
        palette=viridis(N_COLORS)[::-1],
        low=1,
        high=N_COLORS,
        low_color=STILL,
        high_color="rgba(0, 0, 0, 0)",
    )
    image = shapes.Image(image="value", x="x", y="y", dw="width", dh="height", color_mapper=shades)
    return plot.add_glyph(source, image)
