"""Axes that are linear or logarithmic, as the reader wants."""

from collections.abc import Mapping, Sequence
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
    Model,
    NumeralTickFormatter,
    Range,
    Scale,
)
from bokeh.models.glyph import Glyph
from bokeh.plotting import figure as Plot

from thimble_zarr.report.browser.glyphs import LogProperty, Renderer
from thimble_zarr.report.figure import Axis

Dim = Literal["x", "y"]

SIDES: Mapping[Dim, str] = {"x": "below", "y": "left"}
"""Where a plot has the axis."""


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
    """What changes where an axis becomes linear or logarithmic, and into what.

    Attributes
    ----------
    dim
        Whether it is `x` or `y`.
    is_log
        Whether it is logarithmic at first.
    can_switch
        Whether both make sense.
    plot, grid, glyphs
        What changes; of each glyph one property, which is named.
    linear, log
        What it changes into.
    """

    dim: Dim
    is_log: bool
    can_switch: bool
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
    like: Switch | None = None,
) -> Switch:
    """Give an axis of a plot its scale, and return how it is switched.

    `renderers` are what it must have room for, by default all of the plot. It shares the ranges of
    the axis `like`, if there is one.
    """
    room: list[Model] | Literal["auto"] = [*renderers] if renderers else "auto"
    linear, log = (like.linear.range, like.log.range) if like else (_fitting(room), _fitting(room))
    switch = Switch(
        dim=dim,
        is_log=axis.is_log,
        can_switch=axis.can_switch,
        plot=plot,
        grid=plot.xgrid[0] if dim == "x" else plot.ygrid[0],
        glyphs=[(of.glyph, of.name) for of in properties],
        linear=State(
            scale=LinearScale(),
            range=linear,
            ticks=styled(LinearAxis(axis_label=axis.label)),
            properties=[of.linear for of in properties],
        ),
        log=State(
            scale=LogScale(),
            range=log,
            ticks=styled(LogAxis(axis_label=axis.label)),
            properties=[of.log for of in properties],
        ),
    )
    _set(switch, switch.log if axis.is_log else switch.linear)
    return switch


def _fitting(renderers: list[Model] | Literal["auto"]) -> DataRange1d:
    """Return a range that fits what is visible of some renderers."""
    return DataRange1d(only_visible=True, renderers=renderers)


def _set(switch: Switch, state: State) -> None:
    """Do in Python what `controls.log_switch` does in the browser."""
    plot, dim = switch.plot, switch.dim
    plot.update(**{f"{dim}_scale": state.scale, f"{dim}_range": state.range})
    plot.update(**{SIDES[dim]: [state.ticks]})
    switch.grid.axis = state.ticks
    for (glyph, name), value in zip(switch.glyphs, state.properties, strict=True):
        setattr(glyph, name, value)


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
