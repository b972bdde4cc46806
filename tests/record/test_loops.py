"""Training loops of every kind: what is recorded is what the optimizer consumed, or an error.

Each loop is torch's own machinery. Its record must pass the exact check, in which torch takes every
step again from the recorded gradient; a gradient that is not the consumed one fails there.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from tests.support.runs import TINY_MEMORY, Loop
from thimble_zarr import Recorder, accounting, open_dataset
from thimble_zarr.cli.main import cli
from thimble_zarr.errors import OptimizerError, RecordingError
from thimble_zarr.record.block import Block
from thimble_zarr.record.capture import LiveOptimizer
from thimble_zarr.store.reader import StoreReader

IMPLEMENTATIONS = {
    "single": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}

N_STEPS = 11


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


def make_loop(implementation: str = "single", **options: object) -> Loop:
    return Loop(weight_decay=0.1, **{**IMPLEMENTATIONS[implementation], **options})


def n_different(path: Path) -> int:
    """Return how many numbers the replay gets otherwise than recorded; NaN is no number."""
    return int(accounting(open_dataset(path), replay=True).n_different.sum())


def optimizer_steps(path: Path) -> list[float]:
    return StoreReader.open(path).read_scalars()["optimizer_step"].tolist()


def record(
    path: Path, loop: Loop, take_step: Callable[[int], object], n_steps: int = N_STEPS
) -> int:
    """Record a loop and return how many numbers its replay gets otherwise."""
    with Recorder(path, loop.optimizer, parameter=loop.weight):
        for step in range(n_steps):
            take_step(step)
            loop.optimizer.zero_grad()
    return n_different(path)


# Ways to train: each makes, of a loop, what its step is.

Way = Callable[[Loop], Callable[[int], object]]


def clip_norm(loop: Loop) -> Callable[[int], object]:
    def take_step(step: int) -> None:
        loop.backward()
        assert nn.utils.clip_grad_norm_([loop.weight], max_norm=1e-3) > 1e-3
        loop.optimizer.step()

    return take_step


def clip_value(loop: Loop) -> Callable[[int], object]:
    def take_step(step: int) -> None:
        loop.backward()
        nn.utils.clip_grad_value_([loop.weight], 1e-4)
        assert (loop.weight.grad.abs() >= 9e-5).any()
        loop.optimizer.step()

    return take_step


def clip_in_a_hook(loop: Loop) -> Callable[[int], object]:
    loop.optimizer.register_step_pre_hook(
        lambda *args: nn.utils.clip_grad_norm_([loop.weight], max_norm=1e-3) and None
    )
    return lambda step: loop.step()


def accumulate(loop: Loop) -> Callable[[int], object]:
    def take_step(step: int) -> None:
        for _ in range(3):
            loop.backward()
        loop.optimizer.step()

    return take_step


def closure(loop: Loop) -> Callable[[int], object]:
    def compute() -> torch.Tensor:
        loop.optimizer.zero_grad()
        loop.optimizer.param_groups[0]["lr"] *= 0.9  # some schedule
        return loop.backward()

    return lambda step: loop.optimizer.step(compute)


def lambda_lr(loop: Loop) -> Callable[[int], object]:
    scheduler = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda step: 0.8**step)
    return lambda step: (loop.step(), scheduler.step())


def one_cycle(loop: Loop) -> Callable[[int], object]:
    scheduler = torch.optim.lr_scheduler.OneCycleLR(loop.optimizer, 0.1, total_steps=N_STEPS)
    return lambda step: (loop.step(), scheduler.step())


def edited_by_hand(loop: Loop) -> Callable[[int], object]:
    def take_step(step: int) -> None:
        group = loop.optimizer.param_groups[0]
        group["lr"], group["weight_decay"] = 0.01 * (step + 1), 0.3 / (step + 1)
        group["betas"], group["eps"] = (0.9 - step / 37, 0.99), 1e-8 * (step + 1)
        loop.step()

    return take_step


def added_group(loop: Loop) -> Callable[[int], object]:
    def take_step(step: int) -> None:
        if step == 4:
            more = nn.Parameter(torch.ones(3, 2, dtype=loop.weight.dtype))
            more.grad = torch.ones_like(more)
            loop.optimizer.add_param_group({"params": [more], "lr": 0.5})
        loop.step()

    return take_step


def regrouped(loop: Loop) -> Callable[[int], object]:
    def take_step(step: int) -> None:
        if step == 4:  # to a group of its own, as when a part is to learn more slowly
            loop.optimizer.param_groups[0]["params"].remove(loop.weight)
            loop.optimizer.add_param_group({"params": [loop.weight], "lr": 1e-3})
        loop.step()

    return take_step


def gradients_kept(loop: Loop) -> Callable[[int], object]:
    loop.optimizer.zero_grad = partial(loop.optimizer.zero_grad, set_to_none=False)

    def take_step(step: int) -> None:
        if step != 5:  # where the gradient is zero, and a step is taken all the same
            loop.backward()
        loop.optimizer.step()

    return take_step


def checkpoint_of_now(loop: Loop) -> Callable[[int], object]:
    def take_step(step: int) -> None:
        if step == 5:
            loop.optimizer.load_state_dict(loop.optimizer.state_dict())
        loop.step()

    return take_step


def tied(loop: Loop) -> Callable[[int], object]:
    loop.head.weight = loop.embedding.weight
    return lambda step: loop.step()


def cleared_by_another_hook(loop: Loop) -> Callable[[int], object]:
    loop.optimizer.register_step_post_hook(lambda optimizer, *args: optimizer.zero_grad())
    return lambda step: loop.step()


def rescheduled_by_another_hook(loop: Loop) -> Callable[[int], object]:
    scheduler = torch.optim.lr_scheduler.ExponentialLR(loop.optimizer, 0.8)
    loop.optimizer.register_step_post_hook(lambda *args: scheduler.step())
    return lambda step: loop.step()


def compiled_model(loop: Loop) -> Callable[[int], object]:
    model = torch.compile(nn.Sequential(loop.embedding, loop.head), backend="aot_eager")

    def take_step(step: int) -> None:
        model(torch.arange(5)).float().pow(2).mean().backward()
        loop.optimizer.step()

    return take_step


WAYS = {
    "clip_grad_norm_": clip_norm,
    "clip_grad_value_": clip_value,
    "accumulation": accumulate,
    "closure": closure,
    "OneCycleLR": one_cycle,
    "edited by hand": edited_by_hand,
}
"""Ways that are taken with each implementation."""

OTHER_WAYS = {
    "clipping in a pre-hook": clip_in_a_hook,
    "LambdaLR": lambda_lr,
    "add_param_group": added_group,
    "parameter in another group": regrouped,
    "set_to_none=False": gradients_kept,
    "load_state_dict": checkpoint_of_now,
    "tied": tied,
    "zero_grad in a post-hook": cleared_by_another_hook,
    "scheduler in a post-hook": rescheduled_by_another_hook,
}


DTYPES = {"single": torch.bfloat16, "foreach": torch.float32, "fused": torch.bfloat16}


@pytest.mark.parametrize(
    ("way", "implementation"),
    [*product(WAYS, IMPLEMENTATIONS), *product(OTHER_WAYS, ["single"])],
)
def test_the_gradient_recorded_is_the_one_the_step_consumed(
    way: str, implementation: str, path: Path
) -> None:
    loop = make_loop(implementation, dtype=DTYPES[implementation])
    assert record(path, loop, (WAYS | OTHER_WAYS)[way](loop)) == 0
    assert optimizer_steps(path) == [*range(N_STEPS + 1)]
    assert np.isfinite(open_dataset(path).grad[1:]).all()


@pytest.mark.filterwarnings("default:Guards may run slower on Python 3.13.0")
def test_a_model_that_torch_compiled(path: Path) -> None:
    loop = make_loop("foreach")
    assert record(path, loop, compiled_model(loop)) == 0


class Scaled:
    """A loop with a GradScaler, as torch's recipe has it, and infinities where they are told."""

    def __init__(self, loop: Loop, *, infinite: tuple[int, ...] = (), clip: bool = False) -> None:
        self.loop, self.infinite, self.clip = loop, infinite, clip
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        self.truth: list[np.ndarray] = []

    def __call__(self, step: int) -> None:
        loop = self.loop
        tokens = torch.randint(0, loop.n_live, (8,))
        loss = loop.head(loop.embedding(tokens)).float().pow(2).sum()
        scale = self.scaler.get_scale()
        self.scaler.scale(loss * (torch.inf if step in self.infinite else 1.0)).backward()
        unscaled = loop.weight.grad.double().numpy() / scale  # a power of two: exact
        if self.clip:
            self.scaler.unscale_(loop.optimizer)
            nn.utils.clip_grad_norm_([loop.weight], max_norm=1e-3)
            unscaled = loop.weight.grad.double().numpy().copy()
        self.scaler.step(loop.optimizer)
        if step not in self.infinite:
            self.truth.append(unscaled)
        self.scaler.update()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("clip", [False, True])
