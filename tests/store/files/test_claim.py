"""Two who write to one place: the second is told of the first, and replaces a dead one."""

import itertools
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import thimble_zarr
from tests.store.files.conftest import ACCOUNT, Bucket
from tests.support.commands import fails, succeeds
from tests.support.copies import contents, is_copied
from tests.support.servers import serving
from tests.support.waiting import until
from thimble_zarr.errors import StoreLockedError
from thimble_zarr.format.location import Url
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.files.objects import ObjectFiles
from thimble_zarr.store.keys import PUBLISHER
from thimble_zarr.store.lock import WriterLock
from thimble_zarr.store.remote import claim as claims
from thimble_zarr.store.remote.claim import Claim
from thimble_zarr.store.remote.target import Server

Stored = tuple[str, bytes]
"""Generation and content of a file."""

ME = f"process {os.getpid()} on {platform.node()}"


@pytest.fixture
def claim(bucket: Bucket) -> Iterator[Callable[[], Claim]]:
    """Makes claims of one place, and gives them all back."""
    with ExitStack() as stack:

        def make() -> Claim:
            made = Claim(ObjectFiles(bucket.url("run.zarr")))
            stack.callback(made.release)
            return made

        yield make


def left_behind(bucket: Bucket, pid: int, host: str) -> None:
    holder = {"pid": pid, "host": host, "since": "2026-01-01T00:00:00+00:00"}
    bucket.put("run.zarr", PUBLISHER, json.dumps(holder).encode())


def test_a_second_publisher_is_told_of_the_first(
    bucket: Bucket, toy_path: Path, claim: Callable[[], Claim]
) -> None:
    url, first = bucket.url("run.zarr"), claim()
    assert first.take()
    assert not first.take()
    error = fails(3, "publish", toy_path, url)
    assert f"{ME} (since " in error
    assert f"is publishing to {url}; wait for it" in error
    assert [*ObjectFiles(url).list()] == [PUBLISHER]
    first.release()
    succeeds("publish", toy_path, url)
    assert is_copied(toy_path, url)  # and nothing of a claim is left


def test_of_many_at_once_one_has_it(claim: Callable[[], Claim]) -> None:
    def is_taken(one: Claim) -> bool:
        try:
            return one.take()
        except StoreLockedError:
            return False

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(is_taken, [claim() for _ in range(8)])) == 1


def test_what_a_dead_publisher_left_is_taken_over(
    bucket: Bucket, toy_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = bucket.url("run.zarr")
    left_behind(bucket, 2**22 + 1, platform.node())  # no system has so many
    thimble_zarr.publish(toy_path, url)
    assert is_copied(toy_path, url)
    ObjectFiles(url).delete(["W/zarr.json"])
    left_behind(bucket, 1, "elsewhere")
    with pytest.raises(StoreLockedError, match=r"process 1 on elsewhere .* 5 minutes after"):
        thimble_zarr.publish(toy_path, url)
    assert thimble_zarr.verify(url).findings[0].where == "W/zarr.json"  # a claim is none
    monkeypatch.setattr(claims, "_STALE_S", -60.0)
    thimble_zarr.publish(toy_path, url)
    assert is_copied(toy_path, url)


def test_who_was_taken_over_writes_no_more(
    bucket: Bucket, claim: Callable[[], Claim], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "_RENEWED_S", 0.01)
    server = Server(ObjectFiles(bucket.url("run.zarr")))
    server.claim()
    monkeypatch.setattr(claims, "_STALE_S", -60.0)
    second = claim()
    for _ in range(100):  # until it comes between two of the first one's renewals
        try:
            second.take()
            break
        except StoreLockedError:
            continue
    until(lambda: server._claim._is_lost)
    with pytest.raises(StoreLockedError, match=f"{ME} .* is publishing to"):
        server.put("a", b"1", "", print)
    server.close()
    assert PUBLISHER in [*ObjectFiles(server.files.path).list()]  # the second one's
    second.check()


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Stored]]:
    """A server that goes by generations, as Google's does, and by nothing else; what it has."""
    stored: dict[str, Stored] = {}
    generations = itertools.count(1)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = stored.get(self.path)
            self._answer(404 if found is None else 206, found)

        do_HEAD = do_GET  # noqa: N815

        def do_PUT(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            found, wanted = stored.get(self.path), self.headers["x-goog-if-generation-match"]
            if wanted not in (None, "0" if found is None else found[0]):
                return self._answer(412, None)
            stored[self.path] = (str(next(generations)), content)
            return self._answer(200, stored[self.path])

        def do_DELETE(self) -> None:
            self._answer(204 if stored.pop(self.path, None) else 404, None)

        def _answer(self, status: int, found: Stored | None) -> None:
            self.send_response(status)
            generation, content = found or ("", b"")
            body = content if status == 206 else b""
            self.send_header("Content-Length", str(len(body)))
            if found is not None:
                self.send_header("Content-Range", f"bytes 0-{len(content) - 1}/{len(content)}")
                self.send_header("Last-Modified", self.date_time_string())
                self.send_header("ETag", f'"{generation}"')
                self.send_header("x-goog-generation", generation)
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")

        def log_message(self, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, serving(server) as address:
        account = tmp_path / "account.json"
        account.write_text(json.dumps(ACCOUNT | {"gcs_base_url": address}))
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(account))
        yield stored


def test_google_goes_by_generations(
    google: dict[str, Stored], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "_RENEWED_S", 0.01)
    files = ObjectFiles(Url("gs://bucket/run.zarr"))
    first, second = Claim(files), Claim(files)
    first.take()
    (before,) = google.values()
    until(lambda: [*google.values()] > [before])  # it is renewed
    with pytest.raises(StoreLockedError, match=f"{ME} .* is publishing to"):
        second.take()
    first.release()
    assert not google
    dead = {"pid": 2**22 + 1, "host": platform.node(), "since": "2026-01-01T00:00:00+00:00"}
    files.put(PUBLISHER, json.dumps(dead).encode())
    second.take()
    second.release()
    assert not google


def test_a_fetch_and_a_writer_exclude_each_other(toy_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.zarr"
    thimble_zarr.fetch(str(toy_path), copy)
    (copy / "W" / "zarr.json").unlink()
    lock = WriterLock(copy)
    with pytest.raises(StoreLockedError, match="is recording into"):
        thimble_zarr.fetch(str(toy_path), copy)
    lock.release()
    thimble_zarr.fetch(str(toy_path), copy)
    assert contents(LocalFiles(copy)) == contents(LocalFiles(toy_path))


@pytest.mark.parametrize("key", ["W/c.1.0.0", "loss/c.0"])
def test_a_fetched_file_that_changed_is_fetched_again(
    toy_path: Path, tmp_path: Path, key: str
) -> None:
    copy = Path(shutil.copytree(toy_path, tmp_path / "copy.zarr"))
    content = bytearray((copy / key).read_bytes())
    content[5] ^= 1
    (copy / key).write_bytes(content)
    assert thimble_zarr.fetch(str(toy_path), copy).n_files == 1
    assert contents(LocalFiles(copy)) == contents(LocalFiles(toy_path))
