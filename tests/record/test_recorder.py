"""The recorder against what a loop that keeps its own clones saw."""

import errno
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.runs import N_STEPS, TINY_MEMORY, Loop, record, token_labels
from thimble_zarr import Recorder
from thimble_zarr.bits import decode
from thimble_zarr.errors import ConfigError, OptimizerError, RecordingError, StoreExistsError
from thimble_zarr.record import block as block_module
from thimble_zarr.record import writer_thread as writer_module
from thimble_zarr.record.capture import LiveOptimizer
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.writer import StoreWriter


def recorded(path: Path, name: str) -> np.ndarray:
    """Return a variable as float64, all committed rows."""
    reader = StoreReader.open(path)
    return decode(reader.read(name, (0, reader.n_rows)), reader.schema.dtypes[name], np.float64)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


@pytest.mark.parametrize(
    ("dtype", "options", "optimizer"),
    [
        (dtype, options, (torch.optim.AdamW, torch.optim.Adam)[(n_dtype + n_options) % 2])
        for n_dtype, dtype in enumerate(
            [torch.bfloat16, torch.float16, torch.float32, torch.float64]
        )
        for n_options, options in enumerate(
            [{}, {"foreach": True}, {"fused": True}, {"maximize": True}]
        )
    ],
)
def test_every_row_is_what_the_loop_saw(
    path: Path,
    dtype: torch.dtype,
    options: dict[str, bool],
    optimizer: type[torch.optim.Optimizer],
) -> None:
    eps = 1e-4 if dtype == torch.float16 else 1e-8  # which underflows there
    history = record(path, dtype=dtype, optimizer=optimizer, eps=eps, **options)
    reader = StoreReader.open(path)
    assert reader.n_rows == N_STEPS + 1
    assert set(reader.schema.dtypes.values()) == {str(dtype).removeprefix("torch.")}
    for name in reader.schema.dtypes:
        np.testing.assert_array_equal(recorded(path, name), history[name], err_msg=name)
    scalars = reader.read_scalars()
    np.testing.assert_array_equal(scalars["loss"], [np.nan, *history.losses])
    np.testing.assert_array_equal(scalars["learning_rate"], [np.nan, *history.learning_rates])
    np.testing.assert_array_equal(scalars["optimizer_step"], range(N_STEPS + 1))


def test_the_initial_state_has_weights_no_moments_and_no_gradient(path: Path) -> None:
    initial = Loop().weight.detach().double().numpy()
    record(path, n_steps=1)
    np.testing.assert_array_equal(recorded(path, "W")[0], initial)
    assert np.isnan(recorded(path, "grad")[0]).all()
    assert (recorded(path, "exp_avg")[0] == 0).all()
    assert (recorded(path, "exp_avg_sq")[0] == 0).all()


def test_amsgrad_records_the_maximum(path: Path) -> None:
    loop = Loop(amsgrad=True, betas=(0.9, 0.5))
    with Recorder(path, loop.optimizer, parameter=loop.weight, memory_bytes=TINY_MEMORY):
        for _ in range(3):
            loop.step()
            loop.optimizer.zero_grad()
    last = loop.optimizer.state[loop.weight]["max_exp_avg_sq"].double().numpy()
    np.testing.assert_array_equal(recorded(path, "max_exp_avg_sq")[3], last)
    assert (recorded(path, "max_exp_avg_sq")[3] > recorded(path, "exp_avg_sq")[3]).any()


def test_schedules_are_recorded_step_by_step(path: Path) -> None:
    loop = Loop()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(loop.optimizer, 0.5)
    with Recorder(path, loop.optimizer, parameter=loop.weight, memory_bytes=TINY_MEMORY):
        for _ in range(5):
            loop.step()
            scheduler.step()
    rates = StoreReader.open(path).read_scalars()["learning_rate"]
    np.testing.assert_allclose(rates[1:], 1e-2 * 0.5 ** np.arange(5), rtol=1e-12)


