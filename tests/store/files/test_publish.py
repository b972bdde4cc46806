"""A store that is copied to a server, also while it is recorded, and back."""

import json
import random
import shutil
import zlib
from contextlib import closing, suppress
from pathlib import Path
from threading import Thread

import msgspec
import pytest

import thimble_zarr
from tests.store.files.conftest import Bucket
from tests.support import stores
from tests.support.commands import fails, succeeds
from tests.support.copies import contents, is_copied
from tests.support.faults import flip_in_place
from tests.support.runs import token_labels
from tests.support.zoo import Recorded
from thimble_zarr.errors import DamagedStoreError, StoreError, StoreExistsError
from thimble_zarr.store.files.base import ChangedError
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.files.objects import Arrived, ObjectFiles
from thimble_zarr.store.keys import COMMIT, LEDGER
from thimble_zarr.store.ledger import Commit, Line, seal
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.remote import following
from thimble_zarr.store.remote.copying import Copied, Source, copy_committed
from thimble_zarr.store.remote.target import Server
from thimble_zarr.store.writer import StoreWriter


def test_a_store_goes_to_a_server_and_back(bucket: Bucket, zoo: Recorded, tmp_path: Path) -> None:
    url, back = bucket.url("run.zarr"), tmp_path / "back.zarr"
    told = succeeds("publish", zoo.path, url).stdout
    assert "closed; " in told
    assert f"thimble-zarr check {url}" in told
    assert is_copied(zoo.path, url)
    bucket.log.clear()
    assert " 0 files written, 0 B" in succeeds("publish", zoo.path, url).stdout
    assert "PUT" not in {request.method for request in bucket.log.requests}
    succeeds("fetch", url, back)
    assert contents(LocalFiles(back)) == contents(LocalFiles(zoo.path))
    assert thimble_zarr.verify(back).holds
    assert thimble_zarr.verify(url).holds
    assert " 0 files written, 0 B" in succeeds("fetch", url, back).stdout


def test_nothing_else_is_overwritten(bucket: Bucket, toy_path: Path, tmp_path: Path) -> None:
    stores.write_run(tmp_path / "other.zarr")
    url = bucket.upload(tmp_path / "other.zarr")
    bucket.put("files.zarr", "a", b"1")
    shutil.copytree(toy_path, tmp_path / "there.zarr")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "a").write_text("1")
    for command in (
        ("publish", toy_path, url),
        ("publish", toy_path, bucket.url("files.zarr")),
        ("fetch", url, tmp_path / "there.zarr"),
        ("fetch", url, tmp_path / "taken"),
    ):
        assert "choose another place" in fails(2, *command)
    assert is_copied(tmp_path / "other.zarr", url)
    assert "name an s3:// or gs://" in fails(2, "publish", toy_path, "http://127.0.0.1/run.zarr")
    assert "is no address" in fails(2, "publish", toy_path, tmp_path / "new.zarr")
    assert "nothing at" in fails(3, "publish", tmp_path / "nothing.zarr", url)


def test_damage_is_not_published(bucket: Bucket, toy_copy: Path) -> None:
    file = toy_copy / "W" / "c.1.0.0"
    content = bytearray(file.read_bytes())
    content[9] ^= 1
    file.write_bytes(content)
    url = bucket.url("run.zarr")
    with pytest.raises(DamagedStoreError, match=r"W/c\.1\.0\.0 is not what was committed"):
        thimble_zarr.publish(toy_copy, url)
    with pytest.raises(StoreError):
        thimble_zarr.open_dataset(url)  # no commit is there


def test_damaged_metadata_are_not_copied(toy_copy: Path, tmp_path: Path) -> None:
    file = toy_copy / "W" / "zarr.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"zarr_format": 2}))
    with pytest.raises(DamagedStoreError, match=r"W/zarr\.json: its zarr_format is not what was"):
        thimble_zarr.fetch(str(toy_copy), tmp_path / "fetched.zarr")


