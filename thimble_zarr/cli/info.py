"""`info`: what a store holds."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from thimble_zarr.cli.options import PARAMETERS, STORE, aligned
from thimble_zarr.format.layout import human_bytes

if TYPE_CHECKING:
    from thimble_zarr.format.overhead import Overhead
    from thimble_zarr.format.reader import Reader
    from thimble_zarr.format.schema import Json, Schema


@click.command()
@STORE
@PARAMETERS
@click.option(
    "--format",
    "format_",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="A summary for people, or everything for machines.",
)
def info(store: Path, *, parameters: tuple[str, ...], format_: str) -> None:
    """Show what was recorded in STORE: by what, how far, how large, at what cost to training.

    STORE may be the safetensors file of the original notebook. Of several parameters it shows a
    line each.
    """
    from thimble_zarr.interchange.recording import open_recording

    every = open_recording(store)
    readers = open_recording(store, parameters=parameters) if parameters else every
    if format_ == "json":
        click.echo(json.dumps({**_of_parameters(readers), **_as_json(store, every)}, indent=1))
        return
    lines = [("Store", f"{store}, {_kind(every[0])}")]
    lines += _of_one(readers[0]) if len(readers) == 1 else _of_several(readers)
    lines += _of_run(every)
    click.echo("\n".join(f"{name:<10} {value}" for name, value in lines))


def _of_parameters(readers: "Sequence[Reader]") -> "dict[str, Json]":
    from thimble_zarr.format.schema import versioned

    schemas = [reader.schema.to_attribute() for reader in readers]
    return schemas[0] if len(schemas) == 1 else versioned({"parameters": schemas})


def _as_json(store: Path, readers: "Sequence[Reader]") -> dict[str, object]:
    from thimble_zarr.format.lock import Recording

    overhead = _overhead(readers[0])
    return {
        "store": str(store),
        "n_rows": readers[0].n_rows,
        "n_skipped": _n_skipped(readers),
        "complete": _is_complete(readers[0]),
        "recording": Recording.of(readers[0]).state.value,
        "disk_bytes": readers[0].disk_bytes(),
        "raw_bytes": _raw_bytes(readers),
        "resumed_after": _resumed_after(readers[0]),
        "overhead": overhead and asdict(overhead) | _shares(overhead),
    }


def _kind(reader: "Reader") -> str:
    from thimble_zarr.format.lock import Recording
    from thimble_zarr.format.schema import FORMAT_VERSION
    from thimble_zarr.format.store import StoreReader

    if not isinstance(reader, StoreReader):
        return "the notebook's file"
    return f"format {FORMAT_VERSION}, {Recording.of(reader)}"


def _is_complete(reader: "Reader") -> bool:
    from thimble_zarr.format.store import StoreReader

    return not isinstance(reader, StoreReader) or reader.commit.complete


def _of_one(reader: "Reader") -> list[tuple[str, str]]:
    schema, labels = reader.schema, reader.read_labels()
    lines = [
        ("Parameter", f"{schema.parameter or 'unnamed'}, {_shape(schema)}, on {schema.device}"),
        ("Variables", ", ".join(f"{name} {native}" for name, native in schema.dtypes.items())),
        ("Optimizer", _optimizer(schema)),
        ("Steps", _steps([reader])),
    ]
    if labels.live is not None:
        n_live = int(labels.live.sum())
        lines.append(("Tokens", f"{n_live:,} live, {schema.n_tokens - n_live:,} dead"))
    return lines


def _of_several(readers: "Sequence[Reader]") -> list[tuple[str, str]]:
    schemas = [reader.schema for reader in readers]
    table = aligned([_columns(schema) for schema in schemas]).splitlines()
    lines = [("Parameters", f"{len(schemas)}, each a group")]
    lines += [("", line) for line in table]
    optimizers = dict.fromkeys(map(_optimizer, schemas))
    return [*lines, ("Optimizer", "; ".join(optimizers)), ("Steps", _steps(readers))]


def _columns(schema: "Schema") -> tuple[str, ...]:
    dims = f"({', '.join(schema.dims)})"
    return schema.parameter or "", _shape(schema), dims, schema.dtypes["W"], schema.device


def _shape(schema: "Schema") -> str:
    shape = " x ".join(f"{length:,}" for length in schema.shape) or "scalar"
    some = schema.whole_tokens is not None
    return f"{shape} of {schema.whole_tokens:,} {schema.row_name}s" if some else shape


def _optimizer(schema: "Schema") -> str:
    return f"{schema.optimizer.name}, {schema.optimizer.implementation}"


def _n_skipped(readers: "Sequence[Reader]") -> int:
    """Return how many recorded steps changed none of the parameters."""
    import numpy as np

    from thimble_zarr.analysis.windows import Source

    return int(np.logical_and.reduce([Source(reader).skipped for reader in readers]).sum())


def _raw_bytes(readers: "Sequence[Reader]") -> int:
    return sum(reader.n_rows * reader.schema.row_bytes for reader in readers)


def _of_run(readers: "Sequence[Reader]") -> list[tuple[str, str]]:
    """Return what is of all parameters, as the first has it."""
    from thimble_zarr.interchange.contents import NOTEBOOK_FILE

    lines, schema, overhead = [], readers[0].schema, _overhead(readers[0])
    if resumed_after := _resumed_after(readers[0]):
        steps = ", ".join(f"{step:,}" for step in resumed_after)
        lines.append(("Resumed", f"after step {steps}"))
    if overhead is not None:
        lines.append(("Overhead", _summary(overhead)))
    versions = ", ".join(f"{name} {version}" for name, version in schema.software.items())
    blocks = f"blocks of {schema.layout.block_steps} steps"
    return [
        *lines,
        ("Size", f"{_size(readers)}; {blocks}"),
        ("Recorded", f"{schema.created}{f' with {versions}' if versions else ''}"),
        *(
            (name.capitalize(), json.dumps(value))
            for name, value in schema.attrs.items()
            if name != NOTEBOOK_FILE  # for machines; `config` says the same
        ),
    ]


def _size(readers: "Sequence[Reader]") -> str:
    """Return the size of the store, and how it compares with what is in it."""
    disk_bytes, raw_bytes = readers[0].disk_bytes(), _raw_bytes(readers)
    ratio = f", {disk_bytes / raw_bytes:.2f} of raw" if raw_bytes else ""
    return human_bytes(disk_bytes) + ratio


def _steps(readers: "Sequence[Reader]") -> str:
    n_rows, schedule = readers[0].n_rows, readers[0].schema.schedule
    if not n_rows:
        return "none yet"
    n_skipped = _n_skipped(readers)
    skipped = f"; {n_skipped:,} skipped by the optimizer" if n_skipped else ""
    if schedule is None:
        return f"{n_rows - 1:,} and the initial state{skipped}"
    steps = readers[0].read_steps()
    rows = f"{n_rows:,} rows of steps {steps[0]:,} to {steps[-1]:,}"
    return f"{rows}, by schedule {schedule}{skipped}"


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


def _resumed_after(reader: "Reader") -> list[int]:
    from thimble_zarr.format.store import StoreReader

    return reader.read_resumptions() if isinstance(reader, StoreReader) else []


def _summary(overhead: "Overhead") -> str:
    return (
        f"{overhead.training_share:.2%} of training time; "
        f"{overhead.n_waits:,} of {overhead.n_steps:,} steps waited for the writer, "
        f"which was busy {overhead.writer_share:.1%} of it, {overhead.bytes_per_s / 1e6:.1f} MB/s"
    )
