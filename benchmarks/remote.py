"""What it costs that a store lies on a server: the same questions to a disk, a server, a slow one.

The server (SeaweedFS) runs on the same machine and takes its share of the cores. By hand::

    python -m benchmarks.remote run.zarr
"""

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import click

from benchmarks.__main__ import machine, measure_in_turn, say
from benchmarks.object_store import BUCKET, object_store
from benchmarks.processes import Measured
from tests.support.links import link
from thimble_zarr import publish

_READ = """
import json, sys, time, thimble_zarr
ds = thimble_zarr.open_dataset(sys.argv[1])
start = time.perf_counter()
ds.isel(token=17)[["W", "grad", "exp_avg", "exp_avg_sq"]].load()
print(json.dumps({"read_s": time.perf_counter() - start}))
"""


def _check(tokens: str) -> Callable[[str], list[str]]:
    return lambda path: ["-m", "thimble_zarr", "check", path, "--tokens", tokens, "-q"]


QUESTIONS: dict[str, Callable[[str], list[str]]] = {
    "check of the dead tokens": _check("dead"),
    "check of all tokens": _check("all"),
    "history of one token, once open": lambda path: ["-c", _READ, path],
}
"""Python's arguments for each question, given a path; each is a process of its own."""


def seconds(run: Measured) -> float:
    """Return what the answer took: what it says itself, or else the whole process."""
    return run.json["read_s"] if "read_s" in run.stdout else run.wall_s


@click.command()
@click.argument("store", type=click.Path(path_type=Path, exists=True))
@click.option("--url", help="Where STORE is published, at AWS_ENDPOINT_URL.  [default: nowhere]")
@click.option("--repeats", default=5, show_default=True)
@click.option("--latency", "latency_s", default=0.02, show_default=True, help="Seconds a request.")
@click.option("--only", default="", help="Questions that have this word.")
def main(store: Path, *, url: str | None, repeats: int, latency_s: float, only: str) -> None:
    """Publish STORE, and print what each question takes, medians and ratios to the disk."""
    results: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        if url is None:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="thimble-zarr-")))
            stack.enter_context(object_store(root / "weed"))
            url = f"s3://{BUCKET}/run.zarr"
            say(f"published {publish(store, url).n_rows:,} rows")
        address = os.environ["AWS_ENDPOINT_URL"]
        port = int(address.rpartition(":")[2])
        slow = stack.enter_context(link(port, latency_s=latency_s)).address
        places = {"disk": (address, store), "server": (address, url), "slow server": (slow, url)}
        for question, arguments in QUESTIONS.items():
            if only not in question:
                continue
            of = {
                place: ["env", f"AWS_ENDPOINT_URL={where}", sys.executable, *arguments(str(path))]
                for place, (where, path) in places.items()
            }
            found = measure_in_turn(of, repeats=repeats)
            results[question] = {
                place: statistics.median(map(seconds, runs)) for place, runs in found.items()
            }
    for question, medians in results.items():
        words = [f"{place} {s:.2f} s ({s / medians['disk']:.2f})" for place, s in medians.items()]
        say(f"{question}: {', '.join(words)}")
    click.echo(json.dumps({"machine": machine(), "latency_s": latency_s, **results}, indent=1))


if __name__ == "__main__":
    main()
