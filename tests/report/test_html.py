"""The report as one file: all is in it, nothing is fetched, and nothing breaks out of it."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from markupsafe import escape

import thimble_zarr
from tests.support.pages import GROUPS, document_of, hard_panels
from thimble_zarr.analysis.check_result import CheckResult
from thimble_zarr.report import html
from thimble_zarr.report.browser.columns import tables_of
from thimble_zarr.report.browser.page import Header, Steps, Verdict, as_page
from thimble_zarr.report.figure import Figure, Panel
from thimble_zarr.report.html import (
    MOST_BYTES,
    Audited,
    as_html,
    checks,
    panels_of,
    silent,
    summed_up,
    write_report,
)
from thimble_zarr.report.panels.loss import loss
from thimble_zarr.report.panels.registry import PANELS
from thimble_zarr.report.panels.step_size import step_size

EVIL = "</script><script>alert(1)</script><img src=http://x.org/y onerror=alert(2)>"

HEADER = Header(
    name="run.zarr",
    verdicts=[Verdict(True, "dead: HOLDS"), Verdict(False, "live: FAILS", ["a-cause: it was so"])],
    concerns=[("no-decay", "It cannot decay.")],
    facts={"largest step": 'token 3 "the"'},
    table=[("group", "half"), ("dead", "17")],
    caption="When tokens froze",
)


def page_of(panels: list[Panel], **header: object) -> str:
    steps = Steps(first=0, last=60, freezing={"dead": 31})
    of = as_page("run.zarr", panels, groups=GROUPS, steps=steps)
    return of.html([replace(HEADER, **header)])


@pytest.fixture(scope="module")
def page() -> str:
    return page_of(hard_panels())


@pytest.fixture(scope="module")
def of_toy(toy_run: tuple[Path, object], tmp_path_factory: pytest.TempPathFactory) -> Audited:
    of = summed_up(str(toy_run[0]), parameter=None, groups=None, stage=silent)
    (found,) = checks([of.run], None, None, lambda n_done, n_total: None)
    return replace(of, check=found)


def name_of(model: dict) -> str | None:
    """Return what a model was named."""
    return model.get("attributes", {}).get("name")


def figures_of(page: str) -> list[str]:
    """Return the names of a page's figures."""
    return [name_of(of) for of in document_of(page) if of["name"] == "Figure"]


def body_of(page: str) -> str:
    """Return a page without scripts and styles: what a person reads."""
    return re.sub(r"<style\b.*?</style>", "", without_scripts(page), flags=re.S)


def without_scripts(page: str) -> str:
    return re.sub(r"<script\b.*?</script>", "", page, flags=re.S)


def test_every_panel_is_there_with_its_note_and_the_line_that_makes_it(page: str) -> None:
    body = body_of(page)
    for panel in hard_panels():
        assert f">{panel.title}</" in body
        assert panel.note in body
        assert (f"<code>{escape(panel.code)}</code>" in body) == bool(panel.figures)
    names = figures_of(page)
    assert names == ["size-0", "size-1", "regimes-0", "last-0", "picture-0", "space-0", "space-1"]
    assert len(re.findall(r'role="img" aria-label="[^"]+', body)) == len(names)


def test_what_was_found_comes_first(page: str) -> None:
    body = body_of(page)
    told = ["HOLDS", "FAILS", "a-cause", "no-decay", "largest step", "&#34;the&#34;", "Panel of"]
    places = [body.index(text) for text in told]
    assert places == sorted(places)


def test_the_data_of_all_groups_are_there_once(page: str) -> None:
    models = document_of(page)
    assert {name_of(of) for of in models if of["name"] == "RendererGroup"} == {*GROUPS}
    n_sources = len([of for of in models if of["name"] == "ColumnDataSource"])
    n_tables = sum(len(tables_of(of)) for panel in hard_panels() for of in panel.figures)
    assert n_sources == n_tables + 1  # the texts of tokens


def test_nothing_is_fetched(page: str) -> None:
    tags = re.findall(r"<[a-z][^<>]*\b(?:src|href)=([^\s>]*)", without_scripts(page))
    assert all(of.startswith(('"data:', '"#')) for of in tags)
    assert not re.search(r"<script[^>]*\bsrc=", page)
    assert not re.search(r"@import|url\((?!['\"]?(data:|#))", without_scripts(page))
    assert "default-src 'none'" in page