def test_a_grad_scaler_leaves_no_factor_and_its_skipped_steps_no_gradient(
    clip: bool, implementation: str, path: Path
) -> None:
    loop = make_loop(implementation, dtype=DTYPES[implementation])
    scaled = Scaled(loop, infinite=(0, 6), clip=clip)
    assert record(path, loop, scaled) == 0
    ds = open_dataset(path)
    # Only the fused optimizer is called where there is an infinity. The row says it was skipped.
    skipped = [1, 7] if implementation == "fused" else []
    assert ds.sizes["step"] == N_STEPS - 2 + len(skipped) + 1
    assert (np.flatnonzero(np.diff(ds.optimizer_step) == 0) + 1).tolist() == skipped
    consumed = ds.grad.drop_sel(step=[0, *skipped]).values
    np.testing.assert_array_equal(consumed, np.array(scaled.truth))
    assert np.isnan(ds.grad.sel(step=skipped)).all()


def test_a_fused_step_that_is_called_with_an_infinity_records_none_of_it(path: Path) -> None:
    """What torch leaves in the gradient there: the scaled one, which nothing consumed."""
    loop = make_loop("fused", dtype=torch.float32)
    left = []
    loop.optimizer.register_step_post_hook(lambda *args: left.append(loop.weight.grad.clone()))
    assert record(path, loop, Scaled(loop, infinite=(2,)), n_steps=4) == 0
    assert not left[2].isfinite().all()
    assert np.isnan(open_dataset(path).grad[3]).all()


