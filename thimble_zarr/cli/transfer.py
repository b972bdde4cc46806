"""`publish` and `fetch`: a store copied to a server, and back."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from thimble_zarr.cli.options import LOCATION, QUIET
from thimble_zarr.format.layout import human_bytes
from thimble_zarr.format.location import Location
from thimble_zarr.interrupts import terminated_cleanly

if TYPE_CHECKING:
    from thimble_zarr.store.remote.copying import Copied


@click.command(short_help="Copy a store to an object store, while it is recorded, too.")
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("url", type=LOCATION)
@click.option(
    "--follow",
    is_flag=True,
    help="Go on until the recording has ended, and publish each commit.",
)
@QUIET
def publish(store: Path, url: Location, *, follow: bool, quiet: bool) -> None:
    """Copy what is committed of STORE to URL, such as s3://bucket/run.zarr, every file verified.

    Whoever reads URL sees one commit or the next, and never half of one. A copy that was cut off is
    gone on with when the command is given again: what is there is skipped. Something else that lies
    at URL is never overwritten.

    With --follow a server that cannot be reached for a while is waited for. If the writer of STORE
    is gone, what it committed is published, and the command ends.
    """
    from thimble_zarr.cli.progress import progress
    from thimble_zarr.store.remote.publish import publish as publish_store

    def tell(copied: "Copied") -> None:
        if follow and not quiet:
            click.echo(f"Published to step {copied.n_rows - 1:,}", err=True)

    with terminated_cleanly(), progress("publishing", unit="B", quiet=quiet) as bar:
        copied = publish_store(store, str(url), follow=follow, progress=bar.reach, on_commit=tell)
    _say("Published", copied, url, quiet=quiet)


@click.command(short_help="Copy a store from a server to this machine.")
@click.argument("url", type=LOCATION)
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--tokens", help="Only these: all, live, dead, ids such as 17,42, @FILE or text:TEXT."
)
@click.option("--steps", metavar="A:B", help="Only these, and the row before the first of them.")
@QUIET
def fetch(
    url: Location, store: Path, *, tokens: str | None, steps: str | None, quiet: bool
) -> None:
    """Copy what is committed of the store at URL to STORE, every file verified.

    A copy that was cut off is gone on with when the command is given again. Something else that
    lies at STORE is never overwritten.

    With --tokens or --steps STORE is a part of the run, as if no more had been recorded. A part
    that was cut off is fetched again from the start.
    """
    from thimble_zarr.cli.progress import progress
    from thimble_zarr.store.remote.publish import fetch as fetch_store

    if tokens is not None or steps is not None:
        return _fetch_part(url, store, tokens, steps, quiet=quiet)
    with progress("fetching", unit="B", quiet=quiet) as bar:
        copied = fetch_store(str(url), store, progress=bar.reach)
    _say("Fetched", copied, store, quiet=quiet)


def _fetch_part(
    url: Location, store: Path, tokens: str | None, steps: str | None, *, quiet: bool
) -> None:
    from thimble_zarr.analysis.compute.source import Source
    from thimble_zarr.analysis.selection import select_steps, select_tokens
    from thimble_zarr.cli.progress import progress
    from thimble_zarr.sources.part import fetch_part
    from thimble_zarr.store.reader import StoreReader

    source = Source.of(StoreReader.open_each(str(url))[0])
    what: dict[str, Any] = {"rows": select_steps(source, steps)}
    if tokens is not None:
        what["tokens"] = select_tokens(source, tokens)[1]
    with progress("fetching", unit="B", quiet=quiet) as bar:
        part = fetch_part(str(url), store, **what, on_progress=bar.reach)[0]
    if not quiet:
        of_rows, schema = part.read_steps(), part.schema
        click.echo(
            f"Fetched   steps {of_rows[0]:,} to {of_rows[-1]:,} of {schema.n_tokens:,} "
            f"{schema.row_name}s; {human_bytes(part.disk_bytes())}\n"
            f"Store     {store}\n"
            f"Next      thimble-zarr check {shlex.quote(str(store))}"
        )


def _say(done: str, copied: "Copied", where: Location, *, quiet: bool) -> None:
    """Say what was copied, and what can be done with it."""
    if quiet:
        return
    click.echo(
        f"{done:<9} {copied.n_rows - 1:,} steps, {'closed' if copied.complete else 'not closed'}; "
        f"{copied.n_files:,} files written, {human_bytes(copied.n_bytes)}; "
        f"{copied.n_skipped:,} were there\n"
        f"{'Store':<9} {where}\n"
        f"{'Next':<9} thimble-zarr check {shlex.quote(str(where))}"
    )
