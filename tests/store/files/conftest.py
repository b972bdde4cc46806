"""A store on a server: a real one, and one in between that counts requests and makes faults."""

import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import obstore
import pytest

from tests.support.servers import Between, Log, Weed, between, make_bucket, weed
from thimble_zarr.format.location import Url

BUCKET = "bucket"

ACCOUNT = dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
ACCOUNT["disable_oauth"] = True
"""Nobody's, at Google Cloud Storage, whose protocol is that of S3 where files are read."""


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    """Ended with these tests: while it has nothing to do it takes a fortieth of a core."""
    with weed(tmp_path_factory.mktemp("weed")) as running:
        make_bucket(running, BUCKET)
        yield running


@pytest.fixture(scope="package")
def s3_between(server: Weed) -> Iterator[Between]:
    with between(server.s3) as running:
        yield running


@pytest.fixture(scope="package")
def web_between(server: Weed) -> Iterator[Between]:
    with between(server.filer) as running:
        yield running


@dataclass(frozen=True)
class Bucket:
    """A bucket of the server: what tests put there by another client's hand, and its addresses."""

    between: Between
    web: Between
    directory: str

    @property
    def log(self) -> Log:
        return self.between.log

    def url(self, path: str, scheme: str = "s3") -> Url:
        below = "/".join(filter(None, (BUCKET, self.directory, path)))
        web = f"{self.web.address}/buckets/{below}"
        return Url(web if scheme == "http" else f"{scheme}://{below}")

    def client(self, path: str) -> object:
        options = {"allow_http": True}
        return obstore.store.from_url(self.url(path), client_options=options)

    def put(self, path: str, key: str, content: bytes) -> None:
        obstore.put(self.client(path), key, content, use_multipart=False)

    def upload(self, store: Path, path: str = "run.zarr") -> Url:
        """Put a store there, by its path below this test's directory."""
        client, files = self.client(path), [file for file in store.rglob("*") if file.is_file()]

        def put(file: Path) -> None:
            obstore.put(client, file.relative_to(store).as_posix(), file.read_bytes())

        with ThreadPoolExecutor(16) as threads:
            [*threads.map(put, files)]
        self.log.clear()
        return self.url(path)


@pytest.fixture
def bucket(
    s3_between: Between,
    web_between: Between,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Bucket]:
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_between.address)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    account = tmp_path_factory.mktemp("google") / "account.json"
    account.write_text(json.dumps(ACCOUNT | {"gcs_base_url": s3_between.address}))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(account))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield Bucket(s3_between, web_between, re.sub(r"\W+", "-", request.node.name))
    for one in (s3_between, web_between):
        one.log.clear()
        one.log.latency_s = 0.0
