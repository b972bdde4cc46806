"""Other people's trainers, with real steps of small models: each record passes the exact check."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from thimble_zarr import accounting, open_dataset
from thimble_zarr.errors import ConfigError
from thimble_zarr.integrations.callback import torch_optimizer
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.writer import StoreWriter

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from thimble_zarr.integrations.transformers import ThimbleCallback  # noqa: E402

# What Lightning's own code does with what it stands on.
pytestmark = pytest.mark.filterwarnings("default:::pytorch_lightning", "default:.*LeafSpec")

VOCABULARY, WINDOW, N_STEPS = 97, 16, 5


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


def assert_exact(path: Path, *, n_steps: int, parameter: str | None = None) -> None:
    ds = open_dataset(path, parameter=parameter)
    assert ds.sizes["step"] == n_steps + 1
    assert int(accounting(ds, replay=True).n_different.sum()) == 0
    assert StoreReader.open(path, parameter).commit.complete


class Tokens(torch.utils.data.Dataset):
    """Windows of random tokens; reading one may fail."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        generator = torch.Generator().manual_seed(7)
        self.windows = torch.randint(0, VOCABULARY, (40, WINDOW), generator=generator)
        self.fails_at, self.n_read = fails_at, 0

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.n_read += 1
        if self.n_read == self.fails_at:
            raise OSError("the corpus is gone")
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=WINDOW,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


class Losses(transformers.TrainerCallback):
    """What a Trainer logs."""

    def __init__(self) -> None:
        self.of_step: dict[int, float] = {}

    def on_log(
        self, args: object, state: object, control: object, *, logs: dict, **_: object
    ) -> None:
        if "loss" in logs:
            self.of_step[state.global_step] = logs["loss"]


def trainer(
    callback: ThimbleCallback, directory: Path, *, data: Tokens | None = None, **options: object
) -> tuple[transformers.Trainer, Losses]:
    losses = Losses()
    arguments = transformers.TrainingArguments(
        output_dir=str(directory / "output"),
        max_steps=N_STEPS,
        per_device_train_batch_size=2,
        dataloader_pin_memory=False,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **{"logging_steps": 1, **options},
    )
    return transformers.Trainer(
        gpt2(), arguments, train_dataset=data or Tokens(), callbacks=[callback, losses]
    ), losses


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_trainer_of_transformers(optim: str, path: Path) -> None:
    options = {"attrs": {"seed": 0}, "audit": "raise"}
    callback = ThimbleCallback(path, parameters="*.wte.weight", **options)
    training, losses = trainer(
        callback,
        path.parent,
        optim=optim,
        gradient_accumulation_steps=2,
        max_grad_norm=0.1,  # always clipped
        learning_rate=1e-2,
    )
    training.train()
    assert_exact(path, n_steps=N_STEPS)
    schema = StoreReader.open(path).schema
    assert schema.parameter == "transformer.wte.weight"  # tied to lm_head.weight
    assert schema.optimizer.implementation == ("fused" if "fused" in optim else "single")
    assert schema.attrs == {"seed": 0}
    (audited,) = StoreReader.open(path).read_history().audits.values()
    assert (audited.checked, audited.unexplained) == (N_STEPS, 0)
    ds = open_dataset(path)
    assert ds.loss[1:].values.tolist() == [losses.of_step[step] for step in range(1, N_STEPS + 1)]
    assert np.linalg.norm(ds.grad[1]) <= 0.1001
    assert len(set(ds.learning_rate[1:].values)) == N_STEPS  # a linear schedule


def test_an_error_of_training_is_not_hidden_by_one_of_the_disk(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*args: object, **options: object) -> None:
        raise OSError("no space left")

    def run() -> None:
        with ThimbleCallback(path, parameters="*.wte.weight") as callback:
            monkeypatch.setattr(StoreWriter, "commit_block", no_space)
            fail_in_step_four(callback, path.parent)

    with pytest.raises(OSError, match="the corpus is gone") as raised:
        run()
    assert "no space left" in raised.value.__notes__[0]


def test_a_mean_over_steps_is_no_loss(path: Path) -> None:
    callback = ThimbleCallback(path, parameters="lm_head.weight")
    training, losses = trainer(callback, path.parent, logging_steps=3, logging_first_step=True)
    training.train()
    loss = open_dataset(path).loss.values
    assert np.isfinite(loss).nonzero()[0].tolist() == [1]
    assert loss[1] == losses.of_step[1]


def fail_in_step_four(callback: ThimbleCallback, directory: Path) -> None:
    training, _ = trainer(callback, directory, data=Tokens(fails_at=7))
    training.train()


def test_training_that_fails_in_a_with_block_is_recorded_up_to_there(path: Path) -> None:
    def run() -> None:
        with ThimbleCallback(path, parameters="*.wte.weight") as callback:
            fail_in_step_four(callback, path.parent)

    with pytest.raises(OSError, match="the corpus is gone"):
        run()
    n_rows = StoreReader.open(path).n_rows
    assert 2 < n_rows < N_STEPS + 1
    assert_exact(path, n_steps=n_rows - 1)


