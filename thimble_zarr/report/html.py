"""The report: all panels of some runs in one HTML file that opens offline, from a mail too."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from thimble_zarr.analysis.check_result import CheckResult
from thimble_zarr.report.browser.page import Header, Steps, Verdict, as_page
from thimble_zarr.report.facts import facts, freezing, median_freeze_step
from thimble_zarr.report.figure import Panel
from thimble_zarr.report.panels.registry import PANELS
from thimble_zarr.report.run import Run

MOST_BYTES = 5_000_000
"""Of a page: what goes through a mail."""

MOST_BESIDE = 4
"""Runs whose panels are shown side by side; of more only what compares them."""

Concerns = Sequence[tuple[str, str]]
"""What is told of a run's health: a name, and the same in words."""


@dataclass(frozen=True, kw_only=True)
class Audited:
    """A run, and what was found of it.

    Attributes
    ----------
    run
        What panels read.
    check
        What `check` found; None if it was not asked.
    concerns
        What is told of its health; None if nobody looked.
    """

    run: Run
    check: CheckResult | None = None
    concerns: Concerns | None = None


def as_html(runs: Sequence[Audited], *, progress: Callable[[int, int], None] | None = None) -> str:
    """Return a page of one or several runs, of at most `MOST_BYTES`.

    Parameters
    ----------
    runs
        Shown side by side, panel by panel.
    progress
        Called with how many panels are computed, and how many there are.
    """
    while True:
        page = _page(runs, progress)
        if len(page.encode()) <= MOST_BYTES or runs[0].run.n_rows < _LEAST_ROWS:
            return page
        # Many groups or runs: each with fewer points, which stand for more steps and tokens.
        runs = [replace(of, run=_coarser(of.run)) for of in runs]


_LEAST_ROWS = 30


def _coarser(run: Run) -> Run:
    return replace(run, n_columns=run.n_columns * 2 // 3, n_rows=run.n_rows * 2 // 3)


def _page(runs: Sequence[Audited], progress: Callable[[int, int], None] | None) -> str:
    names = [Path(of.run.store).name for of in runs]
    panels = []
    for n_done, make in enumerate(PANELS):
        panels.append(side_by_side([make(of.run) for of in runs], names))
        if progress is not None:
            progress(n_done + 1, len(PANELS))
    every = [of.run for of in runs]
    freeze_steps = [at for run in every if (at := median_freeze_step(run)) is not None]
    return as_page(
        ", ".join(names),
        [_header(of) for of in runs],
        panels,
        groups=[*dict.fromkeys(group for run in every for group in run.groups)],
        steps=Steps(
            first=min(int(run.steps[0]) for run in every),
            last=max(int(run.steps[-1]) for run in every),
            freezing=freeze_steps[0] if freeze_steps else None,
        ),
    )


def side_by_side(panels: Sequence[Panel], names: Sequence[str]) -> Panel:
    """Return the figures of one panel of several runs as one, each with its run's name."""
    if len(panels) == 1:
        return panels[0]
    return replace(
        panels[0],
        code="\n".join(panel.code for panel in panels),
        figures=[
            replace(figure, title=f"{name}: {figure.title}" if figure.title else name)
            for figures in zip(*(panel.figures for panel in panels), strict=False)
            for name, figure in zip(names, figures, strict=True)
        ],
    )


def _header(of: Audited) -> Header:
    """Return what is told of a run before its panels."""
    run, verdicts = of.run, []
    for subset in of.check or ():
        findings = [f"{finding.code}: {finding.message}" for finding in subset.findings]
        text = f"{subset.subset}: {subset.verdict.text}"
        verdicts.append(Verdict(subset.holds, text, findings))
    return Header(
        name=run.store,
        verdicts=verdicts,
        concerns=of.concerns,
        facts=facts(run),
        table=freezing(run),
        caption=f"When {run.row_name}s froze: the last step at which each moved",
    )
