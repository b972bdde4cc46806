"""The search box, and the tokens that it finds."""

from collections.abc import Callable

from bokeh.models import Column
from bokeh.models.widgets import Div, TextInput

from thimble_zarr.report.view.token_table import columns, token_table
from thimble_zarr.report.view.tokens import Tokens

_SHOWN = ("id", "text", "count", "kind", "frozen")


class Search:
    """A box for text or an id, and a table of what it finds; a row that is clicked is chosen.

    Models: `search` (TextInput), `found` (Div), `results` (DataTable).
    """

    def __init__(self, tokens: Callable[[], Tokens], on_choice: Callable[[int], None]) -> None:
        self._tokens = tokens
        self._on_choice = on_choice
        self.box = TextInput(
            name="search",
            css_classes=["search"],
            title="Find a token by its text, a part of it, or its id, and press Enter",
            placeholder="such as  the  or 1234",
            sizing_mode="stretch_width",
        )
        self.found = Div(name="found", text="")
        self.source, table = token_table("results", _SHOWN, 160, on_choice)
        self.box.on_change("value", self._search)
        self.root = Column(children=[self.box, self.found, table], sizing_mode="stretch_width")

    def _search(self, attribute: str, old: str, new: str) -> None:
        tokens = self._tokens()
        positions = tokens.found(new, n_most=N_MOST + 1)
        is_more = len(positions) > N_MOST
        positions = positions[:N_MOST]
        self.source.selected.indices = []
        self.source.data = {**columns(tokens, positions)}
        n = f"the first {N_MOST:,}" if is_more else f"{len(positions):,}"
        self.found.text = f"{n} found" if new else ""
        if len(positions):
            self._on_choice(int(positions[0]))


N_MOST = 200
"""Tokens that are listed."""
