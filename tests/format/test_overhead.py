"""What the recorder measures of itself, with clocks and disks that do as they are told."""

import dataclasses
import itertools
import json
import threading
import warnings
import zlib
from pathlib import Path

import msgspec
import pytest

from tests.support.runs import N_STEPS, TINY_MEMORY, Loop
from thimble_zarr import Recorder
from thimble_zarr.errors import ConfigError
from thimble_zarr.format import overhead as overhead_module
from thimble_zarr.format.overhead import Overhead, Stopwatch
from thimble_zarr.record import recorder as recorder_module
from thimble_zarr.record.writer_thread import BlockWriter
from thimble_zarr.store.ledger import seal
from thimble_zarr.store.reader import StoreReader
from thimble_zarr.store.writer import StoreWriter

BLOCK_STEPS = 4


def total(path: Path) -> Overhead:
    return sum(StoreReader.open(path).read_history().overhead.values(), Overhead())


def ledger(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / ".thimble/blocks.jsonl").read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


@pytest.fixture
def idle_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that is done before training looks again: the fastest disk there could be."""
    submit = BlockWriter.submit

    def submit_and_wait(writer: BlockWriter, *args: object) -> None:
        submit(writer, *args)
        writer._pending[-1][0].result()

    monkeypatch.setattr(BlockWriter, "submit", submit_and_wait)


class SlowDisk:
    """A disk that holds every block until training waits for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        waiting = threading.Event()
        commit_block, collect = StoreWriter.commit_block, BlockWriter._collect

        def commit_when_awaited(writer: StoreWriter, *args: object, **told: object) -> None:
            assert waiting.wait(timeout=60)
            waiting.clear()
            commit_block(writer, *args, **told)

        def collect_and_show(writer: BlockWriter) -> None:
            if not writer._pending[0][0].done():
                waiting.set()
            collect(writer)

        monkeypatch.setattr(StoreWriter, "commit_block", commit_when_awaited)
        monkeypatch.setattr(BlockWriter, "_collect", collect_and_show)
        self.release = waiting.set


def record(path: Path, n_steps: int = N_STEPS, flush_at: tuple[int, ...] = ()) -> None:
    loop = Loop()
    with Recorder(
        path, loop.optimizer, parameter=loop.weight, memory_bytes=TINY_MEMORY
    ) as recorder:
        for step in range(1, n_steps + 1):
            loop.step()
            if step in flush_at:
                recorder.flush()


def test_every_block_says_what_it_took(path: Path) -> None:
    record(path)
    blocks = StoreReader.open(path).read_history().overhead
    assert list(blocks) == [0, 4, 8, 12]
    assert [spent.n_steps for spent in blocks.values()] == [3, 4, 4, 2]
    for spent in blocks.values():
        assert 0 < spent.copy_s < spent.elapsed_s
        assert min(spent.encode_s, spent.write_s, spent.sync_s) > 0
        assert 0 <= spent.wait_s < spent.elapsed_s
    assert total(path).n_bytes == sum(
        file["bytes"] for line in ledger(path) for file in line["files"].values()
    )


@pytest.mark.usefixtures("idle_writer")
def test_no_step_waits_for_a_fast_disk(path: Path) -> None:
    record(path)
    spent = total(path)
    assert (spent.n_waits, spent.n_queued, spent.wait_s) == (0, 0, 0)
    assert spent.n_steps == N_STEPS


