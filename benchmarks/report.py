"""Measure what a report takes: time, memory, and bytes of the page, as a run grows.

The numbers of a run are random, each token's its own, so that nothing compresses: a real run's page
is smaller.
"""

import json
import tempfile
from pathlib import Path

import click
import dask.array
import numpy as np
import xarray as xr

from benchmarks.__main__ import machine, python, say
from benchmarks.processes import measure
from thimble_zarr import open_dataset
from thimble_zarr.analysis.summary.contents import QUANTILES, Contents
from thimble_zarr.report.browser.facts import schema_of
from thimble_zarr.report.html import Audited, as_html
from thimble_zarr.report.run import Run

RUNS = {
    "5,000 steps of 10,000 x 64": (5_000, 10_000, 64),
    "24 steps of GPT-2's 50,257 x 768": (24, 50_257, 768),
}
"""Steps, tokens and dims."""

GROUPS = ("dead", "live", "all", "one", "two")

CHUNKS = {"step": 64, "token": 4096, "group": 1}
"""As a summary has them, about."""


def random_summary(ds: xr.Dataset, path: Path) -> None:
    """Write what `summary` would return of a run, of random numbers."""
    run = Run(store="run.zarr", ds=ds, summary=ds)
    sizes = {"group": len(GROUPS), "step": ds.sizes["step"], "quantile": len(QUANTILES)}
    sizes |= {"token": ds.sizes["token"], "dim": ds.sizes["dim"]}
    random, variables = dask.array.random.default_rng(0), {}
    for name, variable in Contents(schema_of(run)).variables.items():
        shape = [sizes[dim] for dim in variable.dims]
        chunks = [min(sizes[dim], CHUNKS.get(dim, sizes[dim])) for dim in variable.dims]
        if np.issubdtype(variable.dtype, np.floating):
            values = dask.array.exp(random.normal(-5, 2, size=shape, chunks=chunks))
        else:
            most = 2 if variable.dtype is np.bool_ else ds.sizes["step"]
            values = random.integers(0, most, size=shape, chunks=chunks)
        variables[name] = (variable.dims, values.astype(variable.dtype))
    labels = {"group": [*GROUPS], "quantile": [*QUANTILES], "step": ds.step, "token": ds.token}
    attrs = {"ulp_dtype": "bfloat16"}
    xr.Dataset(variables, coords=labels, attrs=attrs).to_zarr(path, consolidated=False)


@click.group()
def main() -> None:
    """Measure what a report takes."""


@main.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("summary", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
def page(store: Path, summary: Path, output: Path) -> None:
    """Write the report of STORE, with a summary that lies anywhere."""
    numbers = xr.open_zarr(summary, consolidated=False)
    run = Run(store=str(store), ds=open_dataset(store), summary=numbers)
    output.write_text(as_html([Audited(run=run)]), encoding="utf-8")


@main.command()
def sizes() -> None:
    """Write runs of random numbers, and print what the report of each takes."""
    from benchmarks.synthetic import synthetic_run  # with torch, which no report loads

    results = {}
    for name, (n_steps, n_tokens, n_dims) in RUNS.items():
        with tempfile.TemporaryDirectory() as directory:
            store, summary = Path(directory) / "run.zarr", Path(directory) / "random.zarr"
            output = Path(directory) / "run.html"
            synthetic_run(store, n_steps=n_steps, n_tokens=n_tokens, n_dims=n_dims)
            random_summary(open_dataset(store), summary)
            found = measure(python("benchmarks.report", "page", store, summary, output))
            n_bytes = output.stat().st_size
        results[name] = {
            "wall_s": found.wall_s,
            "peak_rss_bytes": found.peak_rss_bytes,
            "page_bytes": n_bytes,
        }
        memory = f"{found.peak_rss_bytes / 1e6:.0f} MB of memory"
        say(f"  {name}: {found.wall_s:.1f} s, {memory}, page of {n_bytes / 1e6:.2f} MB")
    click.echo(json.dumps({"machine": machine(), "reports": results}, indent=1))


@main.command()
@click.argument("store", type=click.Path(path_type=Path))
def command(store: Path) -> None:
    """Print what `thimble-zarr report` takes of a run that was summed up before."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "run.html"
        arguments = ("thimble_zarr", "report", store, "--check", "none", "-q", "-o", output)
        measure(python(*arguments))
        found = measure(python(*arguments))
        n_bytes = output.stat().st_size
    result = {"wall_s": found.wall_s, "peak_rss_bytes": found.peak_rss_bytes, "page_bytes": n_bytes}
    click.echo(json.dumps({"machine": machine(), "report": result}, indent=1))


if __name__ == "__main__":
    main()