def test_what_is_missing_of_a_copy_is_copied_again(toy_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.zarr"
    thimble_zarr.fetch(str(toy_path), copy)
    for key in ("W/c.1.0.0", "W/zarr.json"):
        (copy / key).unlink()
        assert thimble_zarr.fetch(str(toy_path), copy).n_files == 1
        assert contents(LocalFiles(copy)) == contents(LocalFiles(toy_path))


def test_a_store_without_a_row_is_not_copied(tmp_path: Path) -> None:
    writer = stores.create(tmp_path / "empty.zarr")
    message = fails(3, "fetch", tmp_path / "empty.zarr", tmp_path / "copy.zarr")
    assert "has no committed step" in message
    writer.close()


def test_a_ledger_cannot_name_a_place_outside(
    bucket: Bucket, toy_copy: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside" / "zarr.json"
    (toy_copy / str(outside)[1:]).parent.mkdir(parents=True)
    (toy_copy / str(outside)[1:]).write_text("{}")
    first, *rest = (toy_copy / LEDGER).read_bytes().splitlines(keepends=True)
    entry = json.loads(first)
    del entry["crc32"]
    entry["metadata"][str(outside)] = {}
    lines = b"".join([seal(entry) + b"\n", *rest])
    (toy_copy / LEDGER).write_bytes(lines)
    commit = msgspec.structs.replace(
        Commit.read(LocalFiles(toy_copy)), ledger_bytes=len(lines), ledger_crc32=zlib.crc32(lines)
    )
    (toy_copy / COMMIT).write_bytes(commit.to_bytes())
    with pytest.raises(DamagedStoreError):
        thimble_zarr.fetch(bucket.upload(toy_copy), tmp_path / "fetched.zarr")
    assert not outside.exists()


def test_an_older_copy_does_not_replace_a_newer_one(bucket: Bucket, tmp_path: Path) -> None:
    url, path, old = bucket.url("run.zarr"), tmp_path / "run.zarr", tmp_path / "old.zarr"
    writer = stores.create(path)
    for n_rows in (1, 3, 4, 8):
        stores.commit(writer, n_rows)
        if n_rows == 4:
            shutil.copytree(path, old)
        thimble_zarr.publish(path, url)
        assert stores.check_rows(url) == n_rows
    writer.close()
    with pytest.raises(StoreExistsError, match=r"holds 8 rows, and .* has not all"):
        thimble_zarr.publish(old, url)


class CutOffError(Exception):
    """The network is gone, or the process that publishes."""


class CutOff(Server):
    """A server that is gone after so many files."""

    def __init__(self, files: ObjectFiles, n_files: int) -> None:
        super().__init__(files)
        self.n_files = n_files

    def put(self, key: str, content: bytes, published_as: str, arrived: Arrived) -> None:
        if self.n_files == 0:
            raise CutOffError
        self.n_files -= 1
        super().put(key, content, published_as, arrived)


def test_whoever_reads_while_it_is_published_sees_whole_commits(
    bucket: Bucket, tmp_path: Path
) -> None:
    """Publishing is cut off after each number of files, after each commit of a writer."""
    rng, path, url = random.Random(0), tmp_path / "run.zarr", bucket.url("run.zarr")
    writer, source = stores.create(path), Source(LocalFiles(path))
    seen = 0
    for n_rows in stores.COMMITS:
        stores.commit(writer, n_rows)
        for _ in range(3):
            server = CutOff(ObjectFiles(url), rng.randrange(9))
            with suppress(CutOffError), closing(server):
                copy_committed(source, server, lambda done, total: None, Copied())
            if (now := readable(url)) is not None:
                assert now in (seen, n_rows)
                seen = now
    writer.close()
    thimble_zarr.publish(path, url)
    assert is_copied(path, url)


def test_a_run_that_was_resumed_earlier_is_never_mixed_with_what_was_taken_back(
    bucket: Bucket, tmp_path: Path
) -> None:
    path, url = tmp_path / "run.zarr", bucket.url("run.zarr")
    stores.write_run(path)
    thimble_zarr.publish(path, url)
    before = StoreReader.open(path).read("W", (0, stores.N_ROWS))
    writer = StoreWriter.resume(path, stores.SCHEMA, labels=token_labels(), kept_rows=3)
    for n_rows in (4, 8, 9):
        first = (n_rows - 1) // stores.BLOCK_STEPS * stores.BLOCK_STEPS
        bits = stores.block(first // stores.BLOCK_STEPS)
        bits["W"][max(0, 3 - first) :] ^= 1
        writer.commit_block(first, n_rows - first, bits, stores.scalars(first))
    opened = StoreReader.open(url).opened()
    opened.read("W", (8, 9), range(3))
    after, n_seen = StoreReader.open(path).read("W", (0, 9)), set()
    for n_files in range(1, 40):
        server = CutOff(ObjectFiles(url), n_files % 4)
        with suppress(CutOffError), closing(server):
            copy_committed(Source(LocalFiles(path)), server, lambda done, total: None, Copied())
        reader = StoreReader.open(url)
        n_rows = reader.n_rows
        n_seen.add(n_rows)
        rows = reader.read("W", (0, n_rows)).tobytes()
        assert rows in (before[:n_rows].tobytes(), after[:n_rows].tobytes())
        if n_rows == 9:
            break
    assert n_seen == {10, 3, 9}
    with pytest.raises(ChangedError):
        opened.read("W", (8, 9), range(3, 11))
    writer.close()
    thimble_zarr.publish(path, url)
    assert is_copied(path, url)


@pytest.mark.parametrize("kept_rows", [4, 6, stores.N_ROWS])
def test_a_copy_that_is_behind_is_whole_until_it_has_what_was_kept(
    bucket: Bucket, tmp_path: Path, kept_rows: int
) -> None:
    """A run is resumed after rows that its copy never had, or the last it has."""
    path, url = tmp_path / "run.zarr", bucket.url("run.zarr")
    writer = stores.create(path)
    stores.commit(writer, 4)
    thimble_zarr.publish(path, url)
    for n_rows in (8, stores.N_ROWS):
        stores.commit(writer, n_rows)
    writer.close()
    resume = StoreWriter.resume(path, stores.SCHEMA, labels=token_labels(), kept_rows=kept_rows)
    n_seen, is_done = set(), False
    while not is_done:
        with suppress(CutOffError), closing(CutOff(ObjectFiles(url), 2)) as server:
            copy_committed(Source(LocalFiles(path)), server, lambda done, total: None, Copied())
            is_done = True
        n_seen.add(readable(url))
    assert n_seen == {4, kept_rows}
    resume.close()
    thimble_zarr.publish(path, url)
    assert is_copied(path, url)


def test_of_a_ledger_only_what_is_new_is_read(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts, parse = list[int](), Line.parse
    monkeypatch.setattr(
        Line, "parse", lambda start, content: starts.append(start) or parse(start, content)
    )
    path, url = tmp_path / "run.zarr", bucket.url("run.zarr")
    writer, source = stores.create(path), Source(LocalFiles(path))
    with closing(Server(ObjectFiles(url))) as server:
        for n_rows in stores.COMMITS:
            stores.commit(writer, n_rows)
            starts.clear()
            copy_committed(source, server, lambda done, total: None, Copied())
    assert len({*starts}) == 1
    assert stores.check_rows(url) == stores.COMMITS[-1]
    writer.close()


def test_a_ledger_that_was_written_anew_is_read_anew(toy_copy: Path, tmp_path: Path) -> None:
    stores.write_run(tmp_path / "run.zarr")
    source = Source(LocalFiles(tmp_path / "run.zarr"))
    n_files = len(source.snapshot().records)
    shutil.rmtree(tmp_path / "run.zarr")
    toy_copy.rename(tmp_path / "run.zarr")
    new = Source(LocalFiles(tmp_path / "run.zarr")).snapshot()
    assert source.snapshot().lines == new.lines
    assert source.snapshot().records.keys() == new.records.keys()
    assert len(new.records) != n_files
    ledger = tmp_path / "run.zarr" / LEDGER
    sound = ledger.read_bytes()
    ledger.write_bytes(sound[:-40] + b"x" + sound[-39:])
    damaged = Source(LocalFiles(tmp_path / "run.zarr"))
    for _ in range(2):
        with pytest.raises(DamagedStoreError, match="the ledger is not the one"):
            damaged.snapshot()
    ledger.write_bytes(sound)
    assert damaged.snapshot().lines == sound


def readable(url: str) -> int | None:
    """Return the rows of a copy, each compared with the truth; None where nothing is committed."""
    if COMMIT not in [*ObjectFiles(url).list()] or "zarr.json" not in [*ObjectFiles(url).list()]:
        return None
    return stores.check_rows(url)


def test_a_run_is_followed_until_it_ends(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "POLL_S", 0.02)
    path, url, published = tmp_path / "run.zarr", bucket.url("run.zarr"), []
    writer = stores.create(path)
    follower = Thread(
        target=thimble_zarr.publish,
        args=(path, url),
        kwargs={"follow": True, "on_commit": lambda copied: published.append(copied.n_rows)},
    )
    follower.start()
    for n_rows in stores.COMMITS:
        stores.commit(writer, n_rows)
        while published[-1:] != [n_rows]:
            assert follower.is_alive()
    assert "being recorded, or cut off" in StoreReader.open(url).kind
    writer.close()
    follower.join(20)
    assert not follower.is_alive()
    assert is_copied(path, url)
    assert StoreReader.open(url).commit.complete


def test_a_run_that_was_cut_off_is_followed_to_where_it_ended(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "POLL_S", 0.02)
    path, url = tmp_path / "run.zarr", bucket.url("run.zarr")
    writer = stores.create(path)
    stores.commit(writer, 3)
    shutil.copytree(path, tmp_path / "cut.zarr", ignore=shutil.ignore_patterns("writer.json"))
    writer.close()
    told = succeeds("publish", tmp_path / "cut.zarr", url, "--follow")
    assert "not closed" in told.stdout
    assert "Published to step 2" in told.stderr
    assert stores.check_rows(url) == 3


def test_a_chunk_of_a_published_store_that_was_changed_is_found(
    bucket: Bucket, toy_copy: Path
) -> None:
    copied, published = bucket.upload(toy_copy, "copied.zarr"), bucket.url("run.zarr")
    thimble_zarr.publish(toy_copy, published)
    n_requests = []
    for url in (copied, published):
        bucket.log.clear()
        assert thimble_zarr.check(url, tokens="all").holds
        n_requests.append(len([of for of in bucket.log.requests if "/c." in of.path]))
    assert n_requests[1] < n_requests[0]  # nobody asks for checksums of chunks
    flip_in_place(toy_copy, "exp_avg", (2, 9, 1), 3)
    key = "exp_avg/c.0.0.0"
    bucket.put("run.zarr", key, (toy_copy / key).read_bytes())
    (found,) = StoreReader.open(published).integrity.altered_chunks((0, 13))
    assert (found.file, found.first_row) == (key, 0)
