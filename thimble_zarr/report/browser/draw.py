"""A figure drawn with Bokeh, for the report and for the viewer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from bokeh.models import (
    BoxZoomTool,
    CDSView,
    ColorBar,
    ColumnDataSource,
    ContinuousColorMapper,
    DataRange1d,
    GlyphRenderer,
    Legend,
    LegendItem,
    LinearAxis,
    LinearColorMapper,
    LinearScale,
    LogAxis,
    LogColorMapper,
    LogScale,
    Range1d,
    Title,
)
from bokeh.models import (
    Line as LineGlyph,
)
from bokeh.palettes import viridis
from bokeh.plotting import figure as Plot

from thimble_zarr.report.browser.columns import Table, color_scale, tables_of
from thimble_zarr.report.browser.cursor import follow_mouse
from thimble_zarr.report.browser.glyphs import N_COLORS, Glyphs, glyphs_of
from thimble_zarr.report.browser.hover import hover_tool
from thimble_zarr.report.browser.links import Links
from thimble_zarr.report.browser.scales import Dim, Switch, set_scale, styled
from thimble_zarr.report.figure import (
    Axis,
    Bars,
    Figure,
    Image,
    Line,
    Panel,
    Points,
    Stack,
    label_colors,
)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A figure as Bokeh has it.

    Attributes
    ----------
    plot
        What is laid out.
    sources
        The numbers, a source for each table of the figure (`columns.tables_of`).
    points
        What draws points of tokens: the source of each has a column `token`.
    axes
        How its axes become linear or logarithmic; that of steps does not.
    colors
        What the colors of images mean: its `low` and `high`.
    """

    plot: Plot
    sources: Sequence[ColumnDataSource]
    points: Sequence[GlyphRenderer]
    axes: Mapping[Dim, Switch]
    colors: ContinuousColorMapper

    @property
    def switches(self) -> list[Switch]:
        """The axes that the reader may switch (`controls.log_switch`)."""
        return [of for of in self.axes.values() if of.can_switch]

    def update(self, figure: Figure) -> None:
        """Replace the numbers in place.

        Raises
        ------
        ValueError
            If the figure has other layers than the one that was drawn: then draw it anew.
        """
        tables = tables_of(figure)
        if [{*of.columns} for of in tables] != [{*of.data} for of in self.sources]:
            raise ValueError("the figure has other layers than the one that was drawn")
        for source, table in zip(self.sources, tables, strict=True):
            source.data = {**table.columns}
        of = color_scale(figure.layers)
        self.colors.update(low=of.low, high=of.high)


def draw_panel(panel: Panel, links: Links, *, height: int = 300) -> list[Drawn]:
    """Draw the figures of a panel, each label in one color.

    Parameters
    ----------
    panel
        What is drawn.
    links
        What its figures share with the others of the page.
    height
        Height of each in pixels; they are as wide as the places where they are put.
    """
    width = 1340 // max(1, n_beside(panel)) - 80
    colors, drawn = label_colors(panel.figures), list[Drawn]()
    for figure in panel.figures:
        like = drawn[0] if drawn and panel.has_same_axes else None
        drawn.append(draw(figure, links, colors=colors, height=height, width=width, like=like))
    _align([of.plot for of in drawn])
    return drawn


def _align(plots: Sequence[Plot]) -> None:
    """Have figures beside each other begin and end at the same heights."""
    height = max((plot.height for plot in plots), default=0)
    top = max((_top(plot) for plot in plots), default=0)
    for plot in plots:
        plot.update(height=height, min_border_top=top)


