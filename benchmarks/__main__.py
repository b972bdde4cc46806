"""Record a real run once and measure everything the docs claim; print one Markdown table."""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import psutil

from benchmarks.processes import Measured, measure
from thimble_zarr.store.reader import StoreReader

EARLY_STEP = 200

Results = dict[str, dict[str, Any]]


def python(module: str, *arguments: object) -> list[str]:
    """Return the command that runs a module."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def say(text: str) -> None:
    """Report progress."""
    click.echo(text, err=True)


def measure_in_turn(
    commands: Mapping[str, Sequence[str]],
    *,
    repeats: int,
    before: Callable[[str], object] | None = None,
) -> dict[str, list[Measured]]:
    """Run whole processes turn by turn.

    `before` is called before each with its name, outside of what is measured; without it one turn
    more warms the page cache.
    """
    found: dict[str, list[Measured]] = {name: [] for name in commands}
    for turn in range(0 if before else -1, repeats):
        for name, command in commands.items():
            if before:
                before(name)
            measured = measure(command)
            say(f"  {name}: {measured.wall_s:.1f} s, {measured.peak_rss_bytes / 1e6:.0f} MB")
            if turn >= 0:
                found[name].append(measured)
    return found


def summarize(found: dict[str, list[Measured]]) -> dict[str, dict[str, float]]:
    """Return the medians."""
    return {
        name: {
            "wall_s": statistics.median(run.wall_s for run in runs),
            "peak_rss_bytes": statistics.median(run.peak_rss_bytes for run in runs),
        }
        for name, runs in found.items()
    }


def machine() -> dict[str, object]:
    """Return what was measured on."""
    return {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
    }


def commit() -> str:
    """Return the commit that was measured."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    return shown.stdout.strip() or "unknown"


def markdown(results: Results, early: int, steps: int) -> str:
    """Return the table of README and docs."""
    time_s, bare, recorded = results["step_time"], results["bare"], results["recorded"]
    disk = results["disk"]

    def added(ours: float, theirs: float) -> str:
        return f"{ours / theirs - 1:+.1%}"

    def megabytes(n_bytes: float) -> str:
        return f"{n_bytes / 1e6:,.0f} MB"

    def gigabytes(n_bytes: float) -> str:
        return f"{n_bytes / 1e9:.2f} GB"

    rows = [
        (
            "a step, median",
            f"{time_s['recorded_median_s'] * 1e3:.0f} ms",
            f"{time_s['bare_median_s'] * 1e3:.0f} ms",
            added(time_s["recorded_median_s"], time_s["bare_median_s"]),
        ),
        (
            f"{time_s['n_steps']:.0f} steps, all writing included",
            f"{time_s['recorded_total_s']:.1f} s",
            f"{time_s['bare_total_s']:.1f} s",
            added(time_s["recorded_total_s"], time_s["bare_total_s"]),
        ),
    ]
    for step, key in ((early, "early_bytes"), (steps, "end_bytes")):
        rows.append(
            (
                f"peak RSS of training after {step:,} steps",
                megabytes(recorded[key]),
                megabytes(bare[key]),
                f"+{megabytes(recorded[key] - bare[key])}",
            )
        )
    rows += [
        (
            f"{steps:,} steps on disk (notebook: one safetensors file)",
            gigabytes(disk["store_bytes"]),
            gigabytes(disk["notebook_bytes"]),
            f"{disk['store_bytes'] / disk['raw_bytes']:.2f} of raw",
        ),
        (
            "`check` against an independent float64 computation",
            f"{max(results['agreement'].values()):.0e} relative",
            "",
            f"{len(results['agreement'])} subsets",
        ),
    ]
    lines = ["| | with thimble-zarr | without | difference |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def about(steps: int, batch_size: int) -> dict[str, Any]:
    """Return what was measured, when and on what."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "steps": steps,
        "batch_size": batch_size,
    }


def measure_recording(directory: Path, *, steps: int, batch_size: int, turns: int) -> Results:
    """Train with and without recording; leave the store in the directory."""
    store = directory / "run.zarr"
    sizes = ("--steps", steps, "--batch-size", batch_size, "--early", min(EARLY_STEP, steps))
    say("training without recording ...")
    bare = measure(python("benchmarks.run", *sizes)).json
    say("training and recording ...")
    recorded = measure(python("benchmarks.run", store, *sizes)).json
    say("step times, turn by turn ...")
    arguments = (directory / "overhead.zarr", "--turns", turns, "--batch-size", batch_size)
    overhead = measure(python("benchmarks.overhead", *arguments)).json
    return {
        "about": about(steps, batch_size),
        "step_time": overhead,
        "bare": bare,
        "recorded": recorded,
    }


def measure_checks(directory: Path, *, batch_size: int) -> Results:
    """Compare the recorded run's check with an independent one, its size with the notebook's."""
    store = directory / "run.zarr"
    say("agreement with an independent computation ...")
    agreement = measure(python("benchmarks.agreement", store)).json
    reader = StoreReader.open(store)
    n_elements = reader.n_rows * reader.schema.n_tokens * reader.schema.n_dims
    disk = {
        "store_bytes": reader.disk_bytes(),
        "raw_bytes": reader.n_rows * reader.schema.row_bytes,
        # Weights and gradients in bfloat16, moments in float32.
        "notebook_bytes": (2 + 2 + 4 + 4) * n_elements,
    }
    return {
        "checks_about": about(reader.n_rows - 1, batch_size),
        "disk": disk,
        "agreement": agreement,
    }


@click.command()
@click.option("--steps", type=int, default=1000, show_default=True)
@click.option("--batch-size", type=int, default=16, show_default=True)
@click.option("--turns", type=int, default=8, show_default=True, help="Turns of step times.")
@click.option(
    "--directory", type=click.Path(path_type=Path), default=Path("runs/bench"), show_default=True
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("benchmarks/results.json"),
    show_default=True,
)
@click.option("--only-checks", is_flag=True, help="Keep the run, and what recording it took.")
def main(
    *,
    steps: int,
    batch_size: int,
    turns: int,
    directory: Path,
    output: Path,
    only_checks: bool,
) -> None:
    """Measure; a quarter of an hour on two cores."""
    directory.mkdir(parents=True, exist_ok=True)
    if only_checks:
        results: Results = json.loads(output.read_text(encoding="utf-8"))
    else:
        results = measure_recording(directory, steps=steps, batch_size=batch_size, turns=turns)
    results |= measure_checks(directory, batch_size=batch_size)
    output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    click.echo(markdown(results, min(EARLY_STEP, steps), steps))


if __name__ == "__main__":
    main()