def test_text_of_others_stays_text() -> None:
    panel = hard_panels()[0]
    layers = [replace(layer, label=EVIL) for layer in panel.figures[0].layers]
    figure: Figure = replace(panel.figures[0], layers=layers, title=EVIL)
    evil = replace(panel, title=EVIL, note=EVIL, code=EVIL, figures=[figure])
    of = page_of([evil], name=EVIL, facts={EVIL: EVIL}, concerns=[(EVIL, EVIL)])
    assert "<script>alert" not in of
    assert "<img" not in without_scripts(of)
    assert of.count("</script>") == page_of([panel]).count("</script>")


def test_a_toy_run_is_reported_whole(of_toy: Audited) -> None:
    page = as_html([of_toy])
    body = body_of(page)
    assert "HOLDS to the bit" in body
    assert "dead (4): each row from the row before, rounded as torch rounds" in body
    assert "11 x 5" in body
    panels = [make(of_toy.run) for make in PANELS]
    for panel in panels:
        assert (f">{escape(panel.title)}</h2>" in body) == bool(panel.figures)
    assert not [line for line in body.splitlines() if "nan" in line]


@pytest.mark.usefixtures("few_panels")
def test_what_a_check_found_is_asked_for_when_all_is_drawn(of_toy: Audited) -> None:
    asked, begun = [], []

    @contextmanager
    def stage(doing: str) -> Iterator[Callable[[int, int], None]]:
        begun.append(doing)
        yield lambda n_done, n_total: None

    def found(reach: Callable[[int, int], None]) -> list[CheckResult | None]:
        asked.append([*begun])
        return [of_toy.check]

    unknown = replace(of_toy, check=None)
    assert "HOLDS" not in body_of(as_html([unknown]))
    assert "HOLDS to the bit" in body_of(as_html([unknown], stage, found))
    assert asked == [["drawing", "checking"]]


@pytest.fixture
def few_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two panels only, which are quick."""
    monkeypatch.setattr(html, "PANELS", (loss, step_size))


@pytest.mark.usefixtures("few_panels")
def test_several_runs_are_side_by_side_and_compared(of_toy: Audited) -> None:
    runs = [replace(of_toy.run, store=f"{name}.zarr") for name in "ab"]
    of_loss, of_size, compared = panels_of(runs, ["a", "b"], lambda n_done, n_total: None)
    assert [of.title for of in of_loss.figures] == ["a", "b"]
    assert [of.title for of in of_size.figures[:2]] == ["a: In weights", "b: In weights"]
    assert of_loss.code.splitlines() == [runs[0].code("loss"), runs[1].code("loss")]
    assert (of_loss.has_same_axes, of_size.has_same_axes) == (True, False)
    assert (of_loss.n_beside, of_size.n_beside) == (2, 2)
    assert compared.name == "compare"


@pytest.mark.usefixtures("few_panels")
def test_of_many_runs_only_the_comparison_is_shown(of_toy: Audited) -> None:
    runs = [replace(of_toy, run=replace(of_toy.run, store=f"{k}.zarr")) for k in range(5)]
    names = figures_of(as_html(runs))
    assert names
    assert all(name.startswith("compare") for name in names)


def test_a_page_that_would_be_too_large_shows_fewer_points(
    of_toy: Audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    class Sized:
        def __init__(self, runs: list[Audited], stage: object) -> None:
            self.run = runs[0].run
            sizes.append((self.run.n_columns, self.run.n_rows))

        def html(self, headers: list[Header]) -> str:
            return "é" * (self.run.n_columns * self.run.n_rows * 40)

    monkeypatch.setattr(html, "_page", Sized)
    assert len(as_html([of_toy]).encode()) <= MOST_BYTES
    assert sizes == [(400, 300), (266, 200)]


def test_zooms_are_within_reach_and_leave_out_a_freezing_that_was_not() -> None:
    steps = Steps(first=0, last=1000, freezing={"dead": 400, "live": 985})
    assert steps.spans("dead")["around the freezing"] == (300, 500)
    assert "around the freezing" not in steps.spans("all") | steps.spans(None)
    assert "around the freezing" not in steps.spans("live")  # the last 10 % show it
    short = Steps(first=3, last=3, freezing={"dead": 3})
    assert all(np.diff(span) > 0 for span in short.spans("dead").values())


@pytest.mark.usefixtures("few_panels")
def test_a_report_is_written_from_python(toy_copy: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.html"
    write_report(toy_copy, path, groups={"first": "0,1,2"}, checked=False)
    page = path.read_text(encoding="utf-8")
    assert "HOLDS" not in body_of(page)
    assert "first" in {*map(name_of, document_of(page))}
    with pytest.raises(thimble_zarr.ThimbleError):
        write_report(tmp_path / "none.zarr", path)
