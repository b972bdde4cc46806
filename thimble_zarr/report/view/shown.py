"""A panel in the page of the viewer: drawn once, then updated in place."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from html import escape

from bokeh.core.properties import value
from bokeh.models import Column, Row
from bokeh.models.annotations import Legend, LegendItem, Title
from bokeh.models.widgets import Div

from thimble_zarr.report.browser.controls import log_switch
from thimble_zarr.report.browser.draw import Drawn, draw
from thimble_zarr.report.browser.links import Links
from thimble_zarr.report.figure import Figure, Panel, label_colors

WIDTH = 660
"""Pixels of a figure that has no other beside it, about."""


class ShownPanel:
    """A place for a panel, empty at first.

    Its model has the name and the CSS class `name`.

    Parameters
    ----------
    prepare
        Adds to a drawn figure what a file cannot do: what a click and a brush lead to. It gets the
        figure, this place, and the figure's index in `figures`.
    n_beside
        Figures beside one another.
    """

    def __init__(
        self,
        name: str,
        links: Links,
        prepare: Callable[[Drawn, "ShownPanel", int], None],
        *,
        n_beside: int,
        height: int,
    ) -> None:
        self._links, self._prepare = links, prepare
        self._n_beside, self._height = n_beside, height
        self._drawn: list[Drawn] = []
        self.figures: Sequence[Figure] = ()
        self.of: object = None
        """What the panel was made of; whoever shows it notes so."""
        self._head = Div(sizing_mode="stretch_width")
        self.root = Column(name=name, css_classes=[name], sizing_mode="stretch_width")

    def announce(self) -> None:
        """Say that a panel is being computed, where there is none yet."""
        if not self._drawn:
            self._head.text = "Computing ..."
            self.root.children = [self._head]

    def show(self, panel: Panel | None) -> None:
        """Show a panel: in place of what is shown if it has the same layers, else drawn anew."""
        figures = () if panel is None else panel.figures
        before, self.figures = self.figures, figures
        if panel is None:
            self._drawn, self.root.children = [], []
        elif self._update(before):
            self._head.text = _in_words(panel)
        else:
            self._draw(panel)

    def _update(self, before: Sequence[Figure]) -> bool:
        """Replace the numbers of what is drawn, and what is written; return whether that can be."""
        if not before or [*map(_shape, before)] != [*map(_shape, self.figures)]:
            return False
        try:
            for drawn, figure, old in zip(self._drawn, self.figures, before, strict=True):
                drawn.update(figure)
                if isinstance(drawn.plot.title, Title):
                    drawn.plot.title.text = figure.title
                if (labels := _labels(figure)) != _labels(old):
                    _rename(drawn, dict(zip(_labels(old), labels, strict=True)))
        except ValueError:
            return False
        return True

    def _draw(self, panel: Panel) -> None:
        doc = self.root.document
        # Else Bokeh looks through all that a document has whenever something is added to it.
        with nullcontext() if doc is None else doc.models.freeze():
            self._draw_anew(panel)

    def _draw_anew(self, panel: Panel) -> None:
        colors = label_colors(panel.figures)
        width = WIDTH // max(1, min(self._n_beside, len(panel.figures)))
        self._drawn = [
            draw(figure, self._links, colors=colors, height=self._height, width=width)
            for figure in panel.figures
        ]
        for index, drawn in enumerate(self._drawn):
            self._prepare(drawn, self, index)
        plots = [drawn.plot for drawn in self._drawn]
        rows = [
            Row(children=[*plots[first : first + self._n_beside]], sizing_mode="stretch_width")
            for first in range(0, len(plots), self._n_beside)
        ]
        self._head.text = _in_words(panel)
        switches = [switch for drawn in self._drawn for switch in drawn.switches]
        logs = [log_switch(switches)] if switches else []
        self.root.children = [Row(children=[self._head, *logs], sizing_mode="stretch_width"), *rows]


def _in_words(panel: Panel) -> str:
    return f"<h3 {_CLOSE}>{escape(panel.title)}</h3><p {_CLOSE}>{escape(panel.note)}</p>"


_CLOSE = "style='margin: 4px 0'"


def _shape(figure: Figure) -> tuple[object, ...]:
    """Return what must be the same for a figure to take the place of another."""
    layers = [(type(layer), layer.group, layer.color) for layer in figure.layers]
    return len(_labels(figure)), figure.x.label, figure.y.label, *layers


def _labels(figure: Figure) -> list[str]:
    return [*dict.fromkeys(layer.label for layer in figure.layers)]


def _rename(drawn: Drawn, names: dict[str, str]) -> None:
    """Give the entries of the legend other labels."""
    for legend in drawn.plot.above:
        for item in legend.items if isinstance(legend, Legend) else ():
            if isinstance(item, LegendItem):
                label = str(getattr(item.label, "value", item.label))
                item.label = value(names.get(label, label))
