"""Checkpoints beside a store, from which a run resumes: model, optimizer, random numbers.

Each is one safetensors file, `run.zarr.checkpoints/step-00000640.safetensors`, whole or not there.
Where the data stand needs no file: a step takes one batch, and the seed gives their order.
"""

import re
import time
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from thimble_zarr import tuning
from thimble_zarr.errors import ResumeError, StoreError
from thimble_zarr.store.files.base import PARTIAL
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.reader import StorePath

_NAME = re.compile(r"step-(\d+)\.safetensors")
_RANDOM = "random"


@dataclass(frozen=True)
class Checkpoint:
    """All that a training loop needs to resume after a step as if it had never stopped.

    `tensors` has copies of parameters, the optimizer's states and the states of random generators,
    by name.
    """

    step: int
    tensors: Mapping[str, Tensor]

    @classmethod
    def take(cls, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> Self:
        """Copy the state after a step."""
        tensors = {f"{_RANDOM}.cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            states = torch.cuda.get_rng_state_all()
            tensors |= {f"{_RANDOM}.cuda.{index}": state for index, state in enumerate(states)}
        for name, parameter in model.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            for state, value in optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{state}"] = value
        copies = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        return cls(step, {name: tensor.contiguous() for name, tensor in copies.items()})

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Make model, optimizer and random numbers what they were, in the memory they have.

        Raises ResumeError if the checkpoint is of another model.
        """
        owned = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        numbers = {id(tensor): number for number, tensor in enumerate(owned)}
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
            states[numbers[id(parameter)]] = {
                key.removeprefix(prefix): tensor.clone()
                for key, tensor in self.tensors.items()
                if key.startswith(prefix)
            }
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": states, "param_groups": groups})
        torch.set_rng_state(self.tensors[f"{_RANDOM}.cpu"])
        for name, state in self.tensors.items():
            if name.startswith(f"{_RANDOM}.cuda."):
                torch.cuda.set_rng_state(state, int(name.rpartition(".")[2]))


class Checkpoints:
    """The checkpoints of a run, beside its store. Raises StoreError where one cannot be written."""

    def __init__(self, store: StorePath) -> None:
        store = Path(store).absolute()
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

    def take(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take a checkpoint after a step and save it, and note when the next is due."""
        start_s = time.perf_counter()
        self.save(Checkpoint.take(step, model, optimizer))
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
        """Return the newest checkpoint that was taken after `step` or before; None without one.

        Raises StoreError if it cannot be read.
        """
        found = max((known for known in self.steps() if known <= step), default=None)
        if found is None:
            return None
        file = self.path / _name(found)
        try:
            return Checkpoint(found, safetensors.torch.load(file.read_bytes()))
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
