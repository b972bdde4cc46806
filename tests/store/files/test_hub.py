"""Stores in a repository of Hugging Face, whose hub sends who asks for a file somewhere else."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import thimble_zarr
from tests.store.files.conftest import Bucket
from tests.support.commands import fails, succeeds
from tests.support.runs import History
from tests.support.servers import SECRET, serving
from thimble_zarr.errors import ConfigError
from thimble_zarr.format.location import Url
from thimble_zarr.store.files.hub import web_address


@dataclass
class Hub:
    """A hub that has no file itself, and what its requests said of who asked."""

    address: str
    tokens: list[str | None] = field(default_factory=list)


@pytest.fixture
def hub(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            running.tokens.append(self.headers["authorization"])
            self.send_response(302)
            self.send_header("Location", f"{bucket.url('', 'http')}{self.path}")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, serving(server) as address:
        running = Hub(address)
        monkeypatch.setenv("HF_ENDPOINT", running.address)
        yield running


def test_a_store_in_a_repository_is_read(
    bucket: Bucket,
    hub: Hub,
    toy_path: Path,
    toy_history: History,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket.upload(toy_path, "datasets/owner/name/resolve/main/run.zarr")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    url = "hf://datasets/owner/name/run.zarr"
    ds = thimble_zarr.open_dataset(url)
    np.testing.assert_array_equal(ds.W.sel(token=[3, 5]), toy_history["W"][:, [3, 5]])
    assert "HOLDS to the bit" in succeeds("check", url, "--tokens=all").stdout
    assert {*hub.tokens} == {f"Bearer {SECRET}"}
    assert SECRET not in fails(3, "info", f"{url}/nothing")
    assert "name an s3:// or gs://" in fails(2, "publish", toy_path, url)


def test_where_the_hub_has_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "")  # as good as none
    hub = "https://huggingface.co"
    for address, expected in (
        ("hf://datasets/a/b/run.zarr", f"{hub}/datasets/a/b/resolve/main/run.zarr"),
        ("hf://a/b@v1/runs/1.zarr", f"{hub}/a/b/resolve/v1/runs/1.zarr"),
        ("hf://spaces/a/b/run.zarr", f"{hub}/spaces/a/b/resolve/main/run.zarr"),
        ("hf://a/b@x%2Fy/run.zarr", f"{hub}/a/b/resolve/x%2Fy/run.zarr"),
        ("hf://a/b@refs/pr/12/run.zarr", f"{hub}/a/b/resolve/refs%2Fpr%2F12/run.zarr"),
        ("hf://a/b@refs%2Fpr%2F12/run.zarr", f"{hub}/a/b/resolve/refs%2Fpr%2F12/run.zarr"),
        ("hf://a/b@refs/run.zarr", f"{hub}/a/b/resolve/refs/run.zarr"),
    ):
        assert web_address(Url(address)) == expected
    for address in ("hf://datasets/a/b", "hf://a", "hf://a//run.zarr"):
        with pytest.raises(ConfigError, match="names no store in a repository"):
            web_address(Url(address))
