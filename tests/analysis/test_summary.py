"""The numbers of a summary, against those computed in the plainest way (`summary_oracle`)."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from tests.support.runs import N_TOKENS, Loop, live_mask, record, token_labels
from tests.support.summary_oracle import assert_same_summary, reference_summary
from tests.support.tuned import tuned
from tests.support.zoo import Recorded
from thimble_zarr import Recorder, every, open_dataset, summary, windows
from thimble_zarr.analysis.compute.windows import Window
from thimble_zarr.analysis.summary import formula, means
from thimble_zarr.errors import ConfigError, SelectionError
from thimble_zarr.store.rows import OpenedRows


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tasks, windows and parts of a toy run."""
    tuned(monkeypatch, summary_elements=4 * N_TOKENS, cached_elements=40, part_bytes=240)
    # Enough for a toy run, and it does not fork; who wants more asks for `workers`.
    monkeypatch.setattr("thimble_zarr.analysis.compute.run.n_cpus", lambda: 1)


def groups_of(ds: xr.Dataset, **named: list[int]) -> dict[str, np.ndarray]:
    groups = {name: ds[name].values for name in ("dead", "live") if name in ds.coords}
    groups["all"] = np.ones(ds.W.shape[1], bool)
    return groups | {name: np.isin(np.arange(ds.W.shape[1]), ids) for name, ids in named.items()}


def expected_of(
    path: Path, native: str | None = None, **named: list[int]
) -> tuple[xr.Dataset, xr.Dataset]:
    ds = open_dataset(path)
    return ds, reference_summary(ds, native or ds.attrs["dtype"], groups_of(ds, **named))


DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_is_that_of_the_plain_computation(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    record(path, dtype=dtype, weight_decay=0.1, eps=1e-4)
    _, expected = expected_of(path, mine=[2, 3, 7])
    assert_same_summary(summary(path, groups={"mine": [2, 3, 7]}), expected)


def test_numbers_do_not_depend_on_how_the_run_is_cut(
    toy_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = summary(toy_path, place=tmp_path / "cut.zarr", workers=2)
    assert len(cut.norm_W.chunks[0]) > 2
    tuned(monkeypatch, summary_elements=2**20)
    whole = summary(toy_path, place=tmp_path / "whole.zarr", workers=1)
    assert_same_summary(cut, whole)
    assert_same_summary(whole, expected_of(toy_path)[1])


@pytest.mark.parametrize("held_bytes", [0, 2**20])
def test_weights_are_read_once_where_they_fit_the_memory(
    held_bytes: int, toy_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned(monkeypatch, summary_held_bytes=held_bytes, summary_elements=2**20)
    read, blocks = OpenedRows.read, []

    def noting(self: OpenedRows, name: str, rows: tuple[int, int], *args: Any) -> np.ndarray:
        blocks.append((name, rows))
        return read(self, name, rows, *args)

    monkeypatch.setattr(OpenedRows, "read", noting)
    found = summary(toy_path, place=tmp_path / "s.zarr", workers=1)
    n_reads = {name: len([of for of, _ in blocks if of == name]) for name in ("W", "grad")}
    assert n_reads["W"] == n_reads["grad"] * (1 if held_bytes else 2)
    assert_same_summary(found, expected_of(toy_path)[1])


@pytest.mark.parametrize("trusting", [False, True])
def test_where_little_is_left_of_a_step_float32_is_not_trusted(
    trusting: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.zarr"
    record(path, lr=1.0)
    if trusting:
        monkeypatch.setattr(formula, "_LEAST_LEFT", 0.0)
    expected, found = expected_of(path)[1][["norm_residual"]], summary(path)[["norm_residual"]]
    with pytest.raises(AssertionError) if trusting else nullcontext():
        assert_same_summary(found, expected)


def test_steps_are_measured_in_the_lattice_of_another_dtype(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    record(path, dtype=torch.float32)
    found = summary(path, dtype="bfloat16")
    assert_same_summary(found, expected_of(path, "bfloat16")[1])
    assert float(found.max_ulp.max()) < float(summary(path).max_ulp.max()) / 1000
    with pytest.raises(ConfigError, match="no dtype int8"):
        summary(path, dtype="int8")


def test_rows_without_the_row_before_have_no_changes(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    record(path, recorder_options={"schedule": every(3) | windows((1, 2))})
    found = summary(path)
    assert_same_summary(found, expected_of(path)[1])
    assert 4 not in found.step
    assert bool(np.isnan(found.norm_delta_W.sel(step=5)).all())
    assert bool((found.norm_m_hat.sel(step=5) > 0).all())


@pytest.mark.parametrize("n_steps", [1, 2])
def test_a_short_run_is_summed_up(n_steps: int, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    record(path, n_steps=n_steps)
    assert_same_summary(summary(path), expected_of(path)[1])


def test_weights_that_are_not_finite_hide_nothing_of_others(tmp_path: Path) -> None:
    path, loop = tmp_path / "run.zarr", Loop(dtype=torch.float32)
    token = int(np.flatnonzero(~live_mask())[0])
    with Recorder(path, loop.optimizer, parameter=loop.weight, labels=token_labels()):
        for bad in (0.5, np.nan, 0.5, 0.5):
            with torch.no_grad():
                loop.weight[token, 2] = bad
            loop.step()
            loop.optimizer.zero_grad()
    ds, found = open_dataset(path), summary(path)
    with np.errstate(invalid="ignore"):
        assert_same_summary(found, reference_summary(ds, "float32", groups_of(ds)))
    assert found.n_moved.sel(token=token).values.tolist()[1:] == [5, 4, 4, 4]
    assert bool(np.isfinite(found.l2_ulp_quantiles.sel(step=4, group="dead")).all())


def test_an_optimizer_without_estimates_has_the_norms_of_its_states(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    loop = Loop(optimizer=torch.optim.SGD, dtype=torch.float32, momentum=0.9)
    with Recorder(path, loop.optimizer, parameter=loop.weight):
        for _ in range(5):
            loop.step()
    ds, found = open_dataset(path), summary(path)
    assert "norm_m_hat" not in found
    assert found.group.values.tolist() == ["all"]
    for name in ("momentum_buffer", "residual"):
        norms = np.sqrt((ds[name].astype(float) ** 2).sum("dim", skipna=False))
        np.testing.assert_allclose(found[f"norm_{name}"], norms, rtol=1e-6)


def test_what_was_not_recorded_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    record(path, recorder_options={"variables": ["W", "exp_avg"]}, n_steps=3)
    found = summary(path)
    assert {"norm_grad", "norm_sqrt_v_hat", "norm_residual", "share_stalled"}.isdisjoint(found)
    W = open_dataset(path).W.astype(float)
    np.testing.assert_allclose(found.norm_W, np.sqrt((W**2).sum("dim")), rtol=1e-6)
    assert {"norm_m_hat", "cosine_to_mean", "norm_observed", "share_moved"} <= {*found}


@pytest.mark.parametrize("name", ["scale", "norm", "query", "filter"])
def test_rows_of_any_parameter_are_summed_up(zoo: Recorded, name: str, tmp_path: Path) -> None:
    found = summary(zoo.path, parameter=name, place=tmp_path / "zoo.summary.zarr")
    W = zoo.histories[name]["W"].reshape(len(found.step), len(found.token), -1)
    np.testing.assert_allclose(found.norm_W, np.sqrt((W**2).sum(-1)), rtol=1e-6)
    np.testing.assert_allclose(found.centroid.sel(group="all"), W.mean(1), rtol=1e-6)
    with pytest.raises(SelectionError, match="holds 7 parameters, and one must be chosen"):
        summary(zoo.path)


def test_a_selection_is_summed_up_and_not_kept(toy_copy: Path) -> None:
    ds = open_dataset(toy_copy)
    found = summary(ds.sel(step=[5, 6, 9], token=[7, 2, 3]), groups={"first": [7]})
    assert not toy_copy.with_name("copy.summary.zarr").exists()
    whole = summary(ds).sel(step=[5, 6, 9], token=[7, 2, 3])
    for name in ("norm_W", "l2_ulp", "norm_residual"):
        np.testing.assert_array_equal(found[name], whole[name])
    at = ds.delta_W.sel(step=9, token=[7, 2, 3]).astype(float)
    np.testing.assert_allclose(found.mean_delta_W.sel(group="all", step=9), at.mean("token"))
    assert found.centroid_distance.sel(group="first", token=7).values.tolist() == [0, 0, 0]
    assert found.token.values.tolist() == [7, 2, 3]


def test_a_selection_may_be_in_any_order_but_not_empty(toy_path: Path) -> None:
    ds = open_dataset(toy_path)
    found = summary(ds.sel(step=[9, 5, 6]))
    assert found.freeze_step.values.tolist() == [9] * N_TOKENS
    for nothing in ({"step": []}, {"token": []}, {"dim": []}):
        with pytest.raises(SelectionError, match="nothing is selected"):
            summary(ds.isel(nothing))


def test_groups_are_ids_masks_or_words(toy_path: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("3 5\n")
    mask = np.isin(np.arange(N_TOKENS), [3, 5])
    groups = {"a": [3, 5], "b": mask, "c": "3,5", "d": f"@{tmp_path / 'ids.txt'}"}
    found = summary(toy_path, groups=groups, place=tmp_path / "s.zarr")
    assert found.group.values.tolist() == ["dead", "live", "all", "a", "b", "c", "d"]
    for name in groups:
        np.testing.assert_array_equal(found.is_member.sel(group=name), mask)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "the group mine is empty"),
        (np.zeros(N_TOKENS, bool), "the group mine is empty"),
        ([99], "has token 99, which is not there"),
        ([0.5], "must be ids or a mask, not float64"),
        (np.ones(3, bool), "a value for each of the 11 tokens"),
        ("text:nothing", "the group mine=text:nothing: no token has the text"),
        ("dead,live", "the group mine=dead,live: expected all, live, dead, ids"),
    ],
)
def test_a_group_that_cannot_be_is_refused(
    members: object, message: str, toy_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(SelectionError, match=message):
        summary(toy_path, groups={"mine": members}, place=tmp_path / "s.zarr")  # type: ignore[dict-item]


@pytest.mark.parametrize("name", ["a/b", "..", "../../a", ""])
def test_a_group_needs_a_name_that_a_folder_can_have(name: str, toy_copy: Path) -> None:
    with pytest.raises(SelectionError, match="a group cannot be called"):
        summary(toy_copy, groups={name: [3]})


@pytest.mark.parametrize("fault", ["spacing at W[t]", "the mean of another group"])
def test_a_wrong_number_is_found(
    fault: str, toy_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison with the plain computation sees what people computed wrong by hand."""
    _, expected = expected_of(toy_path)
    if fault == "spacing at W[t]":
        monkeypatch.setattr(Window, "previous", lambda part, name: np.roll(part.current(name), 1))
        wrong = "l1_ulp"
    else:
        right = means.means
        monkeypatch.setattr(means, "means", lambda of, groups: right(of, groups)[::-1])
        wrong = "centroid"
    found = summary(toy_path, place=tmp_path / "s.zarr")
    with pytest.raises(AssertionError):
        assert_same_summary(found[[wrong]], expected[[wrong]])
