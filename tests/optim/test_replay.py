"""The exact replay: whatever torch.optim did must be replayed to the bit, on any selection.

Gradients are drawn, not trained: of all sizes, some rows of zeros and some of negative zeros.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import dask
import numpy as np
import pytest
import torch
from torch import nn

from tests.support.draws import (
    ADAM,
    ADAMW,
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    LANE_SENSITIVE,
    N_STEPS,
    SHAPE,
    Cell,
    Options,
    draw,
    gradient,
    needs_vectors,
)
from tests.support.optimizers import DTYPES, IMPLEMENTATIONS
from tests.support.runs import Loop, threads
from thimble_zarr import Recorder, accounting, open_dataset
from thimble_zarr.analysis.compute.comparison import compare, replayed
from thimble_zarr.analysis.compute.source import TORCH, Source
from thimble_zarr.analysis.compute.windows import iter_windows
from thimble_zarr.analysis.verdict import verdict
from thimble_zarr.causes.replay import recurrences
from thimble_zarr.optim.lanes import Lanes, Piece, one_thread
from thimble_zarr.optim.lanes import threads as lanes_threads
from thimble_zarr.store.reader import StoreReader


def n_different(path: Path, **selected: np.ndarray) -> dict[str, int]:
    """Count, of some rows, tokens and dims, what the replay gets otherwise than recorded."""
    return n_different_of(Source(StoreReader.open(path), replay=TORCH), **selected)


def n_different_of(source: Source, **selected: np.ndarray) -> dict[str, int]:
    schema = source.reader.schema
    axes = {"step": source.reader.n_rows, "token": schema.n_tokens, "dim": schema.n_dims}
    indices = {name: selected.get(name, range(length)) for name, length in axes.items()}
    counts = dict.fromkeys(recurrences(schema), 0)
    n_seen = 0
    for _, window in iter_windows(source, *indices.values()):
        after = replayed(window)
        for name, comparison in compare(window, after, exact=True).items():
            counts[name] += int(comparison.differs.sum())
        n_seen += after["W"].size
    assert n_seen == np.prod([len(index) for index in indices.values()])
    return counts


def subsets(reader: StoreReader) -> dict[str, dict[str, np.ndarray]]:
    """Selections that put elements elsewhere than they lay: that is where a replay goes wrong."""
    last, middle = reader.schema.n_tokens - 1, reader.n_rows // 2
    few = np.array([last, 3, last - 3, 100, 17, 0])
    return {
        "few": {"token": few},
        "one of the last": {"token": np.array([last])},
        "one of the first": {"token": np.array([1])},
        "one dim": {"dim": np.array([reader.schema.n_dims // 2])},
        "one element": {"token": np.array([last - 1]), "dim": np.array([1])},
        "steps": {"step": np.arange(middle, reader.n_rows)[:3], "token": few},
        "reversed": {"token": np.arange(last, -1, -1), "dim": np.array([4, 2, 0])},
    }


def assert_exact(path: Path, only: tuple[str, ...] | None = None) -> None:
    table = accounting(open_dataset(path))
    assert table.attrs["not_exact_because"] == ""
    for name in ("n_different", "n_beyond", "max_ulp"):
        counts = table[name].sum("step").to_series().to_dict()
        assert set(counts.values()) == {0}, (name, counts)
    assert (table.norm_unexplained == 0).all()
    source = Source(StoreReader.open(path), replay=TORCH)
    selections = subsets(source.reader)
    for name in selections if only is None else only:
        counts = n_different_of(source, **selections[name])
        assert set(counts.values()) == {0}, (name, counts)


sensitive = pytest.mark.parametrize("name", LANE_SENSITIVE)


@sensitive
def test_many_steps_stay_exact(name: str, tmp_path: Path) -> None:
    cell = replace(LANE_SENSITIVE[name], n_steps=199, shape=(17, 7))
    path = cell.record(tmp_path / "run.zarr")
    table = accounting(open_dataset(path))
    assert table.sizes["step"] == 199
    assert int(table.n_different.sum()) == 0
    assert set(n_different(path, token=np.array([16, 2])).values()) == {0}


@needs_vectors
@sensitive
def test_the_trap_is_real(name: str) -> None:
    """The same elements, in a tensor of another size, come out otherwise."""
    cell = LANE_SENSITIVE[name]
    generator = torch.Generator().manual_seed(7)
    n_elements = 31 * 64
    start = draw((n_elements,), generator, size=0.02).to(cell.dtype)
    gradients = [draw((n_elements,), generator).to(cell.dtype) for _ in range(5)]

    def run(elements: slice) -> torch.Tensor:
        weight = nn.Parameter(start[elements].clone())
        optimizer = cell.optimizer([weight], **{"lr": 1e-2, **cell.options})
        for grad in gradients:
            weight.grad = grad[elements].clone()
            optimizer.step()
        state = optimizer.state[weight]
        return torch.stack([weight.detach(), state["exp_avg"], state["exp_avg_sq"]])

    whole = run(slice(None))
    whole_vectors = [run(slice(0, 10 * 64)), run(slice(10 * 64, None))]
    assert torch.equal(torch.cat(whole_vectors, dim=1), whole)
    one_at_a_time = torch.cat([run(slice(i, i + 3)) for i in range(0, 180, 3)], dim=1)
    assert not torch.equal(one_at_a_time, whole[:, :180])


@needs_vectors
@sensitive
def test_without_lanes_the_replay_would_be_wrong(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = LANE_SENSITIVE[name].record(tmp_path / "run.zarr")
    assert_exact(path)

    def in_one(lanes: Lanes, positions: np.ndarray) -> list[Piece]:
        n = len(positions)
        return [Piece(slice(n), slice(n), n)]

    monkeypatch.setattr(Lanes, "split", in_one)
    selections = subsets(StoreReader.open(path)).values()
    assert sum(sum(n_different(path, **selected).values()) for selected in selections) > 0


THREADED = Cell(BFLOAT16, ADAM, {"weight_decay": 0.1}, shape=(1201, 61), n_steps=5)
"""73,261 elements: three threads get 24,421 each, so that rests lie in the middle."""


@pytest.fixture(scope="module", params=["single", "foreach", "fused"])
def threaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cell = replace(THREADED, options=THREADED.options | IMPLEMENTATIONS[request.param])
    if request.param == "fused":
        cell = replace(cell, dtype=FLOAT32)
    with threads(3):
        return cell.record(tmp_path_factory.mktemp("threaded") / "run.zarr")


@pytest.mark.parametrize("n_threads", [1, 2, 3, 5])
def test_any_number_of_threads_replays_what_three_recorded(threaded: Path, n_threads: int) -> None:
    assert StoreReader.open(threaded).schema.n_threads == 3
    with threads(n_threads):
        assert_exact(threaded)


@needs_vectors
def test_the_number_of_threads_matters(threaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the rests looked for at the end only, the replay would be wrong."""
    schema = StoreReader.open(threaded).schema
    if schema.optimizer.implementation == "fused":
        pytest.skip("the fused program divides at cache lines")
    real = Lanes.of

    def of_one_thread(implementation: str, *, n_elements: int, n_threads: int) -> Lanes:
        return real(implementation, n_elements=n_elements, n_threads=1)

    monkeypatch.setattr(Lanes, "of", of_one_thread)
    assert sum(n_different(threaded).values()) > 0


