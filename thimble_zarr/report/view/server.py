"""A server for one person on this machine: bound to 127.0.0.1, below a secret path, offline.

Who does not know the path gets 404, also who reached the server by another name than this
machine's own, as a web page can that lets its own name point here (DNS rebinding). The browser may
open a WebSocket only from a page of this server. Bokeh's scripts come from the server itself.
"""

import logging
import re
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bokeh.application.application import Application
from bokeh.application.handlers.function import FunctionHandler
from bokeh.core.validation import silence
from bokeh.core.validation.warnings import EMPTY_LAYOUT
from bokeh.document import Document
from bokeh.server.server import BaseServer
from bokeh.server.tornado import BokehTornado
from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop
from tornado.routing import HostMatches, Rule, RuleRouter

from thimble_zarr.errors import ConfigError

ADDRESS = "127.0.0.1"
NAMES = (ADDRESS, "localhost")
"""What the browser may call this machine."""

_LEAST_LOGGED = {
    "bokeh": logging.WARNING,
    "tornado": logging.WARNING,
    "tornado.access": logging.ERROR,  # a browser asks for files that nobody has
    "bokeh.server.views.ws": logging.ERROR,  # a tab was closed while it was being answered
}


def _is_worth_telling(record: logging.LogRecord) -> bool:
    """Return False where Bokeh finds that a tab was closed before it was heard out."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, AssertionError)


@dataclass(frozen=True)
class LocalServer:
    """A server that listens; `run` serves until somebody stops the loop."""

    bokeh: BaseServer
    url: str

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.bokeh.port or 0)

    def run(self) -> None:
        """Serve until the loop is stopped: see `stop`."""
        self.bokeh.io_loop.start()

    def stop(self) -> None:
        """Let `run` return; any thread and any signal handler may call it."""
        loop = self.bokeh.io_loop
        loop.add_callback_from_signal(loop.stop)


@contextmanager
def local_server(build: Callable[[Document], None], *, port: int = 0) -> Iterator[LocalServer]:
    """Listen on this machine alone; what a browser opens is a document that `build` fills.

    Parameters
    ----------
    build
        Fills the document of a new browser tab.
    port
        Where to listen; 0 takes any free one.

    Raises
    ------
    ConfigError
        If the port cannot be had.
    """
    silence(EMPTY_LAYOUT)  # a panel that is not computed yet has a place
    for name, level in _LEAST_LOGGED.items():
        logging.getLogger(name).setLevel(level)
    logging.getLogger("bokeh.server.views.ws").addFilter(_is_worth_telling)
    listening = _listening(port)
    listening.settimeout(0)
    port = listening.getsockname()[1]
    path = f"/{secrets.token_urlsafe()}"
    app = BokehTornado(
        {"/": Application(FunctionHandler(build))},
        prefix=path,
        extra_websocket_origins=[f"{name}:{port}" for name in NAMES],
        absolute_url=f"http://{ADDRESS}:{port}",
        ico_path="none",
        include_headers=[],
        include_cookies=[],
        stats_log_frequency_milliseconds=3_600_000,
        unused_session_lifetime_milliseconds=5_000,
        check_unused_sessions_milliseconds=2_000,
    )
    own_name = HostMatches(f"({'|'.join(map(re.escape, NAMES))})$")
    http = HTTPServer(RuleRouter([Rule(own_name, app)]))
    http.add_socket(listening)
    server = BaseServer(IOLoop.current(), app, http)
    server.start()
    try:
        yield LocalServer(server, f"http://{ADDRESS}:{port}{path}/")
    finally:
        server.stop(wait=False)
        server.unlisten()


def _listening(port: int) -> socket.socket:
    try:
        return socket.create_server((ADDRESS, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"cannot listen on port {port} of {ADDRESS}: {reason}; choose another with --port, or "
            "leave it out and any free one is taken"
        ) from error
