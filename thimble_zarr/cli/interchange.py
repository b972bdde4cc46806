"""`import` and `export`: from and to the safetensors file of the original notebook."""

import shlex
from pathlib import Path

import click

from thimble_zarr.cli.options import OVERWRITE, QUIET, STORE, TOKEN_MASK
from thimble_zarr.format.layout import human_bytes

FILE = click.argument("file", type=click.Path(path_type=Path))


@click.command(name="import", short_help="Import a file of the original notebook.")
@FILE
@STORE
@TOKEN_MASK
@OVERWRITE
@QUIET
def import_(
    file: Path, store: Path, *, token_mask: Path | None, overwrite: bool, quiet: bool
) -> None:
    """Import FILE, the safetensors file that the original notebook saves, into a new STORE.

    Nothing is lost: `export` gives the same file back. If the import fails, no store is left. You
    need not import a file to check it, because `check` reads it directly.
    """
    from thimble_zarr.cli.progress import progress
    from thimble_zarr.sources.notebook.conversion import import_notebook
    from thimble_zarr.sources.notebook.reader import has_narrow_states
    from thimble_zarr.sources.open import open_notebook
    from thimble_zarr.store.contents import check_vacant

    check_vacant(store, overwrite=overwrite)
    labels = open_notebook(file, token_mask=token_mask).read_labels()
    with progress("importing", unit="B", quiet=quiet) as bar:
        reader = import_notebook(
            file, store, labels=labels, overwrite=overwrite, on_progress=bar.reach
        )
    if quiet:
        return
    schema, sizes = reader.schema, (file.stat().st_size, reader.disk_bytes())
    states = f"{schema.dtypes[schema.optimizer.states[0].name]}, as they are in the file"
    if has_narrow_states(schema):
        states = "bfloat16: nothing is lost, since all their values are"
    click.echo(
        f"Imported {reader.n_rows - 1:,} steps of {schema.n_tokens:,} x {schema.n_dims}; "
        f"{' -> '.join(map(human_bytes, sizes))}\n"
        f"States   stored as {states}\n"
        f"Store    {store}\n"
        f"Next     thimble-zarr check {shlex.quote(str(store))}"
    )


@click.command(name="export", short_help="Export a store as a file of the original notebook.")
@STORE
@FILE
@click.option("--parameter", metavar="NAME", help="Which parameter, if STORE holds several.")
@click.option("--overwrite", is_flag=True, help="Replace FILE if it is a safetensors file.")
@QUIET
def export(store: Path, file: Path, *, parameter: str | None, overwrite: bool, quiet: bool) -> None:
    """Export STORE to FILE as the original notebook would have saved it.

    From an imported STORE you get the same file back, bit for bit. If the export fails, no file is
    left.
    """
    from thimble_zarr.cli.progress import progress
    from thimble_zarr.sources.notebook.conversion import export_notebook
    from thimble_zarr.store.reader import StoreReader

    reader = StoreReader.open(store, parameter)
    with progress("exporting", unit="B", quiet=quiet) as bar:
        export_notebook(reader, file, overwrite=overwrite, on_progress=bar.reach)
    if not quiet:
        click.echo(
            f"Exported {reader.n_rows - 1:,} steps of {reader.schema.n_tokens:,} x "
            f"{reader.schema.n_dims}; {human_bytes(file.stat().st_size)}\n"
            f"File     {file}\n"
            f"Next     thimble-zarr check {shlex.quote(str(file))}"
        )
