"""A browser tab: the panels of a run, and beside them what was chosen in them.

Every model that a person or a test looks for has a name, which is also its CSS class: `run`
(Select, of several runs), `status` (Div: "recording, step N" or "ended, step N"), `group`
(RadioButtonGroup), `step` (Slider), `finding` (Button: to the first finding), `concerns` (Div: all
findings), `shown` (CheckboxGroup: which panels), a Column a panel (`step_size`), `inspector`
(Tabs), and in its tabs what `token_table.Search`, `detail` and `span` name, and panels at a step
(`phase_space_at_step`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from html import escape

import numpy as np
from bokeh.document import Document
from bokeh.events import Event, SelectionGeometry, Tap
from bokeh.models import BoxSelectTool, Column, ColumnDataSource, Row, TabPanel, Tabs, TapTool
from bokeh.models.annotations import Span as Rule
from bokeh.models.ui import UIElement
from bokeh.models.widgets import Button, CheckboxGroup, Div, Slider

from thimble_zarr.analysis.health.condition import Concern
from thimble_zarr.analysis.health.summarized import health
from thimble_zarr.errors import ThimbleError
from thimble_zarr.report.browser.controls import group_switch
from thimble_zarr.report.browser.draw import Drawn
from thimble_zarr.report.browser.links import linked
from thimble_zarr.report.figure import Image
from thimble_zarr.report.panels.registry import PANELS
from thimble_zarr.report.view.background import Background
from thimble_zarr.report.view.detail import Detail
from thimble_zarr.report.view.live import Live, Snapshot
from thimble_zarr.report.view.moment import AT_STEPS, nearest, panels_at
from thimble_zarr.report.view.shown import ShownPanel
from thimble_zarr.report.view.span import Span
from thimble_zarr.report.view.token_table import Search

SCRUB_MS = 30
"""A slider that is dragged sends many steps: the last of so many milliseconds is shown."""

N_SHOWN_FIRST = 4
"""Panels that are shown at first; the others are computed when they are wanted."""

TOKEN_TAB, SPAN_TAB, STEP_TAB = range(3)

_SCROLLS: dict[str, str | None] = {
    "overflow-y": "auto",
    "max-height": "calc(100vh - 60px)",
    "padding-right": "14px",
}


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
        self._is_scrubbing = self._is_growing = False
        self._concerns: tuple[Concern, ...] = ()
        steps = snapshot.run.steps
        self.links = linked(snapshot.run.groups, first=float(steps[0]), last=float(steps[-1]))
        self._cursor = Rule(dimension="height", line_color="#c5221f", line_dash="dotted")
        self.background = Background(doc, self.fail)
        self._make_controls()
        self.panels = {make.__name__: self._place(make.__name__, 3) for make in PANELS}
        self.at_step = {name: self._place(f"{name}_at_step", 1) for name in AT_STEPS}
        self.detail = Detail(lambda: self.snapshot, self._place("history", 1, height=190))
        self.search = Search(lambda: self.snapshot.tokens, self.choose_token)
        self.span = Span(
            lambda: self.snapshot,
            self.background,
            self._place("comparison", 1, height=220),
            self.choose_token,
        )
        self.inspector = _inspector(
            [self.search.root, self.detail.root],
            [self.span.root],
            [place.root for place in self.at_step.values()],
        )
        self.inspector.on_change("active", self._show_step_again)
        self._show_all()

    def _make_controls(self) -> None:
        """Make what is above and beside the panels."""
        last = self.snapshot.last_step
        self.status = Div(
            name="status", css_classes=["status"], text=escape(self.snapshot.in_words())
        )
        self.group = group_switch(self.links)
        self.group.update(name="group", css_classes=["group"])
        self.group.on_change("active", self._show_step_again)
        self.step = Slider(
            name="step",
            css_classes=["step"],
            title="Step",
            start=int(self.snapshot.run.steps[0]),
            end=max(last, 1),
            value=last,
            step=1,
            sizing_mode="stretch_width",
        )
        self.step.js_link("value", self._cursor, "location")
        self.step.on_change("value", self._scrub)
        self.finding = Button(
            name="finding", css_classes=["finding"], label="First finding", visible=False
        )
        self.finding.on_click(self.choose_first_finding)
        self.concerns = Div(name="concerns", css_classes=["concerns"], width=150)
        self.shown = CheckboxGroup(
            name="shown",
            css_classes=["shown"],
            labels=[make.__name__.replace("_", " ") for make in PANELS],
            active=[*range(min(N_SHOWN_FIRST, len(PANELS)))],
        )
        self.shown.on_change("active", lambda attr, old, new: self._show_panels())

    # What a person chooses.

    def choose_token(self, position: int) -> None:
        """Show a token's history."""
        self.inspector.active = TOKEN_TAB
        self._attempt(partial(self.detail.show, position))

    def choose_span(self, first: float, last: float) -> None:
        """List the tokens that changed regime in a span of steps."""
        self.inspector.active = SPAN_TAB
        self._attempt(partial(self.span.choose, first, last))

    def choose_first_finding(self) -> None:
        """Go to the step of the first finding, and zoom all axes of steps there."""
        if not self._concerns:
            return
        step = min(concern.step for concern in self._concerns)
        width = max(5.0, (self.step.end - self.step.start) / 20)
        start, end = max(self.step.start, step - width), min(self.step.end, step + width)
        self.links.steps.update(start=start, end=end)
        self.step.value = step

    def _scrub(self, attribute: str, old: float, new: float) -> None:
        """Show a step soon: a slider that is dragged asks for many, of which the last counts."""
        if not (self._is_scrubbing or self._is_growing):
            self._is_scrubbing = True
            self._doc.add_timeout_callback(self._stop_scrubbing, SCRUB_MS)

    def _stop_scrubbing(self) -> None:
        self._is_scrubbing = False
        if self.inspector.active == STEP_TAB:
            self._attempt(self._show_step)
        else:
            self.inspector.active = STEP_TAB  # which shows it

    def _show_step_again(self, attribute: str, old: object, new: object) -> None:
        self._attempt(self._show_step)

    def draw_ahead(self) -> None:
        """Draw a token and a step before anyone asks: from then on others take their place."""
        # What is done one after the other begins when the panels are there.
        self.background.do("token", lambda: self.detail.show_first, self._attempt)
        self.background.do("step", lambda: self._draw_step, self._attempt)

    def _show_step(self) -> None:
        """Show the panels of single steps, if they are looked at."""
        if self.inspector.active == STEP_TAB:
            self._draw_step()

    def _draw_step(self) -> None:
        run, step = self.snapshot.run, nearest(self.snapshot.run, self.step.value)
        for panel in panels_at(run, step, run.groups[self.group.active or 0]):
            self.at_step[panel.name].show(panel)

    def _attempt(self, do: Callable[[], bool | None]) -> bool:
        """Do something that reads the run, and return what it does; show why it cannot be done."""
        try:
            return bool(do())
        except (ThimbleError, OSError) as error:
            self.fail(error)
            return False

    # A run that grows.

    def follow(self) -> None:
        """Look whether there are more rows, and show them when they are summed up."""
        if self._attempt(self._live.is_behind):
            self.background.do("growth", self._live.advance, self._grow)

    def fail(self, error: Exception) -> None:
        """Show an error where the state of the run is shown."""
        self.status.text = f"<b class='error'>{escape(str(error) or repr(error))}</b>"

    def _grow(self, snapshot: Snapshot) -> None:
        """Show a run that has grown: all that is shown of it, in place."""
        run, steps = snapshot.run, self.links.steps
        first, last = map(float, run.steps[[0, -1]])
        whole_run = linked(run.groups, first=first, last=last).steps
        was_whole = (steps.start, steps.end) == steps.bounds
        steps.bounds = whole_run.bounds
        if was_whole:
            steps.update(start=whole_run.start, end=whole_run.end)
        self.snapshot = snapshot
        self.status.text = escape(snapshot.in_words())
        was_last = self.step.value == self.step.end
        self.step.end = max(snapshot.last_step, 1)
        if was_last:
            self._is_growing = True  # nobody moved the slider
            self.step.value = self.step.end
            self._is_growing = False
        self._attempt(self.detail.follow)
        self._attempt(self._show_step)
        self.span.follow()
        self._show_all()

    def _show_all(self) -> None:
        snapshot = self.snapshot
        self._show_panels()
        self.background.do(
            "health", lambda: health(snapshot.run.ds, snapshot.run.summary), self._show_concerns
        )

    def _show_concerns(self, concerns: tuple[Concern, ...]) -> None:
        self._concerns = concerns
        self.finding.visible = bool(concerns)
        if concerns:
            first = min(concerns, key=lambda concern: concern.step)
            self.finding.label = f"{len(concerns)} findings, first at step {first.step:,}"
            if len(concerns) == 1:
                self.finding.label = f"1 finding, at step {first.step:,}"
        self.concerns.text = "".join(
            f"<p><b>{escape(of.code)}</b> {escape(of.message)}</p>" for of in concerns
        )

    # Panels.

    def _place(self, name: str, n_beside: int, height: int = 260) -> ShownPanel:
        return ShownPanel(name, self.links, self._prepare, n_beside=n_beside, height=height)

    def _show_panels(self) -> None:
        """Compute the panels that are wanted, one after the other, and show them."""
        snapshot = self.snapshot
        for index, make in enumerate(PANELS):
            name, place = make.__name__, self.panels[make.__name__]
            place.root.visible = index in self.shown.active
            if place.root.visible and place.of is not snapshot:
                place.of = snapshot
                place.announce()
                self.background.do(name, partial(snapshot.panel, name, make), place.show)

    def _prepare(self, drawn: Drawn, place: ShownPanel, index: int) -> None:
        """Add to a drawn figure what a click and a brush lead to."""
        plot, figure = drawn.plot, place.figures[index]
        if drawn.points:
            plot.add_tools(TapTool(renderers=[*drawn.points]))
        for points in drawn.points:
            source = points.data_source
            assert isinstance(source, ColumnDataSource)
            source.selected.on_change("indices", partial(self._tap_point, source))
        if any(isinstance(layer, Image) and layer.tokens is not None for layer in figure.layers):
            plot.on_event(Tap, partial(self._tap_image, place, index))
        if figure.x.is_step:
            plot.add_layout(self._cursor)
            plot.add_tools(BoxSelectTool(dimensions="width", renderers=[]))
            plot.on_event(SelectionGeometry, self._brush)

    def _tap_point(
        self, source: ColumnDataSource, attribute: str, old: list[int], new: list[int]
    ) -> None:
        if new:
            self._choose_id(int(source.data["token"][new[0]]))

    def _tap_image(self, place: ShownPanel, index: int, event: Event) -> None:
        """Choose the token whose row of a picture was clicked, in the group that is shown."""
        assert isinstance(event, Tap)
        assert event.y is not None
        group = self.snapshot.run.groups[self.group.active or 0]
        for layer in place.figures[index].layers:
            if isinstance(layer, Image) and layer.tokens is not None and layer.group == group:
                share = (event.y - layer.y[0]) / (layer.y[1] - layer.y[0])
                row = int(np.floor(share * len(layer.tokens)))
                if 0 <= row < len(layer.tokens):
                    self._choose_id(int(layer.tokens[row]))

    def _choose_id(self, token: int) -> None:
        self.choose_token(int(np.searchsorted(self.snapshot.tokens.ids, token)))

    def _brush(self, event: Event) -> None:
        assert isinstance(event, SelectionGeometry)
        geometry = event.geometry
        if event.final and geometry is not None and geometry["type"] == "rect":
            self.choose_span(geometry["x0"], geometry["x1"])

    def root(self, title: UIElement | None = None) -> UIElement:
        """Return all that the tab shows; `title` comes first, by default the run's name."""
        name = Div(name="store", text=f"<b>{escape(self._live.name)}</b>")
        return _whole(
            [title or name, self.status, self.group, self.step, self.finding],
            [self.shown, self.concerns],
            [place.root for place in self.panels.values()],
            self.inspector,
        )


