"""A run on a server: every command reads it, in few requests, and no more bytes than it needs."""

import json
import pickle
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import distributed
import numpy as np
import pytest

import thimble_zarr
from tests.store.files.conftest import Bucket
from tests.support import stores
from tests.support.commands import fails, run, succeeds
from tests.support.documents import ROOT, blocks
from tests.support.servers import SECRET, Fault
from tests.support.tuned import tuned
from tests.support.zoo import Recorded
from thimble_zarr.format.layout import Layout
from thimble_zarr.report.panels.registry import PANELS
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.writer import StoreWriter

COMMANDS = (
    ("info", "--format", "json"),
    ("check", "--format", "json", "--tokens", "all", "--extended"),
    ("verify", "--format", "json"),
)


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_commands_say_the_same_of_a_store_on_a_server(
    bucket: Bucket, toy_copy: Path, scheme: str
) -> None:
    bucket.upload(toy_copy)
    url = bucket.url("run.zarr", scheme)
    for command, *options in COMMANDS:
        local, remote = run(command, toy_copy, *options), run(command, url, *options)
        assert remote.stderr.replace(url, str(toy_copy)) == local.stderr
        found, expected = json.loads(remote.stdout), json.loads(local.stdout)
        if command == "info" and scheme == "http":  # it tells of no file
            found["disk_bytes"] = expected["disk_bytes"]
        for of, place in ((found, url), (expected, str(toy_copy))):
            assert of.pop("path" if command == "verify" else "store") == place
        assert found == expected
    assert "equal" in succeeds("diff", toy_copy, url).stdout


def test_a_summary_is_kept_in_the_cache(
    bucket: Bucket, toy_copy: Path, tmp_path: Path, cache: Path
) -> None:
    url = bucket.upload(toy_copy)
    ds = thimble_zarr.summary(url)
    assert Path(ds.encoding["source"]).is_relative_to(cache)
    assert ds.identical(thimble_zarr.summary(toy_copy))
    assert [file.name for file in tmp_path.iterdir() if "summary" in file.name] == [
        "copy.summary.zarr"
    ]


def test_parameters_and_codings_are_read(bucket: Bucket, zoo: Recorded, tmp_path: Path) -> None:
    url = bucket.upload(zoo.path, "zoo.zarr")
    for local, remote in zip(
        StoreReader.open_each(zoo.path), StoreReader.open_each(url), strict=True
    ):
        rows = 0, local.n_rows
        for name in local.schema.dtypes:
            assert remote.read(name, rows).tobytes() == local.read(name, rows).tobytes()
    with stores.coded("predicted"):
        stores.write_run(tmp_path / "run.zarr")
        url = bucket.upload(tmp_path / "run.zarr")
        assert stores.check_rows(url) == stores.N_ROWS
    tree = thimble_zarr.open_datatree(bucket.url("zoo.zarr"))
    assert len(tree.children) == len(zoo.histories)


BLOCK_STEPS, CHUNK_TOKENS, N_CHUNKS, N_BLOCKS = 4, 100, 10, 6

SCHEMA = replace(
    stores.SCHEMA,
    shape=(CHUNK_TOKENS * N_CHUNKS, 16),
    layout=Layout(block_steps=BLOCK_STEPS, chunk_tokens=CHUNK_TOKENS),
)


@pytest.fixture
def noise(bucket: Bucket, tmp_path: Path) -> tuple[str, np.ndarray]:
    """A store of bits that nothing can compress, and those of its weights."""
    rng = np.random.default_rng(0)
    shape = N_BLOCKS * BLOCK_STEPS, *SCHEMA.shape
    bits = {
        "W": rng.integers(0, 2**16, shape).astype(np.uint16),
        "grad": rng.normal(size=shape).astype(np.float32),
    }
    writer = StoreWriter.create(tmp_path / "noise.zarr", SCHEMA)
    for start in range(0, shape[0], BLOCK_STEPS):
        rows = {name: of[start : start + BLOCK_STEPS] for name, of in bits.items()}
        numbers = {name: np.arange(BLOCK_STEPS) + float(start) for name in SCHEMA.scalars}
        writer.commit_block(start, BLOCK_STEPS, rows, numbers)
    writer.close()
    return bucket.upload(tmp_path / "noise.zarr", "noise.zarr"), bits["W"]


CHUNK_BYTES = BLOCK_STEPS * CHUNK_TOKENS * 16 * 2


