"""`check`: does every recorded row follow from the one before?"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from thimble_zarr.cli.options import PARAMETERS, QUIET, STORES, TOKEN_MASK
from thimble_zarr.cli.overview import Checked, as_text, overview, rendered_runs
from thimble_zarr.cli.report import DEFAULT_ROWS, Section, in_words, rendered
from thimble_zarr.cli.scheduling import computed, scheduling_options
from thimble_zarr.errors import StoreError, ThimbleError

if TYPE_CHECKING:
    from thimble_zarr.sources.notebook.reader import NotebookReader
    from thimble_zarr.store.reader import StoreReader


class _Rows(click.ParamType[int]):
    """A number of rows, or all."""

    name = "rows"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if value == "all":
            return sys.maxsize
        if str(value).isdecimal() and int(str(value)) > 0:
            return int(str(value))
        self.fail(f"{value!r} is neither a number of steps, such as 40, nor all", param, ctx)


@click.command(short_help="Check that every row follows from the row before.")
@STORES
@click.option(
    "--tokens",
    metavar="SUBSET",
    help="Which tokens: all, live, dead, ids such as 17,42, @FILE with ids, or text:TEXT for the "
    "token with that text. Several subsets, such as dead,live,all, are checked in one pass.  "
    "[default: dead where known, else all]",
)
@PARAMETERS
@click.option(
    "--steps", metavar="A:B", help="First and last step, such as 100:200.  [default: all]"
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["table", "csv", "json"]),
    default="table",
    show_default=True,
    help="A table for people; csv or json with every step for machines.",
)
@click.option(
    "--rows",
    type=_Rows(),
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
    help="Compare every step with AdamW's formula, or only replay.  [default: formula]",
)
@click.option(
    "--replay/--no-replay",
    default=True,
    help="Take every step again with torch and compare bits, or only check the formula.  "
    "[default: replay]",
)
@click.option(
    "--device",
    metavar="DEVICE",
    help="Where to replay: cpu, cuda or mps.  [default: the device of the recording, if this "
    "machine has it]",
)
@scheduling_options
@TOKEN_MASK
@QUIET
@click.pass_context
def check(ctx: click.Context, /, stores: tuple[Path, ...], **options: Any) -> None:
    """Check that every recorded row in STORE follows from the row before.

    Formula: for every step, AdamW's formula predicts the change of the selected weights from the
    recorded states. The table compares it with the observed change: both norms, the norm of the
    difference, cosine and ratio.

    Replay: torch takes every step again, and weights and moments are compared bit by bit. If they
    differ, the cause is looked for and named.

    STORE may be the safetensors file of the original notebook, which is read in place. Several
    stores, or a quoted pattern such as "seed*/run.zarr", are checked one after the other, with a
    line for each. So are several parameters of a store. If one cannot be read, the others are
    still checked.

    Exit code 0 if every row follows, 1 if not; of several stores the highest.
    """
    ctx.exit(run_check(stores, **options))


def run_check(
    stores: Sequence[Path],
    *,
    parameters: Sequence[str] = (),
    token_mask: Path | None = None,
    format_: str = "table",
    rows: int | None = None,
    output: Path | None = None,
    quiet: bool = False,
    **options: Any,
) -> int:
    """Compute, print and judge; return the exit code."""
    from thimble_zarr.analysis.paths import stores_at
    from thimble_zarr.sources.open import open_recording

    if options.get("device") is not None and not options.get("replay", True):
        raise click.UsageError("--device chooses where to replay, and --no-replay turns it off")
    if not options.get("formula", True) and not options.get("replay", True):
        raise click.UsageError("--no-formula and --no-replay leave nothing to check")
    if not options.get("formula", True) and options.get("extended"):
        raise click.UsageError(
            "--extended adds columns to the formula's table, and --no-formula turns that off"
        )
    if rows is not None and format_ != "table":
        raise click.UsageError(f"--rows shortens the table, and --format {format_} has every step")
    if output is not None and not output.absolute().parent.is_dir():
        raise StoreError(f"cannot write {output}: there is no directory {output.parent}")
    paths = [Path(path) for path in stores_at(stores)]
    opening: dict[str, Any] = {"parameters": parameters, "token_mask": token_mask}
    readers = open_recording(paths[0], **opening) if len(paths) == 1 else ()
    has_steps = format_ == "table" and (len(readers) == 1 or rows is not None)
    pandas = format_ == "json" or (has_steps and options.get("formula", True))
    options |= {"quiet": quiet, "pandas": pandas}
    if len(readers) == 1:
        runs = [Checked(paths[0], sections=_check(paths[0], readers[0], **options))]
    else:
        runs = [run for path in paths for run in _check_each(path, opening, **options)]
    sections = [section for run in runs for section in run.sections]
    if format_ == "table":
        text = as_text(runs, rows)
    elif len(readers) == 1:
        text = rendered(sections, format_)
    else:
        text = rendered_runs(runs, format_)
    words = in_words(sections) if len(readers) == 1 else overview(runs)
    if output is None:
        click.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")
    if not quiet and (output is not None or format_ == "csv"):
        click.echo(words, err=True)
    return max(run.exit_code for run in runs)


def _check_each(store: Path, opening: Mapping[str, Any], **options: Any) -> Iterator[Checked]:
    """Check the parameters of a run; if one cannot be, say so and let the others be checked."""
    from thimble_zarr.sources.open import open_recording

    try:
        readers = open_recording(store, **opening)
    except (ThimbleError, OSError) as error:
        yield _unchecked(store, None, error)
        return
    for reader in readers:
        name = _name(reader)
        try:
            sections = _check(store, reader, **options)
        except (ThimbleError, OSError) as error:
            yield _unchecked(store, name, error)
        else:
            yield Checked(store, name, sections)


def _unchecked(store: Path, parameter: str | None, error: Exception) -> Checked:
    of = f"{store}, {parameter}" if parameter else f"{store}"
    where = "" if str(store) in str(error) else f"{of}: "
    click.echo(f"Error: {where}{error}", err=True)
    return Checked(store, parameter, error=error)


def _name(reader: "StoreReader | NotebookReader") -> str | None:
    """Return the name of a parameter where it is one of several."""
    return getattr(reader, "group", None) or None


def _check(
    store: Path,
    reader: "StoreReader | NotebookReader",
    *,
    tokens: str | None = None,
    steps: str | None = None,
    extended: bool = False,
    formula: bool = True,
    replay: bool = True,
    device: str | None = None,
    pandas: bool = True,
    quiet: bool = False,
    **scheduling: Any,
) -> list[Section]:
    """Check the subsets of a parameter that `--tokens` names, in one pass over the store.

    With `pandas` the report needs it.
    """
    from thimble_zarr.analysis.audit.audit import Audit
    from thimble_zarr.analysis.compute.variables import missing_inputs
    from thimble_zarr.analysis.compute.windows import Source
    from thimble_zarr.analysis.selection import select

    selected, subsets = select(Source.of(reader, device), tokens, steps)
    if formula:  # else there is nothing to do without the replay, and an error says why
        replay = replay and not missing_inputs("unexplained", reader.schema)
    audit = Audit.of(selected, formula=formula, replay=replay, extended=extended, subsets=subsets)
    with computed(audit.reduction, replay=replay, quiet=quiet, **scheduling) as numbers:
        # Only now, while others compute.
        if pandas:
            import pandas as _pandas  # noqa: F401

        from thimble_zarr.analysis.audit.table import tabulated
        from thimble_zarr.analysis.causes.findings import find_altered, find_causes
        from thimble_zarr.analysis.verdict import verdict

        checked = audit.reduction.selected
        altered = find_altered(checked, before_block=numbers.reach) if replay else ()
        tables = tabulated(audit, numbers.result())
    sections = []
    for table, (subset, ids) in zip(tables, subsets.items(), strict=True):
        of_subset = selected.of_ids(ids)
        findings = find_causes(of_subset, table, altered) if replay else []
        sections.append(
            Section(
                store=store,
                parameter=_name(reader),
                subset=subset,
                selected=of_subset,
                table=table,
                extended=extended,
                findings=findings,
                found=verdict(table, findings, reader),
            )
        )
    return sections
