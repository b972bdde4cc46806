"""Publish a run while it trains, kill who publishes at random, and read what is on the server.

A real training (Thimble 1's model, 10,000 x 64), and a real server (SeaweedFS). After each kill the
copy is opened and all its rows are read. It must be at a commit that the run has made, and its rows
must be those of the run when that has ended, bit by bit. Training is killed, too, and resumed; it
stands still while the copy is read.
"""

import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import click

from benchmarks.object_store import BUCKET, object_store
from tests.support.copies import is_copied
from thimble_zarr.errors import NotAStoreError
from thimble_zarr.format.location import Url
from thimble_zarr.store.keys import LEDGER
from thimble_zarr.store.reader import StoreReader

REAL = ("--steps=400", "--batch-size=16", "--device=cpu")
"""Options of a run of some minutes."""

_TRAIN = """
import sys
from dataclasses import replace
from thimble_zarr import tuning
from thimble_zarr.cli.main import main
tuning.TUNING = replace(tuning.TUNING, checkpoint_share=0.2)
main()
"""

_ROWS = 16
"""Rows that are read at once."""

Process = subprocess.Popen[bytes]


@dataclass
class Counted:
    """What became of it.

    Attributes
    ----------
    publishers, trainings
        Processes that were killed while they ran.
    within_commit
        Times that a copy was left with files, or lines of the ledger, of which no commit tells yet.
    n_rows
        Rows of the copy after each kill.
    wrong
        What was not as it must be.
    """

    publishers: int = 0
    trainings: int = 0
    within_commit: int = 0
    n_rows: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


@dataclass
class Copy:
    """A run that is recorded at a path and published at an address, and what was seen there."""

    store: Path
    url: Url
    counted: Counted = field(default_factory=Counted)
    seen: list[list[str]] = field(default_factory=list)

    def look(self) -> None:
        """Open the copy, compare its commit with the run's ledger, and read all its rows."""
        try:
            (reader,) = StoreReader.open_each(self.url)
        except NotAStoreError:
            self.counted.n_rows.append(0)
            if any(self.counted.n_rows):
                self.counted.wrong.append("a copy was there, and is no more")
            return
        commit, ledger = reader.commit, (self.store / LEDGER).read_bytes()
        told = ledger[: commit.ledger_bytes]
        if zlib.crc32(told) != commit.ledger_crc32 or not told.endswith(b"\n"):
            self.counted.wrong.append(f"{commit.n_rows} rows are none of the run's commits")
        self.counted.within_commit += reader.files.size(LEDGER) > commit.ledger_bytes
        self.counted.n_rows.append(reader.n_rows)
        self.seen.append(digests(reader))

    def compare(self) -> None:
        """Compare all that was seen with the run, which has ended."""
        (reader,) = StoreReader.open_each(self.store)
        truth = digests(reader)
        for rows in self.seen:
            if rows != truth[: len(rows)]:
                self.counted.wrong.append(f"of {len(rows)} rows some are not the run's")
        if not is_copied(self.store, self.url):
            self.counted.wrong.append("the copy is not the run in the end")


def digests(reader: StoreReader) -> list[str]:
    """Return a checksum of all that is recorded of each row."""
    found = []
    scalars = reader.read_scalars()
    for first in range(0, reader.n_rows, _ROWS):
        rows = first, min(first + _ROWS, reader.n_rows)
        arrays = [reader.read(name, rows) for name in reader.schema.dtypes]
        for row in range(rows[1] - rows[0]):
            digest = hashlib.blake2b(digest_size=16)
            for array in arrays:
                digest.update(array[row])
            for name in sorted(scalars):
                digest.update(scalars[name][first + row].tobytes())
            found.append(digest.hexdigest())
    return found


def kill_publishers(
    copy: Copy, options: Sequence[str], *, kills: int, training_kills: int, seed: int
) -> None:
    """Train and publish; kill who publishes so often, and training at some of these times, too."""
    rng = random.Random(seed)
    with_training = set(rng.sample(range(kills), training_kills))
    with ExitStack() as stack:
        training = _train(stack, copy.store, options)
        _wait_for_rows(copy.store, 0, training)
        for kill in range(kills):
            publisher = _follow(stack, copy)
            time.sleep(rng.uniform(0.3, 6.0))
            if kill in with_training:
                copy.counted.trainings += _kill(training)
                time.sleep(rng.uniform(0.0, 1.0))
            copy.counted.publishers += _kill(publisher)
            with standing_still(training):
                copy.look()
            click.echo(f"  kill {kill + 1}: {copy.counted.n_rows[-1]} rows", err=True)
            if kill in with_training:
                n_rows = _n_rows(copy.store)
                training = _train(stack, copy.store, ["--resume"])
                _wait_for_rows(copy.store, n_rows, training)
        for process in (training, _follow(stack, copy)):
            if code := process.wait():
                raise RuntimeError(f"{process.args!r} ended with exit code {code}")


@contextmanager
def standing_still(process: Process) -> Iterator[None]:
    """Stop a process within the block, if it runs."""
    if process.poll() is None:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)


def _follow(stack: ExitStack, copy: Copy) -> Process:
    options = ["publish", str(copy.store), copy.url, "--follow", "--quiet"]
    return _start(stack, ["-m", "thimble_zarr", *options])


def _train(stack: ExitStack, store: Path, options: Sequence[str]) -> Process:
    return _start(stack, ["-c", _TRAIN, "train", str(store), "--quiet", *options])


def _start(stack: ExitStack, arguments: Sequence[str]) -> Process:
    """Start Python; if it still runs as the stack is left, because of an error, it is killed."""
    process = subprocess.Popen([sys.executable, *arguments])
    stack.callback(process.kill)
    return process


def _wait_for_rows(store: Path, n_rows: int, training: Process) -> None:
    """Wait until a run has other rows than these, or has ended."""
    while _n_rows(store) == n_rows and training.poll() is None:
        time.sleep(0.05)


def _n_rows(store: Path) -> int:
    with suppress(OSError):
        return StoreReader.open_each(store)[0].n_rows
    return 0


def _kill(process: Process) -> bool:
    """Kill a process; return whether it still ran."""
    process.kill()
    code = process.wait()
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{process.args!r} ended with exit code {code}")
    return code != 0


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--kills", default=20, show_default=True, help="Times that who publishes is killed.")
@click.option("--training-kills", default=3, show_default=True, help="Training, at some of these.")
@click.option("--seed", default=0, show_default=True, help="Seed of when they are killed.")
@click.argument("options", nargs=-1)
def main(*, kills: int, training_kills: int, seed: int, options: tuple[str, ...]) -> None:
    """Print what was found after each kill.

    OPTIONS are those of `train`, after `--`; a real run of some minutes by default.
    """
    with tempfile.TemporaryDirectory(prefix="thimble-zarr-") as root:
        copy = Copy(Path(root) / "run.zarr", Url(f"s3://{BUCKET}/run.zarr"))
        with object_store(Path(root) / "weed"):
            kill_publishers(
                copy, options or REAL, kills=kills, training_kills=training_kills, seed=seed
            )
            copy.compare()
    found = copy.counted
    click.echo(
        f"{found.publishers} publishers and {found.trainings} trainings killed; the copy could be "
        f"opened {len(found.n_rows)} times, {found.within_commit} of them with a commit begun; "
        f"{sum(found.n_rows):,} rows read there"
    )
    click.echo(f"rows after each kill: {', '.join(map(str, found.n_rows))}")
    for wrong in found.wrong:
        click.echo(f"  wrong: {wrong}")
    sys.exit(bool(found.wrong))


if __name__ == "__main__":
    main()
