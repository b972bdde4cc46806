"""Step time with and without recording, in one process, turn by turn.

Two equal trainings take turns of two blocks of steps each, one recorded and one not, so that the
machine's moods hit both. A recorded turn ends when its blocks are on disk, so that what the writer
does in the background is counted where it belongs.
"""

import json
import statistics
import time
from pathlib import Path

import click

from thimble_zarr import Recorder
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.experiment.trainer import Training, load_data


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--turns", type=int, required=True)
@click.option("--batch-size", type=int, required=True)
def main(store: Path, *, turns: int, batch_size: int) -> None:
    """Print medians and totals as JSON."""
    config = TrainingConfig(batch_size=batch_size)
    data = load_data(config)
    recorded, bare = Training(config, data), Training(config, data)
    step_s: dict[str, list[float]] = {"recorded": [], "bare": []}
    total_s = {"recorded": 0.0, "bare": 0.0}
    with Recorder(
        store, recorded.optimizer, parameter=recorded.embedding, overwrite=True
    ) as recorder:
        turn_steps = 2 * recorder.schemas[""].layout.block_steps
        for turn in range(2 * turns + 2):
            name = "recorded" if turn % 2 else "bare"
            training = recorded if turn % 2 else bare
            times_s = []
            start_s = time.perf_counter()
            for _ in range(turn_steps):
                step_start_s = time.perf_counter()
                training.step()
                times_s.append(time.perf_counter() - step_start_s)
            if training is recorded:
                recorder.flush()
            if turn >= 2:  # the first turns warm up
                step_s[name] += times_s
                total_s[name] += time.perf_counter() - start_s
    result = {f"{name}_median_s": statistics.median(times) for name, times in step_s.items()}
    result |= {f"{name}_total_s": total for name, total in total_s.items()}
    click.echo(json.dumps(result | {"n_steps": len(step_s["bare"])}))


if __name__ == "__main__":
    main()
