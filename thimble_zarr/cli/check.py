"""`check` and `diff`: does every row follow from the one before, and where do two runs differ?"""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from thimble_zarr.cli.options import (
    FOUND,
    LEARNING_RATE,
    LOCATION,
    PARAMETERS,
    PROCESS_MEMORY,
    QUIET,
    STORES,
    TOKEN_MASK,
    WORKERS,
    check_directory,
    exit_code,
    format_option,
)
from thimble_zarr.errors import ThimbleError
from thimble_zarr.format.location import Location, located
from thimble_zarr.report.text import DEFAULT_ROWS

if TYPE_CHECKING:
    from thimble_zarr.analysis.check_result import ParameterResult


def _rows(text: str) -> int:
    """Read a number of rows, or all."""
    if text == "all":
        return sys.maxsize
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise click.BadParameter(f"{text!r} is neither a number of steps, such as 40, nor all")


@click.command(short_help="Check that every row follows from the row before.")
@STORES
@click.option(
    "--tokens",
    metavar="SUBSET",
    help="Which tokens: all, live, dead, ids such as 17,42, @FILE with ids, or text:TEXT for the "
    "token with that text. Several subsets, such as dead,live,all, are checked in one pass.  "
    "[default: dead where known, else all; all of muon and adafactor]",
)
@PARAMETERS
@click.option(
    "--steps", metavar="A:B", help="First and last step, such as 100:200.  [default: all]"
)
@format_option(
    "table", "csv", "json", help="A table for people; csv or json with every step for machines."
)
@click.option(
    "--rows",
    type=_rows,
    metavar="N",
    help="How many steps the table shows, half of them from either end; or all. With several "
    "subsets, parameters or stores, show the table of each, too.  "
    f"[default: {DEFAULT_ROWS}; of several only a line each]",
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="Write to this file, not to stdout."
)
@click.option(
    "--extended",
    is_flag=True,
    help="Add columns: the shares of weights that stalled and that moved, how far they moved on "
    "average (in ULP), and the norm of what the replay does not explain.",
)
@click.option(
    "--formula/--no-formula",
    default=True,
    help="Compare every step with the optimizer's formula, or only replay.  [default: formula]",
)
@click.option(
    "--replay",
    type=click.Choice(["portable", "torch"]),
    default="portable",
    help="What takes every step again, for bits to be compared: a portable program, and torch "
    "where that differs or there is none; or always torch.  [default: portable]",
)
@click.option("--no-replay", is_flag=True, help="Only check the formula.")
@click.option(
    "--device",
    metavar="DEVICE",
    help="Where to replay: cpu, cuda or mps.  [default: the device of the recording, if this "
    "machine has it]",
)
@PROCESS_MEMORY
@WORKERS
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Use the Dask cluster of this scheduler, such as tcp://10.0.0.1:8786. Its workers must "
    "see STORE at the same path.",
)
@TOKEN_MASK
@LEARNING_RATE
@QUIET
@click.pass_context
def check(ctx: click.Context, /, stores: tuple[Location, ...], **options: Any) -> None:
    """Check that every recorded row in STORE follows from the row before.

    Formula: for every step, the optimizer's formula predicts the change of the selected weights
    from the recorded states. The table compares it with the observed change: both norms, the norm
    of the difference, cosine and ratio.

    Replay: every step is taken again, and weights and moments are compared bit by bit. If they
    differ, the cause is looked for and named.

    STORE may be a safetensors or HDF5 file, which is read in place. Several
    stores, or a quoted pattern such as "seed*/run.zarr", are checked one after the other, with a
    line for each. So are several parameters of a store. If one cannot be read, the others are
    still checked.

    Exit code 0 if every row follows, 1 if not; of several stores the highest.
    """
    ctx.exit(run_check(stores, **options))


