"""Time the check of a store in one worker process against several, whole processes in turn."""

import json
from pathlib import Path

import click

from benchmarks.__main__ import machine, measure_in_turn, python, summarize


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--workers", default=2, show_default=True, help="Compared with one.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--replay/--no-replay", default=True, help="With the exact check, or the formula's.")
def main(store: Path, *, workers: int, repeats: int, replay: bool) -> None:
    """Check all tokens of STORE with one worker and with several; print both and the ratio.

    The run should be long: 5,000 steps of Thimble 1, say.
    """
    what = ("--tokens", "all", "--extended", "--format", "csv", "--quiet")
    how = () if replay else ("--no-replay",)
    check = python("thimble_zarr", "check", store, *what, *how, "--workers")
    commands = {str(number): [*check, str(number)] for number in (1, workers)}
    found = summarize(measure_in_turn(commands, repeats=repeats))
    times = [found[number]["wall_s"] for number in commands]
    results = {
        "machine": machine(),
        "workers": found,
        "speedup": times[0] / times[-1],
    }
    click.echo(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
