"""Panels drawn with matplotlib: in a notebook, and as PNG files. No state of pyplot is touched."""

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from thimble_zarr.report.figure import (
    GRAY,
    PALETTE,
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
    label_colors,
)

NOTE = "#4a4f57"
"""The color of a note."""

COLORMAP = "viridis_r"


class Drawing(Picture):
    """A figure that a notebook shows by itself, though pyplot does not know it."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def draw(panel: Panel, *, group: str | None) -> Drawing:
    """Draw a panel.

    Parameters
    ----------
    panel
        What is drawn.
    group
        The group of tokens that is shown; with None only what is of no group.

    Returns
    -------
    matplotlib.figure.Figure
        All figures of the panel, and one legend.
    """
    drawing, places = _empty(len(panel.figures), has_same_axes=panel.has_same_axes)
    for ax in places[1:] if panel.has_same_axes else ():
        ax.sharex(places[0])
        ax.sharey(places[0])
    width, colors = drawing.get_figwidth(), label_colors(panel.figures)
    shown = [[of for of in figure.layers if of.group in (None, group)] for figure in panel.figures]
    entries = [
        _draw_figure(ax, figure, layers, colors)
        for ax, figure, layers in zip(places, panel.figures, shown, strict=True)
    ]
    looks = [{layer.label: layer.color for layer in layers} for layers in shown]
    is_shared = all(look == looks[0] for look in looks)
    if not is_shared:
        for ax, of in zip(places, entries, strict=True):
            part = ax.get_position().width
            _add_legend(ax, of, part * width, loc="upper left", bbox_to_anchor=(-0.02, -0.17))
    shared = entries[0] if entries and is_shared else {}
    _add_legend(drawing, shared, width, note=panel.note, loc="outside lower left")
    is_of_group = any(layer.group == group is not None for layers in shown for layer in layers)
    title = f"{panel.title} ({group})" if is_of_group else panel.title
    drawing.suptitle(_plain(title), x=0.01, ha="left", fontsize="x-large", weight="bold")
    return drawing


def _empty(n_figures: int, *, has_same_axes: bool) -> tuple[Drawing, list[Axes]]:
    """Return a drawing with empty axes, as many as there are figures."""
    if n_figures < 2:
        size = (9.0, 4.8 if n_figures else 1.2)
        drawing = Drawing(figsize=size, dpi=110, layout="constrained")
        return drawing, [drawing.add_subplot() for _ in range(n_figures)]
    n_columns = 2 if n_figures in (2, 4) else 3
    n_rows = -(-n_figures // n_columns)
    size = (0.8 + 4.2 * n_columns, 1 + 3.4 * n_rows)
    drawing = Drawing(figsize=size, dpi=110, layout="constrained")
    places: list[Axes] = []
    for at in range(n_figures):
        same = places[0] if has_same_axes and places else None
        places.append(drawing.add_subplot(n_rows, n_columns, 1 + at, sharex=same, sharey=same))
    return drawing, places


def _add_legend(
    on: Picture | Axes,
    entries: Mapping[str, Artist],
    width: float,
    *,
    note: str = "",
    **place: object,
) -> None:
    """Write a legend, and a note above it, in so many inches."""
    n_letters = int(16 * width)
    longest = 8 + max(map(len, entries), default=0)
    legend = on.legend(
        [*entries.values()],
        [*map(_plain, entries)],
        title=textwrap.fill(_plain(note), n_letters),
        ncols=max(1, n_letters // longest),
        alignment="left",
        frameon=False,
        fontsize="small",
        title_fontsize="small",
        **place,
    )
    legend.get_title().set_color(NOTE)


def write_png(panels: Iterable[Panel], folder: Path, *, group: str | None) -> list[Path]:
    """Write a file a panel, named by the panel, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for panel in panels:
        paths.append(folder / f"{panel.name}.png")
        draw(panel, group=group).savefig(paths[-1], dpi=150)
    return paths


