"""Read a run that is larger than the memory, with those peers that can: what out of core is for."""

from pathlib import Path

import click

from benchmarks.peers.__main__ import (
    about,
    cold,
    measure_reading,
    read_numbers,
    stored_bytes,
    write_numbers,
    write_report,
)
from benchmarks.peers.inputs import TITLES, Inputs
from benchmarks.peers.prepare import prepare
from benchmarks.peers.report import LARGER, OURS

PEERS = ("memmap", "tensorstore", OURS)


@click.command()
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option(
    "--directory", type=click.Path(path_type=Path), default=Path("runs/long"), show_default=True
)
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    default=Path("runs/long/run.zarr"),
    show_default=True,
    help="A closed bfloat16 run of AdamW, whose raw numbers are more than the memory holds.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("benchmarks/RESULTS.md"),
    show_default=True,
    help="What `benchmarks.peers` wrote; the numbers are added to peers.json beside it.",
)
def main(*, repeats: int, directory: Path, store: Path, output: Path) -> None:
    """Measure, and write the results again with a section more; ten minutes on two cores."""
    results = read_numbers(output)
    if not results:
        raise click.UsageError(
            f"there are no numbers beside {output}: benchmarks.peers comes first"
        )
    inputs = Inputs(directory / "peers", store)
    prepare(inputs, raw_only=True)
    results[LARGER] = {
        "about": about(inputs, repeats),
        "tasks": TITLES,
        "disk": stored_bytes(inputs, PEERS),
        "reading": measure_reading(inputs, cold, repeats=repeats, quick=True, peers=PEERS),
    }
    write_numbers(results, output)
    write_report(results, output)


if __name__ == "__main__":
    main()
