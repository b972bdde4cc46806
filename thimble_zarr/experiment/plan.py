"""What a run will take, before it starts: memory and disk, against what the machine has."""

import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import psutil

from thimble_zarr.errors import DiskSpaceError
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.experiment.device import ComputeDtype, choose_compute_dtype
from thimble_zarr.experiment.optimizers import OPTIMIZERS
from thimble_zarr.format.coding import Coding
from thimble_zarr.format.layout import (
    StoragePlan,
    default_memory_bytes,
    human_bytes,
    plan_storage,
)
from thimble_zarr.format.location import on_disk
from thimble_zarr.format.schema import chosen_variables
from thimble_zarr.optim.base import COUNT, Optimizer
from thimble_zarr.optim.registry import REGISTRY
from thimble_zarr.record.schedule import count_rows
from thimble_zarr.store.contents import is_begun
from thimble_zarr.store.reader import StorePath, StoreReader

_ITEMSIZES = {"float32": 4, "bfloat16": 2}

_DEFAULT_CORPUS_BYTES = 2 * 10**6  # Python 3.11

_CORPUS_BYTES_PER_TEXT_BYTE = 3
"""An id and its place in the order are 8 bytes a token, and English has 3 to 4 bytes a token."""

_LIBRARIES_BYTES = 530 * 10**6  # torch, transformers and xarray imported, measured on Linux


@dataclass(frozen=True)
class RunPlan:
    """What a run takes and what is free, in bytes.

    `storage` is what recording takes, and `notebook_array_bytes` the size of each array as the
    original notebook holds it, in RAM and on disk. The memory of training itself, on the training
    device and in Python, is estimated: `training_bytes` in this arithmetic and
    `notebook_training_bytes` in the original notebook's, whose logits are whole.
    """

    storage: StoragePlan
    notebook_array_bytes: Mapping[str, int]
    compute_dtype: ComputeDtype
    training_bytes: int
    notebook_training_bytes: int
    free_memory_bytes: int
    free_disk_bytes: int

    @property
    def memory_bytes(self) -> int:
        """Memory of training and recording together."""
        return self.training_bytes + self.storage.memory_bytes

    @property
    def notebook_bytes(self) -> int:
        """What the notebook keeps in RAM, beside training, and then writes to disk."""
        return sum(self.notebook_array_bytes.values())

    @property
    def memory_is_short(self) -> bool:
        """Whether the run needs more memory than is free."""
        return self.memory_bytes > self.free_memory_bytes

    def check_disk(self) -> None:
        """Raise DiskSpaceError if the disk cannot hold the run without compression."""
        if self.storage.disk_bytes > self.free_disk_bytes:
            raise DiskSpaceError(
                f"the run needs up to {human_bytes(self.storage.disk_bytes)} of disk, but only "
                f"{human_bytes(self.free_disk_bytes)} is free; free some space, choose another "
                "disk, record fewer steps, or pass --force (compression usually saves a third)"
            )


