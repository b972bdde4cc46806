"""Tokens as rows of a table in the browser."""

from collections.abc import Callable

import numpy as np
from bokeh.models import ColumnDataSource, DataTable, NumberFormatter, TableColumn

from thimble_zarr.report.view.tokens import Tokens

_COUNT = NumberFormatter(format="0,0", nan_format="-", text_align="right")
_ID = NumberFormatter(format="0", text_align="right")

TITLES = {
    "id": ("id", 55, _ID),
    "text": ("text", 130, None),
    "count": ("count", 65, _COUNT),
    "kind": ("kind", 45, None),
    "frozen": ("last moved", 80, None),
    "change": ("change", 125, None),
    "at": ("at step", 60, _ID),
}
"""Columns that there may be: title, width and how numbers are shown."""


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
    return f"{step:,}" if step else "never"


def token_table(
    name: str, shown: tuple[str, ...], height: int, on_choice: Callable[[int], None]
) -> tuple[ColumnDataSource, DataTable]:
    """Return an empty table; a click on a row calls `on_choice` with the token's position."""
    source = ColumnDataSource({column: [] for column in ("position", *shown)})
    table = DataTable(
        source=source,
        columns=[
            TableColumn(
                field=column,
                title=TITLES[column][0],
                width=TITLES[column][1],
                **({} if TITLES[column][2] is None else {"formatter": TITLES[column][2]}),
            )
            for column in shown
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
