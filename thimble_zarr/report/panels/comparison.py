"""Several runs side by side, a line a run."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePath

import numpy as np

from thimble_zarr.report.figure import Axis, Figure, Layer, Panel
from thimble_zarr.report.layers import run_line
from thimble_zarr.report.panels.centroid import norms
from thimble_zarr.report.panels.loss import LOSS
from thimble_zarr.report.panels.regimes import Exits
from thimble_zarr.report.run import Run

Numbers = Iterable[tuple[str | None, np.ndarray]]
"""Of each group, or of None, a number a step."""


def compare(runs: Sequence[Run]) -> Panel:
    """Return key numbers of several runs, by step."""
    names = _names(runs)
    figures = []
    for title, label, is_log, numbers in _FIGURES:
        layers: list[Layer] = []
        for name, run in zip(names, runs, strict=True):
            for group, values in numbers(run):
                layers += run_line(run, values, label=name, group=group)
        if layers:
            y = Axis(label=label, is_log=is_log, can_switch=True)
            figures.append(Figure(title=title, y=y, layers=layers))
    return Panel(
        name="compare",
        title="Runs side by side",
        code=f"thimble_zarr.plot.compare({[run.store for run in runs]!r})",
        figures=figures,
        note=_note(runs, names),
    )


def _names(runs: Sequence[Run]) -> list[str]:
    """Return what runs are called: the names of their stores, or their paths, or those numbered."""
    stores = [run.store for run in runs]
    names = [PurePath(store).name for store in stores]
    numbered = [f"{nth}: {store}" for nth, store in enumerate(stores, 1)]
    return next(of for of in (names, stores, numbered) if len({*of}) == len(of))


def _loss(run: Run) -> Numbers:
    if LOSS not in run.ds:
        return []
    return [(None, run.ds[LOSS].sel(step=run.steps).values.astype(np.float64))]


def _median_ulp(run: Run) -> Numbers:
    return zip(run.groups, run.medians("l2_ulp"), strict=True)


def _moved(run: Run) -> Numbers:
    return zip(run.groups, 100 * run.of_groups("share_moved"), strict=True)


def _frozen(run: Run) -> Numbers:
    """Return the share of tokens that have moved for the last time, after each step."""
    exits = Exits.of(run)
    for group, is_member in run.members.items():
        ends = np.sort(exits.late[is_member & exits.is_finite])
        frozen = np.searchsorted(ends, run.steps, side="left")
        yield group, 100 * frozen / max(1, is_member.sum())


def _centroid(run: Run) -> Numbers:
    return zip(run.groups, norms(run.summary["centroid"]), strict=True)


_FIGURES: tuple[tuple[str, str, bool, Callable[[Run], Numbers]], ...] = (
    ("Loss", "loss", False, _loss),
    ("Median step size", "|delta W| / ULP (L2)", True, _median_ulp),
    ("Weights that moved", "share of weights, %", False, _moved),
    ("At rest to the end", "share of the group, %", False, _frozen),
    ("Norm of the centroid", "|centroid|", False, _centroid),
)


def _note(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Return what distinguishes the runs, in words."""
    facts = [_facts(run) for run in runs]
    differing = [key for key in facts[0] if len({of[key] for of in facts}) > 1]
    if not differing:
        return "All have the same parameter, shape, dtype, optimizer and steps."
    runs_in_words = (
        f"{name}: {', '.join(of[key] for key in differing)}"
        for name, of in zip(names, facts, strict=True)
    )
    note = f"They differ in {' and '.join(differing)}. {'; '.join(runs_in_words)}."
    if len({run.summary.attrs["ulp_dtype"] for run in runs}) > 1:
        note += " An ULP is not the same in all of them: median step sizes cannot be compared."
    return note


def _facts(run: Run) -> dict[str, str]:
    attrs, shape = run.ds.attrs, run.ds["W"].shape[1:]
    return {
        "parameter": str(attrs.get("parameter", "unnamed")),
        "shape": " x ".join(f"{n:,}" for n in shape) or "scalar",
        "dtype": str(attrs["dtype"]),
        "optimizer": str(attrs["optimizer"]),
        "last step": f"{run.steps[-1]:,}",
    }