def test_training_that_fails_is_closed_by_the_next_one(path: Path) -> None:
    callback = ThimbleCallback(path, parameters="*.wte.weight", overwrite=True)
    with pytest.raises(OSError, match="the corpus is gone"):
        fail_in_step_four(callback, path.parent)
    assert not StoreReader.open(path).commit.complete
    training, _ = trainer(callback, path.parent)
    training.train()
    assert_exact(path, n_steps=N_STEPS)


@pytest.mark.soak
def test_what_is_open_when_python_ends_is_closed(path: Path) -> None:
    """A script that ends in an error, as a Trainer leaves it."""
    script = f"""
import sys
import torch
from tests.support.runs import Loop
from thimble_zarr import Recorder

loop = Loop()
recorder = Recorder({str(path)!r}, loop.optimizer, parameter=loop.weight, memory_bytes=8000)
for _ in range(6):
    loop.step()
raise SystemExit(7)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (7, "")
    assert_exact(path, n_steps=6)


@pytest.fixture(scope="module")
def lightning() -> ModuleType:
    """Lightning's module and trainer, where Lightning is."""
    pytest.importorskip("pytorch_lightning")
    from tests.support import lightning

    return lightning


@pytest.mark.parametrize("fused", [False, True])
def test_a_trainer_of_lightning(fused: bool, path: Path, lightning: ModuleType) -> None:
    module = lightning.Module(fused=fused)
    lightning.fit(
        module,
        lightning.ThimbleCallback(path, parameters="embedding.weight"),
        path.parent,
        accumulate_grad_batches=2,
        # Lightning refuses to clip what a fused optimizer could be about to unscale.
        **({} if fused else {"gradient_clip_val": 1e-3}),
    )
    assert_exact(path, n_steps=3)
    expected = np.array(module.losses).reshape(3, 2).mean(axis=1)
    np.testing.assert_allclose(open_dataset(path).loss[1:], expected, rtol=1e-6)


def test_losses_of_a_resumed_lightning_training(path: Path, lightning: ModuleType) -> None:
    module = lightning.Module()
    optimizer = module.configure_optimizers()
    module.configure_optimizers = lambda: optimizer  # as restored from a checkpoint
    for options in ({}, {"resume": True}):
        callback = lightning.ThimbleCallback(path, parameters="embedding.weight", **options)
        lightning.fit(module, callback, path.parent, accumulate_grad_batches=2)
    expected = np.array(module.losses).reshape(6, 2).mean(axis=1)
    np.testing.assert_allclose(open_dataset(path).loss[1:], expected, rtol=1e-6)


def test_losses_of_a_step_that_was_skipped_are_no_other_steps(
    path: Path, lightning: ModuleType
) -> None:
    """As under a precision plugin with a GradScaler: Lightning counts the step."""
    module = lightning.Module()
    optimizer = module.configure_optimizers()
    trainer = SimpleNamespace(
        is_global_zero=True, optimizers=[optimizer], global_step=0, accumulate_grad_batches=2
    )
    callback = lightning.ThimbleCallback(path, parameters="embedding.weight")
    callback.on_train_start(trainer, module)
    for batch, loss in enumerate([100.0, 300.0, 1.0, 3.0, 500.0, 700.0, 5.0, 7.0], start=1):
        if batch % 2 == 0:
            trainer.global_step += 1
            if loss < 100:
                module.embedding.weight.grad = torch.ones(11, 5)
                optimizer.step()
        outputs = {"loss": torch.tensor(loss) / 2}  # divided, as Lightning gives it
        callback.on_train_batch_end(trainer, module, outputs, None, batch)
    callback.on_train_end(trainer, module)
    assert open_dataset(path).loss[1:].values.tolist() == [2.0, 6.0]


def test_lightning_training_that_fails_is_recorded_up_to_there(
    path: Path, lightning: ModuleType
) -> None:
    callback = lightning.ThimbleCallback(path, parameters="embedding.weight")
    with pytest.raises(OSError, match="the corpus is gone"):
        lightning.fit(lightning.Module(fails_at=4), callback, path.parent)
    assert_exact(path, n_steps=4)


def test_an_optimizer_that_a_module_does_not_have(path: Path, lightning: ModuleType) -> None:
    callback = lightning.ThimbleCallback(path, parameters="embedding.weight", optimizer=1)
    with pytest.raises(ConfigError, match="optimizer=1, but the module configures 1"):
        lightning.fit(lightning.Module(), callback, path.parent)
    assert not path.exists()


def test_several_parameters_are_groups(path: Path) -> None:
    callback = ThimbleCallback(path, parameters=["*.wte.weight", "*.ln_f.*"])
    training, _ = trainer(callback, path.parent)
    training.train()
    for name in ("transformer.wte.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"):
        assert_exact(path, n_steps=N_STEPS, parameter=name)


@pytest.fixture
def accelerator() -> Iterator[object]:
    import accelerate

    yield accelerate.Accelerator(cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_wrappers_are_taken_off(accelerator: object, lightning: ModuleType) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(3, 2))])
    wrap: Callable[[object], object] = lightning.pytorch_lightning.core.optimizer.LightningOptimizer
    assert torch_optimizer(accelerator.prepare(optimizer)) is optimizer
    assert torch_optimizer(wrap(optimizer)) is optimizer
    assert torch_optimizer(optimizer) is optimizer