@pytest.mark.parametrize("logged_before_the_step", [True, False])
def test_a_loss_belongs_to_its_step_on_either_side(
    path: Path, *, logged_before_the_step: bool
) -> None:
    loop = Loop()
    with Recorder(
        path, loop.optimizer, parameter=loop.weight, memory_bytes=TINY_MEMORY
    ) as recorder:
        for step in range(1, N_STEPS + 1):
            loop.backward()
            if logged_before_the_step:
                recorder.log(loss=torch.tensor(float(step), requires_grad=True))
            loop.optimizer.step()
            if not logged_before_the_step:
                recorder.log(loss=float(step))
    expected = [np.nan, *range(1, N_STEPS + 1)]
    np.testing.assert_array_equal(StoreReader.open(path).read_scalars()["loss"], expected)


def test_a_step_without_a_logged_loss_has_none(path: Path) -> None:
    loop = Loop()
    with Recorder(path, loop.optimizer, parameter=loop.weight) as recorder:
        for step in (1, 2, 3):
            loop.backward()
            if step != 2:
                recorder.log(loss=step)
            loop.optimizer.step()
    losses = StoreReader.open(path).read_scalars()["loss"]
    np.testing.assert_array_equal(losses, [np.nan, 1, np.nan, 3])


def test_a_loss_that_is_not_a_number_is_recorded_and_warned_of_once(path: Path) -> None:
    loop = Loop()
    with Recorder(path, loop.optimizer, parameter=loop.weight) as recorder:
        loop.step()
        with pytest.warns(UserWarning, match="the loss of step 1 is nan") as caught:
            recorder.log(loss=float("nan"))
        assert caught[0].filename == __file__
        loop.step()
        recorder.log(loss=float("inf"))
    np.testing.assert_array_equal(
        StoreReader.open(path).read_scalars()["loss"], [np.nan, np.nan, np.inf]
    )


def test_a_gradient_with_a_graph_and_odd_strides_is_recorded(path: Path) -> None:
    loop = Loop()
    with Recorder(path, loop.optimizer, parameter=loop.weight):
        gradient = torch.randn(5, 11).bfloat16().T.requires_grad_() * 2
        loop.weight.grad = gradient
        loop.optimizer.step()
    np.testing.assert_array_equal(recorded(path, "grad")[1], gradient.detach().double().numpy())


def test_a_closure_is_recorded_with_the_gradient_it_made(path: Path) -> None:
    loop = Loop()

    def closure() -> torch.Tensor:
        loop.optimizer.zero_grad()
        return loop.backward()

    grads = []
    with Recorder(path, loop.optimizer, parameter=loop.weight):
        for _ in range(3):
            loop.optimizer.step(closure)
            grads.append(loop.weight.grad.double().numpy().copy())
    np.testing.assert_array_equal(recorded(path, "grad")[1:], grads)


def test_clipping_before_the_step_is_seen(path: Path) -> None:
    loop = Loop(dtype=torch.float32)
    with Recorder(path, loop.optimizer, parameter=loop.weight):
        loop.backward()
        torch.nn.utils.clip_grad_norm_([loop.weight], 1e-3)
        loop.optimizer.step()
    assert np.linalg.norm(recorded(path, "grad")[1]) == pytest.approx(1e-3, rel=1e-2)


def test_a_step_without_a_gradient_is_recorded_as_skipped(path: Path) -> None:
    loop = Loop()
    with Recorder(path, loop.optimizer, parameter=loop.weight):
        loop.step()
        loop.weight.grad = None
        with pytest.warns(UserWarning, match="no gradient at step 2"):
            loop.optimizer.step()
    assert np.isnan(recorded(path, "grad")[2]).all()
    np.testing.assert_array_equal(
        StoreReader.open(path).read_scalars()["optimizer_step"], [0, 1, 1]
    )


def test_recording_may_begin_in_the_middle_of_a_run(path: Path) -> None:
    loop = Loop()
    for _ in range(4):
        loop.step()
    before = loop.optimizer.state[loop.weight]["exp_avg"].double().numpy().copy()
    with Recorder(path, loop.optimizer, parameter=loop.weight):
        loop.step()
    np.testing.assert_array_equal(recorded(path, "exp_avg")[0], before)
    np.testing.assert_array_equal(StoreReader.open(path).read_scalars()["optimizer_step"], [4, 5])


