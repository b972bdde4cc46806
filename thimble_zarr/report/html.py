"""The report: all panels of some runs in one HTML file that opens offline, from a mail too."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from thimble_zarr.analysis.check import check
from thimble_zarr.analysis.check_result import CheckResult
from thimble_zarr.analysis.compute.aside import aside
from thimble_zarr.analysis.compute.variables import missing_inputs, unknown_scalars
from thimble_zarr.analysis.dataset.open import open_dataset
from thimble_zarr.analysis.health.condition import Concern
from thimble_zarr.analysis.health.summarized import health
from thimble_zarr.analysis.summary.summary import summary
from thimble_zarr.format.location import located
from thimble_zarr.report.browser.facts import facts, median_freeze_steps, resting, schema_of
from thimble_zarr.report.browser.page import Header, Page, Steps, Verdict, as_page
from thimble_zarr.report.figure import Panel
from thimble_zarr.report.panels.comparison import compare
from thimble_zarr.report.panels.registry import PANELS
from thimble_zarr.report.run import Run

MOST_BYTES = 5_000_000
"""Of a page: what goes through a mail."""

MOST_BESIDE = 4
"""Runs whose panels are shown side by side; of more only what compares them."""

Reach = Callable[[int, int], None]
"""Told how many parts of some work are done, and how many there are."""

Stage = Callable[[str], AbstractContextManager[Reach]]
"""Begins a part of the work, which is named, and returns what is told how far it is."""


@contextmanager
def silent(doing: str) -> Iterator[Reach]:
    """Tell nobody how far some work is."""
    yield lambda n_done, n_total: None


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
        What is told of its health.
    """

    run: Run
    check: CheckResult | None = None
    concerns: Sequence[Concern] = ()


def write_report(
    stores: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
    *,
    parameter: str | None = None,
    groups: Mapping[str, str] | None = None,
    tokens: str | None = None,
    checked: bool = True,
    stage: Stage = silent,
) -> None:
    """Write the report of a run, or of several side by side: one HTML file that needs no network.

    The run is summed up first, as `summary` does, which is kept for the next time.

    Parameters
    ----------
    stores
        One store, or several.
    path
        The file, of at most 5 MB. What is there is replaced.
    parameter
        Which parameter of a store of several, by name.
    groups
        Groups of tokens besides dead, live and all, by name as `summary` takes them.
    tokens
        Which tokens are checked, as `check` takes them.
    checked
        Whether the run is checked: that every row follows from the row before. It is not where
        what a check needs was not recorded.
    stage
        Told what is done, and how far it is.

    Examples
    --------
    >>> import thimble_zarr
    >>> thimble_zarr.write_report("run.zarr", "run.html")
    """
    several = [stores] if isinstance(stores, str | os.PathLike) else stores
    runs = [
        summed_up(str(store), parameter=parameter, groups=groups, stage=stage) for store in several
    ]
    check_all = partial(checks, [of.run for of in runs], parameter, tokens)
    if not checked:
        Path(path).write_text(as_html(runs, stage), encoding="utf-8")
        return
    with aside(check_all, "the check") as found:  # meanwhile figures are drawn
        Path(path).write_text(as_html(runs, stage, found), encoding="utf-8")


def summed_up(
    store: str, *, parameter: str | None, groups: Mapping[str, str] | None, stage: Stage
) -> Audited:
    """Sum up a run, with the options of `write_report`."""
    ds = open_dataset(store, parameter)
    with stage("summing up") as reach:
        numbers = summary(store, groups=groups, parameter=parameter, progress=reach)
    run = Run(store=store, ds=ds.sel(step=numbers.step), summary=numbers)
    return Audited(run=run, concerns=health(ds, numbers))


Checks = Sequence[CheckResult | None]
"""What was found of some runs; None of those that cannot be checked."""


def checks(
    runs: Sequence[Run], parameter: str | None, tokens: str | None, progress: Reach
) -> Checks:
    """Check some runs, one after the other, with the options of `write_report`."""
    names, found = [] if parameter is None else [parameter], list[CheckResult | None]()
    for n_done, run in enumerate(runs):
        schema = schema_of(run)
        scalars = {name: run.ds[name].values for name in schema.scalars}
        if missing_inputs("residual", schema) or unknown_scalars(schema, scalars):
            found.append(None)
            continue

        def reach(n: int, n_parts: int, n_before: int = n_done) -> None:
            progress(n_before * n_parts + n, n_parts * len(runs))

        found.append(check(run.store, tokens=tokens, parameters=names, progress=reach))
    return found


