"""`plan`: what a run takes of memory and disk, and what is free."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from thimble_zarr.cli.options import MEMORY, config_from, config_options
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.format.layout import DEFAULT_MEMORY_BYTES, human_bytes
from thimble_zarr.report.text import aligned

if TYPE_CHECKING:
    from thimble_zarr.experiment.plan import RunPlan


@click.command()
@click.argument("store", type=click.Path(path_type=Path), default=Path("run.zarr"))
@config_options
@MEMORY
def plan(store: Path, *, config: Path | None, memory: int | None, **settings: object) -> None:
    """Show how much memory and disk a run takes, and how much is free.

    Nothing is started. STORE, run.zarr by default, says which disk.
    """
    click.echo("Working out what the run takes ...", err=True)
    from thimble_zarr.experiment.plan import plan_run

    run = config_from(config, settings)
    found = plan_run(run, store, memory_bytes=memory or DEFAULT_MEMORY_BYTES)
    click.echo(render_plan(found, run))
    warn_of_memory(found)
    found.check_disk()


def render_plan(plan: "RunPlan", config: TrainingConfig) -> str:
    """Return what a run takes, by array and in total, beside the notebook's way."""
    storage, notebook_bytes = plan.storage, plan.notebook_bytes
    sizes = {
        f"  {name}": (n_bytes, plan.notebook_array_bytes[name])
        for name, n_bytes in storage.array_bytes.items()
    } | {
        "Disk, at most": (storage.disk_bytes, notebook_bytes),
        "RAM for recording": (storage.memory_bytes, notebook_bytes),
        "RAM for training, about": (plan.training_bytes, plan.notebook_training_bytes),
        "RAM in all, about": (plan.memory_bytes, plan.notebook_training_bytes + notebook_bytes),
    }
    title = f"{config.steps:,} steps of {config.vocab_size:,} x {config.hidden_dim}, {config.dtype}"
    rows = [(title, "this run", "notebook's way")]
    rows += [(name, human_bytes(ours), human_bytes(its)) for name, (ours, its) in sizes.items()]
    compute = plan.compute_dtype
    why = f" ({compute.reason})" if compute.reason else ""
    loss = f"chunks of {config.loss_chunk:,} positions" if config.loss_chunk else "one piece"
    return (
        f"{aligned(rows)}\n"
        f"Forward and backward run in {compute.name}{why}, the loss in {loss}. The record is "
        f"{config.dtype}.\n"
        f"This machine has {human_bytes(plan.free_memory_bytes)} of RAM and "
        f"{human_bytes(plan.free_disk_bytes)} of disk free.\n"
        f"A crash costs at most the last block of {storage.layout.block_steps} steps, or two if "
        "the disk lags."
    )


def warn_of_memory(plan: "RunPlan") -> None:
    """Say on stderr that memory is short, where it is."""
    if plan.memory_is_short:
        click.echo(
            f"Warning: the run needs about {human_bytes(plan.memory_bytes)} of memory, but only "
            f"{human_bytes(plan.free_memory_bytes)} is free; a smaller --batch-size or "
            "--seq-len needs less",
            err=True,
        )