def test_a_checkpoint_may_be_loaded_before_the_first_step(path: Path) -> None:
    trained, loop = Loop(), Loop()
    for _ in range(4):
        trained.step()
    with Recorder(path, loop.optimizer, parameter=loop.weight):
        loop.optimizer.load_state_dict(trained.optimizer.state_dict())
        loop.step()
    np.testing.assert_array_equal(StoreReader.open(path).read_scalars()["optimizer_step"], [4, 5])


def test_steps_after_close_are_not_recorded(path: Path) -> None:
    loop = Loop()
    recorder = Recorder(path, loop.optimizer, parameter=loop.weight)
    loop.step()
    assert recorder.step == 1
    recorder.close()
    recorder.close()
    loop.step()
    assert StoreReader.open(path).n_rows == 2


def test_a_recorder_that_saw_no_step_leaves_no_store(path: Path) -> None:
    loop = Loop()
    Recorder(path, loop.optimizer, parameter=loop.weight).close()
    assert not path.exists()


def test_a_closed_recorder_says_so(path: Path) -> None:
    loop = Loop()
    recorder = Recorder(path, loop.optimizer, parameter=loop.weight)
    loop.step()
    recorder.close()
    for call in (recorder.flush, lambda: recorder.log(loss=1.0)):
        with pytest.raises(RecordingError, match="is closed"):
            call()
    assert StoreReader.open(path).n_rows == 2


def test_a_loss_logged_after_a_skipped_step_is_dropped(path: Path) -> None:
    loop = Loop()
    with Recorder(path, loop.optimizer, parameter=loop.weight) as recorder:
        for iteration in (1, 2, 3, 4):
            loop.backward()
            if iteration != 3:  # as a GradScaler does that found an infinity
                loop.optimizer.step()
            recorder.log(loss=iteration)
    losses = StoreReader.open(path).read_scalars()["loss"]
    np.testing.assert_array_equal(losses, [np.nan, 1, 2, 4])


def test_where_the_first_step_may_be_skipped_the_loop_says_which_step_a_loss_is_of(
    path: Path,
) -> None:
    loop = Loop()
    with Recorder(path, loop.optimizer, parameter=loop.weight) as recorder:
        for iteration in (1, 2, 3, 4):
            loop.backward()
            if iteration not in (1, 3):
                loop.optimizer.step()
            recorder.log(loss=iteration, step=recorder.step)
        recorder.log(loss=7, step=recorder.next_step)
        loop.step()
        recorder.log(loss=8, step=recorder.step)  # there is one already
        for step in (recorder.step - 1, recorder.step + 2):
            with pytest.raises(ConfigError, match=f"of step {step} was logged when 3 steps"):
                recorder.log(loss=0, step=step)
    losses = StoreReader.open(path).read_scalars()["loss"]
    np.testing.assert_array_equal(losses, [np.nan, 2, 4, 7])


def test_losses_that_may_stand_one_step_late_are_warned_of(path: Path) -> None:
    loop = Loop()
    recorder = Recorder(path, loop.optimizer, parameter=loop.weight)
    for iteration in (1, 2, 3):
        if iteration > 1:  # a GradScaler skips the first
            loop.step()
        recorder.log(loss=iteration)
    with pytest.warns(UserWarning, match="all losses are one step late: pass step="):
        recorder.close()


class Clamped(torch.optim.AdamW):
    """An optimizer that does something of its own after the step of its base class."""

    def step(self, closure: object = None) -> None:
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.clamp_(-0.01, 0.01)


def test_a_step_ends_when_that_of_the_subclass_does(path: Path) -> None:
    """Torch calls hooks for both, if anybody has made an optimizer of the base class."""
    torch.optim.AdamW([torch.zeros(1)])
    loop = Loop(optimizer=Clamped)
    with Recorder(path, loop.optimizer, parameter=loop.weight) as recorder:
        for step in (1, 2, 3):
            loop.step()
            assert recorder.step == step
    assert np.abs(recorded(path, "W")[1:]).max() <= 0.0101
    assert np.abs(recorded(path, "W")[0]).max() > 0.02


