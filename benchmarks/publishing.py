"""Publish a run while it trains, kill who publishes at random, and read what is on the server.

A real training (Thimble 1's model, 10,000 x 64), and a real server (SeaweedFS). Who publishes is
killed shortly after it has begun to upload a file, and mostly so within a commit. After each kill
the copy is opened and all its rows are read. It must be at a commit that the run has made, and its
rows must be those of the run when that has ended, bit by bit. Training is killed, too, and resumed;
it stands still while the copy is read.
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

from benchmarks.object_store import BUCKET, object_store, use
from tests.support.copies import is_copied
from tests.support.links import Link, link
from thimble_zarr.errors import NotAStoreError, ThimbleError
from thimble_zarr.format.location import Url
from thimble_zarr.store.files.objects import ObjectFiles
from thimble_zarr.store.keys import LEDGER
from thimble_zarr.store.reader import StoreReader

REAL = ("--steps=400", "--batch-size=4", "--device=cpu")
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

_UPLOAD_BYTES_PER_S = 5e7
"""What the link to the server carries: a commit takes about a second."""

_MOST_UPLOADS = 40
"""So many uploads a publisher begins at most before it is killed: those of a few commits."""

Process = subprocess.Popen[bytes]


@dataclass
class Counted:
    """What became of it.

    Attributes
    ----------
    publishers, trainings
        Processes that were killed while they ran.
    opened
        Rows of the copy after each kill at which one could be opened.
    unopened
        Kills before the first commit was published: there was nothing to open yet.
    cut
        Kills within a commit: the copy has files, or lines of the ledger, of which no commit tells.
    n_compared
        Rows that were read from the copy and compared with the run's.
    wrong
        What was not as it must be.
    """

    publishers: int = 0
    trainings: int = 0
    opened: list[int] = field(default_factory=list)
    unopened: int = 0
    cut: int = 0
    n_compared: int = 0
    wrong: list[str] = field(default_factory=list)


@dataclass
class Copy:
    """A run that is recorded at a path and published at an address, and what was seen there."""

    store: Path
    url: Url
    counted: Counted = field(default_factory=Counted)
    seen: list[list[str]] = field(default_factory=list)

    def look(self) -> str:
        """Open the copy, compare its commit with the run's ledger, and read all its rows.

        Return what was found.
        """
        counted = self.counted
        try:
            (reader,) = StoreReader.open_each(self.url)
        except NotAStoreError:
            counted.unopened += 1
            counted.cut += LEDGER in ObjectFiles(self.url).list()
            if counted.opened:
                counted.wrong.append("a copy was there, and is no more")
            return "nothing published yet"
        commit, ledger = reader.commit, (self.store / LEDGER).read_bytes()
        told = ledger[: commit.ledger_bytes]
        if zlib.crc32(told) != commit.ledger_crc32 or not told.endswith(b"\n"):
            counted.wrong.append(f"{commit.n_rows} rows are none of the run's commits")
        is_cut = reader.files.size(LEDGER) > commit.ledger_bytes
        counted.cut += is_cut
        counted.opened.append(reader.n_rows)
        try:
            self.seen.append(digests(reader))
        except ThimbleError as error:
            counted.wrong.append(f"of {reader.n_rows} rows some cannot be read: {error}")
        return f"{reader.n_rows} rows{', and a commit begun' * is_cut}"

    def compare(self) -> None:
        """Compare all that was seen with the run, which has ended."""
        (reader,) = StoreReader.open_each(self.store)
        truth = digests(reader)
        for rows in self.seen:
            self.counted.n_compared += len(rows)
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


@dataclass(frozen=True)
class Kills:
    """How often who publishes is killed, and training at some of these times; and when."""

    publishers: int
    trainings: int
    seed: int

    def missing(self, found: Counted) -> Iterator[str]:
        """Say what was not killed while it ran."""
        for name in ("publishers", "trainings"):
            n, wanted = getattr(found, name), getattr(self, name)
            if n < wanted:
                yield f"{n} of {wanted} {name} were killed while they ran; give training more steps"


def kill_publishers(copy: Copy, server: Link, options: Sequence[str], kills: Kills) -> None:
    """Train and publish; kill who publishes until it was killed so often, or training has ended."""
    rng = random.Random(kills.seed)
    with_training = {*rng.sample(range(kills.publishers), kills.trainings)}
    with ExitStack() as stack:
        training = _train(stack, copy.store, options)
        _wait_for_rows(copy.store, 0, training)
        for kill in range(kills.publishers):
            publisher = _follow(stack, copy)
            _wait_for_uploads(server, server.n_uploads + rng.randint(1, _MOST_UPLOADS), publisher)
            time.sleep(rng.uniform(0.0, 0.1))
            if kill in with_training:
                copy.counted.trainings += _kill(training)
            was_killed = _kill(publisher)
            copy.counted.publishers += was_killed
            with standing_still(training):
                click.echo(f"  kill {kill + 1}: {copy.look()}", err=True)
            if not was_killed:
                break
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


def _wait_for_uploads(server: Link, n_uploads: int, publisher: Process) -> None:
    """Wait until so many uploads were begun, or who publishes has ended."""
    while server.n_uploads < n_uploads and publisher.poll() is None:
        time.sleep(0.002)


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
    planned = Kills(kills, training_kills, seed)
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="thimble-zarr-")))
        copy = Copy(root / "run.zarr", Url(f"s3://{BUCKET}/run.zarr"))
        port = stack.enter_context(object_store(root / "weed")).s3
        server = stack.enter_context(link(port, upload_bytes_per_s=_UPLOAD_BYTES_PER_S))
        use(server.address)
        kill_publishers(copy, server, options or REAL, planned)
        copy.compare()
    found = copy.counted
    found.wrong += planned.missing(found)
    click.echo(
        f"{found.publishers} publishers and {found.trainings} trainings were killed while they "
        f"ran, {found.cut} times within a commit"
    )
    click.echo(
        f"the copy could be opened {len(found.opened)} times, and {found.unopened} times nothing "
        f"was published yet; {found.n_compared:,} rows of it were compared bit by bit"
    )
    click.echo(f"rows after each kill: {', '.join(map(str, found.opened))}")
    click.echo("in the end the copy is the run" if not found.wrong else "NOT as it must be:")
    for wrong in found.wrong:
        click.echo(f"  wrong: {wrong}")
    sys.exit(bool(found.wrong))


if __name__ == "__main__":
    main()
