"""What a store holds, as people and machines read it."""

import json
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from thimble_zarr.analysis.compute.source import Source
from thimble_zarr.analysis.verdict import stopped_of
from thimble_zarr.format.audited import AuditCounts
from thimble_zarr.format.layout import human_bytes
from thimble_zarr.format.location import Location
from thimble_zarr.format.overhead import Overhead
from thimble_zarr.format.reader import Reader, State
from thimble_zarr.format.schema import NOTEBOOK_FILE, Json, Schema, versioned
from thimble_zarr.report.text import aligned, text_width, wrapped


def as_text(store: Location, readers: Sequence[Reader], every: Sequence[Reader]) -> str:
    """Return what people read of some parameters of a run, of which there are `every`."""
    run, schema = every[0], every[0].schema
    rows = [("Store", f"{store}, {run.kind}")]
    rows += _parameter(readers[0]) if len(readers) == 1 else _parameters(readers)
    if resumed_after := run.read_history().resumed_after:
        rows.append(("Resumed", f"after step {', '.join(f'{step:,}' for step in resumed_after)}"))
    if overhead := _overhead(run):
        words = (
            f"{overhead.training_share:.2%} of training time; "
            f"{overhead.n_waits:,} of {overhead.n_steps:,} steps waited for the writer, "
            f"which was busy {overhead.writer_share:.1%} of it and wrote "
            f"{overhead.bytes_per_s / 1e6:.1f} MB/s"
        )
        rows.append(("Overhead", words))
    if audited := _audited(run):
        rows.append(("Audit", f"{audited}, while it was recorded"))
    rows += _not_copied(readers)
    disk_bytes, raw_bytes = run.disk_bytes(), _raw_bytes(every)
    ratio = f", {disk_bytes / raw_bytes:.2f} of the uncompressed size" if raw_bytes else ""
    n_steps = schema.layout.block_steps
    blocks = f"blocks of {n_steps} step{'s' * (n_steps != 1)}"
    rows.append(("Size", f"{human_bytes(disk_bytes)}{ratio}; {blocks}"))
    versions = ", ".join(f"{name} {version}" for name, version in schema.software.items())
    rows.append(("Recorded", f"{schema.created}{f' with {versions}' if versions else ''}"))
    sections = []
    for name, value in schema.attrs.items():
        title = name.removesuffix("_bytes").replace("_", " ").capitalize()
        if name == NOTEBOOK_FILE:
            continue  # of what the recorder was given to keep, `config` says the same for people
        if isinstance(value, dict):
            cells = [(f"  {key}", _cell(cell)) for key, cell in value.items()]
            sections.append("\n".join([title, *([_lines(cells)] if cells else [])]))
        elif name.endswith("_bytes") and isinstance(value, int):
            rows.append((title, human_bytes(value)))
        else:
            rows.append((title, _cell(value)))
    return "\n\n".join([_lines(rows), *sections])


def as_json(store: Location, readers: Sequence[Reader], every: Sequence[Reader]) -> str:
    """Return the schemas of some parameters of a run, and what is of the run, as JSON."""
    schemas = [reader.schema.to_attribute() for reader in readers]
    run, overhead, audited = every[0], _overhead(every[0]), _audited(every[0])
    schema = schemas[0] if len(schemas) == 1 else versioned({"parameters": schemas})
    shares = ("training_share", "writer_share", "bytes_per_s")
    about = {
        "store": str(store),
        "n_rows": run.n_rows,
        "n_skipped": _n_skipped(every),
        "complete": run.recording.state is State.CLOSED,
        "recording": run.recording.state.value,
        "disk_bytes": run.disk_bytes(),
        "raw_bytes": _raw_bytes(every),
        "audit": audited and audited.to_json(),
        "n_filled": sum(_n_rows(reader.read_history().filled) for reader in every),
        "n_missing": sum(_n_rows(reader.read_history().missing) for reader in every),
        "resumed_after": [*run.read_history().resumed_after],
        "overhead": overhead
        and asdict(overhead) | {name: getattr(overhead, name) for name in shares},
    }
    return json.dumps({**schema, **about}, indent=1)


