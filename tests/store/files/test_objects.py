"""Files on a server, as `store.files` asks for them."""

import os
import pickle
import signal
import sys
from pathlib import Path

import pytest

from tests.store.files.conftest import Bucket
from tests.support.commands import fails
from tests.support.tuned import tuned
from thimble_zarr.errors import ConfigError, StoreError
from thimble_zarr.store.files.base import ChangedError, NotListedError
from thimble_zarr.store.files.objects import ObjectFiles

CONTENT = bytes(range(256)) * 40


def test_files_are_read(bucket: Bucket) -> None:
    for key in ("a/b", "a/c/d", "ab/e", "we ird/ü%41 #?&+.x/f"):
        bucket.put("x.zarr", key, CONTENT)
    bucket.put("x.zarr", "empty", b"")
    files = ObjectFiles(bucket.url("x.zarr"))
    assert files.is_there
    assert not ObjectFiles(bucket.url("x")).is_there
    assert sorted(files.list()) == ["a/b", "a/c/d", "ab/e", "empty", "we ird/ü%41 #?&+.x/f"]
    assert sorted(files.list("a")) == ["a/b", "a/c/d"]
    assert [*files.list("none")] == []
    assert files.total_bytes() == 4 * len(CONTENT)
    for key in ("a/b", "we ird/ü%41 #?&+.x/f"):
        assert files.get(key) == CONTENT
        assert files.get(key, 3) == CONTENT[:3]
        assert files.size(key) == len(CONTENT)
    assert files.get("empty") == b""
    with files.open("empty", 4) as file:
        assert file.n_bytes == 0
    for ask in (files.get, files.open, files.size):
        with pytest.raises(FileNotFoundError):
            ask("a/none")
    assert pickle.loads(pickle.dumps(files)) == files
    with pytest.raises(ConfigError, match="nothing is recorded at"):
        files.writer()


@pytest.mark.parametrize("scheme", ["s3", "gs", "http"])
def test_ranges_are_read_in_few_requests(
    bucket: Bucket, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned(monkeypatch, opening_bytes=100, request_bytes=1000)
    bucket.put("x.zarr", "a", CONTENT)
    files = ObjectFiles(bucket.url("x.zarr", scheme))
    log = bucket.web.log if scheme == "http" else bucket.log
    log.clear()
    with files.open("a", 50) as file:
        assert file.n_bytes == len(CONTENT)
        assert file.read(len(CONTENT) - 50, 99) == CONTENT[-50:]
        assert len(log.requests) == 1
        # Three neighbours, one that lies alone, one that is not there, one that is at hand.
        ranges = [(0, 300), (300, 300), (620, 300), (5000, 10), (9999, 9999)]
        file.will_read([*ranges, (len(CONTENT) - 50, 20)])
        memory = bytearray(300)
        for offset, n_bytes in ranges[:4]:
            assert file.read_into(memoryview(memory)[:n_bytes], offset) == n_bytes
            assert memory[:n_bytes] == CONTENT[offset : offset + n_bytes]
        assert [request.n_bytes for request in log.requests] in ([50, 920, 10], [50, 10, 920])
        file.will_read(ranges[:1])  # has been read
        assert len(log.requests) == 3
        assert file.read(7, 5) == CONTENT[7:12]
        assert len(log.requests) == 4
    with files.open("a") as file:  # line by line, as the ledger is
        assert b"".join(file.read(at, 64) for at in range(0, len(CONTENT), 64)) == CONTENT
    assert len(log.requests) < 30


def test_what_came_with_the_opening_is_let_go_once_it_was_read(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned(monkeypatch, opening_bytes=100)
    bucket.put("x.zarr", "a", CONTENT)
    bucket.log.clear()
    ranges = [(0, 5000), (5000, 5000)]
    with ObjectFiles(bucket.url("x.zarr")).open("a", 2 * len(CONTENT)) as file:
        file.will_read(ranges)
        for offset, n_bytes in ranges:
            assert file.read(offset, n_bytes) == CONTENT[offset : offset + n_bytes]
        assert len(bucket.log.requests) == 1
        assert file.read(0, 10) == CONTENT[:10]
        assert len(bucket.log.requests) == 2


def test_files_are_opened_early(bucket: Bucket) -> None:
    for key in "abc":
        bucket.put("x.zarr", key, CONTENT)
    files = ObjectFiles(bucket.url("x.zarr"))
    bucket.log.clear()
    files.will_open(["a", "b", "none"])
    assert files.size("a") == len(CONTENT)
    assert files.get("a") == files.get("b") == CONTENT
    with pytest.raises(FileNotFoundError):
        files.get("none")
    assert len(bucket.log.requests) == 3
    bucket.put("x.zarr", "a", b"new")
    assert files.get("a") == b"new"


def test_a_file_that_was_replaced_is_no_mixture(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned(monkeypatch, opening_bytes=100)
    bucket.put("x.zarr", "a", CONTENT)
    with ObjectFiles(bucket.url("x.zarr")).open("a") as file:
        bucket.put("x.zarr", "a", CONTENT[::-1])
        assert file.read(0, 100) == CONTENT[:100]
        with pytest.raises(ChangedError, match="was replaced while it was read"):
            file.read(100, 100)


def test_a_web_server_lists_nothing(bucket: Bucket) -> None:
    files = ObjectFiles(bucket.url("x.zarr", "http"))
    assert files.is_there  # as far as anybody can tell
    for ask in (lambda: [*files.list()], files.total_bytes):
        with pytest.raises(NotListedError, match="does not tell which files"):
            ask()


def test_a_process_that_was_forked_says_so(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("x.zarr", "a", b"1")
    files = ObjectFiles(bucket.url("x.zarr"))
    assert files.get("a") == b"1"
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)  # else it would wait for ever
        try:
            ObjectFiles(bucket.url("x.zarr")).get("a")
        except StoreError as error:
            (tmp_path / "error").write_text(str(error))
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert "in a forked process" in (tmp_path / "error").read_text()


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    error = fails(2, "info", "s3://bucket/run.zarr")
    assert "pip install 'thimble-zarr[remote]'" in error


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://key:secret@bucket/run.zarr", "credentials come from the environment"),
        ("https://secret@host/run.zarr", "credentials come from the environment"),
        ("https://host/run.zarr?X-Amz-Signature=secret", "credentials come from the environment"),
        ("ftp://host/run.zarr", "an address has s3://, gs://, hf://, https://, http://"),
        ("s3:///run.zarr", "names no server or bucket"),
    ],
)
def test_an_address_has_no_password_in_it(url: str, expected: str) -> None:
    error = fails(2, "info", url)
    assert expected in error
    assert "secret" not in error
