"""Where everything is in a tab."""

from collections.abc import Sequence

from bokeh.models import Column, Row, TabPanel, Tabs
from bokeh.models.ui import UIElement

TOKEN_TAB, SPAN_TAB, STEP_TAB = range(3)

_SCROLLS: dict[str, str | None] = {"overflow-y": "auto", "max-height": "calc(100vh - 70px)"}


def inspector(
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


def whole(
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
