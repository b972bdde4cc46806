"""What the reader of a page can change: the group, the steps in view, logarithmic axes."""

from collections.abc import Mapping, Sequence

from bokeh.models import CustomJS
from bokeh.models.widgets import RadioButtonGroup, Toggle

from thimble_zarr.report.browser.links import Links
from thimble_zarr.report.browser.scales import State, Switch

_PRESSED = ".bk-btn.bk-active { background: #0b57d0; border-color: #0b57d0; color: #fff; }"
"""The look of what is chosen."""


def group_switch(links: Links) -> RadioButtonGroup:
    """Return what chooses the group of tokens that all figures show."""
    groups = [*links.groups.values()]
    names = [*links.groups]
    shown = links.shown_group
    at = None if shown is None else names.index(shown)
    switch = RadioButtonGroup(labels=names, active=at, stylesheets=[_PRESSED])
    show = "groups.forEach((group, i) => { group.visible = i == cb_obj.active })"
    switch.js_on_change("active", CustomJS(args={"groups": groups}, code=show))
    return switch


Spans = Mapping[str, tuple[float, float]]
"""First and last steps, by name."""


def zoom_switch(links: Links, spans: Sequence[Spans]) -> RadioButtonGroup:
    """Return what chooses the steps in view among some spans, of each group its own."""
    switch = RadioButtonGroup(
        labels=[*spans[0]], active=0, tags=[_lists(spans[0])], stylesheets=[_PRESSED]
    )
    zoom = "const [start, end] = cb_obj.tags[0][cb_obj.active]; steps.setv({start, end})"
    switch.js_on_change("active", CustomJS(args={"steps": links.steps}, code=zoom))
    return switch


def follow_group(zoom: RadioButtonGroup, groups: RadioButtonGroup, spans: Sequence[Spans]) -> None:
    """Have the spans be those of the group that is chosen; the name that was chosen remains."""
    follow = """
      const {labels, active} = zoom, {names, ends} = spans[cb_obj.active]
      const now = Math.max(0, names.indexOf(labels[active]))
      zoom.setv({tags: [ends], labels: names})
      if (now != active) zoom.active = now
      else if (now != 0) zoom.properties.active.change.emit()
    """
    every = [{"names": [*of], "ends": _lists(of)} for of in spans]
    groups.js_on_change("active", CustomJS(args={"zoom": zoom, "spans": every}, code=follow))


def _lists(spans: Spans) -> list[list[float]]:
    return [[*span] for span in spans.values()]


def log_switch(switches: Sequence[Switch]) -> Toggle:
    """Return what makes some axes logarithmic, and linear again."""
    dims = sorted({of.dim for of in switches})
    toggle = Toggle(
        label=f"log {' and '.join(dims)}",
        active=any(of.is_log for of in switches),
        height=24,
        stylesheets=[_PRESSED],
    )
    args = {"axes": [_models(of) for of in switches]}
    toggle.js_on_change("active", CustomJS(args=args, code=_SET_SCALES))
    return toggle


_SET_SCALES = """
for (const {dim, plot, ticks, glyphs, linear, log} of axes) {
  const {scale, ticker, properties} = cb_obj.active ? log : linear
  const range = plot[`${dim}_range`]
  glyphs.forEach(([glyph, name], i) => { glyph[name] = properties[i] })
  range.scale_hint = "auto"
  plot[`${dim}_scale`] = scale
  ticks.ticker = ticker
  range.reset()
}
for (const {plot} of axes) {
  const view = Bokeh.index.find_one(plot)
  view.invalidate_dataranges = true
  view.request_layout(true)
}
"""
"""A range learns from Bokeh that it is logarithmic, but not that it no longer is."""


def _models(of: Switch) -> Mapping[str, object]:
    """Return an axis as the script takes it."""

    def state(of: State) -> Mapping[str, object]:
        return {"scale": of.scale, "ticker": of.ticker, "properties": [*of.properties]}

    return {
        "dim": of.dim,
        "plot": of.plot,
        "ticks": of.ticks,
        "glyphs": [[*of] for of in of.glyphs],
        "linear": state(of.states[False]),
        "log": state(of.states[True]),
    }
