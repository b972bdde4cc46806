"""Runs that are recorded in a spool and published behind: no step waits, and none is lost."""

import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

import thimble_zarr
from tests.store.files.conftest import BUCKET, Bucket
from tests.support.commands import fails, succeeds
from tests.support.copies import is_copied
from tests.support.runs import N_STEPS, TINY_MEMORY, History, Loop, record, token_labels
from tests.support.servers import SECRET, Fault, Weed, make_bucket, weed
from tests.support.tiny import DATA, TINY
from tests.support.tuned import tuned
from tests.support.waiting import until
from thimble_zarr import Recorder
from thimble_zarr.bits import decode
from thimble_zarr.errors import ConfigError, ResumeError, StoreError
from thimble_zarr.experiment.trainer import train
from thimble_zarr.format.location import Url
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.files.objects import ObjectFiles
from thimble_zarr.store.keys import HOLDER, PUBLISHER
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.remote import following
from thimble_zarr.store.remote.behind import Publisher
from thimble_zarr.store.remote.copying import Copied
from thimble_zarr.store.remote.spool import Spool
from thimble_zarr.store.remote.target import Server


@pytest.fixture(autouse=True)
def _impatient(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Servers are asked once, and the current directory is where spools are."""
    tuned(monkeypatch, request_retries=0, request_timeout_s=5.0)
    monkeypatch.setattr(following, "POLL_S", 0.02)
    monkeypatch.chdir(tmp_path)


class Training:
    """A toy run, a few steps at a time, and what it saw of the weights."""

    def __init__(self, location: str, **options: object) -> None:
        self.loop, self.weights = Loop(), list[np.ndarray]()
        what = {"parameter": self.loop.weight, "labels": token_labels()}
        options = {"memory_bytes": TINY_MEMORY, **options}
        self.recorder = Recorder(location, self.loop.optimizer, **what, **options)
        self.see()

    @property
    def publisher(self) -> Publisher:
        publisher = self.recorder._spool._publisher
        assert publisher is not None
        return publisher

    def see(self) -> None:
        self.weights.append(self.loop.weight.detach().float().numpy().copy())

    def train(self, n_steps: int) -> None:
        """Take steps, and have them committed."""
        for _ in range(n_steps):
            self.recorder.log(loss=self.loop.step())
            self.loop.optimizer.zero_grad()
            self.see()
        self.recorder.flush()
        assert self.recorder.committed_step == len(self.weights) - 1

    def is_seen_in(self, location: str | Path) -> bool:
        """Return whether a store has what was seen of all steps, bit for bit."""
        reader = StoreReader.open(location)
        found = decode(reader.read("W", (0, reader.n_rows)), "bfloat16", np.float32)
        return np.array_equal(found, np.stack(self.weights))


def begun(server: Weed, monkeypatch: pytest.MonkeyPatch) -> tuple[Url, Training]:
    """Return a training of which five steps are published on a server, and its address there."""
    make_bucket(server, BUCKET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.s3}")
    url = Url(f"s3://{BUCKET}/run.zarr")
    run = Training(url)
    run.train(5)
    until(lambda: run.publisher.n_rows == 6)
    return url, run


def test_a_server_that_is_killed_and_started_again_costs_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weed").mkdir()
    with ExitStack() as stack:
        server = stack.enter_context(weed(tmp_path / "weed"))
        url, run = begun(server, monkeypatch)
        assert run.is_seen_in(url)
        stack.close()  # it is killed
        run.train(1)
        until(lambda: run.publisher.problem)
        with pytest.warns(UserWarning, match="publishing fails, and recording goes on in") as told:
            run.train(3)
        assert "again and again" in str(told[0].message)
        run.train(3)  # and is not warned of again
        stack.enter_context(weed(tmp_path / "weed", server.ports))
        until(lambda: run.publisher.n_rows == 13)
        run.train(2)
        run.recorder.close()
        assert run.is_seen_in("run.zarr")
        assert is_copied(tmp_path / "run.zarr", url)
        assert StoreReader.open(url).commit.complete


def test_close_does_not_wait_for_a_server_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests would wait for ten minutes here, and the test with them."""
    tuned(monkeypatch, request_timeout_s=600.0, silence_s=1.0)
    (tmp_path / "weed").mkdir()
    with weed(tmp_path / "weed") as server:
        url, run = begun(server, monkeypatch)
        os.kill(server.pid, signal.SIGSTOP)
        run.train(2)
        with pytest.warns(UserWarning, match="steps up to 5 are at") as told:
            run.recorder.close()
        os.kill(server.pid, signal.SIGCONT)
        message = str(told[-1].message)
        assert not run.recorder.is_published
        assert "nothing more arrived there for 1 s" in message
        assert "All is recorded in" in message
        published_by_command(message)
        assert run.is_seen_in(url)
        assert is_copied(tmp_path / "run.zarr", url)


def test_who_cannot_give_its_claim_back_has_published_all(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned(monkeypatch, request_timeout_s=600.0, silence_s=5.0)
    bucket.log.faults = [Fault("hang", method="POST", key="?delete", hang_s=600.0)]
    url = bucket.url("run.zarr")
    run = Training(url)
    run.train(2)
    run.recorder.close()  # without a warning
    assert run.recorder.is_published
    assert not bucket.log.faults[0].times
    ObjectFiles(url).delete([PUBLISHER])
    assert is_copied(tmp_path / "run.zarr", url)


def test_no_process_can_be_started(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left behind: the optimizer can be recorded on this machine."""
    monkeypatch.setattr(sys, "executable", "/there/is/none")
    loop = Loop()
    url, path = bucket.url("run.zarr"), Path("run.zarr").absolute()
    with pytest.raises(StoreError, match="cannot be started: No such file") as refused:
        Recorder(url, loop.optimizer, parameter=loop.weight)
    assert str(refused.value).endswith(f"later with `thimble-zarr publish {path} {url}`")
    assert not Path("run.zarr").exists()
    assert not loop.optimizer._optimizer_step_pre_hooks
    assert not loop.optimizer._optimizer_step_post_hooks


@pytest.fixture
def halted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Publisher], None]]:
    """Stops publishers: nothing is read that they are told, and nothing answered."""
    stopped = []

    def stop(publisher: Publisher) -> None:
        os.kill(publisher.pid, signal.SIGSTOP)
        stopped.append(publisher.pid)

    yield stop
    for pid in stopped:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_no_step_waits_for_who_publishes(
    bucket: Bucket, tmp_path: Path, halted: Callable[[Publisher], None]
) -> None:
    """Steps that waited would never end here."""
    url = bucket.url("run.zarr")
    run = Training(url, spool=tmp_path / "elsewhere" / "spool.zarr")
    halted(run.publisher)
    run.train(40)
    assert "being recorded" in StoreReader.open(tmp_path / "elsewhere" / "spool.zarr").kind
    assert run.publisher.n_rows == 0
    os.kill(run.publisher.pid, signal.SIGCONT)
    run.recorder.close()
    assert run.is_seen_in(url)
    assert is_copied(tmp_path / "elsewhere" / "spool.zarr", url)


def published_by_command(message: str) -> None:
    """Give the command that a warning has in it."""
    (command,) = re.findall(r"`(thimble-zarr .+?)`", message)
    succeeds(*shlex.split(command)[1:])


@pytest.mark.parametrize("wrong", ["no server", "credentials"])
def test_what_could_not_be_published_is_there_and_said(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    url, words = bucket.url("run.zarr"), "the server does not accept the credentials"
    if wrong == "no server":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        words = "no server listens there"
    bucket.log.faults = [Fault(status=403, code="InvalidAccessKeyId", times=10**6)]
    with pytest.warns(UserWarning, match=words) as told:
        history = record(url)
    message = str(told[-1].message)
    assert (
        f"{tmp_path / 'run.zarr'} is not published whole, and nothing of it is at {url}" in message
    )
    assert SECRET not in message
    assert len(told) <= 2
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.between.address)
    bucket.log.clear()
    assert thimble_zarr.verify("run.zarr").holds
    published_by_command(message)
    assert is_copied(tmp_path / "run.zarr", url)
    assert is_history(url, history)


def is_history(location: str, history: History) -> bool:
    ds = thimble_zarr.open_dataset(location)
    return all(np.array_equal(ds[name], history[name], equal_nan=True) for name in history.tensors)


def test_what_a_run_left_the_next_one_publishes(
    bucket: Bucket,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    halted: Callable[[Publisher], None],
) -> None:
    url = bucket.url("run.zarr")
    run = Training(url, resume=True)  # there is none yet, here or there
    run.train(3)
    until(lambda: run.publisher.n_rows == 4)
    bucket.log.faults = [
        Fault(status=403, code="AccessDenied", method="PUT", key="/W/", times=10**6)
    ]
    halted(run.publisher)
    run.train(3)
    os.kill(run.publisher.pid, signal.SIGCONT)
    with pytest.warns(UserWarning, match="publish") as told:
        run.recorder.close()
    assert re.search(r"steps up to 3 are at .*: access is denied", str(told[-1].message))
    bucket.log.clear()
    what = {"parameter": run.loop.weight, "labels": token_labels(), "memory_bytes": TINY_MEMORY}
    run.recorder = Recorder(url, run.loop.optimizer, **what, resume=True)
    run.train(2)
    run.recorder.close()
    assert run.is_seen_in(url)
    assert is_copied(tmp_path / "run.zarr", url)
    (tmp_path / "run.zarr").rename("gone.zarr")
    with pytest.raises(ResumeError, match="it was published, and its spool is not at") as refused:
        Training(url, resume=True)
    published_by_command(str(refused.value))  # it fetches the run
    assert is_copied(tmp_path / "run.zarr", url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(ResumeError, match="whether a run was published cannot be told"):
        Training(url, resume=True, spool="new.zarr")


def test_what_a_killed_run_committed_is_published(bucket: Bucket, tmp_path: Path) -> None:
    url = bucket.url("run.zarr")
    pid = os.fork()
    if pid == 0:
        run = Training(url)
        os.kill(run.publisher.pid, signal.SIGSTOP)
        run.train(N_STEPS)
        (tmp_path / "publisher").write_text(str(run.publisher.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    publisher = int((tmp_path / "publisher").read_text())
    os.kill(publisher, signal.SIGCONT)
    until(lambda: has_ended(publisher))
    (tmp_path / "run.zarr" / HOLDER).unlink()
    assert is_copied(tmp_path / "run.zarr", url)
    assert StoreReader.open(url).n_rows == N_STEPS + 1


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_nothing_is_asked_for_until_more_is_committed(bucket: Bucket) -> None:
    run, n_requests = Training("run.zarr"), list[int]()
    run.train(2)

    def wait(seconds: float) -> None:
        n_requests.append(len(bucket.log.requests))
        if len(n_requests) == 3:
            run.train(1)

    url, copied = bucket.url("run.zarr"), Copied()
    with closing(Server(ObjectFiles(url))) as server:
        following.follow(
            LocalFiles(Path("run.zarr").absolute()),
            server,
            copied,
            progress=lambda done, total: None,
            ended=lambda: len(n_requests) == 5,
            wait=wait,
            on_commit=lambda copied: None,
            on_problem=lambda error: pytest.fail(str(error)),
        )
    assert n_requests[0] == n_requests[1] == n_requests[2] < n_requests[3] == n_requests[4]
    assert run.is_seen_in(url)
    run.recorder.close()


def test_sigterm_for_all_of_a_job_leaves_nothing_unpublished(
    bucket: Bucket, tmp_path: Path
) -> None:
    """Training commits once more, after its publisher was told, too."""
    (tmp_path / "json.py").write_text("raise RuntimeError('a module of the current directory')")
    url = bucket.url("run.zarr")
    run = Training(url)
    run.train(2)
    until(lambda: run.publisher.n_rows == 3)
    os.kill(run.publisher.pid, signal.SIGTERM)
    run.train(3)
    run.recorder.close()
    assert run.is_seen_in(url)


def test_training_is_told_at_once_that_nothing_is_published_any_more(bucket: Bucket) -> None:
    run = Training(bucket.url("run.zarr"))
    os.kill(run.publisher.pid, signal.SIGKILL)
    until(lambda: run.publisher.has_ended)
    with pytest.warns(UserWarning, match="publishing has ended, and recording goes on in") as told:
        run.train(2)
    assert "the process that publishes was killed" in str(told[0].message)
    with pytest.warns(UserWarning, match="is not published whole"):
        run.recorder.close()


def test_a_finished_run_that_is_resumed_publishes_its_rest(bucket: Bucket, tmp_path: Path) -> None:
    config, url = replace(TINY, steps=3), bucket.url("run.zarr")
    train(config, DATA, "run.zarr")
    train(config, DATA, "run.zarr", resume=True, url=url)
    assert is_copied(tmp_path / "run.zarr", url)


def test_another_run_at_the_address_is_never_overwritten(
    bucket: Bucket, toy_path: Path, tmp_path: Path
) -> None:
    url = bucket.upload(toy_path)
    with pytest.warns(UserWarning, match="publish") as told:
        record(url)
    assert f"{url} holds " in str(told[-1].message)
    assert "choose another place" in str(told[-1].message)
    assert "All is recorded in" in str(told[-1].message)
    assert is_copied(toy_path, url)
    assert thimble_zarr.verify("run.zarr").holds


def test_addresses_that_nothing_is_recorded_at(bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`spool` says where a run is recorded"):
        Spool(tmp_path / "run.zarr", "spool.zarr")
    with pytest.raises(ConfigError, match="name an s3:// or gs:// address"):
        Spool("https://host/run.zarr")
    with pytest.raises(ConfigError, match="nothing writes to s3:"):
        Spool("s3://bucket/run.zarr", "s3://bucket/spool.zarr")
    assert "name an s3://" in fails(2, "train", "http://127.0.0.1/run.zarr", "--steps", 3)
