"""A tab of the viewer, without a browser: it is built, it grows, and what is chosen is shown."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from bokeh.core.properties import value
from bokeh.events import SelectionGeometry, Tap

import thimble_zarr
from tests.support import notebook_file
from tests.support.reads import Reads
from tests.support.runs import N_STEPS, N_TOKENS, Loop, record, token_labels
from tests.support.tab import page_of, settle
from tests.support.unusual import RUNS
from tests.support.zoo import Recorded
from thimble_zarr import Recorder
from thimble_zarr.report.figure import Figure, Image, Line, Points
from thimble_zarr.report.panels.registry import PANELS
from thimble_zarr.report.view.history import history, history_panel
from thimble_zarr.report.view.live import Live
from thimble_zarr.report.view.moment import panels_at
from thimble_zarr.report.view.page import N_SHOWN_FIRST, SPAN_TAB, STEP_TAB, TOKEN_TAB, Page
from thimble_zarr.report.view.span import comparison
from thimble_zarr.report.view.token_table import columns
from thimble_zarr.sources.open import open_recording

LAST_MOVE = 8
"""The last step at which the tokens of the shared page move."""


def live_of(path: Path) -> Live:
    return Live(str(path), "", lambda: open_recording(path)[0], {"mine": "2,7"})


def show(page: Page, *names: str) -> None:
    page.shown.active = [[*page.panels].index(name) for name in names]
    settle(page)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """A page of a run that freezes, which tests share: each chooses what it looks at."""
    path = tmp_path_factory.mktemp("viewed") / "run.zarr"
    loop = Loop()
    with Recorder(path, loop.optimizer, parameter=loop.weight, labels=token_labels()) as recorder:
        for step in range(1, N_STEPS + 1):
            if step > LAST_MOVE:
                loop.optimizer.param_groups[0]["lr"] = 0.0
            recorder.log(loss=loop.step())
    return page_of(live_of(path), n_shown=N_SHOWN_FIRST)


def test_a_page_shows_the_first_panels_and_others_when_they_are_wanted(page: Page) -> None:
    assert page.status.text == f"ended, step {N_STEPS}"
    assert page.group.labels == ["dead", "live", "all", "mine"]
    shown = [name for name, place in page.panels.items() if place.figures]
    assert shown == ["loss", "regimes", "token_image", "step_size"]
    first = page.panels["loss"].root.children
    show(page, *shown, "identical")
    assert page.panels["identical"].root.children
    assert page.panels["identical"].root.visible
    assert page.panels["loss"].root.children == first, "and what is shown stays as it is"
    page.status.document.validate()
    assert {*page.panels} == {make.__name__ for make in PANELS}


def test_a_history_is_that_of_the_dataset(toy_path: Path) -> None:
    ds = thimble_zarr.open_dataset(toy_path)
    of = history(ds, 4)
    assert of.token == 4
    assert of.stored == ("W", "grad", "exp_avg", "exp_avg_sq")
    for name in (*of.stored, "update", "decay", "ulp", "displacement_ulp"):
        np.testing.assert_array_equal(of.values[name], ds[name].sel(token=4))
    lines = history_panel(of, [1, 3]).figures[0].layers
    norm, *dims = [line for line in lines if isinstance(line, Line)]
    np.testing.assert_allclose(norm.y, np.linalg.norm(ds.W.sel(token=4), axis=1))
    assert [line.label for line in dims] == ["dim 1", "dim 3"]
    np.testing.assert_array_equal(dims[1].y, ds.W.sel(token=4, dim=3))
    moved = np.nan_to_num(ds.delta_W.sel(token=4)) != 0
    assert of.last_moves.tolist() == [np.flatnonzero(dim).max(initial=0) for dim in moved.T]


def test_a_history_reads_the_chunks_of_its_token_alone(
    toy_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds = thimble_zarr.open_dataset(toy_path)
    reads = Reads(monkeypatch)
    history(ds, 4)
    assert {token for _, _, tokens in reads.calls for token in tokens} == {4}
    by_shard: dict[str, set[int]] = {}
    for shard, chunk in reads.chunks:
        by_shard.setdefault(shard, set()).add(chunk)
    assert {len(chunks) for chunks in by_shard.values()} == {1}


def test_a_token_has_a_history_of_whatever_was_recorded(tmp_path: Path) -> None:
    loop = Loop(optimizer=torch.optim.SGD, dtype=torch.float32)
    with Recorder(tmp_path / "run.zarr", loop.optimizer, parameter=loop.weight):
        loop.step()
    page = page_of(live_of(tmp_path / "run.zarr"))
    page.draw_ahead()
    settle(page)
    assert page.detail.root.select_one({"name": "history"}).children
    assert page.group.labels == ["all", "mine"]


def notebook(path: Path) -> Path:
    history = record(path.with_name("toy.zarr"), n_steps=3)
    file = path.with_suffix(".safetensors")
    return notebook_file.save(file, notebook_file.notebook_tensors(history))


UNUSUAL = {**RUNS, "of the notebook": notebook}
ANY_RANK = ("scale", "norm", "query", "filter")


@pytest.mark.parametrize("kind", [*UNUSUAL, *ANY_RANK])
def test_an_unusual_run_can_be_looked_into(kind: str, tmp_path: Path, zoo: Recorded) -> None:
    path = zoo.path if kind in ANY_RANK else UNUSUAL[kind](tmp_path / "run.zarr")
    name = kind if kind in ANY_RANK else "*"
    snapshot = Live(str(path), "", lambda: open_recording(path, parameters=[name])[0], {}).snapshot
    run, tokens = snapshot.run, snapshot.tokens
    of = history(run.ds, position := len(tokens.ids) - 1)
    W = run.ds.W.values.reshape(len(of.steps), len(tokens.ids), -1)[:, position]
    np.testing.assert_array_equal(of.values.W, W)
    shown = [history_panel(of, of.lively_dims), *panels_at(run, int(run.steps[-1]), "all")]
    shown.append(comparison(run, np.array([position]), tokens.sample(np.array([position]))))
    assert all(panel.figures or panel.note for panel in shown)
    assert shown[0].figures
    n_changes = len(tokens.changed(0, tokens.last_step).positions)
    assert len(columns(tokens, np.arange(position + 1))["frozen"]) == position + 1 >= n_changes / 3


def test_a_search_shows_what_it_finds_and_the_history_of_the_first(page: Page) -> None:
    page.search.box.value = "t1"
    assert page.search.source.data["text"] == ["' t1'", "' t10'"]
    assert "&#x27; t1&#x27;" in page.detail.title.text
    page.search.source.selected.indices = [1]
    head = page.detail.root.select_one({"name": "history"}).children[0].children[0]
    assert "History of token 10</h3>" in head.text
    assert "&#x27; t10&#x27;" in page.detail.title.text
    assert page.inspector.active == TOKEN_TAB
    before = page.detail.root.select_one({"name": "history"}).children
    page.detail.dims.value = ["0"]
    assert page.detail.root.select_one({"name": "history"}).children != before


def test_a_click_on_the_picture_chooses_the_token_of_that_row(page: Page) -> None:
    place = page.panels["token_image"]
    (image,) = (
        of for of in place.figures[0].layers if isinstance(of, Image) and of.group == "dead"
    )
    plot = place.root.children[1].children[0]
    plot._trigger_event(Tap(plot, x=3.0, y=1.5))
    assert f"token {image.tokens[1]} " in page.detail.title.text


def test_a_brush_lists_what_changed_and_compares_it(page: Page) -> None:
    plot = page.panels["loss"].root.children[1].children[0]
    event = SelectionGeometry(plot, {"type": "rect", "x0": 2.2, "x1": 12.4}, final=True)
    plot._trigger_event(event)
    settle(page)
    assert page.inspector.active == SPAN_TAB
    assert page.span.slider.value == (2, 12)
    assert page.span.source.data["at"] == [LAST_MOVE] * N_TOKENS
    assert {*page.span.source.data["change"]} == {"early → frozen"}
    assert {*page.span.source.data["frozen"]} == {f"{LAST_MOVE}"}
    assert not page.span.save.disabled
    assert page.span.root.select_one({"name": "comparison"}).children
    page.choose_span(0, 0)
    assert page.span.source.data["id"] == []
    assert page.span.save.disabled
    assert page.span.root.select_one({"name": "comparison"}).children == []


def tokens_shown(figure: Figure) -> set[int]:
    (points,) = (layer for layer in figure.layers if isinstance(layer, Points))
    return {*points.tokens.tolist()}


def test_the_slider_shows_its_step_in_the_group_that_is_shown(page: Page) -> None:
    def members(group: str) -> set[int]:
        run = page.snapshot.run
        return {*run.ids[run.members[group]].tolist()}

    page.group.active = 0
    page.step.value = 5
    settle(page)
    assert page.inspector.active == STEP_TAB
    (figure,) = page.at_step["phase_space"].figures
    assert figure.title.startswith("step 5,")
    assert tokens_shown(figure) == members("dead")
    drawn = page.at_step["phase_space"].root.children
    page.step.value = 6
    settle(page)
    assert page.at_step["phase_space"].figures[0].title.startswith("step 6,")
    assert page.at_step["phase_space"].root.children == drawn, "it is updated in place"
    outline = page.at_step["histograms"].root.children[1].children[0]
    assert [item.label for legend in outline.above for item in legend.items] == [value("step 6")]
    page.group.active = 1
    assert tokens_shown(page.at_step["phase_space"].figures[0]) == members("live")
    assert page.at_step["phase_space"].root.children == drawn, "another group, too"


def test_the_first_finding_is_where_all_axes_of_steps_go(page: Page) -> None:
    assert page.finding.visible
    assert "exp_avg_sq cannot decay" in page.concerns.text
    page.choose_first_finding()
    assert page.step.value == 1
    assert page.links.steps.end < N_STEPS


@contextmanager
def recording(path: Path) -> Iterator[partial[None]]:
    """Record a run; what is yielded takes some steps and commits them."""
    loop = Loop()
    with Recorder(
        path, loop.optimizer, parameter=loop.weight, labels=token_labels(), memory_bytes=8000
    ) as recorder:

        def step(n_steps: int) -> None:
            for _ in range(n_steps):
                loop.step()
            recorder.flush()

        yield partial(step)


def test_a_run_that_is_recorded_grows_in_the_page(tmp_path: Path) -> None:
    with recording(tmp_path / "run.zarr") as step:
        step(4)
        page = page_of(live_of(tmp_path / "run.zarr"))
        assert page.status.text == "recording, step 4"
        page.choose_token(3)
        show(page, "step_size")
        drawn = page.panels["step_size"].root.children
        whole_run = page.links.steps.end
        page.follow()
        assert page.background.is_idle, "nothing is computed where nothing is new"
        step(3)
        page.follow()
        settle(page)
        assert page.status.text == "recording, step 7"
        assert page.panels["step_size"].root.children == drawn, "it is updated in place"
        source = drawn[1].children[0].renderers[0].data_source
        assert source.data["x"][-1] == page.step.end == page.span.slider.end == 7
        assert page.step.value == 7, "the slider stays at the end"
        assert page.inspector.active == TOKEN_TAB
        assert page.links.steps.end > 7 > whole_run
        (place,) = page.detail.root.select({"name": "history"})
        assert place.children[1].children[0].renderers[0].data_source.data["x"][-1] == 7
        page.links.steps.update(start=1, end=3)
        step(2)
    page.follow()
    settle(page)
    assert page.status.text == "ended, step 9"
    assert (page.links.steps.start, page.links.steps.end) == (1, 3), "who zoomed in stays there"


def test_tabs_share_what_was_computed_and_write_nothing_and_say_what_cannot_be_read(
    toy_copy: Path,
) -> None:
    def contents() -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in toy_copy.rglob("*") if file.is_file()}

    before, live = contents(), live_of(toy_copy)
    first, second = page_of(live), page_of(live)
    show(first, "loss")
    show(second, "loss")
    assert first.panels["loss"].figures[0] is second.panels["loss"].figures[0]
    assert contents() == before
    toy_copy.rename(toy_copy.with_name("gone.zarr"))
    first.follow()
    assert "class='error'" in first.status.text
    second.choose_token(3)
    assert "class='error'" in second.status.text
