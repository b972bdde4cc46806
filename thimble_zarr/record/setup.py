"""What a recording says of itself before its first row."""

import datetime
import functools
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence

import torch

import thimble_zarr
from thimble_zarr.format.layout import plan_layouts
from thimble_zarr.format.schema import Json, Schema, chosen_variables, row_size
from thimble_zarr.record.capture import dtype_name
from thimble_zarr.record.parameters import RecordedParameter
from thimble_zarr.record.schedule import Schedule


def declare(
    recorded: Mapping[str, RecordedParameter],
    *,
    variables: Sequence[str] | None,
    schedule: Schedule | None,
    attrs: Mapping[str, Json] | None,
    memory_bytes: int,
) -> dict[str, Schema]:
    """Return the schema of each parameter; the arguments are those of `Recorder`."""
    dtypes = {
        group: dict.fromkeys(chosen_variables(one.optimizer, variables), dtype_name(one.tensor))
        for group, one in recorded.items()
    }
    rows = [row_size(one.shape, dtypes[group]) for group, one in recorded.items()]
    layouts = plan_layouts(rows, memory_bytes=memory_bytes)
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        group: Schema(
            shape=one.shape,
            dims=one.dims,
            dtypes=dtypes[group],
            layout=layout,
            optimizer=one.optimizer,
            parameter=one.name,
            device=str(one.tensor.device),
            n_threads=torch.get_num_threads(),
            cpu_capability=torch.backends.cpu.get_cpu_capability(),
            contiguous=one.tensor.is_contiguous(),
            whole_tokens=None if one.rows is None else len(one.tensor),
            schedule=None if schedule is None else str(schedule),
            software=_software(),
            created=created,
            attrs=attrs or {},
        ).labelled(one.labels)
        for (group, one), layout in zip(recorded.items(), layouts, strict=True)
    }


@functools.cache
def _software() -> dict[str, str]:
    return {
        "thimble_zarr": thimble_zarr.__version__,
        "torch": torch.__version__,
        "zarr": importlib.metadata.version("zarr"),
        "python": platform.python_version(),
    }