def _top(plot: Plot) -> int:
    """Return how many pixels the title and the legends of a figure need."""
    legends = [of for of in plot.above if isinstance(of, Legend)]
    n_rows = max((-(-len(of.items) // int(of.ncols)) for of in legends), default=0)
    return _TITLE_HEIGHT * bool(plot.title.visible) + _ENTRY_HEIGHT * n_rows + 4 * bool(legends)


def n_beside(panel: Panel) -> int:
    """Return how many figures of a panel are shown beside each other."""
    n_figures = len(panel.figures)
    if panel.n_beside is not None:
        return panel.n_beside
    return n_figures if n_figures < 4 else 2 if n_figures == 4 else 3


def draw(
    figure: Figure,
    links: Links,
    *,
    colors: Mapping[str, str] | None = None,
    height: int = 300,
    width: int = 400,
    like: Drawn | None = None,
) -> Drawn:
    """Draw a figure.

    Parameters
    ----------
    figure
        What is drawn.
    links
        What it shares with the others of the page.
    colors
        The color of each label (`figure.label_colors`), by default of this figure alone.
    height
        Height in pixels.
    width
        Pixels that it has room for at least. It is as wide as the place where it is put.
    like
        What it shares the ranges of its axes with.
    """
    plot, mapper = _plot(figure, links, height), _color_mapper(figure)
    colors = label_colors([figure]) if colors is None else colors
    tables = tables_of(figure)
    sources = [ColumnDataSource({**table.columns}) for table in tables]
    at = {i: source for source, of in zip(sources, tables, strict=True) for i in of.layers}
    drawn = [glyphs_of(plot, i, layer, at[i], colors) for i, layer in enumerate(figure.layers)]
    views = {source: CDSView() for source in sources}  # else each renderer has one of its own
    for layer, glyphs in zip(figure.layers, drawn, strict=True):
        for renderer in glyphs.renderers:
            renderer.view = views[renderer.data_source]
            _assign(renderer, layer.group, links)
    is_met = [isinstance(layer, Image | Points) for layer in figure.layers]
    for source, table in zip(sources, tables, strict=True):
        first = table.layers[0]
        target = _hover_target(plot, figure, table, source, drawn)
        if target is not None and (is_met[first] or not any(is_met)):
            _assign(target, figure.layers[first].group, links)
            plot.add_tools(hover_tool(figure, table, target, mapper, links.texts))
    _add_legends(plot, figure, drawn, links, width)
    if any(isinstance(layer, Image) for layer in figure.layers):
        _add_color_bar(plot, figure, mapper)
    is_token = [isinstance(of, Points) and of.tokens is not None for of in figure.layers]
    return Drawn(
        plot=plot,
        sources=sources,
        points=[of.renderers[0] for of, yes in zip(drawn, is_token, strict=True) if yes],
        axes=_set_scales(plot, figure, drawn, like),
        colors=mapper,
    )


def _plot(figure: Figure, links: Links, height: int) -> Plot:
    """Return an empty plot with the axes of a figure."""
    plot = Plot(
        height=height,
        sizing_mode="stretch_width",
        x_range=_x_range(figure, links),
        y_range=DataRange1d(only_visible=True),
        x_axis_label=figure.x.label,
        tools="pan,wheel_zoom,reset,save",
        active_drag=None,
        window_axis="x" if figure.x.is_step else "none",
    )
    zoom = BoxZoomTool(dimensions="width" if figure.x.is_step else "both")
    plot.add_tools(zoom)
    if figure.x.is_step:
        follow_mouse(plot, links.cursor)
    plot.toolbar.update(logo=None, autohide=True, active_drag=zoom)
    plot.title = Title(
        text=figure.title,
        visible=bool(figure.title),
        text_font_size="13px",
        text_font_style="normal",
        text_color="#3c4043",
    )
    plot.update(outline_line_color=None, min_border_right=16, match_aspect=figure.is_equal)
    plot.grid.grid_line_color = "#eceff1"
    if figure.right is not None:
        _add_right_axis(plot, figure.right)
    return plot


def _x_range(figure: Figure, links: Links) -> Range1d | DataRange1d:
    """Return what is in view: of a histogram all steps, as single ones tell nothing."""
    if not figure.x.is_step:
        return DataRange1d(only_visible=True)
    if any(isinstance(layer, Bars) for layer in figure.layers):
        return Range1d(start=links.steps.start, end=links.steps.end, bounds=links.steps.bounds)
    return links.steps


def _add_right_axis(plot: Plot, axis: Axis) -> None:
    plot.extra_y_ranges["right"] = DataRange1d(only_visible=True)
    plot.extra_y_scales["right"] = LogScale() if axis.is_log else LinearScale()
    kind = LogAxis if axis.is_log else LinearAxis
    plot.add_layout(styled(kind(y_range_name="right", axis_label=axis.label)), "right")


def _color_mapper(figure: Figure) -> ContinuousColorMapper:
    """Return what the colors of a figure's images mean."""
    scale = color_scale(figure.layers)
    kind = LogColorMapper if scale.is_log else LinearColorMapper
    return kind(palette=viridis(N_COLORS)[::-1], low=scale.low, high=scale.high)


def _assign(renderer: GlyphRenderer | Legend, group: str | None, links: Links) -> None:
    """Have something drawn only while its group is shown."""
    if group is not None:
        renderer.group = links.groups[group]
        renderer.visible = links.groups[group].visible


def _hover_target(
    plot: Plot, figure: Figure, table: Table, source: ColumnDataSource, drawn: Sequence[Glyphs]
) -> GlyphRenderer | None:
    """Return what the mouse is over where the numbers of a table are shown.

    Layers of one x are joined by a line that nobody sees, so that one tooltip tells of all.
    """
    first = table.layers[0]
    if f"y{first}" in table.columns or isinstance(figure.layers[first], Image):
        return drawn[first].renderers[-1]
    edges = [name for name in table.columns if name.startswith(("high", "edge"))]
    if edges:
        return plot.add_glyph(source, LineGlyph(x="x", y=edges[-1], line_alpha=0))
    return None


def _entries(
    figure: Figure, drawn: Sequence[Glyphs], group: str | None
) -> dict[str, GlyphRenderer]:
    """Return what shows how something is drawn while a group is shown, by its name."""
    entries: dict[str, GlyphRenderer] = {}
    for layer, glyphs in zip(figure.layers, drawn, strict=True):
        if layer.group in (None, group):
            for label, of in glyphs.entries.items():
                entries.setdefault(label, of)
    return entries


def _entries_beside(labels: Sequence[str], width: int) -> int:
    """Return how many entries of a legend there is room for beside each other."""
    longest = max(map(len, labels))
    return max(1, min(len(labels), int(width / (5.4 * longest + 32))))


def _add_legends(
    plot: Plot, figure: Figure, drawn: Sequence[Glyphs], links: Links, width: int
) -> None:
    """Add a legend, or one for each group if they have other entries."""
    groups: Sequence[str | None]
    groups = [*dict.fromkeys(of.group for of in figure.layers if of.group is not None)] or [None]
    legends, n_rows = [_entries(figure, drawn, group) for group in groups], 1
    if all([*entries] == [*legends[0]] for entries in legends):  # one does for all
        groups = [None]
    for group, entries in zip(groups, legends, strict=False):
        if entries:
            n_columns = _entries_beside([*entries], width)
            legend = Legend(
                items=[LegendItem(label=label, renderers=[of]) for label, of in entries.items()],
                orientation="horizontal",
                ncols=n_columns,
                border_line_color=None,
                label_text_font_size="11px",
                label_text_color="#3c4043",
                label_standoff=4,
                label_height=14,
                glyph_width=16,
                glyph_height=12,
                margin=2,
                padding=2,
                spacing=6,
            )
            _assign(legend, group, links)
            plot.add_layout(legend, "above")
            n_rows = max(n_rows, -(-len(entries) // n_columns))
    plot.height += _ENTRY_HEIGHT * (n_rows - 1)


_TITLE_HEIGHT = 22
"""Pixels of a title."""

_ENTRY_HEIGHT = 20
"""Pixels of a line of a legend, of which what is drawn is not to be made lower."""


def _add_color_bar(plot: Plot, figure: Figure, mapper: ContinuousColorMapper) -> None:
    image = next(layer for layer in figure.layers if isinstance(layer, Image))
    bar = ColorBar(
        color_mapper=mapper,
        width=12,
        padding=8,
        major_label_text_font_size="11px",
        border_line_color=None,
    )
    plot.add_layout(bar, "right")
    title = Title(
        text=f"color: {image.unit}",
        align="right",
        text_font_size="11px",
        text_font_style="normal",
        text_color="#3c4043",
    )
    plot.add_layout(title, "above")


def _set_scales(
    plot: Plot, figure: Figure, drawn: Sequence[Glyphs], like: Drawn | None
) -> dict[Dim, Switch]:
    """Make axes linear or logarithmic, and return how they are switched."""
    switches: dict[Dim, Switch] = {}
    others = like.axes if like is not None else {}
    if figure.x.is_step:
        styled(plot.xaxis[0])
    else:
        switches["x"] = set_scale(plot, "x", figure.x, like=others.get("x"))
    properties = [of for glyphs in drawn for of in glyphs.log_properties]
    on_right = [isinstance(layer, Line) and layer.on_right for layer in figure.layers]
    sides: dict[bool, list[GlyphRenderer]] = {True: [], False: []}
    for glyphs, is_right in zip(drawn, on_right, strict=True):
        sides[is_right] += glyphs.renderers
    if figure.right is not None:
        plot.extra_y_ranges["right"].update(renderers=sides[True])
    left = sides[False] if figure.right is not None else None
    switches["y"] = set_scale(plot, "y", figure.y, properties, left, like=others.get("y"))
    _give_room(plot, figure)
    return switches


def _give_room(plot: Plot, figure: Figure) -> None:
    """Make ranges end with pictures and bars, and show what is everywhere the same."""
    if any(isinstance(layer, Image | Stack | Bars) for layer in figure.layers):
        for of in (plot.x_range, plot.y_range):
            if isinstance(of, DataRange1d):
                of.range_padding = 0
    for on_right, of in ((False, plot.y_range), (True, plot.extra_y_ranges.get("right"))):
        values = [
            layer.y[np.isfinite(layer.y)]
            for layer in figure.layers
            if isinstance(layer, Line) and layer.on_right == on_right
        ]
        most = max((float(np.abs(of).max()) for of in values if of.size), default=0.0)
        if of is not None and most > 0:
            of.default_span = 2 * most
