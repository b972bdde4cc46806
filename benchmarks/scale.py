"""Measure what `check` takes of memory and time as a run grows: steps, tokens and dims."""

import json
import tempfile
from pathlib import Path

import click

from benchmarks.__main__ import machine, python, say
from benchmarks.processes import measure
from benchmarks.synthetic import synthetic_run

RUNS = {
    "100 steps of 8 x 4": (100, 8, 4),
    "10,000 steps of 8 x 4": (10_000, 8, 4),
    "100,000 steps of 8 x 4": (100_000, 8, 4),
    "24 steps of GPT-2's 50,257 x 768": (24, 50_257, 768),
}
"""Steps, tokens and dims."""


@click.command()
@click.option("--memory", default="512MB", show_default=True, help="The bound of every check.")
@click.option("--runs", default=len(RUNS), show_default=True, help="Only so many of them.")
def main(*, memory: str, runs: int) -> None:
    """Write synthetic runs, check them within a bound, print what each check took."""
    results = {}
    for name, (n_steps, n_tokens, n_dims) in list(RUNS.items())[:runs]:
        with tempfile.TemporaryDirectory() as directory:
            store = Path(directory) / "run.zarr"
            synthetic_run(store, n_steps=n_steps, n_tokens=n_tokens, n_dims=n_dims)
            found = measure(python("thimble_zarr", "check", store, "-q", "--memory", memory))
        results[name] = {"wall_s": found.wall_s, "peak_rss_bytes": found.peak_rss_bytes}
        say(f"  {name}: {found.wall_s:.1f} s, {found.peak_rss_bytes / 1e6:.0f} MB")
    click.echo(json.dumps({"machine": machine(), "memory": memory, "checks": results}, indent=1))


if __name__ == "__main__":
    main()
