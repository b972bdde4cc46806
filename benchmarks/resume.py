"""Kill runs at random moments, resume them, count how many are the uninterrupted run to the bit.

Every run is a forked process, so that none has to import torch, and torch has one thread.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from thimble_zarr import tuning
from thimble_zarr.cli.main import cli
from thimble_zarr.format.overhead import Overhead
from thimble_zarr.store.contents import read_declared
from thimble_zarr.store.keys import BOOKKEEPING, LEDGER, METADATA
from thimble_zarr.store.ledger import Ledger
from thimble_zarr.store.reader import StoreReader

TINY = (
    "--steps=199",
    "--batch-size=2",
    "--seq-len=8",
    "--vocab-size=300",
    "--hidden-dim=8",
    "--layers=1",
    "--heads=2",
    "--device=cpu",
    "--memory=200KB",
)
"""Options of a run of some seconds, in blocks of four steps."""


_SHARE_WITH_ROWS = 0.8
"""Kills that come after rows were committed; others may come while a run only begins."""


@dataclass
class Counted:
    """What became of the runs.

    Attributes
    ----------
    identical
        Stores that are those of the uninterrupted run.
    kills
        Processes that were killed while they ran.
    resumed_after
        Steps after which they went on.
    differing
        For each other store the files that differ.
    """

    identical: int
    kills: int
    resumed_after: list[int]
    differing: list[list[str]]


def kill_and_resume(
    root: Path, options: Sequence[str], *, runs: int, seed: int, most_kills: int = 3
) -> Counted:
    """Train once as a whole, and `runs` times with kills; compare."""
    rng = random.Random(seed)
    reference = root / "whole.zarr"
    _expect_end(_train(reference, options))
    (reader,) = StoreReader.open_each(reference)
    training_s = sum(reader.read_history().overhead.values(), Overhead()).elapsed_s
    counted = Counted(0, 0, [], [])
    for run in range(runs):
        store = root / f"killed-{run}.zarr"
        pid = _train(store, options)
        for _ in range(rng.randint(1, most_kills)):
            if rng.random() < _SHARE_WITH_ROWS:
                _wait_for_rows(pid, store)
            time.sleep(rng.uniform(0, training_s / 2))
            counted.kills += _kill(pid)
            pid = _train(store, ["--resume"] if read_declared(store) else [*options, "--resume"])
        _expect_end(pid)
        counted.resumed_after += StoreReader.open_each(store)[0].read_history().resumed_after
        differing = differing_files(reference, store)
        counted.identical += not differing
        if differing:
            counted.differing.append(differing)
        else:
            shutil.rmtree(store)
    return counted


def differing_files(one: Path, other: Path) -> list[str]:
    """Return the files of two stores that differ, but for when they were recorded and how fast."""
    names = {path: _files(path) for path in (one, other)}
    differing = names[one] ^ names[other]
    for name in names[one] & names[other]:
        if _content(one, name) != _content(other, name):
            differing.add(name)
    if _ledger(one) != _ledger(other):
        differing.add(LEDGER)
    return sorted(differing)


def _files(store: Path) -> set[str]:
    files = (path.relative_to(store) for path in store.rglob("*") if path.is_file())
    return {file.as_posix() for file in files if file.parts[0] != BOOKKEEPING}


def _content(store: Path, name: str) -> object:
    content = (store / name).read_bytes()
    if not name.endswith(METADATA):
        return content
    return _without_dates(json.loads(content))


def _without_dates(document: Any) -> Any:
    if not isinstance(document, dict):
        return document
    return {name: _without_dates(value) for name, value in document.items() if name != "created"}


def _ledger(store: Path) -> dict[str, object]:
    """Return what a ledger says last of each file and of the chunks of each block."""
    known: dict[str, Any] = {}
    reader = StoreReader.open_each(store)[0]
    for key, record in Ledger.read(reader.files, reader.commit).records.items():
        known[key] = [record.n_bytes, record.crc32, record.checksums]
    return known


def _n_rows(store: Path) -> int:
    with suppress(OSError):
        return StoreReader.open_each(store)[0].n_rows
    return 0


def _wait_for_rows(pid: int, store: Path) -> None:
    """Wait until a run has committed a block more, or ended."""
    n_rows = _n_rows(store)
    ended = os.WNOWAIT | os.WNOHANG | os.WEXITED
    while _n_rows(store) == n_rows and os.waitid(os.P_PID, pid, ended) is None:
        time.sleep(0.002)


def _train(store: Path, options: Sequence[str]) -> int:
    return _start(lambda: cli(["train", str(store), "--quiet", *options]))


def _start(work: Callable[[], object]) -> int:
    """Run `work` in a process of its own; return its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def _kill(pid: int) -> bool:
    """Kill a process; return whether it still ran."""
    os.kill(pid, signal.SIGKILL)  # it is there until it is waited for
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a run ended with exit code {code}")
    return code != 0


def _expect_end(pid: int) -> None:
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        raise RuntimeError(f"a run ended with exit code {code}")


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--runs", default=10, show_default=True, help="Runs that are killed and resumed.")
@click.option("--seed", default=0, show_default=True, help="Seed of when they are killed.")
@click.option("--checkpoint-share", default=0.5, show_default=True, help="Of a run's time.")
@click.argument("options", nargs=-1)
def main(*, runs: int, seed: int, checkpoint_share: float, options: tuple[str, ...]) -> None:
    """Print how many of the killed runs are the uninterrupted one.

    OPTIONS are those of `train`, after `--`; a tiny model by default.
    """
    import torch

    from thimble_zarr.experiment import trainer  # noqa: F401  # imported once, for all

    torch.set_num_threads(1)  # threads would not be there after a fork
    tuning.TUNING = replace(tuning.TUNING, checkpoint_share=checkpoint_share)
    with tempfile.TemporaryDirectory() as root:
        counted = kill_and_resume(Path(root), options or TINY, runs=runs, seed=seed)
    click.echo(
        f"{counted.identical} of {runs} runs are identical after {counted.kills} kills in all; "
        f"they went on after steps {', '.join(map(str, counted.resumed_after))}"
    )
    for differing in counted.differing:
        click.echo(f"  differs: {', '.join(differing)}")
    sys.exit(counted.identical != runs)


if __name__ == "__main__":
    main()
