"""`info`: what a store holds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from thimble_zarr.cli.options import PARAMETERS, STORE
from thimble_zarr.format.layout import human_bytes
from thimble_zarr.report.text import aligned, text_width, wrapped

if TYPE_CHECKING:
    from thimble_zarr.format.overhead import Overhead
    from thimble_zarr.format.reader import Reader
    from thimble_zarr.format.schema import Json, Schema


@click.command(short_help="Show what was recorded, by what, and how large it is.")
@STORE
@PARAMETERS
@click.option(
    "--format",
    "format_",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="A summary for people; json with everything for machines.",
)
def info(store: Path, *, parameters: tuple[str, ...], format_: str) -> None:
    """Show what was recorded in STORE, by what, how far, how large, and how it slowed training.

    STORE may be the safetensors file of the original notebook. If it holds several parameters, each
    is a line.

    \b
    With --format json it prints one object. Besides the schema of the parameter
    (docs/format.md; of several parameters a list, `parameters`) it has:
      store           path
      n_rows          rows recorded, the initial state included
      n_skipped       steps that the optimizer skipped
      complete        whether the recording ended
      recording       closed, recording, cut-off, or unknown
      disk_bytes      size on disk
      raw_bytes       size of the same arrays uncompressed
      resumed_after   steps after which the run was resumed
      overhead        what recording took; null where nobody measured it
      attrs           configuration, corpus, tokenizer: what the recorder was given
    """  # noqa: D301  # click wants the character
    from thimble_zarr.sources.open import open_recording

    every = open_recording(store)
    readers = open_recording(store, parameters=parameters) if parameters else every
    if format_ == "json":
        click.echo(json.dumps({**_of_parameters(readers), **_as_json(store, every)}, indent=1))
        return
    lines = [("Store", f"{store}, {every[0].kind}")]
    lines += _of_one(readers[0]) if len(readers) == 1 else _of_several(readers)
    lines += _of_run(every)
    attrs = _attrs(every[0].schema)
    lines += [_row(name, value) for name, value in attrs.items() if not isinstance(value, dict)]
    sections = [_section(name, value) for name, value in attrs.items() if isinstance(value, dict)]
    click.echo("\n\n".join([_rows(lines), *sections]))


def _of_parameters(readers: "Sequence[Reader]") -> "dict[str, Json]":
    from thimble_zarr.format.schema import versioned

    schemas = [reader.schema.to_attribute() for reader in readers]
    return schemas[0] if len(schemas) == 1 else versioned({"parameters": schemas})


def _as_json(store: Path, readers: "Sequence[Reader]") -> dict[str, object]:
    from thimble_zarr.format.reader import State

    overhead = _overhead(readers[0])
    return {
        "store": str(store),
        "n_rows": readers[0].n_rows,
        "n_skipped": _n_skipped(readers),
        "complete": readers[0].recording.state is State.CLOSED,
        "recording": readers[0].recording.state.value,
        "disk_bytes": readers[0].disk_bytes(),
        "raw_bytes": _raw_bytes(readers),
        "resumed_after": _resumed_after(readers[0]),
        "overhead": overhead and asdict(overhead) | _shares(overhead),
    }


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
    lines = [("Parameters", f"{len(schemas)}, each a group")]
    width = text_width() - len("Parameters  ")
    table = aligned([_columns(schema) for schema in schemas], width=width).splitlines()
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

    from thimble_zarr.analysis.compute.windows import Source

    return int(np.logical_and.reduce([Source(reader).skipped for reader in readers]).sum())


def _raw_bytes(readers: "Sequence[Reader]") -> int:
    return sum(reader.n_rows * reader.schema.row_bytes for reader in readers)


def _of_run(readers: "Sequence[Reader]") -> list[tuple[str, str]]:
    """Return what is of all parameters, as the first has it."""
    lines, schema, overhead = [], readers[0].schema, _overhead(readers[0])
    if resumed_after := _resumed_after(readers[0]):
        steps = ", ".join(f"{step:,}" for step in resumed_after)
        lines.append(("Resumed", f"after step {steps}"))
    if overhead is not None:
        lines.append(("Overhead", _summary(overhead)))
    versions = ", ".join(f"{name} {version}" for name, version in schema.software.items())
    block_steps = schema.layout.block_steps
    blocks = f"blocks of {block_steps} step{'s' * (block_steps != 1)}"
    return [
        *lines,
        ("Size", f"{_size(readers)}; {blocks}"),
        ("Recorded", f"{schema.created}{f' with {versions}' if versions else ''}"),
    ]


def _attrs(schema: "Schema") -> "dict[str, Json]":
    """Return what the recorder was given to keep, apart from what is for machines only."""
    from thimble_zarr.format.schema import NOTEBOOK_FILE

    # `config` says the same.
    return {name: value for name, value in schema.attrs.items() if name != NOTEBOOK_FILE}


def _section(name: str, values: "Mapping[str, Json]") -> str:
    """Return a title, and a row for each of some values."""
    rows = [(f"  {key}", _cell(value)) for key, value in values.items()]
    return "\n".join([_row(name, None)[0], *([_rows(rows)] if rows else [])])


def _row(name: str, value: "Json") -> tuple[str, str]:
    words, is_size = name.removesuffix("_bytes"), name.endswith("_bytes")
    cell = human_bytes(value) if is_size and isinstance(value, int) else _cell(value)
    return words.replace("_", " ").capitalize(), cell


def _cell(value: "Json") -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value)


def _rows(rows: Sequence[tuple[str, str]]) -> str:
    """Return rows of a name and a value, aligned."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        wrapped(f"{name:<{width}}  {value}", indent=" " * (width + 2)) for name, value in rows
    )


