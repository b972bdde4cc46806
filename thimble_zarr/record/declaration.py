"""What a recording says of itself before its first row: parameters, layout, optimizer, software."""

import datetime
import functools
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence

import torch

import thimble_zarr
from thimble_zarr.format.layout import plan_layouts
from thimble_zarr.format.schema import Json, Schema, chosen_variables, row_size
from thimble_zarr.record.capture import dtype_name, optimizer_info
from thimble_zarr.record.parameters import Chosen


def declare(
    optimizer: torch.optim.Optimizer,
    chosen: Mapping[str, Chosen],
    *,
    variables: Sequence[str] | None,
    schedule: str | None,
    attrs: Mapping[str, Json],
    memory_bytes: int,
) -> dict[str, Schema]:
    """Return what is known of each parameter, by its group.

    Parameters
    ----------
    optimizer
        What will be recorded.
    chosen
        The parameters, by group.
    variables
        Which variables of each; None for all.
    schedule
        Which steps, in words; None for all.
    attrs
        What the user says of the run.
    memory_bytes
        Limit on the recorder's memory.

    Raises
    ------
    ConfigError
        If the variables are none that can be recorded, or labels do not fit.
    """
    infos = {group: optimizer_info(optimizer, of.tensor) for group, of in chosen.items()}
    dtypes = {
        group: dict.fromkeys(chosen_variables(infos[group], variables), dtype_name(of.tensor))
        for group, of in chosen.items()
    }
    rows = [row_size(of.shape, dtypes[group]) for group, of in chosen.items()]
    layouts = plan_layouts(rows, memory_bytes=memory_bytes)
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    schemas = {
        group: Schema(
            shape=of.shape,
            dims=of.dims,
            dtypes=dtypes[group],
            layout=layout,
            optimizer=infos[group],
            parameter=of.name,
            device=str(of.tensor.device),
            n_threads=torch.get_num_threads(),
            cpu_capability=torch.backends.cpu.get_cpu_capability(),
            contiguous=of.tensor.is_contiguous(),
            whole_tokens=None if of.rows is None else len(of.tensor),
            schedule=schedule,
            software=_software(),
            created=created,
            attrs=attrs,
        )
        for (group, of), layout in zip(chosen.items(), layouts, strict=True)
    }
    return {group: schema.labelled(chosen[group].labels) for group, schema in schemas.items()}


@functools.cache
def _software() -> dict[str, str]:
    return {
        "thimble_zarr": thimble_zarr.__version__,
        "torch": torch.__version__,
        "zarr": importlib.metadata.version("zarr"),
        "python": platform.python_version(),
    }
