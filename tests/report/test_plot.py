"""`thimble_zarr.plot`: a function for each panel of the report."""

import inspect
import pydoc
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

import thimble_zarr
from thimble_zarr import open_dataset, plot
from thimble_zarr.errors import ConfigError, SelectionError
from thimble_zarr.report.panels.registry import PANELS

NAMES = [panel.__name__ for panel in PANELS]


def test_there_is_a_function_for_each_panel_with_help() -> None:
    assert plot.__all__ == [*NAMES, "compare"]
    assert dir(plot) == sorted([*NAMES, "compare"])
    text = pydoc.plain(pydoc.render_doc(plot))
    for name in NAMES:
        names = [*inspect.signature(getattr(plot, name)).parameters]
        assert names == ["run", "group", "parameter", "summary"]
        assert f"{name}(run:" in text
    with pytest.raises(AttributeError, match=f"has no step_sizes; it has {NAMES[0]}, "):
        plot.step_sizes  # noqa: B018


@pytest.mark.parametrize("name", NAMES)
def test_every_panel_is_drawn(name: str, toy_path: Path) -> None:
    figure = getattr(plot, name)(toy_path)
    assert isinstance(figure, Figure)
    says_why = bool(figure.legends[0].get_title().get_text())
    assert [ax.has_data() for ax in figure.axes] or says_why
    assert not [text for ax in figure.axes for text in ax.texts if "nothing" in text.get_text()]


def test_the_dead_are_shown_if_no_group_is_named(toy_path: Path) -> None:
    def median(**options: object) -> np.ndarray:
        lines = plot.radius(ds, **options).axes[0].lines
        return next(line.get_ydata() for line in lines if line.get_label() == "median")

    ds = open_dataset(toy_path)
    norms = np.sqrt((ds.W.astype("f8") ** 2).sum("dim")).values
    for group, of in (
        (None, ds.dead),
        ("dead", ds.dead),
        ("live", ds.live),
        ("all", ds.token >= 0),
    ):
        np.testing.assert_allclose(
            median(group=group), np.median(norms[:, of.values], 1), rtol=1e-6
        )


def test_groups_of_a_summary_are_shown_and_others_are_not(toy_copy: Path) -> None:
    ds = open_dataset(toy_copy)
    with pytest.raises(
        SelectionError, match=r"no group 'thai'; the summary has dead, live, all\. "
    ):
        plot.step_size(ds, group="thai")
    summary = thimble_zarr.summary(ds, groups={"thai": [1, 2, 3]})
    assert plot.step_size(ds, group="thai", summary=summary).get_suptitle().endswith("(thai)")


def test_a_selection_is_drawn(toy_path: Path) -> None:
    ds = open_dataset(toy_path).sel(step=slice(2, 7), token=[1, 4, 5])
    low, high = plot.radius(ds, group="all").axes[0].dataLim.intervalx
    assert (low, high) == (2, 7)


def test_a_single_run_is_compared_and_none_is_refused(toy_path: Path) -> None:
    assert len(plot.compare(toy_path).axes[0].lines) == 1
    with pytest.raises(ConfigError, match="nothing to compare"):
        plot.compare([])


def test_runs_are_compared(toy_path: Path) -> None:
    whole = open_dataset(toy_path)
    figure = plot.compare([toy_path, whole.isel(step=slice(5))], group="live")
    names = [[line.get_label() for line in ax.lines] for ax in figure.axes]
    assert names == [[str(toy_path), "run.zarr"]] * 5
    assert [[len(line.get_xdata()) for line in ax.lines] for ax in figure.axes] == [
        [13, 4],
        [13, 4],
        [13, 4],
        [14, 5],
        [14, 5],
    ]
