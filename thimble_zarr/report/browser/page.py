"""A page of panels as one HTML file, which needs nothing else: no server, no network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files

from bokeh import __version__ as bokeh_version
from bokeh.core.json_encoder import serialize_json
from bokeh.core.serialization import Serializer
from bokeh.core.types import ID
from bokeh.document.json import DocJson
from bokeh.embed.elements import script_for_render_items
from bokeh.embed.util import RenderItem
from bokeh.embed.wrappers import wrap_in_script_tag
from bokeh.models import Model
from bokeh.resources import Resources
from bokeh.util.serialization import make_globally_unique_css_safe_id
from jinja2 import Environment

from thimble_zarr import __version__
from thimble_zarr.report.browser.controls import follow_group, group_switch, log_switch, zoom_switch
from thimble_zarr.report.browser.draw import draw_panel, n_beside
from thimble_zarr.report.browser.links import Links, linked
from thimble_zarr.report.figure import Figure, Image, Panel

Table = Sequence[Sequence[str]]
"""Rows of cells, the first with the columns' names."""

HEIGHTS = (330, 280)
"""Pixels of a figure that is alone in a panel, and of one beside others."""


@dataclass(frozen=True)
class Verdict:
    """What a check found of some tokens: whether rows follow, and the same in words."""

    holds: bool
    text: str
    findings: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Header:
    """What is told of a run before its panels.

    Attributes
    ----------
    name
        The run's.
    verdicts
        What was checked, and found.
    concerns
        What no fault makes but its owner wants to know: a name, and the same in words. None if
        nobody looked.
    facts
        What is told of it, by name.
    table, caption
        A table, and what it shows.
    """

    name: str
    verdicts: Sequence[Verdict]
    concerns: Sequence[tuple[str, str]] | None
    facts: Mapping[str, str]
    table: Table
    caption: str


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The steps of a page: first, last, and of groups by when the median row froze."""

    first: float
    last: float
    freezing: Mapping[str, float] = field(default_factory=dict)

    def spans(self, group: str | None) -> dict[str, tuple[float, float]]:
        """Return what the reader can zoom to while a group is shown.

        Around the freezing nothing is to be seen that the last steps do not show, if it is there.
        """
        whole = max(self.last - self.first, 1)
        margin, tenth = whole / 100, whole / 10
        spans = {
            "all": (self.first - margin, self.last + margin),
            "first 10 %": (self.first - margin / 10, self.first + tenth),
        }
        at = self.freezing.get(group or "")
        if at is not None and self.first + tenth < at < self.last - tenth:
            spans["around the freezing"] = (at - tenth, at + tenth)
        return {**spans, "last 10 %": (self.last - tenth, self.last + margin / 10)}


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page of which only the headers are missing.

    Attributes
    ----------
    variables
        What the template takes besides.
    """

    variables: Mapping[str, object]

    def html(self, headers: Sequence[Header]) -> str:
        """Return it as HTML, with what is told first of each run."""
        environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string((_HERE / "page.html.jinja").read_text("utf-8"))
        page: str = template.render(self.variables, headers=headers)
        return page


_HERE = files("thimble_zarr.report.browser")


def as_page(
    title: str,
    panels: Sequence[Panel],
    *,
    groups: Sequence[str],
    steps: Steps,
    texts: Mapping[int, str] | None = None,
) -> Page:
    """Return a page of panels.

    Parameters
    ----------
    title
        What it is of.
    panels
        What is shown, in this order; those without figures are listed at the end.
    groups
        The groups of tokens among which the reader chooses. The first is shown.
    steps
        The steps of the runs.
    texts
        Of tokens by id, if they are known.
    """
    links = linked(groups, first=steps.first, last=steps.last, texts=texts)
    controls = _controls(links, steps)
    models: list[Model] = [model for _, model in controls]
    sections = []
    for panel in panels:
        if panel.figures:
            section, of_panel = _section(panel, links)
            sections.append(section)
            models += of_panel
    scripts = Resources(mode="inline", components=["bokeh", "bokeh-widgets"])
    drawing, roots = _scripts(models)
    return Page(
        variables={
            "title": title,
            "css": (_HERE / "page.css").read_text("utf-8"),
            "bokeh_css": scripts.render_css(),
            "bokeh_js": scripts.render_js(),
            "controls": [{"label": label, "name": model.name} for label, model in controls],
            "sections": sections,
            "empty": [panel for panel in panels if not panel.figures],
            "version": __version__,
            "roots": roots,
            "plot_script": drawing,
        }
    )


def _scripts(models: Sequence[Model]) -> tuple[str, Mapping[str, Mapping[str, str]]]:
    """Return the models as a script that draws them, and where, by name: as Bokeh's `file_html`.

    That takes twice as long, for it goes through all models four times more: it puts them into a
    document, validates them, asks which of Bokeh's scripts they need, and looks for callbacks in
    Python.
    """
    of = DocJson(version=bokeh_version, roots=Serializer(deferred=False).encode([*models]))
    text = escape(serialize_json({_DOCUMENT: of}), quote=False)
    places = {model: make_globally_unique_css_safe_id() for model in models}
    at = make_globally_unique_css_safe_id()
    draw = script_for_render_items(at, [RenderItem(_DOCUMENT, roots=places)])
    scripts = wrap_in_script_tag(text, "application/json", at) + wrap_in_script_tag(draw)
    return scripts, {str(of.name): {"id": of.id, "elementid": places[of]} for of in models}


_DOCUMENT = ID("figures")
"""What the only document of a page is called in it."""


def _controls(links: Links, steps: Steps) -> list[tuple[str, Model]]:
    """Return what is at the top of the page while it is scrolled, with what it is for."""
    controls: list[tuple[str, Model]] = []
    group = group_switch(links) if len(links.groups) > 1 else None
    if group is not None:
        group.name = "group"
        controls.append(("tokens", group))
    spans = [steps.spans(of) for of in links.groups] or [steps.spans(None)]
    zoom = zoom_switch(links, spans)
    zoom.name = "zoom"
    if group is not None:
        follow_group(zoom, group, spans)
    return [*controls, ("steps", zoom)]


def _section(panel: Panel, links: Links) -> tuple[Mapping[str, object], list[Model]]:
    """Return a panel as the template takes it, and its models, which it names."""
    drawn = draw_panel(panel, links, height=HEIGHTS[len(panel.figures) > 1])
    models: list[Model] = []
    figures = []
    for k, (figure, of) in enumerate(zip(panel.figures, drawn, strict=True)):
        of.plot.name = f"{panel.name}-{k}"
        figures.append({"name": of.plot.name, "alt": _in_words(panel, figure)})
        models.append(of.plot)
    section = {
        "id": panel.name,
        "title": panel.title,
        "note": panel.note,
        "code": panel.code.splitlines(),
        "figures": figures,
        "n_beside": n_beside(panel),
    }
    if switches := [switch for of in drawn for switch in of.switches]:
        toggle = log_switch(switches)
        toggle.name = f"{panel.name}-log"
        section["switch"] = toggle.name
        models.append(toggle)
    return section, models


def _in_words(panel: Panel, figure: Figure) -> str:
    """Return what a figure shows, for those who do not see it."""
    title = f"{panel.title}, {figure.title}" if figure.title else panel.title
    labels = [*dict.fromkeys(layer.label for layer in figure.layers if layer.label)]
    labels += [layer.unit for layer in figure.layers[:1] if isinstance(layer, Image)]
    shown = f": {', '.join(labels)}" if labels else ""
    return f"{title}. {figure.y.label} by {figure.x.label}{shown}"
