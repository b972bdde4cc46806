"""The numbers that a figure shows where the mouse is."""

from bokeh.models import (
    ContinuousColorMapper,
    CustomJSHover,
    GlyphRenderer,
    HoverTool,
    LogColorMapper,
)

from thimble_zarr.report.browser.columns import Table
from thimble_zarr.report.figure import Axis, Band, Bars, Figure, Image, Line, Points, Stack

_DECODED = """
if (value == 255) return "none"
const {low, high} = colors, share = value / 254
const shown = is_log ? low * Math.pow(high / low, share) : low + (high - low) * share
return Number(shown.toPrecision(3)).toString()
"""
"""From the byte of a pixel (`columns.pixels`) to its number."""

Rows = list[tuple[str, str]]


def hover_tool(
    figure: Figure, table: Table, target: GlyphRenderer, colors: ContinuousColorMapper
) -> HoverTool:
    """Return what shows the numbers of a table, where the mouse is over one of its glyphs."""
    rows: Rows = []
    for i in table.layers:
        rows += _rows(figure, i, table)
    is_joint = "x" in table.columns and not isinstance(
        figure.layers[table.layers[0]], Points | Image
    )
    is_log = isinstance(colors, LogColorMapper)
    decoded = CustomJSHover(args={"colors": colors, "is_log": is_log}, code=_DECODED)
    return HoverTool(
        renderers=[target],
        tooltips=rows,
        formatters={
            f"@{name}": decoded if isinstance(values, list) else "printf"
            for name, values in table.columns.items()
        },
        mode="vline" if is_joint and figure.x.is_step else "mouse",
        line_policy="nearest",
        point_policy="follow_mouse",
        visible=False,
    )


def _rows(figure: Figure, i: int, table: Table) -> Rows:
    """Return what is told of layer `i`: names, and how their numbers are written."""
    layer = figure.layers[i]
    label = layer.label or figure.y.label
    x = (figure.x.label, f"@x{_number(figure.x)}")
    first = [x] if i == table.layers[0] else []
    match layer:
        case Line():
            spread = f" (@low{i}{{%.3g}} to @high{i}{{%.3g}})" if layer.low is not None else ""
            return [*first, (label, f"@y{i}{{%.4g}}{spread}")]
        case Band():
            return [*first, (label, f"@low{i}{{%.4g}} to @high{i}{{%.4g}}")]
        case Stack():
            names = reversed([*enumerate(layer.heights)])
            return [*first, *((name, f"@height{i}_{k}{{%.4g}}") for k, name in names)]
        case Bars():
            number = _number(figure.x)
            return [(figure.x.label, f"@left{number} to @right{number}"), (label, f"@y{i}{{%.4g}}")]
        case Points():
            token = [("token", "@token{%d}")] if layer.tokens is not None else []
            return [*token, x, (figure.y.label, f"@y{i}{{%.4g}}")]
        case Image():
            spread = " (@low{custom} to @high{custom})" if layer.low is not None else ""
            place = (figure.x.label, "$x{0,0}"), (figure.y.label, "$y{0,0}")
            return [*place, (layer.unit, f"@value{{custom}}{spread}")]
    return []


def _number(axis: Axis) -> str:
    return "{%.7g}" if axis.is_step else "{%.4g}"
