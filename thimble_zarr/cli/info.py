"""`info`: what a store holds."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from thimble_zarr.cli.options import STORE
from thimble_zarr.format.layout import human_bytes

if TYPE_CHECKING:
    from thimble_zarr.format.overhead import Overhead
    from thimble_zarr.format.reader import Reader


@click.command()
@STORE
@click.option(
    "--format",
    "format_",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="A summary for people, or everything for machines.",
)
def info(store: Path, *, format_: str) -> None:
    """Show what was recorded in STORE: by what, how far, how large, at what cost to training.

    STORE may be the safetensors file of the original notebook.
    """
    from thimble_zarr.format.store import StoreReader
    from thimble_zarr.interchange.contents import NOTEBOOK_FILE
    from thimble_zarr.interchange.recording import open_recording

    reader = open_recording(store)
    complete = not isinstance(reader, StoreReader) or reader.commit.complete
    schema, n_rows = reader.schema, reader.n_rows
    overhead = _overhead(reader)
    disk_bytes, raw_bytes = reader.disk_bytes(), n_rows * schema.row_bytes
    if format_ == "json":
        content = schema.to_attribute() | {
            "store": str(store),
            "n_rows": n_rows,
            "complete": complete,
            "disk_bytes": disk_bytes,
            "raw_bytes": raw_bytes,
            "overhead": overhead and asdict(overhead) | _shares(overhead),
        }
        click.echo(json.dumps(content, indent=1))
        return
    optimizer = schema.optimizer
    shape = f"{schema.n_tokens:,} x {schema.n_dims}"
    if schema.whole_tokens is not None:
        shape += f" of {schema.whole_tokens:,} x {schema.n_dims}"
    labels = reader.read_labels()
    versions = ", ".join(f"{name} {version}" for name, version in schema.software.items())
    if isinstance(reader, StoreReader):
        state = "closed" if complete else "not closed: being recorded, or cut off"
        kind = f"format {schema.to_attribute()['format_version']}, {state}"
    else:
        kind = "the notebook's file"
    lines = [
        ("Store", f"{store}, {kind}"),
        ("Parameter", f"{schema.parameter or 'unnamed'}, {shape}, on {schema.device}"),
        ("Variables", ", ".join(f"{name} {native}" for name, native in schema.dtypes.items())),
        ("Optimizer", f"{optimizer.name}, {optimizer.implementation}"),
        ("Steps", _steps(reader)),
    ]
    if labels.live is not None:
        n_live = int(labels.live.sum())
        lines.append(("Tokens", f"{n_live:,} live, {schema.n_tokens - n_live:,} dead"))
    ratio = f", {disk_bytes / raw_bytes:.2f} of raw" if raw_bytes else ""
    if overhead is not None:
        lines.append(("Overhead", _summary(overhead)))
    lines += [
        ("Size", f"{human_bytes(disk_bytes)}{ratio}; blocks of {schema.layout.block_steps} steps"),
        ("Recorded", f"{schema.created}{f' with {versions}' if versions else ''}"),
    ]
    lines += [
        (name.capitalize(), json.dumps(value))
        for name, value in schema.attrs.items()
        if name != NOTEBOOK_FILE  # for machines; `config` says the same
    ]
    click.echo("\n".join(f"{name:<10} {value}" for name, value in lines))


def _steps(reader: "Reader") -> str:
    n_rows, schedule = reader.n_rows, reader.schema.schedule
    if not n_rows or schedule is None:
        return f"{n_rows - 1:,} and the initial state" if n_rows else "none yet"
    steps = reader.read_steps()
    return f"{n_rows:,} rows of steps {steps[0]:,} to {steps[-1]:,}, by schedule {schedule}"


def _overhead(reader: "Reader") -> "Overhead | None":
    """Return what recording the run took, None where nobody measured a step."""
    from thimble_zarr.format.overhead import Overhead
    from thimble_zarr.format.store import StoreReader

    if not isinstance(reader, StoreReader):
        return None
    overhead = sum(reader.read_overhead().values(), Overhead())
    return overhead if overhead.n_steps else None


def _shares(overhead: "Overhead") -> dict[str, float]:
    return {
        "training_share": overhead.training_share,
        "writer_share": overhead.writer_share,
        "bytes_per_s": overhead.bytes_per_s,
    }


def _summary(overhead: "Overhead") -> str:
    return (
        f"{overhead.training_share:.2%} of training time; "
        f"{overhead.n_waits:,} of {overhead.n_steps:,} steps waited for the writer, "
        f"which was busy {overhead.writer_share:.1%} of it, {overhead.bytes_per_s / 1e6:.1f} MB/s"
    )
