"""A line at the step that the mouse is at, in all figures whose x is the step.

It lies above the figures and is no part of them. Bokeh's own crosshair, shared by 20 figures, has
all of them painted anew whenever the mouse moves: that takes 0.6 s of one core.
"""

from bokeh.events import MouseLeave, MouseMove
from bokeh.models import CustomJS, Range1d
from bokeh.plotting import figure as Plot

_MOVE = """
const {x, event_name, origin} = cb_obj
const is_seen = event_name == "mousemove" && steps.start <= x && x <= steps.end
for (const plot of origin.document.all_models) {
  const view = plot.x_range === steps ? Bokeh.index.find_one(plot) : null
  if (view == null) continue
  let line = view.shadow_el.querySelector(".cursor")
  if (line == null) {
    line = document.createElement("div")
    line.className = "cursor"
    line.style = "position: absolute; width: 1px; background: #9aa0a6; pointer-events: none"
    view.shadow_el.append(line)
  }
  const {top, height} = view.frame.bbox, left = view.frame.x_scale.compute(x)
  const place = {left: `${left}px`, top: `${top}px`, height: `${height}px`}
  Object.assign(line.style, place, {display: is_seen ? "block" : "none"})
}
"""


def cursor(steps: Range1d) -> CustomJS:
    """Return what moves the line in all figures that have these steps in view."""
    return CustomJS(args={"steps": steps}, code=_MOVE)


def follow_mouse(plot: Plot, cursor: CustomJS) -> None:
    """Have a figure's mouse move the line."""
    for event in (MouseMove, MouseLeave):
        plot.js_on_event(event, cursor)