def run_check(
    stores: Sequence[Location],
    *,
    format_: str = "table",
    rows: int | None = None,
    output: Path | None = None,
    quiet: bool = False,
    no_replay: bool = False,
    **options: Any,
) -> int:
    """Check, print and return the exit code."""
    from thimble_zarr.analysis.selection import stores_at
    from thimble_zarr.report import check_tables as report

    if rows is not None and format_ != "table":
        raise click.UsageError(f"--rows shortens the table, and --format {format_} has every step")
    if output is not None:
        check_directory(output)
    if no_replay:
        options["replay"] = False
    paths = [*map(located, stores_at(stores))]
    found = (_checked(path, alone=len(paths) == 1, quiet=quiet, **options) for path in paths)
    results = [*itertools.chain.from_iterable(found)]
    if format_ == "table":
        text = report.as_text(results, rows)
    else:
        text = report.as_csv(results) if format_ == "csv" else report.as_json(results)
    if output is None:
        click.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")
    if not quiet and (output is not None or format_ == "csv"):
        click.echo(report.in_words(results), err=True)
    errors = [exit_code(of.error) for of in results if of.error is not None]
    return max([0 if all(of.holds for of in results) else FOUND, *errors])


def _checked(
    store: Location, *, alone: bool, quiet: bool, **options: Any
) -> Sequence["ParameterResult"]:
    """Check a store; of several, say which cannot be, and let the others be checked."""
    from thimble_zarr.analysis.check import check as check_store
    from thimble_zarr.analysis.check_result import ParameterResult
    from thimble_zarr.cli.progress import progress

    try:
        with progress("checking", unit="part", quiet=quiet) as bar:
            results = check_store(store, progress=bar.reach, **options).parameters
    except (ThimbleError, OSError) as error:
        if alone:
            raise
        results = (ParameterResult(store, error=error),)
    for of in results:
        if of.error is not None:
            where = "" if str(store) in str(of.error) else f"{of.name}: "
            click.echo(f"Error: {where}{of.error}", err=True)
    return results


@click.command(short_help="Find where two runs first differ, and what came first.")
@click.argument("a", type=LOCATION)
@click.argument("b", type=LOCATION)
@click.option(
    "--parameter",
    "parameters",
    multiple=True,
    metavar="NAME",
    help='Only this parameter, those that match a pattern such as "*.weight", or NAME_A=NAME_B of '
    "one that has another name in each; may be repeated.  [default: all that both have]",
)
@click.option(
    "--values",
    is_flag=True,
    help="Decode every chunk, and do not rely on the checksums that it was recorded with.",
)
@click.option(
    "--replay/--no-replay",
    default=True,
    help="Have torch take the first step that differs again, to tell which run was changed by "
    "something else than its step.  [default: replay]",
)
@format_option("table", "csv", "json", help="Tables for people; csv or json for machines.")
@QUIET
@click.pass_context
def diff(
    ctx: click.Context,
    /,
    a: Location,
    b: Location,
    *,
    parameters: tuple[str, ...],
    values: bool,
    replay: bool,
    format_: str,
    quiet: bool,
) -> None:
    """Find where the runs A and B first differ, bit by bit, and what came first.

    That is one of: initial weights, configuration or schedule (a number such as the learning rate),
    data (the gradient), kernel (another program took the step), resume, or a change that no step
    made. Then it shows how the difference grows, and what the runs say of themselves that is not
    the same.

    The steps, tokens and variables that both have are compared. Chunks that were recorded with
    equal checksums are not decoded. `verify` tells whether they are still what was recorded.

    Exit code 0 if all of it is equal, 1 if not.
    """
    from thimble_zarr.analysis.diff.diff import diff as compare
    from thimble_zarr.cli.progress import progress
    from thimble_zarr.report.diff import machines, text

    with progress("comparing", unit="step", quiet=quiet) as bar:
        result = compare(
            a, b, parameters=parameters, values=values, replay=replay, progress=bar.reach
        )
    shown = {"table": text.as_text, "csv": machines.as_csv, "json": machines.as_json}
    click.echo(shown[format_](result), nl=False)
    if format_ == "csv" and not quiet:
        click.echo(text.in_words(result), err=True)
    ctx.exit(0 if result.is_equal else FOUND)
