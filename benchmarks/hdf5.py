"""`check` of an HDF5 file in place, against h5py that reads the same bytes once and does no more.

Whole processes in turn, from the page cache and from the disk. By hand::

    python -m benchmarks.hdf5 run.zarr
"""

import json
import sys
import tempfile
from pathlib import Path

import click
import h5py
import numpy as np

from benchmarks.__main__ import machine, measure_in_turn, python, say, summarize
from benchmarks.page_cache import drop
from benchmarks.processes import Measured
from thimble_zarr.format.layout import split_range
from thimble_zarr.store.reader import StoreReader

NAMES = {"W": "W", "grad": "grad_W", "exp_avg": "momentum_W", "exp_avg_sq": "variance_W"}
"""What the layout calls our variables."""

CHUNK_ROWS = 1600

_READ = f"""
import sys, h5py, numpy
file = h5py.File(sys.argv[1], "r")
for name in {[*NAMES.values()]}:
    dataset = file[name]
    rows = numpy.empty((8, *dataset.shape[1:]), dataset.dtype)  # which are used again
    for first in range(0, len(dataset), len(rows)):
        some = rows[: len(dataset) - first]
        dataset.read_direct(some, slice(first, first + len(some)))
"""


def write(store: Path, file: Path, n_bytes: int) -> None:
    """Write the first rows of a store in Thimble 7's layout: so many bytes of them."""
    reader = StoreReader.open(store)
    schema = reader.schema
    row_bytes = len(NAMES) * schema.n_tokens * schema.n_dims * 2
    n_rows = min(reader.n_rows, n_bytes // row_bytes)
    scalars = {name: values[:n_rows] for name, values in reader.read_scalars().items()}
    shape, dead = (n_rows, schema.n_tokens, schema.n_dims), reader.read_labels().dead
    if dead is None:
        raise click.UsageError(f"{store} does not say which tokens are dead")
    with h5py.File(file, "w") as written:
        for name, theirs in NAMES.items():
            dataset = written.create_dataset(
                theirs,
                shape,
                "u2",
                chunks=(CHUNK_ROWS, *shape[1:]),
                maxshape=(None, *shape[1:]),
                fill_time="never",
            )
            for rows in split_range(0, n_rows, schema.layout.block_steps):
                bits = reader.read(name, rows)
                if name == "grad" and rows[0] == 0:
                    bits[0] = 0  # there is none; the layout has zeros
                dataset[slice(*rows)] = bits
        written["losses"] = scalars["loss"].astype(np.float32)
        written["live_mask"], written["dead_mask"] = ~dead, dead
        names = {"learning_rate": "learning_rate", "weight_decay": "weight_decay"}
        names |= {"beta1": "adam_beta1", "beta2": "adam_beta2", "eps": "adam_epsilon"}
        for name, theirs in names.items():
            written.attrs[theirs] = np.float32(scalars[name][-1])


@click.command()
@click.argument("store", type=click.Path(path_type=Path, exists=True))
@click.option("--gigabytes", default=2.0, show_default=True, help="Of the first rows of STORE.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--directory", type=click.Path(path_type=Path), help="Where the file is written.")
def main(store: Path, *, gigabytes: float, repeats: int, directory: Path | None) -> None:
    """Write rows of STORE, a bfloat16 run of AdamW, as HDF5; print medians and ratios to h5py."""
    with tempfile.TemporaryDirectory(prefix="thimble-zarr-", dir=directory) as place:
        file = Path(place) / "thimble_7.h5"
        write(store, file, int(gigabytes * 1e9))
        check = python("thimble_zarr", "check", file, "--quiet", "--tokens")
        commands = {
            "h5py alone": [sys.executable, "-c", _READ, str(file)],
            "check of the dead tokens": [*check, "dead"],
            "check of all tokens": [*check, "all"],
        }
        results = dict[str, dict[str, dict[str, float]]]()
        say("from the page cache ...")
        results["warm"] = _beside_h5py(measure_in_turn(commands, repeats=repeats))
        say("from the disk ...")
        found = measure_in_turn(commands, repeats=repeats, before=lambda name: drop(file))
        results["cold"] = _beside_h5py(found)
    click.echo(json.dumps({"machine": machine(), **results}, indent=1))


def _beside_h5py(found: dict[str, list[Measured]]) -> dict[str, dict[str, float]]:
    """Return medians, the shortest and the longest time, and how many times as long as h5py."""
    medians = summarize(found)
    alone = medians["h5py alone"]["wall_s"]
    for name, of in medians.items():
        times = [run.wall_s for run in found[name]]
        of |= {"min_s": min(times), "max_s": max(times), "ratio": of["wall_s"] / alone}
    return medians


if __name__ == "__main__":
    main()
