"""One token: what it is, and its whole history."""

from collections.abc import Callable
from html import escape

from bokeh.models import Column
from bokeh.models.widgets import Div, MultiChoice

from thimble_zarr.report.view.history import History, history, history_panel
from thimble_zarr.report.view.live import Snapshot
from thimble_zarr.report.view.shown import ShownPanel
from thimble_zarr.report.view.token_table import frozen_in_words, name_of_text


class Detail:
    """The token that was chosen last.

    Models: `token` (Div: what it is), `dims` (MultiChoice), `history` (Column of figures).
    """

    def __init__(self, snapshot: Callable[[], Snapshot], shown: ShownPanel) -> None:
        self._snapshot = snapshot
        self._shown = shown
        self._history: History | None = None
        self._position: int | None = None
        self._is_filling = False
        self.title = Div(name="token", css_classes=["token"], text=_HINT)
        self.dims = MultiChoice(
            name="dims",
            title="Dims whose lines are shown",
            options=[],
            value=[],
            visible=False,
            sizing_mode="stretch_width",
        )
        self.dims.on_change("value", self._change_dims)
        self.root = Column(
            children=[self.title, self.dims, shown.root], sizing_mode="stretch_width"
        )

    def show(self, position: int) -> None:
        """Read a token's history and show it."""
        snapshot = self._snapshot()
        if snapshot.run.ds["W"].ndim != 3:  # of a vector no row has a history of its own
            return
        before, self._history = self._history, history(snapshot.run.ds, position)
        self.title.text = self._in_words(snapshot, position)
        if before is None or self._position != position:
            self._is_filling = True
            lively = [str(dim) for dim in self._history.lively_dims]
            n_dims = self._history.values.W.shape[1]
            self.dims.update(options=[str(dim) for dim in range(n_dims)], value=lively)
            self.dims.visible = True
            self._is_filling = False
        self._position = position
        self._draw()

    def follow(self) -> None:
        """Show the same token's history of a run that has grown."""
        if self._position is not None:
            self.show(self._position)

    def _change_dims(self, attribute: str, old: list[str], new: list[str]) -> None:
        if not self._is_filling:
            self._draw()

    def _draw(self) -> None:
        if self._history is not None:
            dims = sorted(map(int, self.dims.value))
            self._shown.show(history_panel(self._history, dims))

    def _in_words(self, snapshot: Snapshot, position: int) -> str:
        tokens = snapshot.tokens
        text = name_of_text(tokens.texts[position])
        what = [f"{'token' if text else snapshot.run.ds.W.dims[1]} {tokens.ids[position]:,}"]
        if tokens.counts is not None:
            what.append(f"{tokens.counts[position]:,} times in the corpus")
        if tokens.is_dead is not None:
            what.append("dead" if tokens.is_dead[position] else "live")
        lasts = frozen_in_words(tokens, position)
        what.append(lasts if lasts == "still moving" else f"last moved at step {lasts}")
        return f"<b class='text'>{escape(text)}</b> {escape(' · '.join(what))}"


_HINT = (
    "Click a point, a row of the picture of all tokens, or a row of a table: its history is shown "
    "here."
)
