"""A browser tab: the panels of a run, and beside them what was chosen in them.

Every model that a person or a test looks for has a name, which is also its CSS class:
`run` (Select, of several runs), `status` (Div: "recording, step N" or "ended, step N"), `group`
(Select), `step` (Slider), `finding` (Button: the first finding), `shown` (CheckboxGroup: which
panels), one Column for each panel (`step_size`), `inspector` (Tabs), and in its tabs those of
`search`, `detail`, `span`, and the panels at a step with `_at_step` behind their name.
"""

from functools import partial
from html import escape

import numpy as np
from bokeh.document import Document
from bokeh.events import SelectionGeometry, Tap
from bokeh.models import (
    BoxSelectTool,
    CheckboxGroup,
    Column,
    ColumnDataSource,
    Div,
    Model,
    Row,
    Slider,
    TabPanel,
    Tabs,
    TapTool,
)
from bokeh.models import Span as Rule

from thimble_zarr.errors import ThimbleError
from thimble_zarr.report.browser.controls import group_switch
from thimble_zarr.report.browser.draw import Drawn
from thimble_zarr.report.browser.links import linked
from thimble_zarr.report.figure import Figure, Panel
from thimble_zarr.report.panels.registry import PANELS
from thimble_zarr.report.view.background import Background
from thimble_zarr.report.view.detail import Detail
from thimble_zarr.report.view.live import Live, Snapshot
from thimble_zarr.report.view.moment import AT_STEPS, nearest, panels_at
from thimble_zarr.report.view.search import Search
from thimble_zarr.report.view.shown import ShownPanel
from thimble_zarr.report.view.span import Span

POLL_MS = 1_000
"""How often a tab asks whether more was committed."""

SCRUB_MS = 30
"""A slider that is dragged sends many steps: what is shown is the last of so long."""

N_SHOWN_FIRST = 4
"""Panels that are shown at first; the others are computed when they are wanted."""

TOKEN_TAB, SPAN_TAB, STEP_TAB = range(3)