def _inspector(
    token: Sequence[UIElement], span: Sequence[UIElement], step: Sequence[UIElement]
) -> Tabs:
    """Return what shows what was chosen: a token, a span of steps, or a step."""
    tabs = {"Token": token, "Span of steps": span, "Step": step}
    return Tabs(
        name="inspector",
        css_classes=["inspector"],
        sizing_mode="stretch_width",
        tabs=[TabPanel(title=title, child=_column(children)) for title, children in tabs.items()],
    )


def _whole(
    bar: Sequence[UIElement],
    aside: Sequence[UIElement],
    panels: Sequence[UIElement],
    beside: UIElement,
) -> UIElement:
    """Return all of a tab: a bar, below it an aside, the panels, and what was chosen."""
    return _column(
        [
            Row(children=[*bar], css_classes=["bar"], sizing_mode="stretch_width"),
            Row(
                children=[
                    Column(children=[*aside], width=150, styles=_SCROLLS),
                    _column(panels, styles=_SCROLLS),
                    _column([beside], styles={**_SCROLLS, "flex": "0 0 40%"}),
                ],
                sizing_mode="stretch_width",
            ),
        ]
    )


def _column(children: Sequence[UIElement], styles: dict[str, str | None] | None = None) -> Column:
    return Column(children=[*children], sizing_mode="stretch_width", styles=styles or {})
