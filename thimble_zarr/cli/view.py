"""`view`: look at runs in a browser, while they are recorded and later."""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import click

from thimble_zarr.cli.options import GROUPS, PARAMETERS, QUIET, STORES
from thimble_zarr.format.location import Location
from thimble_zarr.interrupts import terminated_cleanly

if TYPE_CHECKING:
    from types import FrameType

    from thimble_zarr.format.reader import Reader
    from thimble_zarr.report.view.live import Live


@click.command(short_help="Look at runs in a browser, live while they are recorded.")
@STORES
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    help="Listen on this port of this machine.  [default: any free one]",
)
@click.option("--no-browser", is_flag=True, help="Print the address, and open no browser.")
@GROUPS
@PARAMETERS
@QUIET
def view(
    stores: tuple[Location, ...],
    *,
    port: int,
    no_browser: bool,
    groups: Mapping[str, str],
    parameters: tuple[str, ...],
    quiet: bool,
) -> None:
    """Look at the recorded run STORE, or at several, in a browser.

    It shows the panels of `thimble-zarr report`, and while the run is being recorded they grow.
    Click a point to see that token's text and whole history, or find a token by its text or id.
    Brush a span of steps to list the tokens that changed regime in it, and save their ids for
    --tokens @FILE. Move the slider to look at a single step.

    Only this machine can reach the server, and only who has the address that is printed. Nothing is
    written into STORE; its summary is kept beside it. Ctrl-C ends it, with exit code 0.
    """
    from thimble_zarr.analysis.selection import stores_at
    from thimble_zarr.cli.progress import progress
    from thimble_zarr.report.view.app import application
    from thimble_zarr.report.view.server import local_server

    lives = []
    for store in stores_at(stores):
        lives += _lives(store, parameters, groups)
    for live in lives:
        with progress(f"summing up {live.name}", unit="part", quiet=quiet) as bar:
            live.advance(progress=bar.reach)
    with terminated_cleanly(), local_server(application(lives), port=port) as server:

        def stop(signum: int, frame: "FrameType | None") -> None:
            server.stop()

        before = signal.signal(signal.SIGINT, stop)
        try:
            click.echo(server.url)
            if not quiet:
                click.echo("Ctrl-C ends it.", err=True)
            if not no_browser and _has_browser(os.environ):
                import webbrowser

                webbrowser.open_new_tab(server.url)
            server.run()
        finally:
            signal.signal(signal.SIGINT, before)


def _lives(store: str, parameters: Sequence[str], groups: Mapping[str, str]) -> list["Live"]:
    """Return the parameters of a run, opened once so that who cannot read it knows at once."""
    from thimble_zarr.report.view.live import Live
    from thimble_zarr.sources.open import open_recording

    def reopened(group: str) -> "Reader":
        return next(of for of in open_recording(store) if of.group == group)

    return [
        Live(store, reader.group, partial(reopened, reader.group), groups)
        for reader in open_recording(store, parameters=parameters)
    ]


def _has_browser(environment: Mapping[str, str]) -> bool:
    """Return whether there is a screen; without one Python would open a browser in the terminal."""
    screens = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    return sys.platform != "linux" or any(environment.get(name) for name in screens)
