"""A panel in the page of the viewer: drawn once, then updated in place."""

from collections.abc import Callable
from html import escape

from bokeh.models import Column, Div, Row

from thimble_zarr.report.browser.draw import Drawn, draw, label_colors
from thimble_zarr.report.browser.links import Links
from thimble_zarr.report.figure import Figure, Panel

Prepare = Callable[[Drawn, Figure], None]
"""Adds to a drawn figure what a file cannot do: what a click and a brush lead to."""


class ShownPanel:
    """A place for a panel, empty at first.

    Its model has the name and the CSS class `name`. `of` is of what the panel that is shown was
    made.
    """

    def __init__(
        self, name: str, links: Links, prepare: Prepare, *, n_beside: int = 3, height: int = 260
    ) -> None:
        self._links, self._prepare = links, prepare
        self._n_beside, self._height = n_beside, height
        self._drawn: list[Drawn] = []
        self.panel: Panel | None = None
        self.of: object = None
        self.root = Column(name=name, css_classes=[name], sizing_mode="stretch_width")

    def show(self, panel: Panel) -> None:
        """Show a panel: in place of what is shown if it has the same layers, else drawn anew."""
        before, self.panel = self.panel, panel
        if before is None or not self._updated(panel):
            self._draw(panel)

    def clear(self) -> None:
        """Show nothing."""
        self.panel, self._drawn, self.root.children = None, [], []

    def _updated(self, panel: Panel) -> bool:
        if len(panel.figures) != len(self._drawn):
            return False
        try:
            for drawn, figure in zip(self._drawn, panel.figures, strict=True):
                drawn.update(figure)
                if drawn.plot.title is not None:
                    drawn.plot.title.text = figure.title
        except ValueError:
            return False
        return True

    def _draw(self, panel: Panel) -> None:
        colors = label_colors(panel.figures)
        self._drawn = [
            draw(figure, self._links, colors=colors, height=self._height)
            for figure in panel.figures
        ]
        for drawn, figure in zip(self._drawn, panel.figures, strict=True):
            self._prepare(drawn, figure)
        plots = [drawn.plot for drawn in self._drawn]
        rows = [
            Row(*plots[first : first + self._n_beside], sizing_mode="stretch_width")
            for first in range(0, len(plots), self._n_beside)
        ]
        note = f"<p class='note'>{escape(panel.note)}</p>" if panel.note else ""
        head = Div(text=f"<h2>{escape(panel.title)}</h2>{note}", sizing_mode="stretch_width")
        self.root.children = [head, *rows]
