"""Recode a plain store, and compare what each coding takes: disk, and time to answer.

By hand::

    python -m benchmarks.coding run.zarr
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

import click

from benchmarks.__main__ import machine, measure_in_turn, python, say
from benchmarks.processes import measure
from thimble_zarr.store.reader import StoreReader

QUESTIONS = {
    "exact check of all tokens": ("check", "--tokens", "all", "--no-formula", "-q"),
    "formula check of all tokens": ("check", "--tokens", "all", "--no-replay", "-q"),
}
"""What is asked of each store, whole processes."""

READS = {
    "history of one token": "ds.isel(token=17)[['W', 'grad', 'exp_avg', 'exp_avg_sq']].load()",
    "residual of 100 tokens": "ds.isel(token=slice(None, None, 100)).residual.load()",
    "one step of everything": "ds.isel(step=777)[['W', 'grad', 'exp_avg', 'exp_avg_sq']].load()",
}
"""Lines of Python that read a dataset, with the time that they take once it is open."""

_READ = """
import json, sys, time, thimble_zarr
ds = thimble_zarr.open_dataset(sys.argv[1])
start = time.perf_counter(), time.process_time()
{line}
print(json.dumps([time.perf_counter() - start[0], time.process_time() - start[1]]))
"""


@click.command()
@click.argument("store", type=click.Path(path_type=Path, exists=True))
@click.option("--repeats", default=3, show_default=True)
def main(store: Path, *, repeats: int) -> None:
    """Recode STORE, which is plain, and print what each coding takes, medians."""
    with tempfile.TemporaryDirectory(prefix="thimble-zarr-", dir=store.parent) as directory:
        stores = {"plain": store}
        results: dict[str, dict[str, object]] = {"plain": {}}
        for name, options in {"predicted": (), "archive": ("--archive",)}.items():
            stores[name] = Path(directory) / f"{name}.zarr"
            command = python("thimble_zarr", "recode", store, stores[name], "-q", *options)
            found = measure(command)
            results[name] = {"recode_s": found.wall_s, "recode_rss_bytes": found.peak_rss_bytes}
        for name, path in stores.items():
            n_bytes = results[name]["bytes"] = StoreReader.open_each(path)[0].disk_bytes()
            say(f"  {name}: {n_bytes / 1e9:.3f} GB")
        for question, arguments in QUESTIONS.items():
            of = {
                name: python("thimble_zarr", arguments[0], path, *arguments[1:])
                for name, path in stores.items()
            }
            for name, runs in measure_in_turn(of, repeats=repeats).items():
                wall_s, cpu_s = (
                    statistics.median(getattr(run, what) for run in runs)
                    for what in ("wall_s", "cpu_s")
                )
                peak = max(run.peak_rss_bytes for run in runs)
                results[name][question] = {"wall_s": wall_s, "cpu_s": cpu_s, "rss_bytes": peak}
        for question, line in READS.items():
            code = _READ.format(line=line)
            of = {name: [sys.executable, "-c", code, str(path)] for name, path in stores.items()}
            for name, runs in measure_in_turn(of, repeats=repeats).items():
                walls, cpus = zip(*(json.loads(run.stdout) for run in runs), strict=True)
                results[name][question] = {
                    "wall_s": statistics.median(walls),
                    "cpu_s": statistics.median(cpus),
                }
    click.echo(json.dumps({"machine": machine(), **results}, indent=1))


if __name__ == "__main__":
    main()
