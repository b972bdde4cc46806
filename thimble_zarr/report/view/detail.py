"""One token: what it is, and its whole history."""

from collections.abc import Callable
from html import escape

from bokeh.models import Column
from bokeh.models.widgets import Div, MultiChoice

from thimble_zarr.report.view.history import History, history, history_panel
from thimble_zarr.report.view.live import Snapshot
from thimble_zarr.report.view.shown import ShownPanel
from thimble_zarr.report.view.token_table import frozen_in_words, name_of_text
from thimble_zarr.report.view.tokens import Tokens


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
        self.title = Div(name="token", css_classes=["token"])
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
        before, self._history = self._history, history(snapshot.run.ds, position)
        self.title.text = _in_words(snapshot.tokens, self._history, position)
        if before is None or self._position != position:
            self._is_filling = True
            lively = [str(dim) for dim in self._history.lively_dims]
            if before is None:
                n_dims = self._history.values.W.shape[1]
                self.dims.options = [str(dim) for dim in range(n_dims)]
            self.dims.value = lively
            self.dims.visible = True
            self._is_filling = False
        self._position = position
        self._draw()

    def show_first(self) -> None:
        """Show the most frequent token, unless another was chosen."""
        counts = self._snapshot().tokens.counts
        if self._position is None:
            self.show(0 if counts is None else int(counts.argmax()))

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


def _in_words(tokens: Tokens, history: History, position: int) -> str:
    text = name_of_text(tokens.texts[position])
    what = [f"{history.dim} {history.token:,}"]
    if tokens.counts is not None:
        what.append(f"{tokens.counts[position]:,} times in the corpus")
    if tokens.is_dead is not None:
        what.append("dead" if tokens.is_dead[position] else "live")
    lasts = frozen_in_words(tokens, position)
    what.append(f"last moved at step {lasts}" if lasts[0].isdecimal() else lasts)
    return f"<b class='text'>{escape(text)}</b> {escape(' · '.join(what))}"
