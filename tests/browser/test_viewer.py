"""The viewer, opened in a browser as a person does: find, click, brush, and watch a run grow."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import N_STEPS
from tests.support.browser import frame, n_colored, opened, place, watched
from tests.support.commands import checked
from tests.support.runs import TINY_MEMORY, Loop, token_labels
from tests.support.viewer import viewer
from thimble_zarr import Recorder, open_dataset, summary

KNOWN = "Deprecation warning: allowHTML will default to false"
"""What a widget of Bokeh's says of itself."""

RTOL = 1e-4
"""To what a page rounds its numbers."""

SIZES = "In ULP of bfloat16"
"""The title of a figure whose x is the step."""

MODEL = "Bokeh.documents[0].get_model_by_name"


@contextmanager
def tab(browser: Browser, store: Path) -> Iterator[Page]:
    """Open a run in a tab; fail if it complains, or asks for what is not on this machine."""
    with viewer(store) as url, watched(browser, is_offline=False) as page:
        yield opened(page, url)
        assert [fault for fault in page.faults if KNOWN not in fault] == []


@pytest.fixture(scope="module")
def page(browser: Browser, real_run: Path) -> Iterator[Page]:
    with tab(browser, real_run) as page:
        page.wait_for_function(HAS_FIGURE)
        yield page


HAS_FIGURE = f"""[...Bokeh.documents[0].all_models].some((of) => of.title?.text == "{SIZES}")"""


def lines(page: Page, title: str) -> dict[str, np.ndarray]:
    """Return the lines of a figure, by title or y, by the label that the legend gives them."""
    code = """(title) => {
      const figures = [...Bokeh.documents[0].all_models].filter((of) => of.type == "Figure")
      const called = (of) => [of.title.text, of.left[0].axis_label].includes(title)
      const plot = figures.find(called)
      const [legend] = plot.center.concat(plot.above).filter((of) => of.type == "Legend")
      return legend.items.map((item) => {
        const {glyph, data_source} = item.renderers[0]
        return [item.label.value, Array.from(data_source.data[glyph.y.field])]
      })
    }"""
    return {name: np.array(values, float) for name, values in page.evaluate(code, title)}


def regimes(run: xr.Dataset) -> np.ndarray:
    """Return the regime of each token at each step but 0, by the definition."""
    steps = run.step.values[1:, np.newaxis]
    ends = [run[name].values for name in ("last_early", "last_midlife", "freeze_step")]
    return np.select([steps <= end for end in ends], [0, 1, 2], 3)


def search(page: Page, text: str) -> None:
    box = page.locator(".search input")
    box.fill(text)
    box.press("Enter")


def test_a_token_is_found_by_its_text_and_its_whole_history_shown(
    page: Page, real_run: Path
) -> None:
    ds = open_dataset(real_run)
    the = ds.isel(token=int(np.flatnonzero(ds.text.values == " the")[0]))
    search(page, " the")
    count = f"token {int(the.token)} · {int(the.n_occurrences):,} times in the corpus · live"
    page.get_by_text(count).wait_for()
    title = "Weight after the step"
    page.get_by_text(re.compile(f"History of token {int(the.token)}$")).wait_for()
    drawn = lines(page, title)
    np.testing.assert_allclose(
        drawn["norm"], np.linalg.norm(the.W.values.astype(float), axis=1), rtol=RTOL
    )
    dims = [name for name in drawn if name.startswith("dim ")]
    assert dims
    for name in dims:
        np.testing.assert_array_equal(drawn[name], the.W.values[:, int(name.removeprefix("dim "))])
    assert n_colored(frame(page, title)) > 100


def test_a_click_on_the_picture_shows_the_token_of_its_row(page: Page, real_run: Path) -> None:
    box = place(page, "tokens, sorted by their last move")
    page.mouse.click(box["x"] + 0.5 * box["width"], box["y"] + 0.3 * box["height"])
    words = page.get_by_text(re.compile(r"token [\d,]+ · 0 times in the corpus · dead"))
    words.wait_for()
    token = int(re.findall(r"token ([\d,]+)", words.inner_text())[0].replace(",", ""))
    page.get_by_text(re.compile(f"History of token ({token}|{token:,})$")).wait_for()
    drawn = lines(page, "Weight after the step")["norm"]
    W = open_dataset(real_run).W.sel(token=token).values
    np.testing.assert_allclose(drawn, np.linalg.norm(W.astype(float), axis=1), rtol=RTOL)


def test_a_brush_lists_what_changed_regime_and_its_ids_can_be_checked(
    page: Page, real_run: Path, tmp_path: Path
) -> None:
    box = place(page, SIZES)
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.3 * box["width"], y)
    tool = page.locator(".bk-tool-icon-x-box-select:visible")
    expect(tool).to_have_count(1)  # of the figure that the mouse is over
    tool.click()
    page.mouse.move(box["x"] + 0.3 * box["width"], y)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.7 * box["width"], y, steps=4)
    page.mouse.up()
    words = page.get_by_text(re.compile(r"[\d,]+ changed regime after steps \d+ to \d+"))
    words.wait_for()
    n_changed, first, last = (
        int(number) for number in re.findall(r"\d+", words.inner_text().replace(",", ""))
    )
    assert 1 < first < last < N_STEPS
    run = summary(real_run)
    changes = np.diff(regimes(run), axis=0) != 0  # after steps 1, 2, ...
    ids = run.token.values[changes[first - 1 : last].any(0)]
    assert n_changed == len(ids) > 0
    with page.expect_download() as download:
        page.get_by_role("button", name="Save ids").click()
    download.value.save_as(file := tmp_path / "ids.txt")
    assert [*map(int, file.read_text().split())] == ids.tolist()
    assert checked(real_run, "--tokens", f"@{file}")["tokens"]["n"] == n_changed
    page.get_by_text("Size of a step: these tokens").wait_for()
    compared = lines(page, "|delta_W| in ULP, L2, median")
    sizes = np.median(run.l2_ulp.sel(token=ids).values, axis=1)
    np.testing.assert_allclose(compared["changed in the span"], sizes, rtol=RTOL)
    assert compared["random sample"].shape == sizes.shape


def test_a_run_gains_steps_without_a_reload(browser: Browser, tmp_path: Path) -> None:
    store = tmp_path / "live.zarr"
    loop = Loop()
    options = {"labels": token_labels(), "memory_bytes": TINY_MEMORY}
    with Recorder(store, loop.optimizer, parameter=loop.weight, **options) as recorder:
        for _ in range(3):
            loop.step()
        recorder.flush()
        with tab(browser, store) as page:
            page.get_by_text("recording, step 3").wait_for()
            page.evaluate("window.is_the_same = true")
            for _ in range(5):
                loop.step()
            recorder.flush()
            page.get_by_text("recording, step 8").wait_for()
            page.wait_for_function(f"{MODEL}('step').end == 8")
            recorder.close()
            page.get_by_text("ended, step 8").wait_for()
            assert page.evaluate("window.is_the_same")
