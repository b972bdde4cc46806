"""Plant every fault in runs of every optimizer, and count what `check` calls them.

Two real runs of AdamW, bfloat16 and float32, are recorded, and two small ones of every optimizer
that works element by element. Each fault that has a name is planted in a copy, several times at
random places; the confusion table shows what was planted and what was found. Then one bit of one
stored element of a real run is flipped in place, as often as asked, and must be found and located.
"""

import json
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.__main__ import about, python, say
from benchmarks.processes import measure
from tests.support import drawn_runs
from tests.support.faults import flip_in_place, rewrite
from tests.support.planted import CAST_BFLOAT16, CAST_FLOAT32, PLANTED, Planted, planted_in
from thimble_zarr import check
from thimble_zarr.bits import storage_dtype
from thimble_zarr.causes.catalogue import Finding
from thimble_zarr.store.reader import StoreReader

SOUND = "nothing"
NOTHING_FOUND = "no finding"

AROUND = 20
"""Steps checked to each side of a flipped bit: more than a block."""


def findings(
    store: Path, *, around: int | None = None, workers: int | None = None
) -> list[Finding]:
    """Check a store, or the steps around one: what a step replays to depends on no other row."""
    steps = None
    if around is not None:
        last = StoreReader.open(store).n_rows - 1
        steps = f"{max(1, around - AROUND)}:{min(last, around + AROUND)}"
    return list(check(store, tokens="all", steps=steps, workers=workers).findings)


def confusion(
    store: Path,
    faults: dict[str, Planted],
    *,
    repeats: int,
    seed: int,
    workers: int | None = None,
) -> Counter[tuple[str, str]]:
    """Return how often each fault was called what."""
    counts: Counter[tuple[str, str]] = Counter()
    copy = store.with_name("planted.zarr")
    random = np.random.default_rng(seed)
    n_rows = StoreReader.open(store).n_rows
    counts[SOUND, called(findings(store, workers=workers))] += 1
    for name, fault in faults.items():
        for _ in range(repeats):
            step = int(random.integers(5, n_rows - 10))
            shutil.rmtree(copy, ignore_errors=True)
            rewrite(store, copy, lambda bits, scalars: fault.plant(bits, scalars, step, random))  # noqa: B023
            counts[f"{name} ({fault.code})", called(findings(copy, workers=workers))] += 1
        say(f"  {name}: {[found for planted, found in counts if planted.startswith(name)]}")
    shutil.rmtree(copy, ignore_errors=True)
    return counts


def called(found: list[Finding]) -> str:
    return " + ".join(finding.code for finding in found) or NOTHING_FOUND


def flips(store: Path, *, trials: int, seed: int) -> dict[str, object]:
    """Flip one bit in place, through zarr-python, check, and put it back; repeat.

    The sound store is checked whole; with a bit flipped the steps around it are.
    """
    random = np.random.default_rng(seed)
    reader = StoreReader.open(store)
    schema = reader.schema
    found: Counter[tuple[str, bool, bool]] = Counter()
    if findings(store):
        raise click.ClickException(f"{store} is not sound")
    seconds = []
    for trial in range(trials):
        name = str(random.choice([*schema.dtypes]))
        place = (
            int(random.integers(reader.n_rows)),
            int(random.integers(schema.n_tokens)),
            int(random.integers(schema.n_dims)),
        )
        file = store / name / f"c.{place[0] // schema.layout.block_steps}.0.0"
        before = file.read_bytes()
        bit = int(random.integers(8 * storage_dtype(schema.dtypes[name]).itemsize))
        flip_in_place(store, name, place, bit)
        start = time.perf_counter()
        causes = findings(store, around=place[0])
        seconds.append(time.perf_counter() - start)
        located = [(f.code, f.variable, (f.step, f.token, f.dim)) for f in causes]
        found[name, bool(causes), located == [("bit-flip", name, place)]] += 1
        if located != [("bit-flip", name, place)]:
            say(f"  {trial}: bit {bit} of {name} {place} was called {located}")
        file.write_bytes(before)
    return {
        "trials": trials,
        "found": sum(n for (_, was_found, _), n in found.items() if was_found),
        "located": sum(n for (_, _, was_located), n in found.items() if was_located),
        "by_variable": {
            name: sum(n for (variable, *_), n in found.items() if variable == name)
            for name in schema.dtypes
        },
        "check_s": float(np.median(seconds)),
    }


def of_optimizers(directory: Path, *, repeats: int) -> dict[str, dict[str, list[list[Any]]]]:
    """Return how often each fault was called what, by optimizer and dtype."""
    results: dict[str, dict[str, list[list[Any]]]] = {}
    for name in drawn_runs.elementwise():
        say(f"planting faults in runs of {name} ...")
        for dtype, casts in {"bfloat16": {}, "float32": CAST_FLOAT32}.items():
            store = directory / f"{name}-{dtype}.zarr"
            shutil.rmtree(store, ignore_errors=True)
            drawn_runs.record(store, name, dtype)
            faults = planted_in(StoreReader.open(store).schema.optimizer) | casts
            counts = confusion(store, faults, repeats=repeats, seed=0, workers=1)
            results.setdefault(name, {})[dtype] = [[*key, n] for key, n in counts.items()]
    return results


