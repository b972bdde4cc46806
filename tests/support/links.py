"""A link between a client and a server of this machine: as slow as is asked for, and counted."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Lock, Thread

_PIECE_BYTES = 2**16


@dataclass
class Link:
    """An address that hands requests on to a port, later or slower, and answers at once.

    Attributes
    ----------
    port
        Of the server.
    latency_s
        Delay of each piece of a request, in seconds; a small request is one piece.
    upload_bytes_per_s
        What all connections together send to the server at most; 0 is no limit.
    n_uploads
        Files, or parts of files, of which the first bytes went to the server.
    """

    port: int
    latency_s: float = 0.0
    upload_bytes_per_s: float = 0.0
    n_uploads: int = 0
    address: str = ""
    _lock: Lock = field(default_factory=Lock, repr=False)
    _open: list[tuple[socket.socket, Thread]] = field(default_factory=list, repr=False)
    _is_free_s: float = 0.0

    def accept(self, listener: socket.socket) -> None:
        """Hand on what clients say, until there is no listener any more."""
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self.port))
                for one in (client, server):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for call, ends in (self._requests, (client, server)), (_answers, (server, client)):
                    thread = Thread(target=call, args=ends, daemon=True)
                    thread.start()
                    self._open.append((ends[0], thread))

    def close(self) -> None:
        """Cut all connections."""
        for one, thread in self._open:
            with suppress(OSError):  # it has ended
                one.shutdown(socket.SHUT_RDWR)
            thread.join()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while piece := client.recv(_PIECE_BYTES):
                time.sleep(self.latency_s + self._wait_s(piece))
                server.sendall(piece)
            server.shutdown(socket.SHUT_WR)

    def _wait_s(self, piece: bytes) -> float:
        """Return how long the link is taken until a piece has gone through; count uploads."""
        with self._lock:
            self.n_uploads += piece.startswith(b"PUT ")
            if not self.upload_bytes_per_s:
                return 0.0
            now_s = time.monotonic()
            self._is_free_s = max(now_s, self._is_free_s) + len(piece) / self.upload_bytes_per_s
            return self._is_free_s - now_s


def _answers(server: socket.socket, client: socket.socket) -> None:
    """Hand answers on through the kernel alone, so that this takes next to nothing of a core."""
    source, sink = os.pipe()
    with suppress(OSError), server, client:
        while n_bytes := os.splice(server.fileno(), sink, 2**20):
            while n_bytes:
                n_bytes -= os.splice(source, client.fileno(), n_bytes)
    os.close(source)
    os.close(sink)


@contextmanager
def link(port: int, *, latency_s: float = 0.0, upload_bytes_per_s: float = 0.0) -> Iterator[Link]:
    """Have a link to a port within the block."""
    with socket.socket() as listener:
        # Else the kernel takes megabytes at once, and the client believes that they are sent.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _PIECE_BYTES)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        made = Link(port, latency_s, upload_bytes_per_s)
        made.address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        Thread(target=made.accept, args=[listener], daemon=True).start()
        try:
            yield made
        finally:
            made.close()
