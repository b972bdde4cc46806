"""A long recording of a small model: does memory or the time of a commit grow with the steps?

It is recorded once as fast as the disk is, and once with a disk that takes ten times as long for
every byte and every sync, so that training waits for it.
"""

import functools
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import torch

from thimble_zarr import Recorder
from thimble_zarr.store.files import disk
from thimble_zarr.store.reader import StoreReader

EARLY_STEP = 200
"""Where memory and commits are compared with those at the end."""

WINDOW_STEPS = 200

SHAPE = 1_000, 16

MEMORY_BYTES = 2**23
"""Makes blocks of a few steps, so that there are many commits."""

SLOWNESS = 10


class SlowOs:
    """`os`, with writes and syncs that take ten times as long."""

    def __getattr__(self, name: str) -> Any:
        call = getattr(os, name)
        return functools.partial(slowed, call) if name in ("write", "fsync") else call


def slowed(call: Callable[..., object], *arguments: object) -> object:
    """Do something, and wait nine times as long as that took."""
    start_s = time.perf_counter()
    result = call(*arguments)
    time.sleep((SLOWNESS - 1) * (time.perf_counter() - start_s))
    return result


def record(path: Path, n_steps: int) -> dict[str, float]:
    """Record random steps; return memory and the time of commits, early and at the end."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(SHAPE, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([weight])
    gradients = torch.randn(17, *SHAPE).bfloat16()
    process, resident = psutil.Process(), []
    with Recorder(path, optimizer, parameter=weight, memory_bytes=MEMORY_BYTES) as recorder:
        for step in range(n_steps):
            weight.grad = gradients[step % len(gradients)]
            optimizer.step()
            recorder.log(loss=step)
            resident.append(process.memory_info().rss)
    reader = StoreReader.open(path)
    commits = {
        first_row: spent.encode_s + spent.write_s + spent.sync_s
        for first_row, spent in reader.read_history().overhead.items()
    }
    early = slice(EARLY_STEP, EARLY_STEP + WINDOW_STEPS)
    late = slice(n_steps - WINDOW_STEPS, n_steps)
    commit_s = [
        statistics.median(s for row, s in commits.items() if part.start <= row < part.stop)
        for part in (early, late)
    ]
    rss = [float(np.median(resident[part])) for part in (early, late)]
    waits = sum(spent.n_waits for spent in reader.read_history().overhead.values())
    return {
        "n_steps": n_steps,
        "block_steps": reader.schema.layout.block_steps,
        "n_waits": waits,
        "rss_early_bytes": rss[0],
        "rss_late_bytes": rss[1],
        "rss_growth": rss[1] / rss[0] - 1,
        "commit_early_ms": 1e3 * commit_s[0],
        "commit_late_ms": 1e3 * commit_s[1],
        "commit_growth": commit_s[1] / commit_s[0],
    }


@click.command()
@click.option("--steps", type=int, default=20_000, show_default=True)
@click.option("--slow/--fast", help="With a disk of a tenth of its speed.")
def main(*, steps: int, slow: bool) -> None:
    """Record, and print JSON."""
    directory = Path(tempfile.mkdtemp(prefix="thimble-zarr-endurance-"))
    try:
        if slow:
            setattr(disk, "os", SlowOs())  # noqa: B010  # the one module that writes
        result = record(directory / "run.zarr", steps)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    click.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