def every_count(results: dict[str, Any]) -> list[tuple[str, str, str, int]]:
    """Return of which run, what was planted, what it was called, and how often."""
    runs = {f"real, {dtype}": counts for dtype, counts in results["confusion"].items()}
    for name, by_dtype in results["optimizers"].items():
        runs |= {f"{name}, {dtype}": counts for dtype, counts in by_dtype.items()}
    return [(run, *count) for run, counts in runs.items() for count in counts]


def code_of(planted: str) -> str:
    """Return the name that a planted fault should be called by."""
    return NOTHING_FOUND if planted == SOUND else planted.rpartition("(")[2].rstrip(")")


def markdown(results: dict[str, Any]) -> str:
    """Return the confusion table: of each optimizer, how many of each fault were called so."""
    named: Counter[tuple[str, str]] = Counter()
    total: Counter[tuple[str, str]] = Counter()
    others: list[str] = []
    for run, planted, found, n in every_count(results):
        kind, code = run.partition(",")[0], code_of(planted)
        named[code, kind] += n if found == code else 0
        total[code, kind] += n
        others += [f"- {run}: {planted} was called {found} ({n})"] if found != code else []
    columns = [*dict.fromkeys(kind for _, kind in total)]
    lines = [f"| planted | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for code in sorted({code for code, _ in total}):
        cells = [
            f"{named[code, of]}/{total[code, of]}" if total[code, of] else "" for of in columns
        ]
        lines.append(f"| {SOUND if code == NOTHING_FOUND else f'`{code}`'} | {' | '.join(cells)} |")
    of = results["flips"]
    flipped = f"Of {of['trials']} flipped bits {of['located']} were found and located."
    return "\n".join([*lines, "", *others, flipped])


def summary(results: dict[str, Any]) -> str:
    """Return the sentence that the docs have."""
    counts = every_count(results)
    named = sum(n for _, planted, found, n in counts if found == code_of(planted) != NOTHING_FOUND)
    total = sum(n for _, planted, _, n in counts if planted != SOUND)
    false_alarms = sum(
        n for _, planted, found, n in counts if planted == SOUND and found != NOTHING_FOUND
    )
    of = results["flips"]
    return (
        f"{named} of {total} planted faults are called by their names, {false_alarms} alarms are "
        f"false, and of {of['trials']} random bits flipped in stored elements {of['located']} are "
        "found and located."
    )


def record(store: Path, dtype: str, steps: int, batch_size: int) -> Path:
    """Record a real run."""
    say(f"recording {steps} steps in {dtype} ...")
    sizes = ("--steps", steps, "--batch-size", batch_size, "--dtype", dtype)
    measure(python("thimble_zarr", "train", store, *sizes, "--overwrite", "--quiet"))
    return store


@click.command()
@click.option("--steps", type=int, default=50, show_default=True, help="Of the planted runs.")
@click.option("--flip-steps", type=int, default=200, show_default=True, help="Of the flipped run.")
@click.option("--batch-size", type=int, default=16, show_default=True)
@click.option("--repeats", type=int, default=1, show_default=True, help="Of each planted fault.")
@click.option("--trials", type=int, default=100, show_default=True, help="Flipped bits.")
@click.option(
    "--real/--no-real",
    default=True,
    show_default=True,
    help="Record and use real runs. Without them their last results stay in the output.",
)
@click.option(
    "--directory", type=click.Path(path_type=Path), default=Path("runs/faults"), show_default=True
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("benchmarks/faults.json"),
    show_default=True,
)
def main(
    *,
    steps: int,
    flip_steps: int,
    batch_size: int,
    repeats: int,
    trials: int,
    real: bool,
    directory: Path,
    output: Path,
) -> None:
    """Plant faults and count what they are called."""
    directory.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"confusion": {}}
    if not real:
        results = json.loads(output.read_text(encoding="utf-8"))
    results["optimizers"] = of_optimizers(directory, repeats=repeats)
    if real:
        for dtype, faults in {
            "bfloat16": PLANTED | CAST_BFLOAT16,
            "float32": PLANTED | CAST_FLOAT32,
        }.items():
            store = record(directory / f"{dtype}.zarr", dtype, steps, batch_size)
            say("planting faults ...")
            counts = confusion(store, faults, repeats=repeats, seed=0)
            results["confusion"][dtype] = [[*key, n] for key, n in counts.items()]
        store = record(directory / "flips.zarr", "bfloat16", flip_steps, batch_size)
        say("flipping bits ...")
        results["flips"] = flips(store, trials=trials, seed=1)
        results["about"] = about(steps, batch_size) | {"flip_steps": flip_steps}
    output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    click.echo(f"{markdown(results)}\n\n{summary(results)}")


if __name__ == "__main__":
    main()