def _size(readers: "Sequence[Reader]") -> str:
    """Return the size of the store, and how it compares with what is in it."""
    disk_bytes, raw_bytes = readers[0].disk_bytes(), _raw_bytes(readers)
    ratio = f", {disk_bytes / raw_bytes:.2f} of the uncompressed size" if raw_bytes else ""
    return human_bytes(disk_bytes) + ratio


def _steps(readers: "Sequence[Reader]") -> str:
    n_rows, schedule = readers[0].n_rows, readers[0].schema.schedule
    if not n_rows:
        return "none yet"
    n_skipped = _n_skipped(readers)
    skipped = f"; {n_skipped:,} skipped by the optimizer" if n_skipped else ""
    if schedule is None:
        from thimble_zarr.analysis.verdict import stopped_of

        return f"{n_rows - 1:,}{stopped_of(readers[0])} and the initial state{skipped}"
    steps = readers[0].read_steps()
    rows = f"{n_rows:,} rows of steps {steps[0]:,} to {steps[-1]:,}"
    return f"{rows}, by schedule {schedule}{skipped}"


def _overhead(reader: "Reader") -> "Overhead | None":
    """Return what recording the run took, None where nobody measured a step."""
    from thimble_zarr.format.overhead import Overhead

    overhead = sum(reader.read_history().overhead.values(), Overhead())
    return overhead if overhead.n_steps else None


def _shares(overhead: "Overhead") -> dict[str, float]:
    return {
        "training_share": overhead.training_share,
        "writer_share": overhead.writer_share,
        "bytes_per_s": overhead.bytes_per_s,
    }


def _resumed_after(reader: "Reader") -> list[int]:
    return [*reader.read_history().resumed_after]


def _summary(overhead: "Overhead") -> str:
    return (
        f"{overhead.training_share:.2%} of training time; "
        f"{overhead.n_waits:,} of {overhead.n_steps:,} steps waited for the writer, "
        f"which was busy {overhead.writer_share:.1%} of it and wrote "
        f"{overhead.bytes_per_s / 1e6:.1f} MB/s"
    )
