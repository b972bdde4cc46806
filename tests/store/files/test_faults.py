"""What a server does wrong, and what becomes of it: the right values, or one clear error.

The table in docs/remote.md has the words that are tested here.
"""

import re
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import thimble_zarr
from tests.store.files.conftest import Bucket
from tests.support import stores
from tests.support.commands import fails
from tests.support.copies import is_copied
from tests.support.documents import ROOT
from tests.support.servers import SECRET, Fault, serving
from tests.support.tuned import tuned
from thimble_zarr.errors import DamagedStoreError
from thimble_zarr.format.location import Url
from thimble_zarr.store.files.base import BusyError, ChangedError, PlaceError
from thimble_zarr.store.files.objects import ObjectFile
from thimble_zarr.store.reader import StoreReader

BUSY = "the server has too much to do, and was asked often enough"

PASSING = {
    "says 503 `SlowDown`": (Fault(), BUSY),
    "says 429": (Fault(status=429, code="TooManyRequests"), BUSY),
    "says 500, or another 5xx": (Fault(status=500, code="InternalError"), "the server failed"),
    "does not answer": (Fault("hang"), "the server did not answer in time"),
    "cuts the connection within a file": (Fault("cut"), "the connection was cut"),
    "does what was asked, and cuts the connection": (Fault("lost"), "the connection was cut"),
}
"""Faults that may pass: what is asked again, and what is said if it does not help."""

REFUSED = {
    "says that the credentials have expired": (
        Fault(status=400, code="ExpiredToken"),
        "the credentials have expired; get new ones",
    ),
    "does not know the credentials": (
        Fault(status=403, code="InvalidAccessKeyId"),
        "the server does not accept the credentials",
    ),
    "denies access": (Fault(status=403, code="AccessDenied"), "access is denied"),
}
"""Faults that do not pass by themselves: nothing is asked again."""

WHILE_READING = "cuts the connection within a file"

OTHERS = {
    "is not there": "no server listens there",
    "has no such bucket": "there is no such bucket",
    "returns whole files where a part was asked for": "the server returns whole files only",
    "has a shorter file than was committed": "the checksum of the index does not match",
    "replaces a file while it is read, time and again": "was replaced while it was read",
    "has another file than was uploaded": "the server has something else than was sent",
}
"""What else is an error."""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned(monkeypatch, request_retries=2, request_timeout_s=0.5)


@pytest.fixture
def store(bucket: Bucket, tmp_path: Path) -> tuple[Path, Url]:
    stores.write_run(tmp_path / "run.zarr")
    return tmp_path / "run.zarr", bucket.upload(tmp_path / "run.zarr")


@pytest.mark.parametrize("name", [*PASSING, *REFUSED])
def test_reading(bucket: Bucket, store: tuple[Path, Url], name: str) -> None:
    fault, words = (PASSING | REFUSED)[name]
    reader, kind = StoreReader.open(store[1]), BusyError if name in PASSING else PlaceError
    bucket.log.faults = [replace(fault, key="/W/c.1.", times=99)]
    with pytest.raises(kind, match=words) as raised:
        reader.read("W", (0, stores.N_ROWS))
    assert str(raised.value).count(store[1]) == 1
    assert SECRET not in str(raised.value)
    if name in REFUSED:
        assert bucket.log.faults[0].times == 98
        return
    bucket.log.faults = [replace(fault, key="/W/c.1.", times=1)]
    stores.check_rows(store[1])
    assert bucket.log.faults[0].times == 0


@pytest.mark.parametrize("name", sorted({*PASSING, *REFUSED} - {WHILE_READING}))
def test_publishing(bucket: Bucket, store: tuple[Path, Url], name: str) -> None:
    (fault, words), url = (PASSING | REFUSED)[name], bucket.url("new.zarr")
    bucket.log.faults = [replace(fault, method="PUT", key="/W/c.1.", times=99)]
    with pytest.raises(PlaceError, match=words):
        thimble_zarr.publish(store[0], url)
    bucket.log.faults = [replace(fault, method="PUT", key="/W/c.1.", times=1)]
    if name in REFUSED:
        bucket.log.clear()
    thimble_zarr.publish(store[0], url)
    assert is_copied(store[0], url)


@contextmanager
def without_ranges(directory: Path):
    """Serve files as Python's own server does: whole."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    handler = partial(Handler, directory=directory)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, serving(server) as address:
        yield address


def test_servers_that_are_no_place_for_a_store(
    store: tuple[Path, Url],
) -> None:
    assert OTHERS["is not there"] in fails(3, "info", "http://127.0.0.1:1/run.zarr")
    assert OTHERS["has no such bucket"] in fails(3, "info", "s3://nowhere/run.zarr")
    assert OTHERS["has no such bucket"] in fails(3, "publish", store[0], "s3://nowhere/run.zarr")
    with without_ranges(store[0].parent) as address:
        error = fails(3, "info", f"{address}/run.zarr")
    assert OTHERS["returns whole files where a part was asked for"] in error


def test_a_file_that_is_not_the_one_that_was_committed(
    bucket: Bucket, store: tuple[Path, Url]
) -> None:
    path, url = store
    content = (path / "W" / "c.1.0.0").read_bytes()
    bucket.put("run.zarr", "W/c.1.0.0", content[: len(content) // 2])
    words = OTHERS["has a shorter file than was committed"]
    with pytest.raises(DamagedStoreError, match=words):
        StoreReader.open(url).read("W", (0, stores.N_ROWS))
    bucket.put("run.zarr", "W/c.1.0.0", content)


def test_a_file_that_is_replaced_while_it_is_read(
    bucket: Bucket, store: tuple[Path, Url], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, url = store
    key, expected = "W/c.1.0.0", StoreReader.open(path).read("W", (4, 8))
    content = (path / key).read_bytes()
    with StoreReader.open(url).opened() as rows:
        rows.read("W", (4, 8), range(3))
        bucket.put("run.zarr", key, content + content)  # the same chunks, as a later commit has
        np.testing.assert_array_equal(rows.read("W", (4, 8), range(11)), expected)
        rows.read("W", (4, 8), range(3))

        def replaced(file: ObjectFile, asked: object) -> None:
            raise ChangedError("a file was replaced while it was read; give the command again")

        monkeypatch.setattr(ObjectFile, "_same", replaced)
        with pytest.raises(
            ChangedError, match=OTHERS["replaces a file while it is read, time and again"]
        ):
            rows.read("W", (4, 8), range(11))


def test_a_file_that_did_not_arrive_as_it_was_sent(bucket: Bucket, store: tuple[Path, Url]) -> None:
    bucket.log.faults = [Fault("altered", method="PUT", key="/W/c.1.")]
    words = OTHERS["has another file than was uploaded"]
    with pytest.raises(PlaceError, match=words):
        thimble_zarr.publish(store[0], bucket.url("new.zarr"))
    thimble_zarr.publish(store[0], bucket.url("new.zarr"))
    assert is_copied(store[0], bucket.url("new.zarr"))


def test_the_table_has_all_of_it() -> None:
    text = (ROOT / "docs" / "remote.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", text.partition("## Faults")[2], re.MULTILINE)
    again = "asked again. If it does not pass: {}"
    expected = {name: again.format(words) for name, (_, words) in PASSING.items()}
    expected |= {name: words for name, (_, words) in REFUSED.items()}
    assert dict(rows[2:]) == expected | OTHERS
