"""What the figures of a page share: the group that is shown, the steps in view, the cursor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bokeh.models import ColumnDataSource, CustomJS, Range1d
from bokeh.models.renderers import RendererGroup

from thimble_zarr.report.browser.cursor import cursor


@dataclass(frozen=True, kw_only=True)
class Links:
    """What the figures of a page share.

    Attributes
    ----------
    groups
        Of each group of tokens what makes its layers visible; one of them is.
    steps
        The steps in view.
    cursor
        What moves a line in all figures to the step that the mouse is at.
    texts
        The columns `token` and `text`: what is told of a token besides its id.
    """

    groups: Mapping[str, RendererGroup]
    steps: Range1d
    cursor: CustomJS
    texts: ColumnDataSource

    @property
    def shown_group(self) -> str | None:
        """The group that is shown at first; None if there is none."""
        return next((name for name, of in self.groups.items() if of.visible), None)


def linked(
    groups: Sequence[str], *, first: float, last: float, texts: Mapping[int, str] | None = None
) -> Links:
    """Return what figures of a run share.

    Parameters
    ----------
    groups
        The groups of tokens. The first is shown.
    first, last
        The steps of the run.
    texts
        Of tokens by id, if they are known.
    """
    last = max(last, first + 1)  # of a run of one step there is something to see, too
    margin = 0.01 * (last - first)
    start, end = first - margin, last + margin
    steps = Range1d(start=start, end=end, bounds=(start, end), min_interval=1)
    return Links(
        groups={name: RendererGroup(visible=name == groups[0], name=name) for name in groups},
        steps=steps,
        cursor=cursor(steps),
        texts=ColumnDataSource({"token": [*(texts or {})], "text": [*(texts or {}).values()]}),
    )
