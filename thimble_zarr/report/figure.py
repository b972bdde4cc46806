"""Figures as data: what a panel shows, without a word of how it is drawn.

A panel (`panels/`) makes a `Figure` of a run; `browser/draw` draws it with Bokeh, for the report
and the viewer, and `pyplot` with matplotlib. So a panel is computed once and looks alike in both.

What is 0, negative or infinite has no place on a logarithmic axis: lines are interrupted there,
bands are left out, and bars begin at the lower edge.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis.

    Attributes
    ----------
    label
        What it shows, with its unit.
    is_log
        Whether it is logarithmic at first; the reader can switch.
    can_switch
        Whether linear and logarithmic both make sense.
    is_step
        Whether it is the step: such axes zoom together, and have one cursor.
    """

    label: str
    is_log: bool = False
    can_switch: bool = False
    is_step: bool = False


BLUE, ORANGE, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
"""Colors of lines (Okabe and Ito's): the color-blind tell them apart."""

PALETTE = (BLUE, ORANGE, GREEN, PINK, "#e69f00", "#56b4e9", "#5d3a9b", "#8c510a")
"""Colors of layers that have none of their own, one after the other."""

GRAY = "#8a8f98"
"""Of what is not in question: references, the learning rate."""

BLACK = "#000000"
"""Of what must be seen on everything else."""

REGIME_COLORS: Mapping[str, str] = {
    "early": "#e07b54",
    "midlife": "#f4c766",
    "late": "#6fb1dc",
    "frozen": "#dfe4ea",
    "not finite": "#444444",
}
"""From hot to cold, in every figure the same."""


def shade(color: str, share: float) -> str:
    """Return a color mixed with white, of which the share is 0 (none) to 1 (all)."""
    parts = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * share):02x}" for part in parts)


STILL = "#d5d8dd"
"""Of pixels that are 0 where colors are by the logarithm."""

STEP = Axis(label="step", is_step=True)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Something drawn in a figure.

    Attributes
    ----------
    label
        Its entry in the legend; none if empty.
    group
        The group of tokens that it is of, of which one is shown at a time; None if it is always
        shown.
    color
        `#rrggbb`, or None for the next one of the palette. Layers of one label share their color.
    """

    label: str = ""
    group: str | None = None
    color: str | None = None


@dataclass(frozen=True, kw_only=True)
class Line(Layer):
    """A line through points, float64, shape `(point,)`.

    Attributes
    ----------
    x, y
        Its points; where `y` is NaN it is interrupted.
    low, high
        Least and greatest value of the steps that each point stands for; None where each stands
        for one.
    is_dashed
        Whether it is a reference, not data.
    on_right
        Whether it belongs to the second axis, on the right.
    """

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    is_dashed: bool = False
    on_right: bool = False


@dataclass(frozen=True, kw_only=True)
class Band(Layer):
    """The area between two lines, shape `(point,)`."""

    x: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Stack(Layer):
    """Areas one on the other, from below; each of shape `(point,)`, by label."""

    x: np.ndarray
    heights: Mapping[str, np.ndarray]
    colors: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Image(Layer):
    """A picture of numbers: viridis reversed, so that blank looks like less than the least.

    Attributes
    ----------
    values
        Float32, shape `(row, column)`, the lowest row first; NaN is left blank, and 0 is grey where
        colors are by the logarithm. Each is the median
        of what the pixel covers.
    low, high
        Least and greatest of it, same shape; None where a pixel covers one number.
    x, y
        Where the picture begins and ends.
    unit
        What the numbers are.
    is_log
        Whether colors are by the logarithm.
    tokens
        The id of a token of each row, in the middle of what it covers, int64; None if rows are
        of no tokens.
    """

    values: np.ndarray
    x: tuple[float, float]
    y: tuple[float, float]
    unit: str
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    is_log: bool = False
    tokens: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Bars(Layer):
    """A histogram: `heights` of shape `(bin,)` between `edges` of shape `(bin + 1,)`."""

    edges: np.ndarray
    heights: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Points(Layer):
    """Points, each of a token.

    Attributes
    ----------
    x, y
        Where they are, shape `(point,)`.
    tokens
        The tokens' ids, int64, shape `(point,)`; None if the points are no tokens.
    """

    x: np.ndarray
    y: np.ndarray
    tokens: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Rule(Layer):
    """A straight line across the figure, at a value of one axis: give `x` or `y`.

    It is drawn dashed.
    """

    x: float | None = None
    y: float | None = None


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What is drawn between two axes.

    Attributes
    ----------
    title
        What is seen, in words; empty if the panel's title says it.
    x, y
        The axes; `right` is a second one for layers that say so.
    layers
        What is drawn, the lowest first.
    is_equal
        Whether a unit is as long on both axes.
    """

    title: str = ""
    x: Axis = STEP
    y: Axis
    right: Axis | None = None
    layers: Sequence[Layer]
    is_equal: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A question and the figures that answer it.

    Attributes
    ----------
    name
        The function in `thimble_zarr.plot` that makes it.
    title
        What it shows, in words.
    code
        The line of Python that makes it.
    figures
        One, or several side by side.
    note
        How to read it, in a sentence or two; empty if nothing needs saying.
    has_same_axes
        Whether all figures have the same ranges of x and y, those of what is shown, and zoom
        together.
    n_beside
        How many figures are beside each other; None if that does not matter.
    """

    name: str
    title: str
    code: str
    figures: Sequence[Figure]
    note: str = ""
    has_same_axes: bool = False
    n_beside: int | None = None


def label_colors(figures: Sequence[Figure]) -> dict[str, str]:
    """Return the color of each label, the same in all figures of a panel and for all groups."""
    colors: dict[str, str] = {}
    palette = cycle(PALETTE)
    for layer in (layer for figure in figures for layer in figure.layers):
        is_reference = isinstance(layer, Rule) or (isinstance(layer, Line) and layer.is_dashed)
        if layer.label not in colors and not isinstance(layer, Stack | Image):
            colors[layer.label] = layer.color or (GRAY if is_reference else next(palette))
    return colors