def as_html(
    runs: Sequence[Audited], stage: Stage = silent, found: Callable[[Reach], Checks] | None = None
) -> str:
    """Return a page of some runs, of at most `MOST_BYTES`.

    Of few runs each panel has the figures of all, side by side. `found` is asked, when all is
    drawn, for what was found of each run, unless that is known.
    """
    page = _page(runs, stage)
    if found is not None:
        with stage("checking") as reach:
            runs = [
                replace(of, check=of_run) for of, of_run in zip(runs, found(reach), strict=True)
            ]
    headers = [_header(of) for of in runs]
    while True:
        html = page.html(headers)
        if len(html.encode()) <= MOST_BYTES or runs[0].run.n_rows < _LEAST_ROWS:
            return html
        # Many groups or runs: each with fewer points, which stand for more steps and tokens.
        runs = [replace(of, run=_coarser(of.run)) for of in runs]
        page = _page(runs, stage)


_LEAST_ROWS = 30


def _coarser(run: Run) -> Run:
    most = {name: getattr(run, name) * 2 // 3 for name in ("n_columns", "n_rows", "n_points")}
    return replace(run, **most)


def _page(runs: Sequence[Audited], stage: Stage) -> Page:
    every = [of.run for of in runs]
    names = [located(run.store).name for run in every]
    freezing: dict[str, float] = {}
    for run in reversed(every):  # the first run's count
        freezing |= median_freeze_steps(run)
    with stage("drawing") as reach:
        panels = panels_of(every, names, reach)
        return as_page(
            ", ".join(names),
            panels,
            groups=[*dict.fromkeys(group for run in every for group in run.groups)],
            steps=Steps(
                first=min(int(run.steps[0]) for run in every),
                last=max(int(run.steps[-1]) for run in every),
                freezing=freezing,
            ),
            texts=_texts(every[0]),
        )


def _texts(run: Run) -> dict[int, str]:
    """Return the text of each token, by id, where it is known."""
    if "text" not in run.ds:
        return {}
    return dict(zip(run.ids.tolist(), map(str, run.ds["text"].values), strict=True))


def panels_of(runs: Sequence[Run], names: Sequence[str], reach: Reach) -> list[Panel]:
    """Return the panels of some runs, and of several last what compares them."""
    makers = PANELS if len(runs) <= MOST_BESIDE else ()
    panels = []
    for n_done, make in enumerate(makers):
        panels.append(side_by_side([make(run) for run in runs], names))
        reach(n_done + 1, len(PANELS) + 1)
    return [*panels, compare(runs)] if len(runs) > 1 else panels


def side_by_side(panels: Sequence[Panel], names: Sequence[str]) -> Panel:
    """Return the figures of one panel of several runs as one, each with its run's name."""
    if len(panels) == 1:
        return panels[0]
    figures = [
        replace(figure, title=f"{name}: {figure.title}" if figure.title else name)
        for position in range(max(len(panel.figures) for panel in panels))
        for name, panel in zip(names, panels, strict=True)
        for figure in panel.figures[position : position + 1]
    ]
    code = "\n".join(panel.code for panel in panels)
    is_alike = all(len(panel.figures) == 1 or panel.has_same_axes for panel in panels)
    n_beside = 2 if len(panels) == 4 else len(panels)
    return replace(panels[0], code=code, figures=figures, has_same_axes=is_alike, n_beside=n_beside)


def _header(of: Audited) -> Header:
    """Return what is told of a run before its panels."""
    run, verdicts = of.run, []
    table, caption = resting(run)
    for subset in of.check or ():
        findings = [f"{finding.code}: {finding.message}" for finding in subset.findings]
        text = f"{subset.subset}: {subset.verdict.text}"
        verdicts.append(Verdict(subset.holds, text, findings))
    return Header(
        name=run.store,
        verdicts=verdicts,
        concerns=[(concern.code, concern.message) for concern in of.concerns],
        facts=facts(run) | _checked(of.check),
        table=table,
        caption=caption,
    )


def _checked(found: CheckResult | None) -> dict[str, str]:
    """Return which tokens were replayed, and how that differs from the panel of accounting."""
    replayed = [f"{of.subset} ({of.n_tokens:,})" for of in found or () if of.replay is not None]
    if not replayed:
        return {}
    how = "each row from the row before, rounded as torch rounds"
    beside = "the formula of the panel Accounting does not round"
    return {"replayed": f"{', '.join(replayed)}: {how}; {beside}"}
