"""`info` and `summary`: what a store holds, and what the run did."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from thimble_zarr.cli.options import (
    GROUPS,
    PARAMETERS,
    PROCESS_MEMORY,
    QUIET,
    STORE,
    WORKERS,
    format_option,
)
from thimble_zarr.format.location import Location


@click.command(short_help="Show what was recorded, by what, and how large it is.")
@STORE
@PARAMETERS
@format_option("table", "json", help="A summary for people; json with everything for machines.")
def info(store: Location, *, parameters: tuple[str, ...], format_: str) -> None:
    """Show what was recorded in STORE, by what, how far, how large, and how it slowed training.

    STORE may be a safetensors or HDF5 file. If it holds several parameters, each is a line.

    \b
    With --format json it prints one object. Besides the schema of the parameter
    (docs/format.md; of several parameters a list, `parameters`) it has:
      store           path
      n_rows          rows recorded, the initial state included
      n_skipped       steps that the optimizer skipped
      n_filled        rows of which weights and states were worked out between keyframes
      n_missing       rows of which weights and states are not known
      complete        whether the recording ended
      recording       closed, recording, cut-off, or unknown
      disk_bytes      size on disk
      raw_bytes       size of the same arrays uncompressed
      audit           steps that were audited while it was recorded; null where none was
      resumed_after   steps after which the run was resumed
      overhead        what recording took; null where nobody measured it
      attrs           configuration, corpus, tokenizer: what the recorder was given
    """  # noqa: D301  # click wants the character
    from thimble_zarr.report.info import as_json, as_text
    from thimble_zarr.sources.open import open_recording

    every = open_recording(store)
    readers = open_recording(store, parameters=parameters) if parameters else every
    shown = as_json if format_ == "json" else as_text
    click.echo(shown(store, readers, every))


@click.command(short_help="Sum up a run: a dozen numbers for each step and token.")
@STORE
@GROUPS
@PARAMETERS
@click.option(
    "--dtype",
    metavar="DTYPE",
    help="The dtype in whose ULP steps are measured, such as bfloat16.  [default: the recorded]",
)
@format_option("table", "csv", "json", help="A short table for people; csv or json for machines.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="PLACE",
    help="Where to keep it.  [default: run.summary.zarr beside run.zarr]",
)
@PROCESS_MEMORY
@WORKERS
@QUIET
def summary(
    store: Location,
    *,
    groups: Mapping[str, str],
    parameters: tuple[str, ...],
    format_: str,
    output: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Sum up the run in STORE: for each step and token a dozen numbers.

    They are norms of weights, steps, gradient and moments, how far weights moved in ULP, and where
    they lie and move relative to their group: dead, live, all, and those that --group names. They
    are kept beside STORE as an ordinary Zarr, which Python opens with
    `thimble_zarr.summary("run.zarr")`; of a run that has grown only the new steps are computed.

    What is printed is the short of it: when tokens froze, in which regime the others are, the
    largest step.
    """
    from thimble_zarr.analysis.summary.summary import summary as sum_up
    from thimble_zarr.cli.progress import progress
    from thimble_zarr.report import summary_table
    from thimble_zarr.sources.open import open_recording

    found = []
    for reader in open_recording(store, parameters=parameters):
        with progress("summing up", unit="part", quiet=quiet) as bar:
            options |= {"groups": groups, "place": output, "progress": bar.reach}
            found.append(sum_up(store, parameter=reader.schema.parameter, **options))
    shown = {"table": summary_table.as_text, "csv": summary_table.as_csv}
    click.echo(shown.get(format_, summary_table.as_json)(str(store), found), nl=False)
