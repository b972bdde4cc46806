"""Measure the peers side by side on one recorded run, and write tables, numbers and a plot."""

import datetime
import functools
import json
import shutil
import statistics
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.__main__ import commit, machine, measure_in_turn, python, say
from benchmarks.page_cache import drop
from benchmarks.peers.child import printed_table
from benchmarks.peers.inputs import BOTH, EXACT, TABLES, TASKS, TITLES, Inputs
from benchmarks.peers.prepare import prepare
from benchmarks.peers.recording import RECORDING
from benchmarks.peers.report import LARGER, OURS, Results, markdown, plot
from benchmarks.peers.thimble import CHECKS, check, counts
from benchmarks.processes import Measured

MODULES = {
    "notebook": "notebook",
    "memmap": "memmap",
    "h5py": "hdf5",
    "zarr + dask": "zarr_dask",
    "tensorstore": "tensor_store",
    OURS: "thimble",
}


def command(peer: str, task: str, inputs: Inputs) -> list[str]:
    """Return the process that solves a task."""
    if peer == OURS and task in CHECKS:
        return check(task, inputs)
    return python(f"benchmarks.peers.{MODULES[peer]}", task, inputs.directory, inputs.store)


def said(run: Measured) -> dict[str, Any]:
    """Return what a process of ours said of itself; the command line says nothing."""
    last = run.stdout.splitlines()[-1]
    return dict(json.loads(last)) if last.startswith("{") else {}


def answer(peer: str, task: str, run: Measured) -> np.ndarray:
    """Return the table, or the few numbers that tell an answer from another."""
    if task in TABLES:
        return printed_table(run.stdout)
    if peer == OURS and task in (EXACT, BOTH):
        return np.array(counts(run.stdout))
    return np.array(said(run)["digest"])


def difference(task: str, ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the largest difference: of cosines absolute, of counts too, of all else relative.

    Where ours is NaN nothing moved, and there is nothing to compare.
    """
    if ours.shape != theirs.shape:
        return float("inf")
    with np.errstate(invalid="ignore"):  # a ratio is infinite where nothing moved
        absolute = np.where(ours == theirs, 0.0, np.abs(ours - theirs))
        relative = absolute / np.maximum(np.abs(ours), np.finfo(float).tiny)
    if task in TABLES:
        relative[:, 3] = absolute[:, 3]
    return float(np.nanmax(absolute if task == EXACT else relative))


def warm(inputs: Inputs, peer: str) -> None:
    """Bring what a peer reads into the page cache, which another may have needed."""
    for path in inputs.files(peer):
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass


def cold(inputs: Inputs, peer: str) -> None:
    """Drop what a peer reads from the page cache, as if the data were larger than memory."""
    for path in inputs.files(peer):
        drop(path)


def median(values: list[float]) -> float:
    return float(statistics.median(values))


def summarize(runs: list[Measured]) -> dict[str, float]:
    """Return the medians of all that was measured and said."""
    numbers = [
        {
            "wall_s": run.wall_s,
            "peak_rss_bytes": run.peak_rss_bytes,
            "bytes_read": run.bytes_read + said(run).get("mapped_bytes", 0),
        }
        | {key: value for key, value in said(run).items() if key != "digest"}
        for run in runs
    ]
    medians = {key: median([number[key] for number in numbers]) for key in numbers[0]}
    return medians | {"n": len(runs)}


SLOW = {"zarr + dask": ("formula, dead", "formula, all", "exact, all", "residual")}
"""What takes minutes each."""

SELDOM = 3
"""Turns, at most, of reading from the disk and of recording, which take longest."""


def measure_reading(
    inputs: Inputs,
    before: Callable[[Inputs, str], None],
    *,
    repeats: int,
    quick: bool,
    peers: Collection[str] = MODULES,
) -> Results:
    """Solve every task with every peer, and compare the answers with ours."""
    reading: dict[str, dict[str, dict[str, float]]] = {}
    in_turn = functools.partial(measure_in_turn, before=functools.partial(before, inputs))
    for task, title in TITLES.items():
        say(f"{title}, {before.__name__} ...")
        slow = [peer for peer in peers if quick and task in SLOW.get(peer, ())]
        solvers = peers if task in TASKS else (OURS,)
        commands = {peer: command(peer, task, inputs) for peer in solvers}
        found = in_turn(
            {peer: line for peer, line in commands.items() if peer not in slow}, repeats=repeats
        )
        if before is warm:
            found |= in_turn({peer: commands[peer] for peer in slow}, repeats=1)
        ours = answer(OURS, task, found[OURS][0])
        reading[task] = {}
        for peer, runs in found.items():
            differs = difference(task, ours, answer(peer, task, runs[0]))
            reading[task][peer] = summarize(runs) | {"difference": differs}
    return reading


def measure_recording(inputs: Inputs, *, steps: int, repeats: int) -> Results:
    """Record the synthetic loop with every peer."""
    say(f"recording {steps} steps ...")
    path = inputs.directory / "recorded"

    def remove(_: str) -> None:
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)

    module = "benchmarks.peers.recording"
    commands = {
        peer: python(module, peer, path, inputs.directory, inputs.store, steps)
        for peer in RECORDING
    }
    found = measure_in_turn(commands, repeats=repeats, before=remove)
    remove("")
    return {peer: summarize(runs) for peer, runs in found.items()}


def stored_bytes(inputs: Inputs, peers: Iterable[str] = MODULES) -> dict[str, int]:
    """Return what each peer's files take on disk."""
    return {peer: sum(f.stat().st_size for f in inputs.files(peer)) for peer in peers}


def about(inputs: Inputs, repeats: int) -> Results:
    """Return what was measured, when and on what."""
    n_rows, n_tokens, n_dims = inputs.shape
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "steps": n_rows - 1,
        "n_tokens": n_tokens,
        "n_dims": n_dims,
        "n_dead": len(inputs.dead),
        "repeats": repeats,
    }


