"""Crash recordings in every way there is, many times over, and print how often nothing was lost.

What the tests do with samples, this does with all: `make soak`, half an hour on two cores.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from tests import test_crash, test_power_loss
from tests.support import crashing, damage, power, stores
from tests.support.runs import record
from thimble_zarr.store.files import disk as disk_module


def kills(directory: Path, n_kills: int) -> str:
    """Kill recordings at random moments."""
    truth = record(directory / "truth.zarr", n_steps=test_crash.N_STEPS)
    with crashing.server() as server:
        found = test_crash.kill_many(server, truth, directory, n_kills)
    n_cut = sum(0 < n_rows <= test_crash.N_STEPS for n_rows, _ in found)
    n_left = sum(left for _, left in found)
    return (
        f"{n_kills} recordings killed, {n_cut} of them between their first commit and their end; "
        f"{n_left} left something behind, which was repaired; 0 lost a flushed step or gave a "
        "wrong number"
    )


def power_losses(directory: Path, every: int) -> str:
    """Lose power after calls of the system."""
    system = power.LoggedOs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_module, "os", system)
        path = test_power_loss.record(directory / "disk/run.zarr", system)
    n_states = test_power_loss.sweep(path, system.log, directory, every)
    return (
        f"power lost after {len(system.log) // every} calls of the system, in "
        f"{len(power.POLICIES)} ways: {n_states} different disks; 0 lost a flushed step or gave a "
        "wrong number"
    )


def failing_calls(directory: Path, every: int) -> str:
    """Let calls of the system fail."""
    counts = {
        kind: test_crash.fail_everywhere(directory, kind, code, every) // every
        for kind, code in test_crash.CALLS.items()
    }
    words = ", ".join(f"{n} x {kind}" for kind, n in counts.items())
    return f"calls that failed: {words}; 0 lost a committed step"


def changed_bytes(directory: Path, n_places: int) -> str:
    """Change bytes of every file of a store."""
    path = directory / "run.zarr"
    stores.write_run(path)
    counts = damage.sweep(path, n_places)
    return (
        f"{sum(counts.values()):,} changes to the files of a store: {counts['found']:,} found by "
        f"verify, {counts['harmless']:,} change no value (white space in JSON), 0 others"
    )


@click.command()
@click.option("--n-kills", type=int, default=200, show_default=True)
@click.option("--every", type=int, default=1, show_default=True, help="Try one call in so many.")
@click.option("--n-places", type=int, default=10**9, help="Bytes a file.  [default: all]")
def main(*, n_kills: int, every: int, n_places: int) -> None:
    """Crash, and count."""
    runs: list[tuple[Callable[[Path, int], str], int]] = [
        (kills, n_kills),
        (power_losses, every),
        (failing_calls, every),
        (changed_bytes, n_places),
    ]
    for run, size in runs:
        directory = Path(tempfile.mkdtemp(prefix="thimble-zarr-soak-"))
        start_s = time.perf_counter()
        try:
            click.echo(f"{run(directory, size)} ({time.perf_counter() - start_s:.0f} s)")
        finally:
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
