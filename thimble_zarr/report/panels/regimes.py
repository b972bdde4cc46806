"""When tokens leave each regime, and freeze."""

from dataclasses import dataclass

import numpy as np

from thimble_zarr.report.downsample import Pixels, evenly, pixels
from thimble_zarr.report.figure import (
    BLACK,
    REGIME_COLORS,
    STEP,
    Axis,
    Bars,
    Figure,
    Image,
    Layer,
    Line,
    Panel,
    Rule,
    Stack,
)
from thimble_zarr.report.panels.step_size import NO_CHANGE
from thimble_zarr.report.run import Run


@dataclass(frozen=True, kw_only=True)
class Exits:
    """The last step of each token in each regime, 0 if it never was in it; shape `(token,)`.

    Attributes
    ----------
    early, midlife, late
        The last step, of those whose change is known. After the last late one a token is frozen.
    last
        The last of these steps.
    is_moving
        Whether the token moved at the last step, and so is not frozen.
    is_finite
        Whether the token's weights are finite at the end; if not it cannot be called frozen.
    """

    early: np.ndarray
    midlife: np.ndarray
    late: np.ndarray
    last: int
    is_moving: np.ndarray
    is_finite: np.ndarray

    @classmethod
    def of(cls, run: Run) -> "Exits":
        """Read them from the summary."""
        early, midlife, late = (
            run.summary[name].values.astype(np.int64)
            for name in ("last_early", "last_midlife", "freeze_step")
        )
        last = int(run.steps[run.follows].max(initial=0))
        norms = run.summary["norm_W"].isel(step=-1).values
        return cls(
            early=early,
            midlife=np.maximum(midlife, early),
            late=late,
            last=last,
            is_moving=late == last,
            is_finite=np.isfinite(norms),
        )

    @property
    def is_frozen(self) -> np.ndarray:
        """Whether the token is frozen at the last step."""
        frozen: np.ndarray = self.is_finite & ~self.is_moving
        return frozen

    def half_by(self, mask: np.ndarray) -> float | None:
        """Return by which step half of some tokens had moved for the last time; None if fewer."""
        if not mask.any() or 2 * (self.is_frozen & mask).sum() < mask.sum():
            return None
        ends = np.sort(np.where(self.is_frozen, self.late, np.inf)[mask])
        return float(ends[(len(ends) - 1) // 2])


def regimes(run: Run) -> Panel:
    """Return how many tokens of each group are in each regime, by step."""
    exits, layers = Exits.of(run), list[Layer]()
    steps = run.steps[run.follows]
    steps = steps[evenly(len(steps), run.n_columns)]
    for group, mask in run.members.items():
        if len(steps) and mask.any():
            layers += [_stack(exits, group, mask, steps), *_median_rule(exits, group, mask)]
    figure = Figure(y=Axis(label=f"% of the group's {run.row_name}s"), layers=layers)
    return Panel(
        name="regimes",
        title=f"Regimes: how many {run.row_name}s still move, and how",
        code=run.code("regimes"),
        figures=[figure] if layers else [],
        note=_definitions(run) if layers else NO_CHANGE,
    )


def _stack(exits: Exits, group: str, mask: np.ndarray, steps: np.ndarray) -> Stack:
    """Return the share of tokens in each regime at some steps, the last regime lowest."""
    ends = [of[mask] for of in (exits.early, exits.midlife, exits.late)]
    early, midlife, late = (_n_reaching(np.maximum.reduce(ends[: n + 1]), steps) for n in range(3))
    lost = exits.late[mask & ~exits.is_finite]
    n_lost = len(lost) - _n_reaching(lost, steps)
    counts = {
        "frozen": mask.sum() - late - n_lost,
        "late": late - midlife,
        "midlife": midlife - early,
        "early": early,
        **({"not finite": n_lost} if len(lost) else {}),
    }
    shares = {name: 100 * count / mask.sum() for name, count in counts.items()}
    return Stack(group=group, x=steps.astype(np.float64), heights=shares, colors=REGIME_COLORS)


def _n_reaching(ends: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return how many of the ends are at each step or after it."""
    return len(ends) - np.searchsorted(np.sort(ends), steps, side="left")


def _median_rule(exits: Exits, group: str, mask: np.ndarray) -> list[Layer]:
    """Return by when half of the group had moved for the last time, if half rests at the end."""
    step = exits.half_by(mask)
    if step is None:
        return []
    return [Rule(label=f"half had made their last move by step {step:,.0f}", group=group, x=step)]


def _definitions(run: Run) -> str:
    n_dims = run.summary.sizes["dim"]
    return (
        f"A {run.row_name}'s regime says what is still to come, at this step or later. Early: a "
        f"step with L2 > sqrt({n_dims}) = {np.sqrt(n_dims):.3g} ULP. Midlife: a dim that moves by "
        "more than 1 ULP. Late: any change. Frozen: none, up to the end of the recording; after "
        "it, it may move again. "
        f"(ULP: of {run.summary.attrs['ulp_dtype']}, at the weight before the step.)"
    )


def token_image(run: Run) -> Panel:
    """Return the step size of every token at every step, sorted by the tokens' last moves."""
    exits, layers = Exits.of(run), list[Layer]()
    orders = {
        group: at[np.lexsort((exits.early[at], exits.midlife[at], exits.late[at]))]
        for group, mask in run.members.items()
        if len(at := np.flatnonzero(mask)) and run.follows.any()
    }
    found = pixels(run.summary["l2_ulp"], orders, run.n_columns, run.n_rows) if orders else {}
    for group, of in found.items():
        layers += [_image(run, group, of, orders[group])]
        layers += _freeze_line(run, exits, group, orders[group])
    figure = Figure(y=Axis(label=f"{run.row_name}s, sorted by their last move"), layers=layers)
    return Panel(
        name="token_image",
        title=f"Step size of every {run.row_name} at every step",
        code=run.code("token_image"),
        figures=[figure] if layers else [],
        note=(
            f"Each pixel is the median of the {run.row_name}s and steps that it covers. It is "
            "grey where half of them or more did not move. The black line is the last move of "
            f"each {run.row_name} that is at rest when the recording ends."
            if layers
            else NO_CHANGE
        ),
    )


def _image(run: Run, group: str, of: Pixels, order: np.ndarray) -> Image:
    (first, last), n_rows = run.steps[[0, -1]].tolist(), len(of.median)
    middle = (2 * np.arange(n_rows) + 1) * len(order) // (2 * n_rows)
    return Image(
        group=group,
        values=of.median,
        low=of.low,
        high=of.high,
        x=(first - 0.5, last + 0.5),
        y=(0.0, float(len(order))),
        unit="|delta W| / ULP (L2)",
        is_log=True,
        tokens=run.summary["token"].values[order[middle]],
    )


def _freeze_line(run: Run, exits: Exits, group: str, order: np.ndarray) -> list[Layer]:
    """Return where in a picture tokens at rest at the end moved last, if there are any."""
    at = evenly(len(order), run.n_rows)
    frozen_at = np.where(exits.is_frozen, exits.late + 0.5, np.nan)[order[at]]
    if np.isnan(frozen_at).all():
        return []
    return [Line(label="last move", group=group, color=BLACK, x=frozen_at, y=at + 0.5)]


N_BINS = 60
"""Bars of a histogram at most."""


def last_steps(run: Run) -> Panel:
    """Return histograms of the last step of tokens in each regime."""
    exits, steps = Exits.of(run), run.steps[run.follows]
    figures = [
        Figure(
            title=title,
            x=STEP,
            y=Axis(label=f"{run.row_name}s", can_switch=True),
            layers=_histograms(run, exits, name, steps),
        )
        for title, name in (
            ("Last early step", "early"),
            ("Last midlife step", "midlife"),
            ("Last step with any change", "late"),
        )
        if len(steps)
    ]
    return Panel(
        name="last_steps",
        title=f"When {run.row_name}s leave each regime",
        code=run.code("last_steps"),
        figures=figures,
        note=(
            f"Of {run.row_name}s that have left the regime; of others it is not known when they "
            "will. The panel of regimes defines them. What rests at the end may move again."
            if figures
            else NO_CHANGE
        ),
    )


def _histograms(run: Run, exits: Exits, name: str, steps: np.ndarray) -> list[Layer]:
    """Return of each group how many tokens left a regime, by step."""
    ends, layers, last = getattr(exits, name), list[Layer](), int(steps[-1])
    width = -(-(last - steps[0] + 1) // N_BINS)
    edges = np.arange(steps[0], last + 1 + width, width) - 0.5
    for group, mask in run.members.items():
        left = mask & (ends > 0) & (ends < last) & (exits.is_finite | (name != "late"))
        n_left, n_still = left.sum(), (mask & (ends == last)).sum()
        words = ("at rest", "moving") if name == "late" else ("left", name)
        label = f"{n_left:,} {words[0]}; {n_still:,} still {words[1]} at step {last:,}"
        heights = np.histogram(ends[left], edges)[0].astype(np.float64)
        style = {"label": label, "group": group, "color": REGIME_COLORS[name]}
        layers.append(Bars(edges=edges, heights=heights, **style))
    return layers