def read_numbers(output: Path) -> Results:
    """Return the numbers that lie beside a report, none if they were not measured yet."""
    file = output.with_name("peers.json")
    return dict(json.loads(file.read_text("utf-8"))) if file.exists() else {}


def write_numbers(results: Results, output: Path) -> None:
    """Write the numbers of a report, beside it."""
    output.with_name("peers.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")


def write_report(results: Results, output: Path) -> None:
    """Write and print the report."""
    text = markdown(results)
    output.write_text(text, "utf-8")
    click.echo(text)


@click.command()
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--steps", type=int, default=300, show_default=True, help="Of the recordings.")
@click.option(
    "--directory", type=click.Path(path_type=Path), default=Path("runs/bench"), show_default=True
)
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    default=Path("runs/bench/run.zarr"),
    show_default=True,
    help="A closed bfloat16 run of AdamW, from `python -m benchmarks` or `thimble-zarr train`.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("benchmarks/RESULTS.md"),
    show_default=True,
    help="The plot lies beside it under the same name, the numbers as peers.json.",
)
@click.option(
    "--quick",
    is_flag=True,
    help="Measure what takes minutes, zarr + dask, once, and not from disk.",
)
def main(
    *, repeats: int, steps: int, directory: Path, store: Path, output: Path, quick: bool
) -> None:
    """Measure; an hour on two cores. The peers' files take 17 GB for a run of 1,000 steps."""
    inputs = Inputs(directory / "peers", store)
    say("writing the peers' files ...")
    prepare(inputs)
    results: Results = {
        "about": about(inputs, repeats) | {"recording_steps": steps},
        "tasks": TITLES,
        "disk": stored_bytes(inputs),
    }
    if (known := read_numbers(output)).get(LARGER):  # `benchmarks.peers.larger` measured it
        results[LARGER] = known[LARGER]
    seldom = min(repeats, SELDOM)
    measured: dict[str, Callable[[], Results]] = {
        "reading": lambda: measure_reading(inputs, warm, repeats=repeats, quick=quick),
        "cold": lambda: measure_reading(inputs, cold, repeats=seldom, quick=True),
        "recording": lambda: measure_recording(inputs, steps=steps, repeats=seldom),
    }
    for name, measure_all in measured.items():
        results[name] = measure_all()
        write_numbers(results, output)
    plot(results, output.with_suffix(".png"))
    write_report(results, output)


if __name__ == "__main__":
    main()
