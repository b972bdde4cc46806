"""A real object store for measurements, where this process and those that it starts find it."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

from tests.support.servers import Weed, make_bucket, weed

BUCKET = "bucket"


@contextmanager
def object_store(directory: Path) -> Iterator[Weed]:
    """Start SeaweedFS with a bucket, and say in the environment where it is."""
    directory.mkdir(parents=True, exist_ok=True)
    with weed(directory) as server:
        make_bucket(server, BUCKET)
        use(f"http://127.0.0.1:{server.s3}")
        yield server


def use(address: str) -> None:
    """Say in the environment which server is meant."""
    os.environ |= {
        "AWS_ENDPOINT_URL": address,
        "AWS_SKIP_SIGNATURE": "true",
        "AWS_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }


@contextmanager
def slower(port: int, latency_s: float) -> Iterator[str]:
    """Have an address that hands requests on to a port of this machine, each of them later.

    Answers go through the kernel alone, so that this takes next to nothing of a core.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        Thread(target=_accept, args=[listener, port, latency_s], daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def _accept(listener: socket.socket, port: int, latency_s: float) -> None:
    with suppress(OSError):  # it was closed
        while True:
            client, _ = listener.accept()
            server = socket.create_connection(("127.0.0.1", port))
            for one in (client, server):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            Thread(target=_requests, args=[client, server, latency_s], daemon=True).start()
            Thread(target=_answers, args=[server, client], daemon=True).start()


def _requests(client: socket.socket, server: socket.socket, latency_s: float) -> None:
    """Hand requests on: each is one packet, and the next comes after its answer."""
    with suppress(OSError):
        while request := client.recv(2**16):
            time.sleep(latency_s)
            server.sendall(request)
        server.shutdown(socket.SHUT_WR)


def _answers(server: socket.socket, client: socket.socket) -> None:
    source, sink = os.pipe()
    with suppress(OSError), server, client:
        while n_bytes := os.splice(server.fileno(), sink, 2**20):
            while n_bytes:
                n_bytes -= os.splice(source, client.fileno(), n_bytes)
    os.close(source)
    os.close(sink)
