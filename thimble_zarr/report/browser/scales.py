"""Axes that are linear or logarithmic, as the reader wants."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bokeh.models import Axis as Ticks
from bokeh.models import (
    BasicTickFormatter,
    DataRange1d,
    Grid,
    LinearAxis,
    LinearScale,
    LogAxis,
    LogScale,
    NumeralTickFormatter,
    Range,
    Scale,
)
from bokeh.models.glyph import Glyph
from bokeh.plotting import figure as Plot

from thimble_zarr.report.browser.glyphs import LogProperty, Renderer
from thimble_zarr.report.figure import Axis

Dim = Literal["x", "y"]


@dataclass(frozen=True, kw_only=True)
class State:
    """How an axis is while it is linear, or while it is logarithmic.

    Attributes
    ----------
    scale, range, ticks
        What the plot has then.
    properties
        What glyphs have then, in the order of `Switch.glyphs`.
    """

    scale: Scale
    range: Range
    ticks: Ticks
    properties: Sequence[object]


@dataclass(frozen=True, kw_only=True)
class Switch:
    """An axis that can be switched: what there is to change, and into what.

    Attributes
    ----------
    dim
        Whether it is `x` or `y`.
    is_log
        Whether it is logarithmic at first.
    plot, grid, glyphs
        What changes; of each glyph one property, which is named.
    linear, log
        What it changes into.
    """

    dim: Dim
    is_log: bool
    plot: Plot
    grid: Grid
    glyphs: Sequence[tuple[Glyph, str]]
    linear: State
    log: State


def set_scale(
    plot: Plot,
    dim: Dim,
    axis: Axis,
    properties: Sequence[LogProperty] = (),
    renderers: Sequence[Renderer] | None = None,
) -> Switch:
    """Give an axis of a plot its scale, and return how it is switched.

    `renderers` are what it must have room for, by default all of the plot.
    """
    states = [
        State(
            scale=scale(),
            range=DataRange1d(only_visible=True, renderers=[*renderers] if renderers else "auto"),
            ticks=styled(ticks(axis_label=axis.label)),
            properties=of,
        )
        for scale, ticks, of in (
            (LinearScale, LinearAxis, [of.linear for of in properties]),
            (LogScale, LogAxis, [of.log for of in properties]),
        )
    ]
    grid = plot.xgrid[0] if dim == "x" else plot.ygrid[0]
    glyphs = [(of.glyph, of.name) for of in properties]
    state = states[axis.is_log]
    plot.update(**{f"{dim}_scale": state.scale, f"{dim}_range": state.range})
    plot.update(**{"below" if dim == "x" else "left": [state.ticks]})
    grid.axis = state.ticks
    for (glyph, name), value in zip(glyphs, state.properties, strict=True):
        setattr(glyph, name, value)
    return Switch(
        dim=dim, is_log=axis.is_log, plot=plot, grid=grid, glyphs=glyphs,
        linear=states[0], log=states[1],
    )  # fmt: skip


def styled(ticks: Ticks, axis: Axis | None = None) -> Ticks:
    """Return an axis in the page's style; of steps, with their whole numbers."""
    if axis is not None and axis.is_step:
        ticks.formatter = NumeralTickFormatter(format="0,0")
    elif isinstance(ticks.formatter, BasicTickFormatter):
        ticks.formatter = BasicTickFormatter(precision="auto")
    ticks.update(
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
