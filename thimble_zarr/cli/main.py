"""The command `thimble-zarr`: its group, and how errors become exit codes."""

import gc
import os
import sys
import warnings
from typing import Any

import click

from thimble_zarr import __version__
from thimble_zarr.cli.check import check, diff
from thimble_zarr.cli.interchange import export, import_, recode
from thimble_zarr.cli.options import INTERRUPTED, TERMINATED, UNREADABLE, exit_code
from thimble_zarr.cli.report import report
from thimble_zarr.cli.summary import info, summary
from thimble_zarr.cli.tokens import tokens
from thimble_zarr.cli.train import demo, plan, train
from thimble_zarr.cli.transfer import fetch, publish
from thimble_zarr.cli.verify import repair, verify
from thimble_zarr.cli.view import view
from thimble_zarr.errors import ThimbleError
from thimble_zarr.interrupts import Terminated


class _Group(click.Group):
    """Shows an error as one line on stderr, without a traceback, and exits by its kind."""

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        try:
            return super().make_context(*args, **options)
        except KeyboardInterrupt:  # click would exit with 1, which is what a check found
            click.echo("Interrupted.", err=True)
            sys.exit(INTERRUPTED)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            is_asked = isinstance(interrupt, Terminated)
            what, code = ("Terminated.", TERMINATED) if is_asked else ("Interrupted.", INTERRUPTED)
            click.echo("\n".join([what, *getattr(interrupt, "__notes__", [])]), err=True)
            ctx.exit(code)
        except BrokenPipeError:
            # Whoever read stdout went away: nobody to tell, and nothing the check found.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(UNREADABLE)
        except (ThimbleError, OSError) as error:
            click.echo(f"Error: {_in_words(error)}", err=True)
            ctx.exit(exit_code(error))


def _in_words(error: ThimbleError | OSError) -> str:
    """Return what an error says; of the system's own errors the file and the reason."""
    if isinstance(error, ThimbleError) or error.filename is None:
        return str(error)
    return f"{error.filename}: {error.strerror}"


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 all is well, 1 a check found something, 2 wrong usage, "
    "3 a store or file cannot be read or written, 130 interrupted, 143 terminated.",
)
@click.version_option(__version__)
def cli() -> None:
    """Record and audit neural-network training.

    thimble-zarr records what the optimizer saw and did at every step. Then it checks that every
    weight change follows from that.
    """


_COMMANDS = (
    *(demo, train, plan, check, diff, summary, report, view, info),
    *(verify, repair, publish, fetch, tokens, import_, export, recode),
)
for _command in _COMMANDS:
    cli.add_command(_command)


def main() -> None:
    """Run the command line."""
    warnings.formatwarning = lambda message, *args, **kwargs: f"Warning: {message}\n"
    # Imports make a hundred thousand objects that stay. Python would look for garbage among them at
    # every 700 and once more when it ends, which takes a tenth of a second, with torch half of one.
    gc.set_threshold(20_000)
    try:
        cli()
    finally:
        gc.freeze()