@pytest.mark.parametrize("optimizer", [ADAMW, ADAM])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_real_shape(
    implementation: str, optimizer: type[torch.optim.Optimizer], tmp_path: Path
) -> None:
    options = {"weight_decay": 0.1, **IMPLEMENTATIONS[implementation]}
    cell = Cell(BFLOAT16, optimizer, options, shape=(10_000, 64), n_steps=2)
    with threads(2):
        assert_exact(cell.record(tmp_path / "run.zarr"))


@pytest.mark.parametrize("n_elements", [1, 63, 64, 65, 2743, 32767, 32768, 73_261])
@pytest.mark.parametrize("n_threads", [1, 2, 3, 7])
@pytest.mark.parametrize("implementation", ["single", "fused"])
def test_lanes_take_every_element_once(
    n_elements: int, n_threads: int, implementation: str
) -> None:
    lanes = Lanes.of(implementation, n_elements=n_elements, n_threads=n_threads)
    rng = np.random.default_rng(0)
    some = rng.permutation(n_elements)[: 1 + n_elements // 3]
    for positions in (np.arange(n_elements), some, np.sort(some), some[:1]):
        seen = np.zeros(len(positions), dtype=np.int64)
        for piece in lanes.split(positions):
            marks = np.arange(1, len(positions) + 1)
            placed = piece.place(marks)
            assert len(placed) == piece.length
            np.testing.assert_array_equal(placed[piece.offsets], marks[piece.indices])
            assert np.count_nonzero(placed) == len(marks[piece.indices])
            seen[piece.indices] += 1
        np.testing.assert_array_equal(seen, 1)


class Training:
    """A recorded loop in which a test decides what a step is."""

    def __init__(self, path: Path, loop: Loop, *, parameter: torch.Tensor | None = None) -> None:
        self.path = path
        self.loop = loop
        self.recorder = Recorder(
            path, loop.optimizer, parameter=loop.weight if parameter is None else parameter
        )

    def run(self, take_step: Callable[[int], None], n_steps: int = 11) -> Path:
        with self.recorder:
            for step in range(n_steps):
                take_step(step)
                self.loop.optimizer.zero_grad()
        return self.path


SETTINGS = [
    pytest.param(dtype, options, id=f"{implementation}-{name}")
    for name, (dtype, eps) in DTYPES.items()
    for implementation, program in IMPLEMENTATIONS.items()
    for options in [{"eps": eps, **program}]
]
settings = pytest.mark.parametrize(("dtype", "options"), SETTINGS)


def toy_loop(dtype: torch.dtype, options: Options) -> Loop:
    return Loop(dtype=dtype, n_tokens=37, n_dims=7, n_live=29, optimizer=ADAM, **options)


@settings
def test_clipped_and_accumulated_gradients_are_those_the_step_consumed(
    dtype: torch.dtype, options: Options, tmp_path: Path
) -> None:
    loop = toy_loop(dtype, options | {"weight_decay": 0.1})

    def take_step(step: int) -> None:
        for _ in range(3):
            loop.backward()
        norm = nn.utils.clip_grad_norm_([loop.weight], max_norm=1e-2)
        assert norm > 1e-2
        loop.optimizer.step()

    assert_exact_toy(Training(tmp_path / "run.zarr", loop).run(take_step))


def assert_exact_toy(path: Path) -> None:
    table = accounting(open_dataset(path))
    assert int(table.n_different.sum()) == 0
    assert verdict(table).text.startswith("HOLDS to the bit: ")
    for selected in ({"token": np.array([36, 2, 20])}, {"dim": np.array([6]), "token": [11]}):
        assert set(n_different(path, **selected).values()) == {0}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("group", [0, 1])
def test_each_group_of_parameters_has_its_own_numbers(
    group: int, implementation: str, tmp_path: Path
) -> None:
    loop = toy_loop(FLOAT32, {})
    groups = [
        {"params": [loop.weight], "lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.2},
        {"params": list(loop.head.parameters()), "lr": 3e-3, "amsgrad": True},
    ]
    loop.optimizer = ADAMW(groups, **IMPLEMENTATIONS[implementation])
    parameter = [loop.weight, loop.head.weight][group]

    def take_step(step: int) -> None:
        loop.step()

    path = Training(tmp_path / "run.zarr", loop, parameter=parameter).run(take_step)
    learning_rate = StoreReader.open(path).read_scalars()["learning_rate"][1:]
    assert set(learning_rate) == {[1e-2, 3e-3][group]}
    assert int(accounting(open_dataset(path)).n_different.sum()) == 0
    assert set(n_different(path, token=np.array([5, 1])).values()) == {0}


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"amsgrad": True, "maximize": True}]
)
def test_a_differentiable_optimizer(dtype: torch.dtype, options: Options, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    weight = draw(SHAPE, generator).to(dtype)
    optimizer = ADAM([weight], lr=1e-2, differentiable=True, **options)
    with Recorder(tmp_path / "run.zarr", optimizer, parameter=weight):
        for _ in range(5):
            weight.grad = gradient(SHAPE, generator).to(dtype)
            optimizer.step()
    assert StoreReader.open(tmp_path / "run.zarr").schema.optimizer.differentiable
    assert_exact(tmp_path / "run.zarr")


@settings
def test_what_diverges_is_replayed_too(
    dtype: torch.dtype, options: Options, tmp_path: Path
) -> None:
    loop = toy_loop(dtype, options)

    def take_step(step: int) -> None:
        loop.backward()
        if step == 4:
            loop.weight.grad[[3, 36], 2] = torch.tensor([np.nan, np.inf], dtype=dtype)
        loop.optimizer.step()

    path = Training(tmp_path / "run.zarr", loop).run(take_step, n_steps=7)
    table = accounting(open_dataset(path))
    assert int(table.n_different.sum()) == 0
    assert table.n_not_finite.values.tolist()[:5] == [0, 0, 0, 0, 2]
    found = verdict(table)
    assert not found.holds
    assert "weight changes are not finite, first at step 5" in found.text
    assert set(n_different(path, token=np.array([36, 3]), dim=np.array([2])).values()) == {0}
    unexplained = open_dataset(path).unexplained.values[1:]
    assert (unexplained[:4] == 0).all()


@pytest.mark.parametrize("optimizer", [ADAMW, ADAM])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float16_in_which_epsilon_is_zero(
    implementation: str, optimizer: type[torch.optim.Optimizer], tmp_path: Path
) -> None:
    """Where the second moment underflows weights become infinite and NaN: so does the replay."""
    options = {"eps": 1e-8, "weight_decay": 0.1, **IMPLEMENTATIONS[implementation]}
    path = Cell(FLOAT16, optimizer, options).record(tmp_path / "run.zarr")
    assert_exact(path)
    if implementation != "fused":  # which computes in float32
        assert not np.isfinite(open_dataset(path).W).all()


@settings
@pytest.mark.filterwarnings("ignore:no gradient")
def test_skipped_steps_change_nothing(dtype: torch.dtype, options: Options, tmp_path: Path) -> None:
    loop = toy_loop(dtype, options)

    def take_step(step: int) -> None:
        if step not in (0, 1, 4, 10):
            loop.backward()
        loop.optimizer.step()

    path = Training(tmp_path / "run.zarr", loop).run(take_step)
    count = StoreReader.open(path).read_scalars()["optimizer_step"]
    assert count.tolist() == [0, 0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 7]
    assert_exact_toy(path)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
def test_a_gradient_scaler_that_skips_in_the_fused_program(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    loop = toy_loop(dtype, {"fused": True})
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    generator = torch.Generator().manual_seed(7)
    scales = set()

    def take_step(step: int) -> None:
        loss = (loop.weight.float() * draw(tuple(loop.weight.shape), generator)).sum()
        scales.add(scaler.get_scale())
        scaler.scale(loss * (torch.inf if step in (0, 5) else 1.0)).backward()
        scaler.step(loop.optimizer)
        scaler.update()

    path = Training(tmp_path / "run.zarr", loop).run(take_step)
    assert scales == {1024.0, 512.0}
    assert StoreReader.open(path).read_scalars()["optimizer_step"][[1, 6, -1]].tolist() == [0, 4, 9]
    assert_exact_toy(path)


def test_recording_may_begin_in_the_middle_of_training(tmp_path: Path) -> None:
    loop = toy_loop(BFLOAT16, {"weight_decay": 0.1})
    for _ in range(5):
        loop.step()
    path = Training(tmp_path / "run.zarr", loop).run(lambda step: loop.step())
    assert StoreReader.open(path).read_scalars()["optimizer_step"][[0, 1]].tolist() == [5, 6]
    assert_exact_toy(path)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_default_dtype_of_those_who_replay_changes_nothing(
    implementation: str, tmp_path: Path
) -> None:
    options = IMPLEMENTATIONS[implementation] | {"weight_decay": 0.1}
    if implementation == "single":
        options["differentiable"] = True
    path = tmp_path / "run.zarr"
    weight = draw(SHAPE, torch.Generator().manual_seed(7))
    optimizer = ADAMW([weight], **options)
    with Recorder(path, optimizer, parameter=weight):
        for _ in range(5):
            weight.grad = draw(SHAPE, torch.Generator().manual_seed(3))
            optimizer.step()
    torch.set_default_dtype(torch.float64)
    try:
        assert_exact(path)
    finally:
        torch.set_default_dtype(torch.float32)


def test_no_cpu_runs_a_capturable_optimizer() -> None:
    """So there is none to be replayed; a record of one from a GPU is replayed without the flag."""
    weight = nn.Parameter(torch.ones(3, 2))
    weight.grad = torch.ones(3, 2)
    optimizer = ADAMW([weight], capturable=True)
    with pytest.raises(AssertionError, match="capturable=True"):
        optimizer.step()


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

ON_CUDA = {
    **IMPLEMENTATIONS,
    "single, capturable": {"foreach": False, "capturable": True},
    "foreach, capturable": {"foreach": True, "capturable": True},
    "foreach, capturable, tensor lr": {
        "foreach": True,
        "capturable": True,
        "lr": torch.tensor(1e-2),
    },
    "fused, tensor lr": {"fused": True, "lr": torch.tensor(1e-2)},
}


@needs_cuda
@pytest.mark.parametrize("optimizer", [ADAMW, ADAM])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("program", ON_CUDA)
def test_programs_on_a_gpu(
    program: str, dtype: str, optimizer: type[torch.optim.Optimizer], tmp_path: Path
) -> None:
    torch_dtype, eps = DTYPES[dtype]
    options = {"lr": 1e-2, **ON_CUDA[program]}
    if isinstance(options["lr"], torch.Tensor):
        options["lr"] = options["lr"].cuda()
    generator = torch.Generator().manual_seed(7)
    weight = nn.Parameter(draw(SHAPE, generator, size=0.02).to("cuda", torch_dtype))
    run = optimizer([weight], eps=eps, weight_decay=0.1, **options)
    with Recorder(tmp_path / "run.zarr", run, parameter=weight):
        for _ in range(N_STEPS):
            weight.grad = gradient(SHAPE, generator).to("cuda", torch_dtype)
            run.step()
    assert_exact(tmp_path / "run.zarr")


def test_a_thread_that_changes_how_many_it_has_changes_none_that_are_new() -> None:
    def change() -> list[int]:
        seen = []
        for n in (1, 2, 5):
            with lanes_threads(n), ThreadPoolExecutor(1) as new:
                seen += [torch.get_num_threads(), new.submit(torch.get_num_threads).result()]
        return seen

    with threads(3), ThreadPoolExecutor(1) as pool:
        assert pool.submit(change).result() == [1, 3, 2, 3, 5, 3]


def test_torchs_threads_are_left_as_they_were(toy_path: Path) -> None:
    """One thread replays; the main thread and every new one keep what they had."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        ds = open_dataset(toy_path)
        for scheduler in ("sync", "threads"):
            with dask.config.set(scheduler=scheduler):
                ds.unexplained.compute()
            assert torch.get_num_threads() == 3
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(torch.get_num_threads).result() == 3
        with ThreadPoolExecutor(2) as pool:
            seen = [pool.submit(threads_within).result() for _ in range(4)]
        assert seen == [1] * 4
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def threads_within() -> int:
    with one_thread():
        return torch.get_num_threads()
