"""`info`: what a store holds."""

import click

from thimble_zarr.cli.options import PARAMETERS, STORE, format_option
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
