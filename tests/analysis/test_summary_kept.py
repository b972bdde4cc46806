"""Where a summary lies, of which run and rows it is, and what becomes of it when either changes."""

import errno
import os
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

from tests.support.notebook_file import notebook_tensors, save
from tests.support.runs import N_STEPS, N_TOKENS, TINY_MEMORY, History, Loop, record, token_labels
from tests.support.tuned import tuned
from tests.support.zoo import Recorded
from thimble_zarr import Recorder, open_dataset, summary
from thimble_zarr.analysis.summary import computation
from thimble_zarr.analysis.summary.kept import Kept
from thimble_zarr.errors import StoreExistsError

CHUNK_ROWS = 4


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned(monkeypatch, summary_elements=CHUNK_ROWS * N_TOKENS)
    # Enough for a toy run, and it does not fork; who wants more asks for `workers`.
    monkeypatch.setattr("thimble_zarr.analysis.compute.run.n_cpus", lambda: 1)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that were computed in this process (`workers=1`), in their order."""
    rows: list[int] = []
    numbers_of = computation.numbers_of

    def noting(selected: computation.Selected, *options: object) -> dict[str, np.ndarray]:
        rows.extend(selected.rows)
        return numbers_of(selected, *options)  # type: ignore[arg-type]

    monkeypatch.setattr(computation, "numbers_of", noting)
    return rows


@contextmanager
def recording(path: Path, loop: Loop, **options: object) -> Iterator[Recorder]:
    labels = {"labels": token_labels()} if "resume" not in options else {}
    with Recorder(
        path, loop.optimizer, parameter=loop.weight, memory_bytes=TINY_MEMORY, **labels, **options
    ) as recorder:
        yield recorder


def steps(loop: Loop, n: int) -> None:
    for _ in range(n):
        loop.step()
        loop.optimizer.zero_grad()


def assert_is_of(path: Path, found: xr.Dataset, tmp_path: Path) -> None:
    """Compare a summary with one computed from scratch."""
    scratch = summary(path, place=tmp_path / "scratch.zarr", workers=1)
    assert {*scratch.data_vars} <= {*found.data_vars}
    for name in scratch.data_vars:
        at = {"group": scratch.group} if "group" in scratch[name].dims else {}
        np.testing.assert_allclose(
            found[name].sel(at).values.astype(float),
            scratch[name].values.astype(float),
            rtol=1e-6,
            atol=1e-9,
            err_msg=name,
        )
    shutil.rmtree(tmp_path / "scratch.zarr")


def test_it_lies_beside_the_store_as_an_ordinary_zarr(
    toy_copy: Path, tmp_path: Path, computed: list[int]
) -> None:
    before = sorted(toy_copy.rglob("*"))
    found = summary(toy_copy, workers=1)
    place = toy_copy.with_name("copy.summary.zarr")
    assert found.encoding["source"] == str(place)
    assert sorted(toy_copy.rglob("*")) == before
    assert computed == [*range(N_STEPS + 1)]
    plain = xr.open_zarr(place)
    assert {*found.data_vars} == {*plain.data_vars}
    assert plain.norm_W.dims == ("step", "token")
    np.testing.assert_array_equal(plain.l2_ulp, found.l2_ulp)
    for _, array in zarr.open_group(place, mode="r").arrays():
        assert array.metadata.dimension_names
        assert [type(codec).__name__ for codec in array.metadata.codecs] == [
            "BytesCodec",
            "BloscCodec",
        ]
    again = summary(toy_copy, workers=1)
    assert computed == [*range(N_STEPS + 1)]
    assert again.identical(found)


def test_of_a_run_that_grows_only_new_rows_are_computed(
    tmp_path: Path, computed: list[int]
) -> None:
    path, loop = tmp_path / "run.zarr", Loop()
    with recording(path, loop) as recorder:
        for n_steps in (6, 1, 5):
            steps(loop, n_steps)
            recorder.flush()
            found = summary(path, workers=1)
            assert len(computed) == len({*computed}) == len(found.step)
            assert_is_of(path, found, tmp_path)
            computed[:] = computed[: len(found.step)]
    summary(path, workers=1)
    assert len(computed) == 13


def test_a_run_that_was_cut_and_resumed_is_summed_up_anew(tmp_path: Path) -> None:
    path, loop = tmp_path / "run.zarr", Loop()
    with recording(path, loop):
        steps(loop, 9)
    before = summary(path).load()
    other = Loop()
    steps(other, 5)
    with recording(path, other, resume=True, after_step=5):
        other.optimizer.param_groups[0]["lr"] = 0.1
        steps(other, 6)
    found = summary(path)
    assert len(found.step) == 12
    assert_is_of(path, found, tmp_path)
    assert not np.array_equal(before.norm_W, found.norm_W[:10])
    np.testing.assert_array_equal(before.norm_W[:6], found.norm_W[:6])


def test_another_run_at_the_same_path_is_summed_up_anew(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    for lr in (1e-2, 1e-1):
        record(path, lr=lr, recorder_options={"overwrite": True})
        assert_is_of(path, summary(path), tmp_path)


def test_a_dataset_of_fewer_steps_has_a_summary_of_those(tmp_path: Path) -> None:
    path, loop = tmp_path / "run.zarr", Loop()
    with recording(path, loop) as recorder:
        steps(loop, 5)
        recorder.flush()
        ds = open_dataset(path)
        steps(loop, 5)
    assert len(summary(path).step) == 11
    found = summary(ds)
    assert found.step.values.tolist() == [0, 1, 2, 3, 4, 5]
    assert int(found.freeze_step.max()) == 5


def test_groups_that_were_asked_for_stay(toy_copy: Path, computed: list[int]) -> None:
    names = [
        summary(toy_copy, groups=groups, workers=1).group.values.tolist()
        for groups in ({"a": [3]}, {"b": [5]}, {"a": [3]}, {})
    ]
    assert names[1:] == [["dead", "live", "all", "a", "b"]] * 3
    assert len(computed) == 2 * (N_STEPS + 1)
    changed = summary(toy_copy, groups={"a": [7]}, workers=1)
    assert np.flatnonzero(changed.is_member.sel(group="a")).tolist() == [7]


def test_who_has_it_open_reads_the_same_when_a_group_is_added(toy_copy: Path) -> None:
    before = summary(toy_copy, groups={"a": [3]}, workers=1).load()
    opened = summary(toy_copy, workers=1)
    summary(toy_copy, groups={"b": [5]}, workers=1)
    xr.testing.assert_allclose(opened.load(), before)


def test_another_run_at_the_same_path_has_none_of_its_groups(tmp_path: Path) -> None:
    path, loop = tmp_path / "run.zarr", Loop()
    record(path)
    summary(path, groups={"mine": [3]})
    with Recorder(path, loop.optimizer, parameter=loop.weight, overwrite=True):
        steps(loop, 3)
    assert summary(path).group.values.tolist() == ["all"]


def test_last_steps_are_not_those_of_rows_that_were_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed just before it was complete, of a run that is cut off and resumed then."""
    path, loop = tmp_path / "run.zarr", Loop()
    with recording(path, loop) as recorder:
        steps(loop, 3)
        recorder.flush()
        summary(path, workers=1)
        steps(loop, 9)
    with monkeypatch.context() as patch:
        patch.setattr(Kept, "finish", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert ended_by(lambda: summary(path, workers=1)) == signal.SIGKILL
    other = Loop()
    steps(other, 5)
    with recording(path, other, resume=True, after_step=5):
        steps(other, 1)
    found = summary(path)
    assert int(found.freeze_step.max()) == 6
    assert_is_of(path, found, tmp_path)


def test_results_are_let_go_of_when_they_are_written(
    toy_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned(monkeypatch, summary_elements=N_TOKENS)
    results: list[weakref.ref[np.ndarray]] = []
    numbers_of = computation.numbers_of

    def noting(*options: object) -> dict[str, np.ndarray]:
        found = numbers_of(*options)  # type: ignore[arg-type]
        results.append(weakref.ref(found["freeze_step"]))
        return found

    monkeypatch.setattr(computation, "numbers_of", noting)
    n_alive: list[int] = []

    def reached(n_done: int, n_tasks: int) -> None:
        n_alive.append(sum(result() is not None for result in results))

    summary(toy_copy, workers=1, progress=reached)
    assert len(results) == N_STEPS + 1
    assert n_alive[-1] <= 2


def test_nobody_writes_any_more_when_others_may(
    toy_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One task fails while another one runs."""
    events: list[str] = []
    locked, barrier = Kept.locked, threading.Barrier(2)

    def failing(*options: object) -> None:
        if options[-1] == (0, CHUNK_ROWS):
            barrier.wait(10)
            raise ValueError("it fails")
        if options[-1] == (CHUNK_ROWS, 2 * CHUNK_ROWS):
            barrier.wait(10)
        time.sleep(0.2)
        events.append("written")

    @contextmanager
    def noting(kept: Kept) -> Iterator[None]:
        try:
            with locked(kept):
                yield
        finally:
            events.append("free")

    monkeypatch.setattr(computation, "_compute_rows", failing)
    monkeypatch.setattr(computation, "processes", lambda *_: ThreadPoolExecutor(4))
    monkeypatch.setattr(Kept, "locked", noting)
    with pytest.raises(ValueError, match="it fails"):
        summary(toy_copy)
    assert events[-1] == "free"
    assert "written" in events


def test_a_user_without_a_name_may_write(toy_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", nameless)
    assert len(summary(toy_copy).step) == N_STEPS + 1


def ended_by(child: Callable[[], object]) -> int:
    """Run something in a forked process, and return which signal killed it, or 0."""
    pid = os.fork()
    if pid == 0:
        try:
            child()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) <= 0
    return -os.waitstatus_to_exitcode(status)


@pytest.mark.parametrize(
    ("n_steps", "moment"),
    [(0, "begin"), (6, "write"), (6, "write_last_steps"), (6, "finish")],
)
def test_what_was_killed_is_never_taken_for_complete(
    moment: str, n_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a summary is computed from scratch, and while one of six steps is extended."""
    path, loop = tmp_path / "run.zarr", Loop()
    with recording(path, loop) as recorder:
        steps(loop, n_steps)
        recorder.flush()
        if n_steps:
            summary(path, workers=1)
        steps(loop, 5)

    whole = getattr(Kept, moment)

    def half(*args: object, **options: object) -> None:
        if moment != "finish":
            whole(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(Kept, moment, half)
        if moment != "begin" or n_steps == 0:
            assert ended_by(lambda: summary(path, workers=1)) == signal.SIGKILL
    place = path.with_name("run.summary.zarr")
    note = Kept(place).note
    assert (note is None) if n_steps == 0 else (note is not None and note.n_rows == n_steps + 1)
    if n_steps:
        assert len(xr.open_zarr(place).step) == n_steps + 1
    assert_is_of(path, summary(path), tmp_path)


def test_two_processes_at_once_make_one_summary(toy_copy: Path, tmp_path: Path) -> None:
    """They want different groups, so that each replaces what the other one looks at."""

    def sum_up(group: str) -> None:
        for token in (3, 5, 7):
            assert len(summary(toy_copy, groups={group: [token]}, workers=1).step) == N_STEPS + 1

    pids = []
    for group in "ab":
        if (pid := os.fork()) == 0:
            try:
                sum_up(group)
                os._exit(0)
            finally:
                os._exit(1)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    found = summary(toy_copy)
    assert found.group.values.tolist()[:3] == ["dead", "live", "all"]
    assert_is_of(toy_copy, found, tmp_path)


def test_where_nothing_can_be_written_it_lies_in_the_cache(
    toy_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    create = zarr.create_group

    def refusing(store: Path, **options: object) -> zarr.Group:
        if tmp_path / "cache" not in Path(store).parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(store))
        return create(store, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(zarr, "create_group", refusing)
    with pytest.warns(UserWarning, match=r"nothing can be written beside .*Permission denied"):
        found = summary(toy_copy)
    assert found.encoding["source"].startswith(str(tmp_path / "cache"))
    with pytest.raises(PermissionError):
        summary(toy_copy, place=tmp_path / "here.zarr")


def test_nothing_else_is_overwritten(toy_copy: Path, toy_path: Path) -> None:
    place = toy_copy.with_name("copy.summary.zarr")
    shutil.copytree(toy_path, place)
    with pytest.raises(StoreExistsError, match="is there and is no summary; remove it, or name"):
        summary(toy_copy)


def test_parameters_of_a_store_share_a_zarr(zoo: Recorded, tmp_path: Path) -> None:
    place = tmp_path / "zoo.summary.zarr"
    for name in ("query", "up", "query"):
        found = summary(zoo.path, parameter=name, place=place)
    assert {*zarr.open_group(place, mode="r").group_keys()} == {"query", "up"}
    np.testing.assert_array_equal(found.norm_W, xr.open_zarr(place, group="query").norm_W)


def test_a_notebooks_file_is_summed_up_until_it_changes(
    toy_history: History, tmp_path: Path, computed: list[int]
) -> None:
    file = save(tmp_path / "run.safetensors", notebook_tensors(toy_history))
    found = summary(file, workers=1)
    assert found.encoding["source"] == str(tmp_path / "run.summary.zarr")
    norms = np.sqrt((toy_history["W"] ** 2).sum(-1))
    np.testing.assert_allclose(found.norm_W, norms, rtol=1e-6)
    summary(file, workers=1)
    assert len(computed) == N_STEPS + 1
    os.utime(file, ns=(0, 0))
    summary(file, workers=1)
    assert len(computed) == 2 * (N_STEPS + 1)