def plan_run(
    config: TrainingConfig,
    store: StorePath,
    *,
    memory_bytes: int | None = None,
    audited: bool = False,
    overwrite: bool = False,
) -> RunPlan:
    """Work out what a run takes; looks only at the machine: device, free memory and disk.

    `audited` says whether its steps are audited; `overwrite` counts the room that a store at
    `store` will leave.
    """
    path = on_disk(store).absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    free_disk_bytes = shutil.disk_usage(there).free
    if overwrite and is_begun(store):
        free_disk_bytes += StoreReader.open_each(store)[0].disk_bytes()
    compute_dtype = choose_compute_dtype(config)
    optimizer = _optimizer(config)
    variables = chosen_variables(optimizer, config.recorded_variables)
    return RunPlan(
        storage=plan_storage(
            count_rows(config.schedule, config.steps),
            config.vocab_size,  # how many of them are live is known when the corpus is read
            config.hidden_dim,
            dict.fromkeys(variables, _ITEMSIZES[config.dtype]),
            n_scalars=len(("loss", *optimizer.scalars, COUNT, "step")),
            memory_bytes=memory_bytes or default_memory_bytes(config.coding),
            predicted=[name for name in variables if Coding(config.coding).predicts(name)],
            audited=audited,
            is_stepped_whole=not optimizer.ELEMENTWISE,
        ),
        # It has the whole run in RAM, the states in float32, and saves it once.
        notebook_array_bytes={
            name: n * (2 if name in ("W", "grad") else 4)
            for name, n in _elements(config, optimizer).items()
        },
        compute_dtype=compute_dtype,
        training_bytes=training_bytes(replace(config, compute_dtype=compute_dtype.name)),
        notebook_training_bytes=training_bytes(
            replace(config, compute_dtype=config.dtype, loss_chunk=0)
        ),
        free_memory_bytes=psutil.virtual_memory().available,
        free_disk_bytes=free_disk_bytes,
    )


def _elements(config: TrainingConfig, optimizer: Optimizer) -> dict[str, int]:
    """Return how many elements a run has of each variable, as large as torch has them."""
    shape = config.vocab_size, config.hidden_dim
    elements = dict.fromkeys(optimizer.variables, (config.steps + 1) * math.prod(shape))
    for state in optimizer.states:
        if state.single_along is not None:
            elements[state.name] //= shape[state.single_along]
    return elements


def _optimizer(config: TrainingConfig) -> Optimizer:
    """Return what the optimizer is that trains, as far as it decides what is recorded."""
    name = OPTIMIZERS[config.optimizer].kind
    flags = ("maximize", "capturable", "differentiable", "decoupled_weight_decay")
    known: dict[str, object] = dict.fromkeys((*flags, "amsgrad", "fused", "foreach"), False)
    known |= {"initial_accumulator_value": 0.0, "betas": (0.0, 0.0), "momentum": 0.0}
    known |= {"nesterov": False, "adjust_lr_fn": None} | config.optimizer_options
    if name == "AdamW":
        known["decoupled_weight_decay"] = True
    found = REGISTRY[name].from_group(known, type(name, (), {}))
    return found.of_shape((config.vocab_size, config.hidden_dim))


def training_bytes(config: TrainingConfig) -> int:
    """Estimate the memory of training: libraries, parameters and states, activations, corpus.

    The original notebook's estimate leaves out its largest part, the logits: in backward they exist
    three times in float32, as log-probabilities and two gradients. `loss_chunk` bounds their rows.
    The compute dtype must be the one that is used, not `auto`.
    """
    d, positions = config.hidden_dim, config.batch_size * config.seq_len
    itemsize, compute_itemsize = _ITEMSIZES[config.dtype], _ITEMSIZES[config.compute_dtype]
    n_parameters = (config.vocab_size + config.seq_len) * d + config.layers * 12 * d**2
    states = [of for of in _optimizer(config).states if of.single_along is None]
    n_arrays = len(("W", "grad", *states))
    parameters = n_arrays * n_parameters * itemsize
    if config.compute_dtype != config.dtype:
        parameters += 2 * n_parameters * compute_itemsize  # copies and their gradients
    logits = min(config.loss_chunk or positions, positions) * config.vocab_size * 3 * 4
    hidden = positions * d * 3 * 4  # the last layer's output in float32, and gradients
    activations = (
        positions * config.layers * (34 * d + 5 * config.heads * config.seq_len) * compute_itemsize
    )
    text_bytes = _DEFAULT_CORPUS_BYTES if config.corpus is None else 0
    if config.corpus is not None:
        with suppress(OSError):  # reading it will say why
            text_bytes = config.corpus.stat().st_size
    corpus = text_bytes * _CORPUS_BYTES_PER_TEXT_BYTE
    return _LIBRARIES_BYTES + parameters + logits + hidden + activations + corpus
