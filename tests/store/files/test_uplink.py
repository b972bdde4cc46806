"""Uploads over a slow link: they take longer than any answer may, and arrive all the same."""

import random
from pathlib import Path

import pytest
import torch

from tests.store.files.conftest import Bucket
from tests.support.copies import is_copied
from tests.support.links import link
from tests.support.servers import Weed
from tests.support.tuned import tuned
from thimble_zarr import Recorder
from thimble_zarr.store.files.objects import ObjectFiles


@pytest.mark.parametrize("n_bytes", [4 * 2**20, 13 * 2**20])
def test_an_upload_may_take_longer_than_an_answer(
    server: Weed, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, n_bytes: int
) -> None:
    """Of a file, and of each of the parts of a large one."""
    tuned(monkeypatch, request_timeout_s=1.0, request_retries=0)
    content, arrived = random.Random(0).randbytes(n_bytes), list[int]()
    with link(server.s3, upload_bytes_per_s=2e6) as slow:
        monkeypatch.setenv("AWS_ENDPOINT_URL", slow.address)
        ObjectFiles(bucket.url("x.zarr")).put("a", content, arrived=arrived.append)
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.between.address)
    assert ObjectFiles(bucket.url("x.zarr")).get("a") == content
    assert sum(arrived) == n_bytes
    assert max(arrived) <= 5 * 2**20


def test_close_waits_for_a_file_of_which_parts_arrive(
    server: Weed, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole file takes longer than `close()` waits for something to arrive."""
    tuned(monkeypatch, silence_s=4.0)
    monkeypatch.chdir(tmp_path)
    weight = torch.nn.Parameter(torch.randn(60_000, 100, generator=torch.Generator()))
    weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.SGD([weight])
    with link(server.s3, upload_bytes_per_s=3e6) as slow:
        monkeypatch.setenv("AWS_ENDPOINT_URL", slow.address)
        recorder = Recorder(bucket.url("run.zarr"), optimizer, parameter=weight)
        optimizer.step()
        recorder.close()
    assert recorder.is_published
    (shard,) = (tmp_path / "run.zarr" / "W").glob("c*")
    assert shard.stat().st_size > 4.0 * slow.upload_bytes_per_s
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.between.address)
    assert is_copied(tmp_path / "run.zarr", bucket.url("run.zarr"))
