"""What a run will take, before it starts: memory and disk, against what the machine has."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from thimble_zarr.errors import DiskSpaceError
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.format.bits import storage_dtype
from thimble_zarr.format.layout import DEFAULT_MEMORY_BYTES, StoragePlan, human_bytes, plan_storage
from thimble_zarr.format.schema import SCALARS
from thimble_zarr.format.store import StorePath, StoreReader, is_begun
from thimble_zarr.record.schedule import count_rows

NOTEBOOK_ITEMSIZES: Mapping[str, int] = {"W": 2, "grad": 2, "exp_avg": 4, "exp_avg_sq": 4}
"""Bytes an element in the original notebook, which holds the whole run in RAM and saves it once."""

_LIBRARIES_BYTES = 450 * 10**6  # torch, transformers and xarray imported, measured on Linux


@dataclass(frozen=True)
class RunPlan:
    """What a run takes and what there is, in bytes.

    Attributes
    ----------
    storage
        What recording takes.
    notebook_array_bytes
        Size of each array as the original notebook holds it, in RAM and on disk.
    training_bytes
        Estimate of the memory of training itself, on the training device and in Python.
    free_memory_bytes, free_disk_bytes
        What the machine has now.
    """

    storage: StoragePlan
    notebook_array_bytes: Mapping[str, int]
    training_bytes: int
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
                f"the run needs up to {human_bytes(self.storage.disk_bytes)} of disk and "
                f"{human_bytes(self.free_disk_bytes)} are free; make room, choose another disk, "
                "record fewer steps, or pass --force (compression usually saves a third)"
            )


def plan_run(
    config: TrainingConfig,
    store: StorePath,
    *,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    overwrite: bool = False,
) -> RunPlan:
    """Work out what a run takes; reads nothing but the machine's free memory and disk.

    Parameters
    ----------
    config
        The settings.
    store
        Where the run will be recorded.
    memory_bytes
        Bound on the recorder's memory.
    overwrite
        Count the room that a store at `store` will leave.

    Returns
    -------
    RunPlan
    """
    free_disk_bytes = shutil.disk_usage(_existing_parent(Path(store))).free
    if overwrite and is_begun(store):
        free_disk_bytes += StoreReader.open_each(store)[0].disk_bytes()
    itemsize = storage_dtype(config.dtype).itemsize
    recorded = {"W", *(config.recorded_variables or NOTEBOOK_ITEMSIZES)}  # W always is
    elements = (config.steps + 1) * config.vocab_size * config.hidden_dim
    return RunPlan(
        storage=plan_storage(
            count_rows(config.schedule, config.steps),
            config.vocab_size,  # how many of them are live is known when the corpus is read
            config.hidden_dim,
            {name: itemsize for name in NOTEBOOK_ITEMSIZES if name in recorded},
            n_scalars=len(SCALARS) + 1,
            memory_bytes=memory_bytes,
        ),
        notebook_array_bytes={name: elements * size for name, size in NOTEBOOK_ITEMSIZES.items()},
        training_bytes=training_bytes(config, itemsize),
        free_memory_bytes=psutil.virtual_memory().available,
        free_disk_bytes=free_disk_bytes,
    )


def training_bytes(config: TrainingConfig, itemsize: int) -> int:
    """Estimate the memory of training: libraries, parameters and states, activations.

    The logits dominate: they exist in the model's dtype and in float32, as log-probabilities, and
    their gradients once in each dtype. The original notebook's estimate leaves them out.
    """
    d, positions = config.hidden_dim, config.batch_size * config.seq_len
    n_parameters = (config.vocab_size + config.seq_len) * d + config.layers * 12 * d**2
    logits = positions * config.vocab_size * (2 * itemsize + 3 * 4)
    activations = (
        positions * config.layers * (34 * d + 5 * config.heads * config.seq_len) * itemsize
    )
    return _LIBRARIES_BYTES + 4 * n_parameters * itemsize + logits + activations


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