def _parameter(reader: Reader) -> list[tuple[str, str]]:
    schema, live = reader.schema, reader.read_labels().live
    rows = [
        ("Parameter", f"{schema.parameter or 'unnamed'}, {_shape(schema)}, on {schema.device}"),
        ("Variables", ", ".join(f"{name} {native}" for name, native in schema.dtypes.items())),
        ("Optimizer", _optimizer(schema)),
        *_coding([schema]),
        ("Steps", _steps([reader])),
    ]
    if live is not None:
        n_live = int(live.sum())
        rows.append(("Tokens", f"{n_live:,} live, {schema.n_tokens - n_live:,} dead"))
    return rows


def _parameters(readers: Sequence[Reader]) -> list[tuple[str, str]]:
    schemas = [reader.schema for reader in readers]
    cells = [
        (of.parameter or "", _shape(of), f"({', '.join(of.dims)})", of.dtypes["W"], of.device)
        for of in schemas
    ]
    lines = aligned(cells, width=text_width() - len("Parameters  ")).splitlines()
    return [
        ("Parameters", f"{len(schemas)}, each a group"),
        *(("", line) for line in lines),
        ("Optimizer", "; ".join(dict.fromkeys(map(_optimizer, schemas)))),
        *_coding(schemas),
        ("Steps", _steps(readers)),
    ]


def _shape(schema: Schema) -> str:
    shape = " x ".join(f"{length:,}" for length in schema.shape) or "scalar"
    some = schema.whole_tokens is not None
    return f"{shape} of {schema.whole_tokens:,} {schema.row_name}s" if some else shape


def _optimizer(schema: Schema) -> str:
    optimizer = schema.optimizer
    how = "" if optimizer.ELEMENTWISE else "; a step needs the whole parameter"
    return f"{optimizer.name}, {optimizer.implementation}{how}"


def _coding(schemas: Sequence[Schema]) -> list[tuple[str, str]]:
    """Return how arrays are written, unless all are as they are."""
    codings = [schema.coding for schema in schemas if schema.coding.is_predicted]
    words = [
        f"predicted by {of.program or 'no program'}; gradient {of.gradient_codec}" for of in codings
    ]
    return [("Coding", ", ".join(dict.fromkeys(words)))] if words else []


def _steps(readers: Sequence[Reader]) -> str:
    n_rows, schedule = readers[0].n_rows, readers[0].schema.schedule
    if not n_rows:
        return "none yet"
    n_skipped = _n_skipped(readers)
    skipped = f"; {n_skipped:,} skipped by the optimizer" if n_skipped else ""
    if schedule is None:
        return f"{n_rows - 1:,}{stopped_of(readers[0])} and the initial state{skipped}"
    steps = readers[0].read_steps()
    rows = f"{n_rows:,} rows of steps {steps[0]:,} to {steps[-1]:,}"
    return f"{rows}, by schedule {schedule}{skipped}"


def _n_skipped(readers: Sequence[Reader]) -> int:
    """Return how many recorded steps changed none of the parameters."""
    return int(np.logical_and.reduce([Source(reader).skipped for reader in readers]).sum())


def _raw_bytes(readers: Sequence[Reader]) -> int:
    return sum(reader.n_rows * reader.schema.row_bytes for reader in readers)


def _overhead(reader: Reader) -> Overhead | None:
    """Return what recording the run took, None where nobody measured a step."""
    overhead = sum(reader.read_history().overhead.values(), Overhead())
    return overhead if overhead.n_steps else None


def _not_copied(readers: Sequence[Reader]) -> list[tuple[str, str]]:
    """Return how many rows were worked out between keyframes, and how many could not be."""
    histories = [reader.read_history() for reader in readers]
    filled = sum(_n_rows(history.filled) for history in histories)
    missing = sum(_n_rows(history.missing) for history in histories)
    rows = []
    if filled:
        rows.append(("Keyframes", f"{filled:,} rows were not copied: the gradients lead to them"))
    if missing:
        rows.append(("Missing", f"W and states of {missing:,} rows, to which no gradients lead"))
    return rows


def _n_rows(ranges: Sequence[tuple[int, int]]) -> int:
    return sum(stop - first for first, stop in ranges)


def _audited(reader: Reader) -> AuditCounts | None:
    """Return how many steps were audited while the run was recorded, None where none was."""
    counts = sum(reader.read_history().audits.values(), AuditCounts())
    return counts if counts.checked else None


def _cell(value: Json) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value)


def _lines(rows: Sequence[tuple[str, str]]) -> str:
    """Return rows, the values aligned."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        wrapped(f"{name:<{width}}  {value}", indent=" " * (width + 2)) for name, value in rows
    )