def test_a_slow_disk_is_seen_as_waiting(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SlowDisk(monkeypatch)
    loop = Loop()
    with Recorder(
        path, loop.optimizer, parameter=loop.weight, memory_bytes=TINY_MEMORY
    ) as recorder:
        for _ in range(4 * BLOCK_STEPS):
            loop.step()
        monkeypatch.undo()
        disk.release()
        recorder._writer._pending[0][0].result()
    blocks = StoreReader.open(path).read_history().overhead
    # With two blocks, training waits when it would begin the third and every later one.
    assert [spent.n_waits for spent in blocks.values()] == [0, 0, 1, 1, 1]
    assert [spent.n_queued for spent in blocks.values()] == [0, 1, 1, 1, 0]
    assert [spent.wait_s > 0 for spent in blocks.values()] == [False, False, True, True, True]
    assert total(path).wait_s < total(path).elapsed_s


@pytest.mark.usefixtures("idle_writer")
def test_a_block_that_is_flushed_counts_its_steps_once(path: Path) -> None:
    record(path, flush_at=(1, 2, 2, 6, 7))
    assert [line["rows"] for line in ledger(path)[:5]] == [[0, 2], [0, 3], [0, 4], [4, 7], [4, 8]]
    assert total(path).n_steps == N_STEPS
    assert total(path).n_waits == 0
    assert total(path).wait_s > 0  # training did wait, for what it asked for


def test_times_are_those_of_the_clock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves by one whenever the training thread looks: each span is a count."""
    ticks = {threading.get_ident(): itertools.count()}

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            return float(next(ticks.setdefault(threading.get_ident(), itertools.count())))

    for module in (overhead_module, recorder_module):
        monkeypatch.setattr(module, "time", Clock)
    record(path, n_steps=2)
    spent = total(path)
    # A step's copying begins and ends, and then the step ends: three looks.
    assert (spent.n_steps, spent.copy_s, spent.wait_s, spent.elapsed_s) == (2, 2.0, 0.0, 6.0)
    assert spent.training_share == pytest.approx(1 / 3)


@pytest.fixture
def training_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which each look of the training thread takes a second, and others none.

    A step has three looks, one of which is spent on copying: a third of the time.
    """
    main, ticks = threading.get_ident(), itertools.count()

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            return float(next(ticks)) if threading.get_ident() == main else 0.0

    for module in (overhead_module, recorder_module):
        monkeypatch.setattr(module, "time", Clock)


def record_within(
    path: Path,
    max_overhead: float | None,
    n_steps: int = 66,
    memory_bytes: int = 4 * TINY_MEMORY,  # blocks of 16 steps
) -> list[str]:
    """Record a run and return what was warned of."""
    loop = Loop()
    with (
        warnings.catch_warnings(record=True) as caught,
        Recorder(
            path,
            loop.optimizer,
            parameter=loop.weight,
            memory_bytes=memory_bytes,
            max_overhead=max_overhead,
        ),
    ):
        warnings.simplefilter("always")
        for _ in range(n_steps):
            loop.step()
    return [str(warning.message) for warning in caught]


@pytest.mark.usefixtures("training_clock", "idle_writer")
def test_too_much_overhead_is_warned_of_once_and_changes_nothing(path: Path) -> None:
    (warned,) = record_within(path, 0.03)
    assert "recording takes 33.3% of training time, and max_overhead is 3.0%" in warned
    assert "copying a row takes 1e+03 ms of a step's 3e+03 ms: record fewer parameters" in warned
    quiet = path.with_name("quiet.zarr")
    assert record_within(quiet, None) == []
    one, other = StoreReader.open(path), StoreReader.open(quiet)
    assert one.n_rows == other.n_rows == 67
    for name in one.schema.dtypes:
        assert (one.read(name, (0, 67)) == other.read(name, (0, 67))).all()


ONE_ROW = 1000
"""Memory for one row of the toy run and its encoding, and not for two."""


@pytest.mark.usefixtures("training_clock")
def test_where_one_row_fits_each_step_waits_and_more_memory_is_advised(path: Path) -> None:
    (warned,) = record_within(path, 0.03, memory_bytes=ONE_ROW)
    assert "because memory_bytes holds one row only: give more, for two" in warned
    assert total(path).n_waits == total(path).n_steps == 66
    assert record_within(path.with_name("two.zarr"), None) == []
    one, two = StoreReader.open(path), StoreReader.open(path.with_name("two.zarr"))
    assert (one.schema.layout.block_steps, two.schema.layout.block_steps) == (1, 16)
    for name in one.schema.dtypes:
        rows = one.read(name, (0, 67))
        assert rows.tobytes() == two.read(name, (0, 67)).tobytes()


@pytest.mark.usefixtures("training_clock", "idle_writer")
@pytest.mark.parametrize(("max_overhead", "n_steps"), [(0.34, 66), (0.03, 50)])
def test_little_overhead_and_short_runs_are_not_warned_of(
    path: Path, max_overhead: float, n_steps: int
) -> None:
    assert record_within(path, max_overhead, n_steps) == []


def test_a_run_of_few_seconds_tells_nothing() -> None:
    assert Overhead(n_steps=50, elapsed_s=10).telling
    assert not Overhead(n_steps=49, elapsed_s=10).telling
    assert not Overhead(n_steps=5000, elapsed_s=9.9).telling


@pytest.mark.parametrize(
    ("slowest", "words"),
    [
        ("encode_s", "mostly compressing: leave a core for it"),
        ("write_s", "mostly writing: choose a faster disk"),
        ("sync_s", "mostly syncing: give more memory_bytes"),
    ],
)
def test_waiting_is_advised_on_by_what_the_writer_does(slowest: str, words: str) -> None:
    spent = Overhead(n_steps=100, n_waits=7, elapsed_s=50, copy_s=1, wait_s=2)
    spent += Overhead(encode_s=1, write_s=1, sync_s=1) + Overhead(**{slowest: 22})
    assert "7 of 100 steps waited for the writer thread, which was busy 50%" in spent.advice
    assert words in spent.advice


@pytest.mark.parametrize("share", [0, -0.1, float("nan")])
def test_an_overhead_that_no_recording_keeps_is_refused(path: Path, share: float) -> None:
    loop = Loop()
    with pytest.raises(ConfigError, match=r"max_overhead is .* above 0"):
        Recorder(path, loop.optimizer, parameter=loop.weight, max_overhead=share)
    assert not path.exists()


def test_ledgers_without_it_and_with_more_are_read(path: Path) -> None:
    assert Overhead.from_json({"n_steps": 3, "elapsed_s": 1.5, "of_the_future": "x"}) == Overhead(
        n_steps=3, elapsed_s=1.5
    )
    record(path)
    lines = ledger(path)
    for line in lines:
        del line["overhead"], line["crc32"]
        line["of_the_future"] = {"x": 1}
    reader = rewritten(path, "".join(f"{seal(line).decode()}\n" for line in lines))
    assert reader.read_history().overhead == {}
    assert list(reader.integrity.altered_chunks((0, reader.n_rows))) == []


def rewritten(path: Path, content: str) -> StoreReader:
    """Return a reader of a store whose ledger is another one."""
    (path / ".thimble/blocks.jsonl").write_text(content)
    reader = StoreReader.open(path)
    commit = msgspec.structs.replace(
        reader.commit, ledger_bytes=len(content), ledger_crc32=zlib.crc32(content.encode())
    )
    return dataclasses.replace(reader, commit=commit)


def test_laps_add_up() -> None:
    stopwatch = Stopwatch()
    assert stopwatch.lap() == Overhead()
    stopwatch.add(n_steps=1, copy_s=0.5)
    stopwatch.add(n_steps=1, copy_s=0.25)
    with stopwatch.time("wait_s"):
        pass
    first = stopwatch.lap()
    assert (first.n_steps, first.copy_s) == (2, 0.75)
    assert first.wait_s > 0
    assert list(stopwatch.time_each("encode_s", iter("abc"))) == ["a", "b", "c"]
    second = stopwatch.lap()
    assert second.encode_s > 0 == second.n_steps
    assert sum([first, second], Overhead()) == Overhead(
        n_steps=2, copy_s=0.75, wait_s=first.wait_s, encode_s=second.encode_s
    )


def test_shares_are_of_training_time() -> None:
    spent = Overhead(
        n_steps=5, elapsed_s=10, copy_s=1, wait_s=2, encode_s=1, write_s=2, sync_s=3, n_bytes=50
    )
    assert (spent.training_share, spent.writer_share, spent.bytes_per_s) == (0.3, 0.6, 5)
    assert Overhead.from_json(spent.to_json()) + Overhead(n_bytes=50) == spent


def test_a_time_that_fails_counts() -> None:
    stopwatch = Stopwatch()
    with pytest.raises(OSError, match="full"), stopwatch.time("write_s"):
        raise OSError("full")
    assert stopwatch.lap().write_s > 0
