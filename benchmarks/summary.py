"""Time the summary of a store against the formula check of all its tokens, whole processes in turn.

By hand::

    python -m benchmarks.summary run.zarr
"""

import json
import shutil
import statistics
import tempfile
from pathlib import Path

import click

from benchmarks.__main__ import machine, measure_in_turn, python
from benchmarks.processes import Measured


@click.command()
@click.argument("store", type=click.Path(path_type=Path, exists=True))
@click.option("--repeats", default=3, show_default=True)
def main(store: Path, *, repeats: int) -> None:
    """Time the summary and the formula check of STORE in turn; print medians and ratios.

    Memory is that of all processes together.
    """
    with tempfile.TemporaryDirectory(prefix="thimble-zarr-") as directory:
        place = Path(directory) / "summary.zarr"
        formula = ("--tokens", "all", "--no-replay", "--quiet")
        commands = {
            "check": python("thimble_zarr", "check", store, *formula),
            "summary": python("thimble_zarr", "summary", store, "--output", place, "--quiet"),
        }
        found: dict[str, list[Measured]] = {name: [] for name in commands}
        for _ in range(repeats):
            shutil.rmtree(place, ignore_errors=True)
            taken = measure_in_turn(commands, repeats=1, before=lambda name: None)
            for name, (run,) in taken.items():
                found[name].append(run)
        kept_bytes = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    results = {
        name: {
            measure: statistics.median(getattr(run, measure) for run in runs)
            for measure in ("wall_s", "cpu_s", "peak_rss_bytes")
        }
        for name, runs in found.items()
    }
    ratios = {
        measure: results["summary"][measure] / results["check"][measure]
        for measure in ("wall_s", "cpu_s")
    }
    shown = {"machine": machine(), **results, "ratio": ratios, "kept_bytes": kept_bytes}
    click.echo(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
