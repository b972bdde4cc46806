"""What a browser opens: a page of a run, and of several the choice of one."""

from collections.abc import Callable, Sequence

from bokeh.document import Document
from bokeh.models import Model
from bokeh.models.widgets import Div, Select
from jinja2 import Template

from thimble_zarr.report.view.background import Background
from thimble_zarr.report.view.live import Live, Snapshot
from thimble_zarr.report.view.page import Page

POLL_MS = 1_000
"""How often a tab asks whether more was committed."""


def application(lives: Sequence[Live]) -> Callable[[Document], None]:
    """Return what fills the document of a new tab: the first run, and a choice among all."""

    def build(doc: Document) -> None:
        _Tab(doc, lives).open(lives[0])

    return build


PAGE = """
{% extends base %}
{% block preamble %}
<link rel="icon" href="data:,">
<style>
  html { font-family: system-ui, sans-serif; }
  body { margin: 0 8px; }
</style>
{% endblock %}
"""
"""The page around the models. Without an icon of its own a browser asks for one elsewhere."""


class _Tab:
    """A tab of the browser, which shows one run after the other."""

    def __init__(self, doc: Document, lives: Sequence[Live]) -> None:
        self._doc, self._lives = doc, lives
        self._page: Page | None = None
        self._background = Background(doc, self._fail)
        doc.title = "thimble-zarr"
        doc.template = Template(PAGE)
        doc.add_periodic_callback(self._follow, POLL_MS)

    def open(self, live: Live) -> None:
        """Show a run, at once if it was summed up, else when it is."""
        self._page = None
        if live.is_ready:
            self._show(live, live.snapshot)
            return
        self._replace(Div(name="status", text=f"Summing up {live.name} ..."))
        self._background.do("open", live.advance, lambda snapshot: self._show(live, snapshot))

    def _show(self, live: Live, snapshot: Snapshot) -> None:
        self._page = page = Page(self._doc, live, snapshot)
        names: list[str | tuple[object, str]] = [
            (str(index), other.name) for index, other in enumerate(self._lives)
        ]
        choice = Select(
            name="run",
            css_classes=["run"],
            options=names,
            value=str(self._lives.index(live)),
        )
        choice.on_change("value", lambda attribute, old, new: self.open(self._lives[int(new)]))
        self._replace(page.root(choice if len(names) > 1 else None))
        page.draw_ahead()

    def _replace(self, *roots: Model) -> None:
        self._doc.clear()
        for root in roots:
            self._doc.add_root(root)

    def _follow(self) -> None:
        if self._page is not None:
            self._page.follow()

    def _fail(self, error: Exception) -> None:
        self._replace(Div(name="status", text=str(error) or repr(error)))