def test_a_step_that_fails_is_none(path: Path) -> None:
    loop = Loop()

    def fail() -> torch.Tensor:
        raise OSError("the corpus is gone")

    with Recorder(path, loop.optimizer, parameter=loop.weight) as recorder:
        for _ in range(3):
            with pytest.raises(OSError, match="the corpus is gone"):
                loop.optimizer.step(fail)
            loop.step()
        assert recorder.step == 3
    assert StoreReader.open(path).n_rows == 4


def test_a_recorder_that_cannot_begin_leaves_no_store(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop()

    def no_memory(*args: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "Block", no_memory)
        with pytest.raises(MemoryError):
            Recorder(path, loop.optimizer, parameter=loop.weight)
    assert not path.exists()
    with Recorder(path, loop.optimizer, parameter=loop.weight):
        loop.step()
    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "Block", no_memory)
        with pytest.raises(MemoryError):
            Recorder(path, loop.optimizer, parameter=loop.weight, resume=True)
    with Recorder(path, loop.optimizer, parameter=loop.weight, resume=True):
        loop.step()
    assert StoreReader.open(path).n_rows == 3


def test_a_step_that_could_not_be_recorded_ends_the_recording(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ctrl-C in a notebook, after the optimizer moved and before the row was there."""
    loop = Loop()

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    def run() -> None:
        with Recorder(path, loop.optimizer, parameter=loop.weight):
            loop.step()
            with monkeypatch.context() as patch:
                patch.setattr(LiveOptimizer, "row", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    loop.step()
            loop.step()

    with pytest.raises(RecordingError, match=r"counts 3 steps, and counted 1 at the last row"):
        run()
    assert StoreReader.open(path).n_rows == 2


def test_ctrl_c_while_the_last_block_is_written_loses_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, main = StoreWriter.commit_block, threading.get_ident()

    def commit_block(writer: StoreWriter, *args: object, **told: object) -> None:
        assert threading.get_ident() != main, "training thread writes"
        signal.pthread_kill(main, signal.SIGINT)
        signal.pthread_kill(main, signal.SIGINT)  # of a user who cannot wait
        real(writer, *args, **told)

    loop = Loop()
    recorder = Recorder(path, loop.optimizer, parameter=loop.weight)
    for _ in range(6):
        loop.step()
    monkeypatch.setattr(StoreWriter, "commit_block", commit_block)
    # A test run that was started in the background ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            recorder.close()
    finally:
        signal.signal(signal.SIGINT, before)
    reader = StoreReader.open(path)
    assert reader.n_rows == 7
    assert reader.commit.complete


def test_a_failed_write_is_not_hidden_by_ctrl_c(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop()

    def run() -> None:
        with Recorder(path, loop.optimizer, parameter=loop.weight, memory_bytes=TINY_MEMORY):
            for _ in range(4):
                loop.step()
            FailingDisk(monkeypatch, from_block=1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        run()
    assert "No space left" in caught.value.__notes__[0]
    assert not StoreReader.open(path).commit.complete


def test_the_loop_may_change_its_directory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop()
    monkeypatch.chdir(path.parent)
    with Recorder(path.name, loop.optimizer, parameter=loop.weight):
        loop.step()
        (path.parent / "elsewhere").mkdir()
        monkeypatch.chdir(path.parent / "elsewhere")
    monkeypatch.chdir(path.parent)
    reader = StoreReader.open(path.name)
    monkeypatch.chdir(path.parent / "elsewhere")
    assert reader.read("W", (0, 2)).shape == (2, 11, 5)


def test_attrs_that_are_no_json_are_refused_before_anything_is_removed(path: Path) -> None:
    record(path)
    loop = Loop()
    for value in (Path("a"), float("nan")):
        with pytest.raises(ConfigError, match=r"attrs\['x'\] cannot be kept as JSON"):
            Recorder(
                path, loop.optimizer, parameter=loop.weight, attrs={"x": value}, overwrite=True
            )
    assert StoreReader.open(path).n_rows == N_STEPS + 1


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int32])
def test_dtypes_that_no_store_holds_are_refused(path: Path, dtype: torch.dtype) -> None:
    weight = torch.zeros(11, 5, dtype=dtype)
    optimizer = torch.optim.AdamW([weight])
    with pytest.raises(OptimizerError, match=str(dtype).removeprefix("torch.") + " of shape"):
        Recorder(path, optimizer, parameter=weight)


def test_flush_commits_what_was_recorded_and_recording_goes_on(path: Path) -> None:
    loop = Loop()
    weights = []
    with Recorder(
        path, loop.optimizer, parameter=loop.weight, memory_bytes=TINY_MEMORY
    ) as recorder:
        for step in range(1, 11):
            loop.step()
            recorder.log(loss=step)
            weights.append(loop.weight.detach().double().numpy().copy())
            if step in (2, 3, 6, 7):
                recorder.flush()
                reader = StoreReader.open(path)
                assert reader.n_rows == step + 1
                assert reader.read_scalars()["loss"][-1] == step
                np.testing.assert_array_equal(recorded(path, "W")[1:], weights)
    np.testing.assert_array_equal(recorded(path, "W")[1:], weights)
    np.testing.assert_array_equal(StoreReader.open(path).read_scalars()["loss"][1:], range(1, 11))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_loop_that_is_cut_off_keeps_what_was_recorded(
    path: Path, error: type[BaseException]
) -> None:
    loop = Loop()

    def run() -> None:
        with Recorder(path, loop.optimizer, parameter=loop.weight, memory_bytes=TINY_MEMORY):
            for _ in range(6):
                loop.step()
            raise error("stop")

    with pytest.raises(error, match="stop"):
        run()
    reader = StoreReader.open(path)
    assert reader.n_rows == 7
    assert reader.commit.complete


def test_an_interrupted_copy_leaves_no_torn_row(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop()
    real, calls = block_module._copy, []

    def copy(row: torch.Tensor, tensor: torch.Tensor, indices: None) -> None:
        calls.append(1)
        if len(calls) == 10:  # in the middle of the third row: the first has no gradient
            raise KeyboardInterrupt
        real(row, tensor, indices)

    def run() -> None:
        with Recorder(path, loop.optimizer, parameter=loop.weight):
            monkeypatch.setattr(block_module, "_copy", copy)
            for _ in range(6):
                loop.step()

    with pytest.raises(KeyboardInterrupt):
        run()
    assert StoreReader.open(path).n_rows == 2


class FailingDisk:
    """A disk that is full from the n-th block on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, from_block: int) -> None:
        self.n_blocks = 0
        real = StoreWriter.commit_block

        def commit_block(writer: StoreWriter, *args: object, **told: object) -> None:
            self.n_blocks += 1
            if self.n_blocks >= from_block:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(writer, *args, **told)

        monkeypatch.setattr(StoreWriter, "commit_block", commit_block)


