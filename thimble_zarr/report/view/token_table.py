"""Tokens as rows of a table in the browser, and the box that finds them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from bokeh.models import Column, ColumnDataSource
from bokeh.models.widgets import (
    CellFormatter,
    DataTable,
    Div,
    NumberFormatter,
    StringFormatter,
    TableColumn,
    TextInput,
)

from thimble_zarr.report.view.tokens import Tokens


@dataclass(frozen=True)
class _Shown:
    """How a column is shown."""

    title: str
    width: int
    format: Callable[[], CellFormatter] = StringFormatter


_COLUMNS = {
    "id": _Shown("id", 55, partial(NumberFormatter, format="0", text_align="right")),
    "text": _Shown("text", 130),
    "count": _Shown("count", 65, partial(NumberFormatter, format="0,0", text_align="right")),
    "kind": _Shown("kind", 45),
    "frozen": _Shown("last moved", 80),
    "change": _Shown("change", 125),
    "at": _Shown("at step", 60, partial(NumberFormatter, format="0,0", text_align="right")),
}
"""Columns that there may be."""

N_MOST = 200
"""Tokens that a search lists."""


def columns(tokens: Tokens, positions: np.ndarray) -> dict[str, list[object]]:
    """Return what is known of some tokens, as columns."""
    counts, is_dead = tokens.counts, tokens.is_dead
    kinds = [""] * len(positions)
    if is_dead is not None:
        kinds = ["dead" if dead else "live" for dead in is_dead[positions].tolist()]
    return {
        "position": positions.tolist(),
        "id": tokens.ids[positions].tolist(),
        "text": [name_of_text(tokens.texts[position]) for position in positions.tolist()],
        "count": [None] * len(positions) if counts is None else counts[positions].tolist(),
        "kind": kinds,
        "frozen": [frozen_in_words(tokens, position) for position in positions.tolist()],
    }


def name_of_text(text: str) -> str:
    """Return a text so that its spaces are seen; nothing of none."""
    return repr(text) if text else ""


def frozen_in_words(tokens: Tokens, position: int) -> str:
    """Return when a token last moved, as far as the run goes."""
    step = int(tokens.freeze_steps[position])
    if step == tokens.last_step:
        return "still moving"
    return f"{step:,}" if step else "never moved"


def token_table(
    name: str, shown: tuple[str, ...], height: int, on_choice: Callable[[int], None]
) -> tuple[ColumnDataSource, DataTable]:
    """Return an empty table; a click on a row calls `on_choice` with the token's position."""
    source = ColumnDataSource({column: [] for column in ("position", *shown)})
    table = DataTable(
        source=source,
        columns=[
            TableColumn(field=column, title=of.title, width=of.width, formatter=of.format())
            for column, of in ((name, _COLUMNS[name]) for name in shown)
        ],
        name=name,
        css_classes=[name],
        index_position=None,
        height=height,
        sizing_mode="stretch_width",
        selectable=True,
        sortable=True,
        reorderable=False,
    )

    def choose(attribute: str, old: list[int], new: list[int]) -> None:
        if new:
            on_choice(int(source.data["position"][new[0]]))

    source.selected.on_change("indices", choose)
    return source, table


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
            title=f"Click a {tokens().run.row_name} in a panel, or find it by its id or a part of "
            "its text (Enter)",
            placeholder="such as  the  or 1234",
            sizing_mode="stretch_width",
        )
        self.found = Div(name="found", text="")
        self.source, table = token_table(
            "results", ("id", "text", "count", "kind", "frozen"), 160, on_choice
        )
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
