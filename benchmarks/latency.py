"""Time what a user waits for before there is anything to read: start-up, opening, one history."""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np

from benchmarks.__main__ import machine, measure_in_turn, python
from benchmarks.processes import measure
from benchmarks.synthetic import synthetic_run

STATES = ["W", "grad", "exp_avg", "exp_avg_sq"]

N_TOKENS = 20
"""Histories that are read, each of another token."""


def opened(store: Path) -> dict[str, float]:
    """Open a store in this process, and read histories; seconds."""
    from thimble_zarr import open_dataset

    start_s = time.perf_counter()
    ds = open_dataset(store)
    times = {"open_s": time.perf_counter() - start_s}
    tokens = np.random.default_rng(0).choice(ds.token.values, N_TOKENS, replace=False)
    histories = []
    for token in tokens:
        start_s = time.perf_counter()
        ds[STATES].sel(token=token).load()
        histories.append(time.perf_counter() - start_s)
    return times | {"first_s": histories[0], "history_s": statistics.median(histories[1:])}


def measure_opening(store: Path, repeats: int) -> dict[str, float]:
    """Return the medians of `opened`, each in a process of its own."""
    found = [measure(python("benchmarks.latency", store, "--child")).json for _ in range(repeats)]
    return {key: statistics.median(times[key] for times in found) for key in found[0]}


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--repeats", default=5, show_default=True)
@click.option("--child", is_flag=True, hidden=True)
def main(store: Path, *, repeats: int, child: bool) -> None:
    """Print medians for STORE, and for opening one of 100,000 steps."""
    if child:
        click.echo(json.dumps(opened(store)))
        return
    started = measure_in_turn(
        {
            "help": python("thimble_zarr", "--help"),
            "import": [sys.executable, "-c", "import thimble_zarr"],
        },
        repeats=repeats,
    )
    with tempfile.TemporaryDirectory() as directory:
        long = Path(directory) / "long.zarr"
        synthetic_run(long, n_steps=100_000, n_tokens=20, n_dims=4)
        results = {
            "machine": machine(),
            "started_s": {
                name: statistics.median(run.wall_s for run in runs)
                for name, runs in started.items()
            },
            "store": measure_opening(store, repeats),
            "of_100_000_steps": measure_opening(long, repeats),
        }
    click.echo(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