# Planted mistakes: each is one that a recorder could make, and the exact check must see it.


@dataclass
class Mistake:
    """A wrong gradient in place of the one consumed: what was there when `note` was called."""

    loop: Loop
    noted: torch.Tensor | None = field(default=None)

    def note(self, *args: object) -> None:
        self.noted = self.loop.weight.grad.detach().clone()

    def plant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        append = Block.append

        def append_noted(block: Block, tensors: dict, scalars: dict, **row: object) -> None:
            grad = tensors["grad"] if tensors["grad"] is None else self.noted
            append(block, {**tensors, "grad": grad}, scalars, **row)

        monkeypatch.setattr(Block, "append", append_noted)


def test_the_scaled_gradient_would_be_seen(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = make_loop("fused", dtype=torch.float32)
    mistake = Mistake(loop)
    loop.optimizer.register_step_pre_hook(mistake.note)  # where it still has the factor
    mistake.plant(monkeypatch)
    assert record(path, loop, Scaled(loop)) > 0


def test_the_gradient_before_clipping_would_be_seen(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_loop(dtype=torch.float32)
    mistake = Mistake(loop)
    mistake.plant(monkeypatch)

    def take_step(step: int) -> None:
        loop.backward()
        mistake.note()
        nn.utils.clip_grad_norm_([loop.weight], max_norm=1e-3)
        loop.optimizer.step()

    assert record(path, loop, take_step) > 0


def test_the_gradient_before_the_closure_would_be_seen(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_loop(dtype=torch.float32)
    loop.backward()
    mistake = Mistake(loop)
    mistake.note()
    loop.optimizer.register_step_pre_hook(lambda *args: loop.weight.grad is None or mistake.note())
    mistake.plant(monkeypatch)
    monkeypatch.setattr(loop.optimizer, "zero_grad", lambda: None)
    assert record(path, loop, lambda step: loop.optimizer.step(loop.backward)) > 0


def test_an_alias_would_be_seen(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows copied one step late, from tensors that were kept in place of their numbers."""
    loop = make_loop(dtype=torch.float32)
    append, kept = Block.append, []

    def append_late(block: Block, tensors: dict, scalars: dict, **row: object) -> None:
        if kept:
            late_block, late_row, late, late_labels = kept.pop()
            if late_block is block and late_row < block.n_rows:
                n_rows, block.n_rows = block.n_rows, late_row
                append(block, late, {}, **late_labels)
                block.n_rows = n_rows
        kept.append((block, block.n_rows, tensors, row))
        append(block, tensors, scalars, **row)

    monkeypatch.setattr(Block, "append", append_late)
    assert record(path, loop, lambda step: loop.step()) > 0


def test_a_hook_that_runs_before_the_recorders_would_be_seen(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the recorder's hook not the first one, it would see what others leave."""
    loop = make_loop(dtype=torch.float32)
    take_step = rescheduled_by_another_hook(loop)
    hooks = type(loop.optimizer._optimizer_step_post_hooks)
    first = loop.optimizer._optimizer_step_post_hooks

    class Unordered(hooks):
        def move_to_end(self, key: int, last: bool = True) -> None:
            """Leave the order as it is."""

    loop.optimizer._optimizer_step_post_hooks = Unordered(first)
    assert record(path, loop, take_step) > 0


# Steps that were skipped, and parameters that are no longer trained.


def test_skipped_steps_are_counted_where_people_look(path: Path) -> None:
    loop = make_loop("fused", dtype=torch.float32)
    record(path, loop, Scaled(loop, infinite=(0, 6)))
    run = partial(CliRunner().invoke, cli, catch_exceptions=False)
    info, checked = run(["info", str(path)]), run(["check", str(path), "--tokens", "all"])
    assert "11 and the initial state; 2 skipped by the optimizer\n" in info.output
    assert "Steps    1 to 11; 2 skipped by the optimizer\n" in checked.output
    assert json.loads(run(["info", str(path), "--format", "json"]).output)["n_skipped"] == 2
    later = run(["check", str(path), "--tokens", "all", "--steps", "7:", "--format", "json"])
    assert json.loads(later.output)["n_skipped"] == 1
    assert accounting(open_dataset(path)).skipped.values.tolist() == [1, *[0] * 5, 1, *[0] * 4]


def test_a_run_without_skipped_steps_does_not_speak_of_them(path: Path) -> None:
    loop = make_loop()
    record(path, loop, lambda step: loop.step())
    for command in (["info", str(path)], ["check", str(path), "--tokens", "all"]):
        output = CliRunner().invoke(cli, command, catch_exceptions=False).output
        assert "skipped by the optimizer" not in output


def test_a_parameter_that_is_frozen_in_the_middle_is_skipped_and_warned_of(path: Path) -> None:
    loop = make_loop()

    def take_step(step: int) -> None:
        loop.weight.requires_grad_(step < 4)
        with (
            pytest.warns(UserWarning, match="no gradient at step 5") if step == 4 else nullcontext()
        ):
            loop.step()

    assert record(path, loop, take_step, n_steps=7) == 0
    assert optimizer_steps(path) == [0, 1, 2, 3, 4, 4, 4, 4]


def test_a_frozen_parameter_is_refused_at_the_start(path: Path) -> None:
    loop = make_loop()
    loop.weight.requires_grad_(False)
    with pytest.raises(OptimizerError, match=r"frozen \(requires_grad is False\).*unfreeze"):
        Recorder(path, loop.optimizer, parameter=loop.weight)
    assert not path.exists()


def test_a_parameter_replaced_in_the_model_is_warned_of(path: Path) -> None:
    loop = make_loop()
    recorded = loop.weight

    def take_step(step: int) -> None:
        if step == 3:
            loop.embedding.load_state_dict({"weight": torch.zeros_like(recorded)}, assign=True)
        warns = pytest.warns(UserWarning, match=r"no gradient at step 4.*assign=True")
        with warns if step == 3 else nullcontext():
            loop.step()

    with Recorder(path, loop.optimizer, parameter=recorded):
        for step in range(5):
            take_step(step)
            loop.optimizer.zero_grad()
    assert n_different(path) == 0
    assert optimizer_steps(path) == [0, 1, 2, 3, 3, 3]


CHANGES: dict[str, tuple[Callable[[Loop], object], str]] = {
    "model.to(dtype)": (lambda loop: loop.embedding.to(torch.float64), "dtype float32 -> float64"),
    "maximize": (
        lambda loop: loop.optimizer.param_groups[0].update(maximize=True),
        "maximize False -> True",
    ),
    "a checkpoint of another program": (
        lambda loop: loop.optimizer.load_state_dict(make_loop("foreach").optimizer.state_dict()),
        "implementation single -> foreach",
    ),
    "tensor learning rate": (
        lambda loop: loop.optimizer.param_groups[0].update(lr=torch.tensor(1e-2)),
        "lr_dtype None -> float32",
    ),
    "parameter taken out": (
        lambda loop: loop.optimizer.param_groups[0]["params"].remove(loop.weight),
        "does not own the parameter",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_no_record_can_hold_is_an_error_at_its_step(change: str, path: Path) -> None:
    loop = make_loop(dtype=torch.float32)
    apply, words = CHANGES[change]
    before = loop.weight

    def run() -> None:
        with Recorder(path, loop.optimizer, parameter=before, memory_bytes=TINY_MEMORY):
            for step in range(8):
                if step == 5:
                    loop.backward()
                    apply(loop)
                    loop.optimizer.step()
                loop.step()
                loop.optimizer.zero_grad()

    with pytest.raises(OptimizerError, match=words):
        run()
    assert StoreReader.open(path).n_rows == 6  # everything up to the change
    assert n_different(path) == 0


def test_a_parameter_that_moves_is_an_error(path: Path) -> None:
    loop = make_loop(dtype=torch.float32)
    with Recorder(path, loop.optimizer, parameter=loop.weight) as recorder:
        live = LiveOptimizer(loop.optimizer, {"": loop.weight})
        live.schemas = {"": replace(recorder.schemas[""], device="cuda:0")}
    with pytest.raises(OptimizerError, match=r"\(device cuda:0 -> cpu\)"):
        live.check_unchanged()


def test_a_checkpoint_of_other_weights_is_no_step_of_the_optimizer(path: Path) -> None:
    """Weights may be set by hand; then the check says that something besides the optimizer did."""
    loop = make_loop(dtype=torch.float32)

    def take_step(step: int) -> None:
        if step == 5:
            loop.embedding.load_state_dict({"weight": torch.zeros_like(loop.weight)})
        loop.step()

    assert record(path, loop, take_step) > 0
    table = accounting(open_dataset(path))
    assert table.step[table.n_different.sel(recurrence="W") > 0].values.tolist() == [6]


def test_a_step_that_torch_refuses_costs_no_recorded_row(path: Path) -> None:
    loop = make_loop(dtype=torch.float32)
    loop.embedding.sparse = True

    def run() -> None:
        with Recorder(path, loop.optimizer, parameter=loop.weight):
            for step in range(4):
                loop.embedding.sparse = step == 3
                tokens = torch.randint(0, loop.n_live, (8,))
                loop.head(loop.embedding(tokens)).pow(2).sum().backward()
                loop.optimizer.step()
                loop.optimizer.zero_grad()

    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        run()
    assert optimizer_steps(path) == [0, 1, 2, 3]
    assert n_different(path) == 0


class Twice(torch.optim.AdamW):
    """A subclass with a step of its own: torch calls the hooks of both."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        return super().step(closure)


def test_a_subclass_that_calls_its_base_class_is_recorded_once_a_step(path: Path) -> None:
    loop = make_loop(optimizer=Twice)
    assert record(path, loop, lambda step: loop.step()) == 0
    assert optimizer_steps(path) == [*range(N_STEPS + 1)]


def test_a_step_that_clears_its_gradient_is_an_error(path: Path) -> None:
    loop = make_loop()

    def run() -> None:
        with Recorder(path, loop.optimizer, parameter=loop.weight):
            hook = loop.optimizer.register_step_post_hook(lambda *args: loop.optimizer.zero_grad())
            loop.optimizer._optimizer_step_post_hooks.move_to_end(hook.id, last=False)
            loop.step()

    with pytest.raises(RecordingError, match="gradient of step 1 was gone"):
        run()
    assert StoreReader.open(path).n_rows == 1


# What cannot be recorded is refused, and says what to do.


@pytest.mark.parametrize("name", ["SparseAdam", "LBFGS"])
def test_other_optimizers_are_refused(name: str, path: Path) -> None:
    loop = make_loop(dtype=torch.float32)
    optimizer = getattr(torch.optim, name)([loop.weight], lr=1e-2)
    with pytest.raises(OptimizerError, match=f"{name} cannot be recorded: (its gradients|a step)"):
        Recorder(path, optimizer, parameter=loop.weight)
    assert not path.exists()


class Wrapper(torch.optim.AdamW):
    """Says, as those of trainers do, that it is what it wraps."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


def test_an_optimizer_in_a_wrapper_is_asked_for(path: Path) -> None:
    loop = make_loop()
    with pytest.raises(OptimizerError, match=r"Wrapper wraps.*`optimizer.optimizer`"):
        Recorder(path, Wrapper(loop.optimizer), parameter=loop.weight)


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (torch.zeros(11, 5, dtype=torch.complex64), "complex64 of shape"),
        (torch.zeros(11, 5, device="meta"), "no plain memory.* on meta"),
    ],
)
def test_other_tensors_are_refused(weight: torch.Tensor, words: str, path: Path) -> None:
    with pytest.raises(OptimizerError, match=words):
        Recorder(path, torch.optim.AdamW([weight]), parameter=weight)
    assert not path.exists()


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of one process, as a launcher would make of many."""
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_model_in_distributed_data_parallel(path: Path) -> None:
    loop = make_loop("fused")
    model = nn.parallel.DistributedDataParallel(nn.Sequential(loop.embedding, loop.head))

    def take_step(step: int) -> None:
        model(torch.arange(5)).float().pow(2).mean().backward()
        loop.optimizer.step()

    assert record(path, loop, take_step) == 0


@pytest.mark.usefixtures("process_group")
def test_a_sharded_parameter_is_refused(path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(nn.Sequential(nn.Embedding(11, 5), nn.Linear(5, 11)))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(OptimizerError, match=r"is a DTensor, of which .*FSDP"):
        Recorder(path, optimizer, parameter=model[0].weight)
    assert not path.exists()


@pytest.mark.filterwarnings("ignore:.*Profiler record function")
def test_a_compiled_step_is_refused_at_its_first_step(path: Path) -> None:
    loop = make_loop()
    step = torch.compile(loop.optimizer.step, backend="eager")

    def run() -> None:
        with Recorder(path, loop.optimizer, parameter=loop.weight):
            loop.backward()
            step()

    with pytest.raises(OptimizerError, match=r"optimizer.step\(\) is compiled"):
        run()
    assert not path.exists()
