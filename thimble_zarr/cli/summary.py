"""`summary`: a run as a dozen numbers for each step and token, kept beside it."""

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
