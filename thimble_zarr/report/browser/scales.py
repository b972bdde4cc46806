"""Axes that are linear or logarithmic, as the reader wants."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bokeh.models import Axis as Ticks
from bokeh.models import (
    BasicTicker,
    CustomJSTickFormatter,
    GlyphRenderer,
    LinearScale,
    LogScale,
    LogTicker,
    NoOverlap,
    Scale,
    Ticker,
)
from bokeh.models.glyph import Glyph
from bokeh.plotting import figure as Plot

from thimble_zarr.report.browser.glyphs import LogProperty
from thimble_zarr.report.figure import Axis

Dim = Literal["x", "y"]


@dataclass(frozen=True, kw_only=True)
class State:
    """How an axis is while it is linear, or while it is logarithmic.

    Attributes
    ----------
    scale, ticker
        What the plot and its axis have then.
    properties
        What glyphs have then, in the order of `Switch.glyphs`.
    """

    scale: Scale
    ticker: Ticker
    properties: Sequence[object]


@dataclass(frozen=True, kw_only=True)
class Switch:
    """What changes where an axis becomes linear or logarithmic, and into what.

    The plot keeps its range and its axis: Bokeh does not listen to a range that is put in place of
    another, and fails to draw two new axes at a time.

    Attributes
    ----------
    dim
        Whether it is `x` or `y`.
    is_log
        Whether it is logarithmic at first.
    plot, ticks, glyphs
        What changes; of each glyph one property, which is named.
    states
        What it changes into, by whether it is logarithmic; a single one if only that makes sense.
    """

    dim: Dim
    is_log: bool
    plot: Plot
    ticks: Ticks
    glyphs: Sequence[tuple[Glyph, str]]
    states: Mapping[bool, State]

    @property
    def can_switch(self) -> bool:
        """Whether linear and logarithmic both make sense."""
        return len(self.states) > 1


def set_scale(
    plot: Plot,
    dim: Dim,
    axis: Axis,
    properties: Sequence[LogProperty] = (),
    renderers: Sequence[GlyphRenderer] | None = None,
    like: Switch | None = None,
) -> Switch:
    """Give an axis of a plot its scale, and return how it is switched.

    `renderers` are what it must have room for, by default all of the plot. It shares the range of
    the axis `like`, if there is one.
    """
    shown = like.plot if like is not None else plot
    scales = {
        is_log: State(
            scale=LogScale() if is_log else LinearScale(),
            ticker=LogTicker() if is_log else BasicTicker(),
            properties=[of.log if is_log else of.linear for of in properties],
        )
        for is_log in ((False, True) if axis.can_switch else (axis.is_log,))
    }
    switch = Switch(
        dim=dim,
        is_log=axis.is_log,
        plot=plot,
        ticks=styled(plot.xaxis[0] if dim == "x" else plot.yaxis[0]),
        glyphs=[(of.glyph, of.name) for of in properties],
        states=scales,
    )
    if renderers is not None:
        plot.y_range.renderers = renderers
    switch.ticks.axis_label = axis.label
    plot.update(**{f"{dim}_range": getattr(shown, f"{dim}_range")})
    _set(switch, scales[axis.is_log])
    return switch


def _set(switch: Switch, state: State) -> None:
    """Do in Python what `controls.log_switch` does in the browser."""
    switch.plot.update(**{f"{switch.dim}_scale": state.scale})
    switch.ticks.ticker = state.ticker
    for (glyph, name), value in zip(switch.glyphs, state.properties, strict=True):
        setattr(glyph, name, value)


def styled(ticks: Ticks) -> Ticks:
    """Return an axis in the page's style."""
    ticks.update(
        formatter=CustomJSTickFormatter(code=_WRITTEN),
        major_label_policy=NoOverlap(),
        axis_label_text_font_style="normal",
        axis_label_text_font_size="12px",
        axis_label_text_color="#3c4043",
        major_label_text_font_size="11px",
        major_label_text_color="#5f6368",
        axis_line_color="#9aa0a6",
        major_tick_line_color="#9aa0a6",
        minor_tick_line_color=None,
        major_tick_in=0,
    )
    return ticks


_WRITTEN = """
const size = Math.abs(tick)
if (size == 0 || (size >= 1e-4 && size < 1e6)) {
  return Number(tick.toPrecision(6)).toLocaleString("en-US", {maximumFractionDigits: 9})
}
const [digits, exponent] = Number(tick.toPrecision(6)).toExponential().split("e")
const raised = (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]
const power = "10" + [...exponent.replace("+", "")].map(raised).join("")
return digits == "1" ? power : `${digits}·${power}`
"""
"""How a number is written beside an axis: in full, or with a power of ten."""
