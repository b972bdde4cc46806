"""`report`: all that can be seen of a run, in one file."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from thimble_zarr.cli.options import GROUPS, QUIET, STORES, check_directory
from thimble_zarr.errors import StoreError
from thimble_zarr.format.location import Location, located

if TYPE_CHECKING:
    from thimble_zarr.report.html import Reach


@click.command(short_help="Write all that can be seen of a run to one HTML file.")
@STORES
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="The HTML file to write, or the folder of PNG files. What is there is replaced.  "
    "[default: run.html of run.zarr, here; of several stores report.html]",
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["html", "png"]),
    default="html",
    show_default=True,
    help="One page to look at, at most 5 MB; or a picture a panel.",
)
@GROUPS
@click.option(
    "--check",
    "subset",
    metavar="SUBSET",
    help="Which tokens are checked, as thimble-zarr check --tokens takes them; or none.  "
    "[default: dead where known, else all]",
)
@click.option("--parameter", metavar="NAME", help="Which parameter, of a store that holds several.")
@QUIET
def report(
    stores: tuple[Location, ...],
    *,
    output: Path | None,
    format_: str,
    groups: Mapping[str, str],
    subset: str | None,
    parameter: str | None,
    quiet: bool,
) -> None:
    """Write all that can be seen of the run in STORE to one HTML file, which needs no network.

    At its top are the verdict of the check, the health of the run, and when its tokens moved last.
    The panels below share the steps in view and a cursor, and show one group of tokens at a time.
    Each names the line of Python that draws it.

    The panels of several stores, at most four, are side by side; of more only what compares them.

    The run is summed up first, which takes longest. The summary is kept beside STORE, so that the
    next report is quick.
    """
    from thimble_zarr.analysis.selection import stores_at

    run_report(
        stores_at(stores),
        output,
        format_=format_,
        groups=groups,
        subset=subset,
        parameter=parameter,
        quiet=quiet,
    )


def run_report(
    paths: Sequence[str],
    output: Path | None,
    *,
    format_: str = "html",
    groups: Mapping[str, str] | None = None,
    subset: str | None = None,
    parameter: str | None = None,
    quiet: bool = False,
) -> None:
    """Write a report and say where it is."""
    if output is None:
        stem = located(paths[0]).stem if len(paths) == 1 else "report"
        output = Path(stem if format_ == "png" else f"{stem}.html")
    check_directory(output)
    if format_ == "html" and output.is_dir():
        raise StoreError(f"cannot write {output}: it is a directory; name a file, -o run.html")
    if format_ == "png" and output.is_file():
        raise StoreError(f"cannot write into {output}: it is a file; name a folder, -o run")
    write = _write_page if format_ == "html" else _write_pictures
    stage = partial(_stage, quiet=quiet)
    written = write(paths, output, subset, parameter=parameter, groups=groups, stage=stage)
    click.echo(written)


@contextmanager
def _stage(doing: str, *, quiet: bool) -> "Iterator[Reach]":
    """Show on stderr what is done, and how far it is."""
    from thimble_zarr.cli.progress import progress

    with progress(doing, unit="part", quiet=quiet) as bar:
        yield bar.reach


def _write_page(paths: Sequence[str], file: Path, subset: str | None, **options: Any) -> str:
    """Write the page, and return what to say of it."""
    from thimble_zarr.format.layout import human_bytes
    from thimble_zarr.report.html import write_report

    is_checked = subset != "none"
    write_report(paths, file, tokens=subset if is_checked else None, checked=is_checked, **options)
    return f"{file}, {human_bytes(file.stat().st_size)}"


def _write_pictures(paths: Sequence[str], folder: Path, _: str | None, **options: Any) -> str:
    """Write pictures of the panels, a folder for each group, and return what to say of them."""
    from thimble_zarr.report.html import panels_of, summed_up
    from thimble_zarr.report.pyplot import write_png

    runs = [summed_up(path, **options).run for path in paths]
    groups = [*dict.fromkeys(group for run in runs for group in run.groups)]
    with options["stage"]("drawing") as reach:
        panels = panels_of(runs, [located(path).name for path in paths], reach)
        shown = [panel for panel in panels if panel.figures]
        n_written = sum(len(write_png(shown, folder / name, group=name)) for name in groups)
    return f"{folder}, {n_written} pictures of {', '.join(groups)}"
