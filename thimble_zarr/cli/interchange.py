"""`import`, `export` and `recode`: from other files, to the notebook's, and store to store."""

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from thimble_zarr.cli.options import LEARNING_RATE, OVERWRITE, QUIET, STORE, TOKEN_MASK, size
from thimble_zarr.format.coding import CodingName
from thimble_zarr.format.layout import human_bytes

if TYPE_CHECKING:
    from thimble_zarr.format.reader import Reader
    from thimble_zarr.sources.reader import FileReader

FILE = click.argument("file", type=click.Path(path_type=Path))


@click.command(name="import", short_help="Import a recording from a file of another layout.")
@click.argument(
    "files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@STORE
@click.option(
    "--parameter",
    metavar="NAME",
    help="Which run of FILE, or which tensor of checkpoints.",
)
@TOKEN_MASK
@LEARNING_RATE
@OVERWRITE
@QUIET
def import_(
    files: tuple[Path, ...],
    store: Path,
    *,
    parameter: str | None,
    token_mask: Path | None,
    learning_rate: str | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Import FILE, a safetensors or HDF5 file with a recorded run, into a new STORE.

    Of the first notebook's file nothing is lost: `export` gives the same file back. If the import
    fails, no store is left. You need not import a file to check it, because `check` reads it
    directly.

    Several FILEs are checkpoints of a model: safetensors files, directories of them, or PyTorch's
    distributed checkpoints, of which --parameter names one tensor. The step of each is the last
    number in its name, or in that of its directory. STORE then has the weights at these steps, and
    AdamW's moments where they were saved.
    """
    from thimble_zarr.cli.progress import progress
    from thimble_zarr.sources.checkpoints import import_checkpoints
    from thimble_zarr.sources.importing import import_file
    from thimble_zarr.sources.open import open_file_alone
    from thimble_zarr.store.contents import check_vacant

    check_vacant(store, overwrite=overwrite)
    source = None
    if len(files) == 1:
        source = open_file_alone(
            files[0], parameter, token_mask=token_mask, learning_rate=learning_rate
        )
    elif parameter is None or learning_rate is not None or token_mask is not None:
        raise click.UsageError(
            "several FILEs are checkpoints: --parameter must name a tensor in them, and neither "
            "--token-mask nor --learning-rate can be given"
        )
    with progress("importing", unit="B", quiet=quiet) as bar:
        how = partial(import_checkpoints, files, parameter=str(parameter))
        if source is not None:
            how = partial(import_file, source)
        reader = how(store, overwrite=overwrite, on_progress=bar.reach)
    if not quiet:
        click.echo(_imported(source, files, reader, store))


def _imported(
    source: "FileReader | None", files: Sequence[Path], reader: "Reader", store: Path
) -> str:
    """Return what to say of an import."""
    schema, n_bytes = reader.schema, reader.disk_bytes()
    what = f"{len(files):,} checkpoints of {' x '.join(f'{n:,}' for n in schema.shape)}; "
    sizes = human_bytes(n_bytes)
    if source is not None:
        what = f"{reader.n_rows - 1:,} steps of {schema.n_tokens:,} x {schema.n_dims}; "
        sizes = f"{human_bytes(source.disk_bytes())} -> {sizes}"
    return (
        f"Imported {what}{sizes}\n"
        f"States   {_states(source, reader)}\n"
        f"Store    {store}\n"
        f"Next     {_next(reader, store)}"
    )


def _states(source: "FileReader | None", stored: "Reader") -> str:
    """Return how the states of an imported run were stored."""
    names = [state.name for state in stored.schema.optimizer.states]
    dtypes = {stored.schema.dtypes[name] for name in names if name in stored.schema.dtypes}
    if not dtypes:
        return "none: there are no moments"
    if source is not None and source.narrow_states and dtypes == {"bfloat16"}:
        return "stored as bfloat16: nothing is lost, since all their values are"
    return f"stored as {', '.join(sorted(dtypes))}, as they are in the file"


def _next(reader: "Reader", store: Path) -> str:
    has_states = {*reader.schema.optimizer.variables} <= {*reader.schema.dtypes}
    return f"thimble-zarr {'check' if has_states else 'report'} {shlex.quote(str(store))}"


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
    from thimble_zarr.sources.exporting import export_notebook
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


@click.command(name="recode", short_help="Write a store again, smaller, or plain.")
@STORE
@click.argument("copy", type=click.Path(path_type=Path))
@click.option(
    "--coding",
    type=click.Choice(get_args(CodingName)),
    default="predicted",
    show_default=True,
    help="predicted: a third of the disk. plain: arrays that any Zarr reader opens.",
)
@click.option("--archive", is_flag=True, help="With predicted: the least disk; takes longer.")
@click.option(
    "--memory",
    type=size,
    help="Limits the memory for a block (minimum: one step) and so its length.  [default: 256MiB; "
    "predicted 512MiB; an archive 1GiB]",
)
@OVERWRITE
@QUIET
def recode(
    store: Path,
    copy: Path,
    *,
    coding: CodingName,
    archive: bool,
    memory: int | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Write STORE again as COPY, with another coding, and compare every value.

    Both hold the same bits, and every command reads both. A copy that was interrupted is gone on
    with when the command is given again.
    """
    from thimble_zarr.cli.progress import progress
    from thimble_zarr.sources.recode import recode as recode_store
    from thimble_zarr.store.reader import StoreReader

    with progress("recoding", unit="B", quiet=quiet) as bar:
        readers = recode_store(
            store,
            copy,
            coding=coding,
            archive=archive,
            memory_bytes=memory,
            overwrite=overwrite,
            on_progress=bar.reach,
        )
    if quiet:
        return
    sizes = StoreReader.open_each(store)[0].disk_bytes(), readers[0].disk_bytes()
    click.echo(
        f"Recoded  {readers[0].n_rows - 1:,} steps, every value compared; "
        f"{' -> '.join(map(human_bytes, sizes))}\n"
        f"Store    {copy}\n"
        f"Next     thimble-zarr check {shlex.quote(str(copy))}"
    )
