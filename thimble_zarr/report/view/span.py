"""A span of steps: the tokens that changed regime in it, kept as ids and compared with others."""

from collections.abc import Callable

import numpy as np
from bokeh.models import Column, CustomJS, Row
from bokeh.models.widgets import Button, Div, RangeSlider

from thimble_zarr.report.figure import Axis, Figure, Line, Panel
from thimble_zarr.report.run import Run
from thimble_zarr.report.view.background import Background
from thimble_zarr.report.view.live import Snapshot
from thimble_zarr.report.view.shown import ShownPanel
from thimble_zarr.report.view.token_table import columns, token_table
from thimble_zarr.report.view.tokens import median_over_tokens

_SHOWN = ("id", "text", "count", "kind", "change", "at", "frozen")

_SAVE = """
const ids = Array.from(new Set(Array.from(source.data.id))).sort((a, b) => a - b)
const text = ids.map((id) => id + "\\n").join("")
const link = document.createElement("a")
link.href = URL.createObjectURL(new Blob([text], {type: "text/plain"}))
const [first, last] = span.value
link.download = `changed-${first}-${last}.txt`
link.click()
URL.revokeObjectURL(link.href)
"""


class Span:
    """The span of steps that was brushed.

    Models: `span` (RangeSlider), `changes` (Div), `changed` (DataTable), `save` (Button),
    `comparison` (Column of figures).
    """

    def __init__(
        self,
        snapshot: Callable[[], Snapshot],
        background: Background,
        shown: ShownPanel,
        on_choice: Callable[[int], None],
    ) -> None:
        self._snapshot, self._background, self._shown = snapshot, background, shown
        last = max(1, snapshot().last_step)
        self.slider = RangeSlider(
            name="span",
            title="Steps",
            start=0,
            end=last,
            step=1,
            value=(0, 0),
            sizing_mode="stretch_width",
        )
        self.slider.on_change("value_throttled", self._choose)
        self.words = Div(name="changes", text=_HINT)
        self.source, table = token_table("changed", _SHOWN, 240, on_choice)
        self.save = Button(name="save", label="Save ids", disabled=True, width=110)
        self.save.js_on_click(
            CustomJS(args={"source": self.source, "span": self.slider}, code=_SAVE)
        )
        self.root = Column(
            children=[
                self.slider,
                Row(children=[self.save, self.words], sizing_mode="stretch_width"),
                table,
                shown.root,
            ],
            sizing_mode="stretch_width",
        )

    def choose(self, first: float, last: float) -> None:
        """List what changed in a span, as if the slider had been moved there."""
        ends = np.clip(np.round([first, last]), 0, self.slider.end)
        self.slider.value = tuple(ends.astype(int).tolist())
        self._list()

    def follow(self) -> None:
        """Let the slider reach what was recorded since."""
        self.slider.end = max(1, self._snapshot().last_step)

    def _choose(self, attribute: str, old: object, new: object) -> None:
        self._list()

    def _list(self) -> None:
        snapshot = self._snapshot()
        first, last = map(int, self.slider.value)
        change = snapshot.tokens.changed(first, last)
        self.source.selected.indices = []
        self.source.data = {
            **columns(snapshot.tokens, change.positions),
            "change": change.words,
            "at": change.steps.tolist(),
        }
        positions = np.unique(change.positions)
        self.save.disabled = not len(positions)
        self.words.text = f"{len(positions):,} changed regime after steps {first:,} to {last:,}"
        if not len(positions):
            self._shown.show(None)
            return
        others = snapshot.tokens.sample(positions)
        self._shown.announce()
        self._background.do(
            "comparison",
            lambda: comparison(snapshot.run, positions, others),
            self._shown.show,
        )


_HINT = (
    "Brush some steps in a panel (with the tool of a dashed box), or move the ends of the slider: "
    "the tokens that changed regime there are listed."
)


def comparison(run: Run, positions: np.ndarray, others: np.ndarray) -> Panel:
    """Return how far some tokens moved at each step, and as many others, median over tokens."""
    sizes = {"norm_delta_W": "|delta_W|", "l2_ulp": "|delta_W| in ULP, L2"}
    sets = {"changed in the span": positions, "random sample": others}
    figures = []
    for name, label in sizes.items():
        if name not in run.summary:
            continue
        lines = [
            Line(
                x=run.summary.step.values.astype(np.float64),
                y=median_over_tokens(run.summary[name], of),
                label=words,
            )
            for words, of in sets.items()
        ]
        figures.append(
            Figure(y=Axis(label=f"{label}, median", is_log=True, can_switch=True), layers=lines)
        )
    return Panel(
        name="comparison",
        title="Size of a step: these tokens, and as many others at random",
        code="",
        figures=figures,
        note=f"{len(positions):,} tokens against {len(others):,}, dead and live in the same "
        "proportion as far as there are enough.",
    )