class Page:
    """What a tab shows of one run.

    Parameters
    ----------
    doc
        The tab's document.
    live
        The run.
    snapshot
        What of it was committed by now.
    """

    def __init__(self, doc: Document, live: Live, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self._doc, self._live = doc, live
        run = snapshot.run
        self._group = run.groups[0]
        self.links = linked(run.groups, first=float(run.steps[0]), last=float(run.steps[-1]))
        self._cursor = Rule(dimension="height", line_color="#c5221f", line_dash="dotted")
        self.status = Div(name="status", css_classes=["status"], text=snapshot.in_words())
        self.background = Background(doc, self.fail)
        self.step = self._step_slider()
        self.panels = {make.__name__: self._place(make.__name__) for make in PANELS}
        self.at_step = {
            name: self._place(f"{name}_at_step", n_beside=1) for name in AT_STEPS
        }
        self.detail = Detail(lambda: self.snapshot, self._place("history", n_beside=1, height=190))
        self.search = Search(lambda: self.snapshot.tokens, self.detail.show)
        self.span = Span(
            lambda: self.snapshot,
            self.background,
            self._place("comparison", n_beside=1, height=220),
            self.choose_token,
        )
        self.choice = self._choice_of_panels()
        self.inspector = self._inspector()
        self.group = group_switch(self.links)
        self.group.update(name="group", css_classes=["group"])
        self.group.on_change("active", self._change_group)
        self._show_panels()

    # --- what a tab does

    def choose_token(self, position: int) -> None:
        """Show a token's history."""
        self.inspector.active = TOKEN_TAB
        self.detail.show(position)

    def choose_span(self, first: float, last: float) -> None:
        """List the tokens that changed regime in a span of steps."""
        self.inspector.active = SPAN_TAB
        self.span.choose(first, last)

    def choose_step(self, step: int) -> None:
        """Show the panels of single steps at a step, and zoom all axes of steps to it."""
        self.step.value = step
        width = max(10, (self.step.end - self.step.start) // 20)
        self.links.steps.update(
            start=max(self.step.start, step - width), end=min(self.step.end, step + width)
        )

    def follow(self) -> None:
        """Look whether there are more rows, and show them when they are summed up."""
        try:
            is_behind = self._live.is_behind()
        except (ThimbleError, OSError) as error:
            self.fail(error)
            return
        if is_behind:
            self.background.do("growth", self._live.advance, self._grow)

    def fail(self, error: Exception) -> None:
        """Show an error where the state of the run is shown."""
        self.status.text = f"<b class='error'>{escape(str(error) or repr(error))}</b>"

    def _grow(self, snapshot: Snapshot) -> None:
        """Show a run that has grown, all that is shown of it in place."""
        is_all_in_view = self.links.steps.end >= self.step.end
        self.snapshot = snapshot
        self.status.text = snapshot.in_words()
        last = snapshot.last_step
        self.step.end = max(last, 1)
        self.links.steps.bounds = (self.links.steps.bounds[0], last * 1.01)
        if is_all_in_view:
            self.links.steps.end = last * 1.01
        self.detail.follow()
        self.span.follow()
        self._show_panels()

    # --- panels

    def _place(self, name: str, **options: int) -> ShownPanel:
        return ShownPanel(name, self.links, self._prepare, **options)

    def _show_panels(self) -> None:
        """Compute the panels that are wanted, one after the other, and show them."""
        snapshot = self.snapshot
        for index, make in enumerate(PANELS):
            place = self.panels[make.__name__]
            place.root.visible = index in self.choice.active
            if place.root.visible and place.of is not snapshot:
                self.background.do(
                    make.__name__,
                    partial(snapshot.panel, make.__name__, make),
                    partial(self._show_panel, place, snapshot),
                )

    def _show_panel(self, place: ShownPanel, snapshot: Snapshot, panel: Panel | None) -> None:
        place.of = snapshot
        if panel is not None:
            place.show(panel)

    def _prepare(self, drawn: Drawn, figure: Figure) -> None:
        """Add to a drawn figure what a click and a brush lead to."""
        if drawn.points:
            drawn.plot.add_tools(TapTool(renderers=[*drawn.points]))
        for points in drawn.points:
            source = points.data_source
            source.selected.on_change("indices", partial(self._tap_point, source))
        if figure.x.is_step:
            drawn.plot.add_layout(self._cursor)
            drawn.plot.add_tools(BoxSelectTool(dimensions="width", renderers=[]))
            drawn.plot.on_event(SelectionGeometry, self._brush)

    def _tap_point(
        self, source: ColumnDataSource, attribute: str, old: list[int], new: list[int]
    ) -> None:
        if new:
            token = int(source.data["token"][new[0]])
            self.choose_token(int(np.searchsorted(self.snapshot.tokens.ids, token)))

    def _brush(self, event: SelectionGeometry) -> None:
        if event.final and event.geometry["type"] == "rect":
            self.choose_span(event.geometry["x0"], event.geometry["x1"])

    # --- a step

    def _step_slider(self) -> Slider:
        last = self.snapshot.last_step
        slider = Slider(
            name="step",
            css_classes=["step"],
            title="Step",
            start=int(self.snapshot.run.steps[0]),
            end=max(last, 1),
            value=last,
            step=1,
            sizing_mode="stretch_width",
        )
        slider.js_link("value", self._cursor, "location")
        slider.on_change("value", self._scrub)
        return slider

    def _scrub(self, attribute: str, old: float, new: float) -> None:
        """Show a step soon: a slider that is dragged asks for many, of which the last counts."""
        self.inspector.active = STEP_TAB
        if not self._is_scrubbing:
            self._is_scrubbing = True
            self._doc.add_timeout_callback(self._show_step, SCRUB_MS)

    _is_scrubbing = False

    def _show_step(self) -> None:
        self._is_scrubbing = False
        run = self.snapshot.run
        step = nearest(run, self.step.value)
        for panel in panels_at(run, step, self._group):
            self.at_step[panel.name].show(panel)

    def _change_group(self, attribute: str, old: int, new: int) -> None:
        self._group = self.snapshot.run.groups[new]
        if self.inspector.active == STEP_TAB:
            self._show_step()

    # --- layout

    def _choice_of_panels(self) -> CheckboxGroup:
        choice = CheckboxGroup(
            name="shown",
            css_classes=["shown"],
            labels=[make.__name__.replace("_", " ") for make in PANELS],
            active=[*range(min(N_SHOWN_FIRST, len(PANELS)))],
        )
        choice.on_change("active", lambda attribute, old, new: self._show_panels())
        return choice

    def _inspector(self) -> Tabs:
        tabs = Tabs(
            name="inspector",
            css_classes=["inspector"],
            sizing_mode="stretch_width",
            tabs=[
                TabPanel(
                    title="Token",
                    child=Column(self.search.root, self.detail.root, sizing_mode="stretch_width"),
                ),
                TabPanel(title="Span of steps", child=self.span.root),
                TabPanel(
                    title="Step",
                    child=Column(
                        *(place.root for place in self.at_step.values()),
                        sizing_mode="stretch_width",
                    ),
                ),
            ],
        )
        tabs.on_change("active", self._open_tab)
        return tabs

    def _open_tab(self, attribute: str, old: int, new: int) -> None:
        if new == STEP_TAB:
            self._show_step()

    def root(self, *beside_title: Model) -> Model:
        """Return all that the tab shows; `beside_title` comes first."""
        title = Div(text=f"<b>{escape(self.snapshot.run.store)}</b>", name="store")
        bar = Row(
            *beside_title,
            title,
            self.status,
            self.group,
            self.step,
            css_classes=["bar"],
            sizing_mode="stretch_width",
        )
        places = [place.root for place in self.panels.values()]
        body = Row(
            Column(Div(text="<b>Panels</b>"), self.choice, width=130),
            Column(*places, css_classes=["panels"], sizing_mode="stretch_width", styles=_SCROLLS),
            Column(
                self.inspector,
                sizing_mode="stretch_width",
                styles=_SCROLLS | {"flex": "0 0 40%"},
            ),
            sizing_mode="stretch_width",
        )
        return Column(bar, body, sizing_mode="stretch_width")


_SCROLLS = {"overflow-y": "auto", "max-height": "calc(100vh - 70px)"}
