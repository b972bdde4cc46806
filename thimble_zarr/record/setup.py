"""What a recording says of itself before its first row, and the store that is told so."""

import datetime
import functools
import importlib.metadata
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import thimble_zarr
from thimble_zarr.errors import ConfigError, ResumeError
from thimble_zarr.format.layout import (
    MAX_BUFFERS,
    RowSize,
    count_buffers,
    human_bytes,
    plan_layouts,
    recorder_memory_bytes,
)
from thimble_zarr.format.schema import (
    Json,
    Schema,
    array_path,
    chosen_variables,
    row_size,
)
from thimble_zarr.record.capture import LiveOptimizer, dtype_name
from thimble_zarr.record.parameters import RecordedParameter
from thimble_zarr.record.resume_state import ResumeState, resume_state
from thimble_zarr.record.schedule import Schedule, as_schedule
from thimble_zarr.store.contents import is_begun
from thimble_zarr.store.reader import StorePath, StoreReader
from thimble_zarr.store.writer import StoreWriter


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is recorded, of which steps, and with how many blocks in memory (`n_buffers`).

    Parameters are given by group, as they are (`recorded`) and as a store is told (`schemas`).
    """

    live: LiveOptimizer
    recorded: Mapping[str, RecordedParameter]
    schemas: Mapping[str, Schema]
    schedule: Schedule | None
    n_rows: int | None
    n_buffers: int
    max_overhead: float | None

    @property
    def row_indices(self) -> dict[str, Tensor]:
        """By path in the store, the rows to record of arrays of which not all are."""
        return {
            array_path(group, name): torch.from_numpy(one.rows).to(one.tensor.device)
            for group, one in self.recorded.items()
            for name in self.schemas[group].dtypes
            if one.rows is not None
        }

    def open(
        self, path: StorePath, *, resume: bool, overwrite: bool, after_step: int | None
    ) -> tuple[StoreWriter, ResumeState | None]:
        """Create the store, or resume it; the arguments are those of `Recorder`."""
        if (resume and overwrite) or (after_step is not None and not resume):
            raise ConfigError(
                "`resume` continues a store and `overwrite` replaces it: choose one; "
                "`after_step` is for `resume`"
            )
        ids = {group: one.rows for group, one in self.recorded.items() if one.rows is not None}
        labels = {group: one.labels for group, one in self.recorded.items() if one.labels}
        declared: dict[str, Any] = {"labels": labels, "token_ids": ids, "n_rows": self.n_rows}
        schema = self.schemas.get("", self.schemas)
        if resume and is_begun(path):
            states: list[ResumeState] = []

            def approve(readers: Sequence[StoreReader], n_rows: int) -> None:
                states.append(resume_state(self.live, readers, n_rows))

            kept_rows = None if after_step is None else after_step + 1
            store = StoreWriter.resume(
                path, schema, kept_rows=kept_rows, approve=approve, **declared
            )
            return store, states[0]
        if after_step:
            raise ResumeError(
                f"cannot resume after step {after_step}: nothing is recorded at {path}; check the "
                "path or leave `after_step` out to record from here on"
            )
        return StoreWriter.create(path, schema, overwrite=overwrite or resume, **declared), None


def set_up(
    optimizer: torch.optim.Optimizer,
    recorded: Mapping[str, RecordedParameter],
    *,
    variables: Sequence[str] | None,
    schedule: Callable[[int], bool] | None,
    attrs: Mapping[str, Json] | None,
    memory_bytes: int,
    n_steps: int | None,
    max_overhead: float | None,
) -> Setup:
    """Return what is recorded of parameters; the arguments are those of `Recorder`."""
    if max_overhead is not None and not max_overhead > 0:
        raise ConfigError(
            f"max_overhead is {max_overhead}; give a share of training time above 0, such as "
            "0.03, or None for no warning"
        )
    steps = None if schedule is None else as_schedule(schedule)
    dtypes = {
        group: dict.fromkeys(chosen_variables(one.optimizer, variables), dtype_name(one.tensor))
        for group, one in recorded.items()
    }
    rows = [row_size(one.shape, dtypes[group]) for group, one in recorded.items()]
    layouts = plan_layouts(rows, memory_bytes=memory_bytes)
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    text = None if steps is None else str(steps)
    of_run = {"schedule": text, "attrs": attrs or {}, "created": created}
    return Setup(
        live=LiveOptimizer(optimizer, {group: one.tensor for group, one in recorded.items()}),
        recorded=recorded,
        schemas={
            group: _schema(one, dtypes=dtypes[group], layout=layout, **of_run)
            for (group, one), layout in zip(recorded.items(), layouts, strict=True)
        },
        schedule=steps,
        n_rows=None if n_steps is None or steps is not None else n_steps + 1,
        n_buffers=_count_buffers(rows, layouts[0].block_steps, memory_bytes=memory_bytes),
        max_overhead=max_overhead,
    )


def _schema(one: RecordedParameter, **known: Any) -> Schema:
    return Schema(
        shape=one.shape,
        dims=one.dims,
        optimizer=one.optimizer,
        parameter=one.name,
        device=str(one.tensor.device),
        n_threads=torch.get_num_threads(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        contiguous=one.tensor.is_contiguous(),
        whole_tokens=None if one.rows is None else len(one.tensor),
        software=_software(),
        **known,
    ).labelled(one.labels)


def _count_buffers(rows: Sequence[RowSize], block_steps: int, *, memory_bytes: int) -> int:
    """Return how many blocks to hold in memory, and warn if even one row is more than the limit."""
    n_buffers = count_buffers(rows, block_steps, memory_bytes)
    needed, wished = (recorder_memory_bytes(rows, block_steps, n) for n in (n_buffers, MAX_BUFFERS))
    if needed > memory_bytes:
        warnings.warn(
            f"one row of what is recorded takes {human_bytes(sum(row.n_bytes for row in rows))}: "
            f"the recorder needs {human_bytes(needed)}, more than memory_bytes "
            f"({human_bytes(memory_bytes)}), and training waits while each step is written. With "
            f"memory_bytes={wished} it need not wait; to need less, record fewer rows (tokens=), "
            "variables or parameters",
            stacklevel=4,
        )
    return n_buffers


@functools.cache
def _software() -> dict[str, str]:
    return {
        "thimble_zarr": thimble_zarr.__version__,
        "torch": torch.__version__,
        "zarr": importlib.metadata.version("zarr"),
        "python": platform.python_version(),
    }
