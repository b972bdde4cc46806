"""Checkpoints beside a store, and the run they are of, which resumes from them.

Each is one safetensors file, `run.zarr.checkpoints/step-00000640.safetensors`, whole or not there.
It has the model, the optimizer and random numbers. Where the data stand needs no file: a step takes
one batch, and the seed gives their order.
"""

import re
import time
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from thimble_zarr import tuning
from thimble_zarr.errors import ConfigError, ResumeError, StoreError
from thimble_zarr.experiment.config import AUTO, TrainingConfig
from thimble_zarr.experiment.optimizers import without_others
from thimble_zarr.format.location import on_disk
from thimble_zarr.format.schema import Json, Schema
from thimble_zarr.store.contents import is_begun, read_declared
from thimble_zarr.store.files.base import PARTIAL
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.lock import WriterLock
from thimble_zarr.store.reader import StorePath, StoreReader
from thimble_zarr.store.resume import check_has_every_step

_NAME = re.compile(r"step-(\d+)\.safetensors")
_RANDOM = "random"


@dataclass(frozen=True)
class Checkpoint:
    """Copies of parameters, states and random generators, to resume as if nothing had stopped."""

    step: int
    tensors: Mapping[str, Tensor]

    @classmethod
    def take(cls, step: int, model: nn.Module, *optimizers: torch.optim.Optimizer) -> Self:
        """Copy the state after a step."""
        held = {weight: of for optimizer in optimizers for weight, of in optimizer.state.items()}
        tensors = {f"{_RANDOM}.cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            states = torch.cuda.get_rng_state_all()
            tensors |= {f"{_RANDOM}.cuda.{index}": state for index, state in enumerate(states)}
        for name, parameter in model.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            for state, value in held.get(parameter, {}).items():
                if value is None:  # SGD's buffer without momentum
                    continue
                tensors[f"optimizer.{name}.{state}"] = value
        copies = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        return cls(step, {name: tensor.contiguous() for name, tensor in copies.items()})

    def restore(self, model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
        """Make model, optimizers and random numbers what they were, in the memory they have."""
        states: dict[int, dict[str, Tensor]] = {}
        for name, parameter in model.named_parameters():
            saved = self.tensors.get(f"model.{name}")
            if saved is None or (saved.shape, saved.dtype) != (parameter.shape, parameter.dtype):
                raise ResumeError(
                    f"the checkpoint of step {self.step} is of another model: {name} is not in it, "
                    "or of another shape or dtype; train with the settings it was taken with"
                )
            with torch.no_grad():
                parameter.copy_(saved)
            prefix = f"optimizer.{name}."
            states[id(parameter)] = {
                key.removeprefix(prefix): tensor.clone()
                for key, tensor in self.tensors.items()
                if key.startswith(prefix)
            }
        for optimizer in optimizers:
            _restore(optimizer, states)
        torch.set_rng_state(self.tensors[f"{_RANDOM}.cpu"])
        for name, state in self.tensors.items():
            if name.startswith(f"{_RANDOM}.cuda."):
                torch.cuda.set_rng_state(state, int(name.rpartition(".")[2]))


def _restore(optimizer: torch.optim.Optimizer, states: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Give an optimizer the states of its parameters, which are known by their identity."""
    owned = [own for group in optimizer.param_groups for own in group["params"]]
    by_number = {number: states[id(own)] for number, own in enumerate(owned)}  # torch's
    optimizer.load_state_dict(optimizer.state_dict() | {"state": by_number})
    for parameter in owned:
        held = optimizer.state[parameter]
        for key, saved in states[id(parameter)].items():
            if held[key].dtype != saved.dtype:  # torch casts numbers to the parameter's dtype
                held[key] = saved.to(held[key].device)


class Checkpoints:
    """The checkpoints of a run; raises StoreError where one cannot be written or read."""

    def __init__(self, store: StorePath) -> None:
        store = on_disk(store).absolute()
        self.path = store.with_name(f"{store.name}.checkpoints")
        self._files = LocalFiles(self.path)
        self._next_s = time.perf_counter()

    @property
    def is_due(self) -> bool:
        """Whether enough time has passed that taking another costs a small share of it at most."""
        return time.perf_counter() >= self._next_s

    def steps(self) -> list[int]:
        """Return the steps of those that there are, in order."""
        return sorted(int(found[1]) for found in map(_NAME.fullmatch, self._files.list()) if found)

    def take(self, step: int, model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
        """Take a checkpoint after a step and save it, and note when the next is due."""
        start_s = time.perf_counter()
        self.save(Checkpoint.take(step, model, *optimizers))
        now_s = time.perf_counter()
        self._next_s = now_s + (now_s - start_s) / tuning.TUNING.checkpoint_share

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, whole or not at all. When this returns it survives a power loss."""
        name = _name(checkpoint.step)
        try:
            with closing(self._files.writer()) as writer:
                writer.put(name, [safetensors.torch.save(dict(checkpoint.tensors))])
                writer.sync()
        except OSError as error:
            raise StoreError(f"cannot write the checkpoint {self.path / name}: {error}") from error

    def newest(self, step: int) -> Checkpoint | None:
        """Return the newest checkpoint that was taken after `step` or before; None without one."""
        found = [known for known in self.steps() if known <= step]
        if not found:
            return None
        file = self.path / _name(found[-1])
        try:
            return Checkpoint(found[-1], safetensors.torch.load(file.read_bytes()))
        except (OSError, safetensors.SafetensorError) as error:
            raise StoreError(
                f"cannot read the checkpoint {file}: {error}; remove it to resume "
                "from the one before"
            ) from error

    def prune(self, committed_step: int) -> None:
        """Remove what no resumption can need: all before the newest one of a committed step."""
        needed = max((step for step in self.steps() if step <= committed_step), default=0)
        self._remove(_name(step) for step in self.steps() if step < needed)

    def clear(self, after_step: int = 0) -> None:
        """Remove all checkpoints of later steps, and no other file."""
        self._remove(_name(step) for step in self.steps() if step > after_step)
        self._remove(name for name in self._files.list() if name.endswith(PARTIAL))
        with suppress(OSError):
            self.path.rmdir()

    def _remove(self, names: Iterable[str]) -> None:
        with closing(self._files.writer()) as writer:
            writer.delete([*names])


def _name(step: int) -> str:
    return f"step-{step:08d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """What the store of a run says of it.

    `committed_step` is -1 where not even the initial state is recorded for good. `is_finished` says
    that all steps were taken and the store is closed.
    """

    path: Path
    config: TrainingConfig
    memory_bytes: int
    schema: Schema
    committed_step: int
    is_finished: bool

    @classmethod
    def read(cls, store: StorePath) -> Self | None:
        """Return what a store says; None where there is none.

        A store without a committed step still has its settings, unless its writer was killed before
        it had written them. Raises ResumeError if something else than `train` recorded it, or a
        schedule left out steps.
        """
        if is_begun(store):
            reader = StoreReader.open_each(store)[0]
            check_has_every_step(reader)
            schema, n_rows, is_closed = reader.schema, reader.n_rows, reader.commit.complete
        elif (declared := read_declared(store)) is not None:
            schema, n_rows, is_closed = declared, 0, False
        else:
            return None
        settings, memory_bytes = schema.attrs.get("config"), schema.attrs.get("memory_bytes")
        try:
            if not isinstance(settings, Mapping) or type(memory_bytes) is not int:
                raise ConfigError("the store has no settings of it")
            # A version before also recorded defaults of settings that its optimizer does not have.
            settings = without_others(settings, settings.get("optimizer", TrainingConfig.optimizer))
            # Version 0.1.0 recorded neither: it computed as the original notebook does.
            earlier = {"compute_dtype": settings.get("dtype"), "loss_chunk": 0}
            config = TrainingConfig.from_settings(earlier | settings)
        except ConfigError as error:
            raise ResumeError(
                f"cannot resume {store}: this version of `thimble-zarr train` did not record it "
                f"({error}); a loop of your own resumes with Recorder(..., resume=True)"
            ) from error
        return cls(
            path=Path(store),
            config=config,
            memory_bytes=memory_bytes,
            schema=schema,
            committed_step=n_rows - 1,
            is_finished=is_closed and n_rows > config.steps,
        )

    def check_same(self, config: TrainingConfig, attrs: Mapping[str, Json]) -> None:
        """Raise ResumeError, which names every difference, unless a run would be this one."""
        # Of another optimizer only what both have is compared: the rest follows from its name.
        settings = without_others(config.to_json(), self.config.optimizer)
        differences = [
            f"{name} {recorded.get(name)} recorded, {value} now"
            for recorded, now in (
                (self.config.to_json(), without_others(settings, config.optimizer)),
                (self.schema.attrs, attrs),
            )
            for name, value in now.items()
            if value != recorded.get(name)
        ]
        if differences:
            raise ResumeError(
                f"cannot resume {self.path}: {'; '.join(differences)}; leave these options out "
                "(the store has them), or record another run"
            )

    def resolve(self, config: TrainingConfig) -> TrainingConfig:
        """Return the config with the recorded compute dtype where it says `auto`."""
        if config.compute_dtype != AUTO:
            return config
        return replace(config, compute_dtype=self.config.compute_dtype)

    def check_resumable(self) -> None:
        """Raise what resuming would: another process is recording, or the checkpoint is lost."""
        if not self.is_finished:
            WriterLock(self.path).release()
            self.check_has(Checkpoints(self.path))

    def check_has(self, checkpoints: Checkpoints) -> None:
        """Raise ResumeError if there must have been a checkpoint of a recorded step."""
        is_there = any(step <= self.committed_step for step in checkpoints.steps())
        # One is taken as soon as a block is full, and that is before the block is committed.
        if not is_there and self.committed_step >= self.schema.layout.block_steps:
            raise ResumeError(
                f"cannot resume {self.path}: it has {self.committed_step} steps, but "
                f"{checkpoints.path} has no checkpoint of any; put the checkpoints back, or record "
                "again with --overwrite"
            )