def test_a_failed_write_reaches_training_and_costs_nothing_committed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FailingDisk(monkeypatch, from_block=2)
    loop = Loop()

    def run() -> None:
        with Recorder(path, loop.optimizer, parameter=loop.weight, memory_bytes=TINY_MEMORY):
            for _ in range(40):
                loop.step()

    with pytest.raises(RecordingError, match=r"No space left.*steps 0 to 3 are committed and safe"):
        run()
    assert StoreReader.open(path).n_rows == 4
    assert not [t for t in threading.enumerate() if t.name.startswith("thimble-zarr-writer")]


def test_a_failed_last_write_is_raised_by_close(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop()
    recorder = Recorder(path, loop.optimizer, parameter=loop.weight)
    loop.step()
    FailingDisk(monkeypatch, from_block=1)
    with pytest.raises(RecordingError, match="nothing is committed"):
        recorder.close()


def test_the_loops_own_error_is_not_hidden_by_a_failed_write(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop()

    def run() -> None:
        with Recorder(path, loop.optimizer, parameter=loop.weight):
            loop.step()
            FailingDisk(monkeypatch, from_block=1)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught:
        run()
    assert "No space left" in caught.value.__notes__[0]


def test_there_are_never_more_than_two_blocks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from thimble_zarr.record import writer_thread as writer_module

    made = []
    real = writer_module.Block

    def block(*args: object) -> object:
        made.append(real(*args))
        return made[-1]

    monkeypatch.setattr(writer_module, "Block", block)
    record(path, n_steps=50)
    assert len(made) == 2


def test_a_slow_disk_slows_training_down_and_loses_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, gate = StoreWriter.commit_block, threading.Event()

    def commit_block(writer: StoreWriter, *args: object, **told: object) -> None:
        gate.wait(timeout=60)
        real(writer, *args, **told)

    monkeypatch.setattr(StoreWriter, "commit_block", commit_block)
    loop, taken = Loop(), []

    def run() -> None:
        with Recorder(path, loop.optimizer, parameter=loop.weight, memory_bytes=TINY_MEMORY):
            for step in range(20):
                loop.step()
                taken.append(step)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=3)
    assert thread.is_alive()
    assert len(taken) < 8  # two blocks of four rows, one of them the initial state
    gate.set()
    thread.join(timeout=60)
    assert StoreReader.open(path).n_rows == 21


def test_recording_changes_nothing(path: Path) -> None:
    with_recorder, without = Loop(), Loop()
    torch.manual_seed(1)
    with Recorder(path, with_recorder.optimizer, parameter=with_recorder.weight):
        for _ in range(5):
            with_recorder.step()
    torch.manual_seed(1)
    for _ in range(5):
        without.step()
    assert torch.equal(with_recorder.weight, without.weight)


def test_bad_arguments_are_refused_before_anything_is_written(path: Path) -> None:
    loop = Loop()
    with pytest.raises(OptimizerError, match="SparseAdam cannot be recorded"):
        Recorder(path, torch.optim.SparseAdam([loop.weight]), parameter=loop.weight)
    with pytest.raises(OptimizerError, match="does not own"):
        Recorder(path, Loop().optimizer, parameter=loop.weight)
    with pytest.raises(OptimizerError, match=r"a Embedding; pass its tensor"):
        Recorder(path, loop.optimizer, parameter=loop.embedding)
    empty = torch.nn.Parameter(torch.zeros(0, 5))
    with pytest.raises(OptimizerError, match=r"float32 of shape \(0, 5\)"):
        Recorder(path, torch.optim.AdamW([empty]), parameter=empty)
    with pytest.raises(ConfigError, match="11 tokens, but 12 values"):
        Recorder(path, loop.optimizer, parameter=loop.weight, labels=token_labels(12))
    assert not path.exists()
    assert not loop.optimizer._optimizer_step_pre_hooks


def test_a_taken_path_is_refused(path: Path, toy_path: Path) -> None:
    loop = Loop()
    with pytest.raises(StoreExistsError):
        Recorder(toy_path, loop.optimizer, parameter=loop.weight)


def test_a_state_that_changes_its_dtype_is_a_clear_error(path: Path) -> None:
    loop = Loop(dtype=torch.float32)

    def cast_state(*args: object) -> None:
        state = loop.optimizer.state[loop.weight]
        state["exp_avg"] = state["exp_avg"].double()

    def run() -> None:
        loop.step()
        with Recorder(path, loop.optimizer, parameter=loop.weight):
            hook = loop.optimizer.register_step_post_hook(cast_state)
            loop.optimizer._optimizer_step_post_hooks.move_to_end(hook.id, last=False)
            loop.step()

    with pytest.raises(OptimizerError, match=r"exp_avg became float64 \(11, 5\) during the run"):
        run()
    assert StoreReader.open(path).n_rows == 1


def test_what_is_known_of_the_run_is_kept(path: Path) -> None:
    record(
        path,
        n_steps=1,
        fused=True,
        recorder_options={"name": "wte.weight", "attrs": {"seed": 7}},
    )
    schema = StoreReader.open(path).schema
    assert schema.parameter == "wte.weight"
    assert schema.attrs == {"seed": 7}
    assert schema.device == "cpu"
    assert schema.optimizer.name == "AdamW"
    assert schema.optimizer.implementation == "fused"
    assert schema.software["torch"] == torch.__version__


@pytest.mark.parametrize("coding", ["plain", "predicted"])
def test_no_memory_is_not_the_default(path: Path, coding: str) -> None:
    with pytest.warns(UserWarning, match=r"more than memory_bytes \(0 B\)"):
        record(path, n_steps=2, recorder_options={"memory_bytes": 0, "coding": coding})
    reader = StoreReader.open(path)
    assert reader.schema.layout.block_steps == 1
    assert reader.n_rows == 3