@pytest.mark.parametrize(
    ("tokens", "n_chunks", "n_requests"),
    [
        ([3], 1, 2),  # the index, and the chunk
        ([3, 120, 130, 901], 3, 3),  # two neighbours at once
        (range(CHUNK_TOKENS * N_CHUNKS), N_CHUNKS, 1),  # the file
    ],
)
def test_a_block_takes_few_requests_and_no_more_bytes_than_its_chunks(
    bucket: Bucket,
    noise: tuple[str, np.ndarray],
    tokens: list[int],
    n_chunks: int,
    n_requests: int,
) -> None:
    url, truth = noise
    ds = thimble_zarr.open_dataset(url)
    bucket.log.clear()
    bucket.log.latency_s, bucket.between.most_at_once = 0.02, 0
    values = ds.W.isel(token=list(tokens)).compute().values
    expected = (truth[:, np.asarray(tokens)].astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(values, expected)
    shards = [request for request in bucket.log.requests if "/W/c." in request.path]
    assert len(shards) == n_requests * N_BLOCKS
    n_bytes = sum(request.n_bytes for request in bucket.log.requests)
    assert n_bytes <= 1.3 * n_chunks * CHUNK_BYTES * N_BLOCKS
    # Nobody waits for one after the other.
    assert bucket.between.most_at_once >= 4


def test_chunks_at_the_end_of_a_file_come_with_its_index_once_that_is_known(
    bucket: Bucket, noise: tuple[str, np.ndarray]
) -> None:
    url, truth = noise
    tokens = range(CHUNK_TOKENS * (N_CHUNKS - 2), CHUNK_TOKENS * N_CHUNKS)
    bucket.log.clear()
    with StoreReader.open(url).opened() as rows:
        for start in range(0, len(truth), BLOCK_STEPS):
            span = start, start + BLOCK_STEPS
            rows.will_read(["W"], span, tokens)
            np.testing.assert_array_equal(rows.read("W", span, tokens), truth[slice(*span), tokens])
    requests = [request for request in bucket.log.requests if request.method == "GET"]
    shards = [request for request in requests if "/W/c." in request.path]
    assert len(shards) == N_BLOCKS + 1  # of the first the index, and then the chunks
    assert sum(request.n_bytes for request in shards) <= 1.3 * 2 * CHUNK_BYTES * N_BLOCKS


def test_processes_of_a_check_have_their_own_connections(
    bucket: Bucket, toy_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.py"  # as users have: it would run again in each process
    script.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    main = ModuleType("__main__")
    main.__file__ = str(script)
    monkeypatch.setitem(sys.modules, "__main__", main)
    tuned(monkeypatch, task_steps=4)
    url = bucket.upload(toy_path)
    result = thimble_zarr.check(url, tokens="all", workers=2)
    assert result.holds
    expected = thimble_zarr.check(toy_path, tokens="all", workers=1)
    assert result.table.equals(expected.table)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("train", "http://127.0.0.1/new.zarr", "--steps", 3), "name an s3:// or gs://"),
        (("repair", "s3://bucket/run.zarr", "--apply"), "nothing writes to"),
    ],
)
def test_nothing_is_recorded_on_a_server(command: tuple[object, ...], expected: str) -> None:
    assert expected in fails(2, *command)


def test_the_page_on_servers_says_what_can_be_done(
    bucket: Bucket, toy_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("thimble_zarr.report.html.PANELS", PANELS[:2])
    replace(bucket, directory="").upload(toy_path)
    shutil.copytree(toy_path, "run.zarr")
    for block in blocks((ROOT / "docs" / "remote.md").read_text(encoding="utf-8")):
        if block.not_run is not None and block.language == "console":
            for command in block.commands:
                program, *arguments = shlex.split(command)
                assert program == "thimble-zarr"
                assert run(*arguments).exit_code == 0, command
        elif block.not_run is not None:
            exec(compile(block.content, "remote.md", "exec"), {})
    assert "HOLDS to the bit" in (tmp_path / "run.html").read_text()


def test_what_opens_a_server_goes_nowhere(
    bucket: Bucket, toy_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_SKIP_SIGNATURE")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    url = bucket.url("run.zarr")
    bucket.log.faults = [Fault(status=403, code="AccessDenied", times=99)]
    assert "access is denied" in fails(3, "info", url)  # and `fails` has seen all that was printed
    assert SECRET not in run("info", url).output
    bucket.log.faults.clear()
    bucket.upload(toy_path)
    bucket.log.faults.clear()
    reader = StoreReader.open(url)
    reader.read("W", (0, 3))
    assert SECRET.encode() not in pickle.dumps(reader)
    assert SECRET not in repr(reader)
    error = fails(3, "info", bucket.url("run.zarr", "http") + "/nothing")
    assert SECRET not in error


def test_two_workers_of_a_cluster_read_a_server(
    bucket: Bucket, toy_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned(monkeypatch, task_steps=4)  # so that there is something to do for both
    url = bucket.upload(toy_path)
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",  # None is port 8787, which another test may hold
            silence_logs=60,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.wait_for_workers(2)
        result = thimble_zarr.check(url, tokens="all")
        readers = client.run(lambda: "obstore" in sys.modules)
    assert [*readers.values()] == [True, True]
    assert result.table.equals(thimble_zarr.check(toy_path, tokens="all", workers=1).table)