def _plain(text: str) -> str:
    """Return text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")


def _draw_figure(
    ax: Axes, figure: Figure, layers: Sequence[Layer], colors: Mapping[str, str]
) -> dict[str, Artist]:
    """Draw what is shown of a figure, and return its entries of the legend."""
    ax.set_title(_plain(figure.title), fontsize="medium")
    ax.grid(color="#e6e6e6", linewidth=0.6)
    ax.set_axisbelow(True)
    right = ax.twinx() if figure.right is not None else ax
    entries: dict[str, Artist] = {}
    for layer in map(_positive, layers) if figure.y.is_log else layers:
        on = right if isinstance(layer, Line) and layer.on_right else ax
        artists = _draw_layer(on, layer, layer.color or colors.get(layer.label, GRAY))
        entries |= {label: artist for label, artist in artists.items() if label}
    if not layers:
        ax.text(0.5, 0.5, "nothing of this group", transform=ax.transAxes, ha="center", color=GRAY)
    _set_axis(ax, "x", figure.x)
    _set_axis(ax, "y", figure.y)
    if figure.right is not None:
        _set_axis(right, "y", figure.right)
    return entries


def _positive(layer: Layer) -> Layer:
    """Return a line or band without what has no place on a logarithmic axis."""
    match layer:
        case Line(y=y, low=low):
            y = np.where(y > 0, y, np.nan)
            return replace(layer, y=y, low=None if low is None else np.where(low > 0, low, y))
        case Band(low=low):
            return replace(layer, low=np.where(low > 0, low, np.nan))
    return layer


def _set_axis(ax: Axes, name: str, axis: Axis) -> None:
    high = getattr(ax.dataLim, f"interval{name}")[1]
    is_log = axis.is_log and high > 0 and np.isfinite(high)
    label = textwrap.fill(_plain(axis.label), 40)
    ax.set(**{f"{name}label": label, f"{name}scale": "log" if is_log else "linear"})
    if axis.is_step and not is_log:
        ax.margins(x=0.01)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    low, high = getattr(ax, f"get_{name}lim")()
    if name == "x" and is_log and high < 20 * low:
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))
        ax.xaxis.set_minor_locator(NullLocator())  # matplotlib labels them one over the other


def _draw_layer(ax: Axes, layer: Layer, color: str) -> dict[str, Artist]:
    """Draw a layer, and return the entries of the legend that it asks for."""
    match layer:
        case Line():
            artist = _draw_line(ax, layer, color)
        case Band(x=x, low=low, high=high):
            x, low, high = _wide(x, low, high)
            artist = ax.fill_between(x, low, high, color=color, alpha=0.3, linewidth=0)
        case Stack():
            return _draw_stack(ax, layer)
        case Image():
            _draw_image(ax, layer)
            return {}
        case Bars(edges=edges, heights=heights):
            artist = ax.stairs(heights, edges, fill=True, color=color, alpha=0.7)
        case Points(x=x, y=y, tokens=None):
            artist = ax.scatter(x, y, s=40, color=color, edgecolors="white", zorder=3)
        case Points(x=x, y=y):
            artist = ax.scatter(x, y, s=7, color=color, alpha=0.5, linewidths=0)
        case Rule(y=at) if at is not None:
            artist = ax.axhline(at, color=color, linestyle="--", linewidth=1.2)
        case Rule(x=at) if at is not None:
            artist = ax.axvline(at, color=color, linestyle="--", linewidth=1.2)
        case _:
            raise TypeError(f"a layer is one of figure.py, not {type(layer).__name__}")
    artist.set_label(layer.label)
    return {layer.label: artist}


def _draw_line(ax: Axes, line: Line, color: str) -> Artist:
    if line.low is not None and line.high is not None:
        x, low, high = _wide(line.x, line.low, line.high)
        ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    is_there = np.pad(np.isfinite(line.y), 1)
    is_alone = is_there[1:-1] & ~is_there[:-2] & ~is_there[2:]
    (artist,) = ax.plot(
        line.x,
        line.y,
        color=color,
        linewidth=1.4,
        linestyle="--" if line.is_dashed else "-",
        marker="." if is_alone.any() else "",
        markevery=is_alone,
    )
    return artist


def _wide(x: np.ndarray, *heights: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return an area that has a width, even of a single step."""
    if len(x) != 1:
        return x, *heights
    return x + np.array([-0.5, 0.5]), *(np.repeat(height, 2) for height in heights)


def _draw_stack(ax: Axes, stack: Stack) -> dict[str, Artist]:
    palette = cycle(PALETTE)
    colors = [stack.colors.get(label) or next(palette) for label in stack.heights]
    x, *heights = _wide(stack.x, *stack.heights.values())
    areas = ax.stackplot(x, *heights, colors=colors, linewidth=0)
    ax.margins(y=0)
    return dict(zip(stack.heights, areas, strict=True))


def _draw_image(ax: Axes, image: Image) -> None:
    values = np.ma.masked_invalid(image.values, copy=True)
    norm = Normalize()
    if image.is_log and (values > 0).any():
        positive = values[values > 0]
        norm = LogNorm(vmin=positive.min(), vmax=positive.max())
        values[values == 0] = positive.min() / 2
        values = np.ma.masked_less(values, 0)
    ax.grid(visible=False)
    artist = ax.imshow(
        values,
        cmap=colormaps[COLORMAP].with_extremes(under=STILL),
        norm=norm,
        aspect="auto",
        origin="lower",
        extent=(*image.x, *image.y),
    )
    ax.figure.colorbar(artist, ax=ax, pad=0.01, label=_plain(image.unit))
