"""The numbers that a figure shows where the mouse is."""

import numpy as np
from bokeh.models import (
    ColumnDataSource,
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
if (value == 0) return "0"
const {low, high} = colors, share = (value - 1) / 253
const shown = is_log ? low * Math.pow(high / low, share) : low + (high - low) * share
return Number(shown.toPrecision(3)).toString()
"""
"""From the byte of a pixel (`columns.pixels`) to its number."""

_NAMED = """
let id = value
if (picture != null) {
  const {y: [bottom], height: [height], tokens: [ids]} = picture.data
  id = ids[Math.min(ids.length - 1, Math.floor(ids.length * (special_vars.y - bottom) / height))]
}
const at = Array.from(texts.data.token).indexOf(id)
return at < 0 ? `${id}` : `${id} ${JSON.stringify(texts.data.text[at])}`
"""
"""From the id of a token, or a place in a picture, to its id and text."""

_MOST_POINTS = 3
"""Of those that lie on one another, so many are told of."""

Rows = list[tuple[str, str]]


def hover_tool(
    figure: Figure,
    table: Table,
    target: GlyphRenderer,
    colors: ContinuousColorMapper,
    texts: ColumnDataSource,
) -> HoverTool:
    """Return what shows the numbers of a table, where the mouse is over one of its glyphs."""
    rows: Rows = []
    for i in table.layers:
        rows += _rows(figure, i, table)
    first = figure.layers[table.layers[0]]
    is_joint = "x" in table.columns and not isinstance(first, Points | Image)
    is_log = isinstance(colors, LogColorMapper)
    decoded = CustomJSHover(args={"colors": colors, "is_log": is_log}, code=_DECODED)
    picture = target.data_source if isinstance(first, Image) else None
    named = CustomJSHover(args={"texts": texts, "picture": picture}, code=_NAMED)
    formatters: dict[str, object] = {
        f"@{name}": decoded if isinstance(values, list) else "printf"
        for name, values in table.columns.items()
    }
    formatters |= {name: named for _, text in rows for name in ("@token", "$y") if name in text}
    return HoverTool(
        renderers=[target],
        tooltips=rows,
        formatters=formatters,
        mode="vline" if is_joint and figure.x.is_step else "mouse",
        line_policy="nearest",
        point_policy="follow_mouse",
        attachment="below",
        limit=_MOST_POINTS,
        visible=False,
    )


def _rows(figure: Figure, i: int, table: Table) -> Rows:
    """Return what is told of layer `i`: names, and how their numbers are written."""
    layer = figure.layers[i]
    label = layer.label or figure.y.label
    number, unit = "{%.4g}", " %" if "%" in figure.y.label else ""
    x = (figure.x.label, f"@x{_number(figure.x)}")
    first = [x] if i == table.layers[0] else []
    match layer:
        case Line():
            spread = f" (@low{i}{number} to @high{i}{number})" if layer.low is not None else ""
            return [*first, (label, f"@y{i}{number}{unit}{spread}")]
        case Band():
            if not np.any(layer.low):
                return [*first, (label, f"@high{i}{number}{unit}")]
            return [*first, (label, f"@low{i}{number} to @high{i}{number}{unit}")]
        case Stack():
            names = reversed([*enumerate(layer.heights)])
            return [*first, *((name, f"@height{i}_{k}{number}{unit}") for k, name in names)]
        case Bars():
            ends = f"@left{_number(figure.x)} to @right{_number(figure.x)}"
            return [(figure.x.label, ends), (label, f"@y{i}{number}{unit}")]
        case Points():
            token = [(layer.label or "token", "@token{custom}")] if layer.tokens is not None else []
            return [*token, x, (figure.y.label, f"@y{i}{number}{unit}")]
        case Image():
            spread = " (@low{custom} to @high{custom})" if layer.low is not None else ""
            token = [("token", "$y{custom}")] if layer.tokens is not None else []
            return [(figure.x.label, "$x{0,0}"), *token, (layer.unit, f"@value{{custom}}{spread}")]
    return []


def _number(axis: Axis) -> str:
    return "{%.7g}" if axis.is_step else "{%.4g}"
