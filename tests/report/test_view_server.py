"""The server of the viewer: who reaches it, and what it sends."""

import json
import re
import socket
from urllib.parse import urlsplit

import psutil
import pytest
from bokeh.document import Document
from bokeh.models import Div
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest, HTTPResponse
from tornado.ioloop import IOLoop
from tornado.websocket import websocket_connect

from thimble_zarr.errors import ConfigError
from thimble_zarr.report.view.server import ADDRESS, LocalServer, local_server


def build(doc: Document) -> None:
    doc.add_root(Div(text="a run"))


async def asked(url: str, host: str | None = None) -> HTTPResponse:
    headers = {} if host is None else {"Host": host}
    return await AsyncHTTPClient().fetch(url, headers=headers, raise_error=False)


def test_only_who_knows_the_path_and_asks_this_machine_by_its_name_is_answered() -> None:
    async def ask(server: LocalServer) -> None:
        origin, path = f"http://{ADDRESS}:{server.port}", urlsplit(server.url).path
        assert len(path) > 40
        assert (await asked(server.url)).code == 200
        assert (await asked(server.url, f"localhost:{server.port}")).code == 200
        script = "static/js/bokeh.min.js"
        assert (await asked(f"{origin}{path}{script}")).code == 200
        for wrong in ("/", f"/{script}", "/favicon.ico", "/ws", "/metadata", "/wrong/", path[:-2]):
            assert (await asked(f"{origin}{wrong}")).code == 404, wrong
        for host in ("evil.example", f"{ADDRESS}.evil.example", "localhost.evil.example", ""):
            assert (await asked(server.url, host)).code in (400, 404), host

    with local_server(build) as server:
        IOLoop.current().run_sync(lambda: ask(server))


def test_a_page_brings_all_that_it_needs_from_its_server() -> None:
    with local_server(build) as server:
        page = IOLoop.current().run_sync(lambda: asked(server.url)).body.decode()
        sources = re.findall(r"(?:src|href)=\"([^\"]+)\"", page)
        assert len(sources) > 2
        assert all(source.startswith(urlsplit(server.url).path) for source in sources)


def test_a_page_of_another_server_opens_no_socket() -> None:
    async def opened(server: LocalServer, origin: str) -> bool:
        page = (await asked(server.url)).body.decode()
        token = json.loads(re.findall(r"\"token\":(\"[^\"]+\")", page)[0])
        url = f"{server.url.replace('http', 'ws', 1)}ws"
        request = HTTPRequest(url, headers={"Origin": origin})
        socket = await websocket_connect(request, subprotocols=["bokeh", token])
        assert await socket.read_message() is not None
        socket.close()
        while await socket.read_message() is not None:
            pass
        return True

    async def ask(server: LocalServer) -> None:
        for origin in (f"http://{ADDRESS}:{server.port}", f"http://localhost:{server.port}"):
            assert await opened(server, origin)
        for origin in ("http://evil.example:{}", "http://127.0.0.1:1{}", "null"):
            with pytest.raises(HTTPClientError, match="403"):
                await opened(server, origin.format(server.port))

    with local_server(build) as server:
        IOLoop.current().run_sync(lambda: ask(server))


def test_it_listens_on_this_machine_alone() -> None:
    with local_server(build) as server:
        listening = [of.laddr for of in psutil.Process().net_connections() if of.status == "LISTEN"]
        assert [of.ip for of in listening if of.port == server.port] == [ADDRESS]


def test_a_port_that_is_taken_is_said() -> None:
    with socket.create_server((ADDRESS, 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=rf"port {port} of {ADDRESS}.*--port"),
            local_server(build, port=port),
        ):
            pass
