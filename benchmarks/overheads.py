"""What recording costs a step of training: thimble-zarr in several ways, and trainscope.

Two trainings, with each way in a process of its own, turn by turn:

- *paced*: torch's AdamW on the gradients of a recorded run, and then a pause, so that a bare step
  takes as long as was asked for, and what works beside training has a core. What is added to the
  median step is what the training thread spends.
- *busy*: a float32 GPT-2 of 2 layers with small batches, which keeps all cores busy itself. The
  mean step counts until everything is on disk: here it costs what works beside training, too.

thimble-zarr records one parameter of 10,000 x 64, its gradient and its states, bit for bit.
trainscope records of every parameter and gradient norms, means and extremes at each step and now
and then histograms and activations, and no array: no step can be checked with what it records.
"""

import json
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import torch

from benchmarks.__main__ import about, measure_in_turn, python
from benchmarks.keepup import WARM_UP_STEPS, Replay, run
from thimble_zarr import Recorder
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.experiment.trainer import Training, load_data

BARE, TRAINSCOPE = "nothing", "trainscope"

WAYS: dict[str, dict[str, Any]] = {
    "thimble-zarr": {},
    "thimble-zarr, keyframes": {"keep": "keyframes"},
    "thimble-zarr, predicted": {"coding": "predicted"},
    "thimble-zarr, predicted, audited": {"coding": "predicted", "audit": "raise"},
    "thimble-zarr, predicted, audited every step": {
        "coding": "predicted",
        "audit": "raise",
        "audit_every_step": True,
    },
}
"""Options of the recorder."""

STEP_S = 0.015
BATCH_SIZE = 4

Numbers = Mapping[str, float]


@contextmanager
def recorded(
    way: str, path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[None]:
    """Record what the optimizer does with a model; of ours the one parameter of most elements."""
    if way == BARE:
        yield
    elif way == TRAINSCOPE:
        from trainscope import TrainScope
        from trainscope.core.config import TrainScopeConfig

        scope = TrainScope(model, optimizer, config=TrainScopeConfig(run_dir=str(path))).attach()

        def before_step(*given: object) -> None:
            scope.step(1.0)  # with no loss out of the ordinary, which would cost more

        hook = optimizer.register_step_pre_hook(before_step)
        try:
            yield
        finally:
            hook.remove()
            scope.detach()
    else:
        parameter = max(model.parameters(), key=torch.numel)
        with Recorder(path, optimizer, parameter=parameter, max_overhead=None, **WAYS[way]):
            yield


def paced(way: str, path: Path, source: Path, n_steps: int) -> Numbers:
    """Return quantiles of the seconds of a step, without the pause after it."""
    pause_s = max(0.0, STEP_S - statistics.median(run(Replay(source), n_steps=20, pause_s=0.0)))
    training = Replay(source)
    model = torch.nn.Module()
    model.weight = training.weight
    with recorded(way, path, model, training.optimizer):
        times_s = run(training, n_steps=n_steps, pause_s=pause_s)
    median_s, p99_s = np.quantile(times_s, (0.5, 0.99)).tolist()
    return {"median_s": median_s, "p99_s": p99_s}


def busy(way: str, path: Path, n_steps: int) -> Numbers:
    """Return the mean seconds of a step, and of the process's CPU time."""
    config = TrainingConfig(batch_size=BATCH_SIZE, dtype="float32")
    training = Training(config, load_data(config))
    for _ in range(WARM_UP_STEPS):
        training.step()
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    with recorded(way, path, training.model, training.optimizer):
        for _ in range(n_steps):
            training.step()
    return {
        "mean_s": (time.perf_counter() - start_s) / n_steps,
        "cpu_s": (time.process_time() - start_cpu_s) / n_steps,
    }


def table(results: Mapping[str, Mapping[str, Numbers]]) -> str:
    """Return a table of what was measured."""
    lines = [
        "| recorded by | 15 ms a step: added, median | added, 99th percentile | "
        "busy cores: a step, mean | added | CPU time a step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    paced, busy = results["paced"], results["busy"]
    for way in paced:
        added, added_p99 = (paced[way][key] - paced[BARE][key] for key in ("median_s", "p99_s"))
        mean, share = busy[way]["mean_s"], busy[way]["mean_s"] / busy[BARE]["mean_s"] - 1
        lines.append(
            f"| {way} | {added * 1e3:+.2f} ms | {added_p99 * 1e3:+.2f} ms | {mean * 1e3:.1f} ms "
            f"| {share:+.1%} | {busy[way]['cpu_s'] * 1e3:.0f} ms |"
        )
    return "\n".join(lines)


def measured(source: Path, *, paced_steps: int, busy_steps: int, repeats: int) -> dict[str, Any]:
    """Return the medians of what each way takes, by training."""
    results: dict[str, Any] = {}
    for training, n_steps in (("paced", paced_steps), ("busy", busy_steps)):
        options = ("--paced-steps", n_steps, "--busy-steps", n_steps)
        commands = {
            way: python("benchmarks.overheads", source, *options, "--child", training, way)
            for way in (BARE, *WAYS, TRAINSCOPE)
        }
        found = measure_in_turn(commands, repeats=repeats)
        results[training] = {
            way: {key: statistics.median(one.json[key] for one in runs) for key in runs[0].json}
            for way, runs in found.items()
        }
    return results


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.option("--paced-steps", type=int, default=600, show_default=True)
@click.option("--busy-steps", type=int, default=300, show_default=True)
@click.option("--repeats", type=int, default=5, show_default=True)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("benchmarks/overheads.json"),
    show_default=True,
)
@click.option("--child", type=(str, str), hidden=True)
def main(
    source: Path,
    *,
    paced_steps: int,
    busy_steps: int,
    repeats: int,
    output: Path,
    child: tuple[str, str] | None,
) -> None:
    """Measure, with the gradients of SOURCE, a bfloat16 run; half an hour on two quiet cores."""
    if child is None:
        steps = {"paced_steps": paced_steps, "busy_steps": busy_steps}
        results = measured(source, **steps, repeats=repeats)
        results["about"] = about(paced_steps, BATCH_SIZE) | steps
        output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        click.echo(table(results))
        return
    training, way = child
    with TemporaryDirectory() as directory:
        path = Path(directory) / "run.zarr"
        if training == "paced":
            numbers = paced(way, path, source, paced_steps)
        else:
            numbers = busy(way, path, busy_steps)
    click.echo(json.dumps(numbers))


if __name__ == "__main__":
    main()
