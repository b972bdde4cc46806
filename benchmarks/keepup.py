"""Does the recorder keep up with fast training? Small steps of a fixed length, bare and recorded.

The steps replay the gradients of a real run, because random bits do not compress like real ones,
through torch's AdamW. Sleep makes a bare step as long as was asked for; what recording adds comes
on top. First all steps run bare, then all run recorded, without a pause that a writer could catch
up in.
"""

import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from thimble_zarr import Recorder
from thimble_zarr.format.overhead import Overhead
from thimble_zarr.store.reader import StoreReader

WARM_UP_STEPS = 20


class Replay:
    """Training whose gradients are those of a recorded bfloat16 run, again and again."""

    def __init__(self, source: Path) -> None:
        self._reader = StoreReader.open(source)
        self._gradients = self._rows("grad")[1:]
        self.weight = torch.nn.Parameter(self._rows("W")[0].clone())
        self.optimizer = torch.optim.AdamW([self.weight], lr=1e-3, weight_decay=0.0)
        self._n_steps = 0

    def _rows(self, name: str) -> Tensor:
        bits = self._reader.read(name, (0, self._reader.n_rows))
        return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)

    def step(self) -> float:
        """Take a step of the optimizer and return its seconds, hooks and all."""
        self.weight.grad = self._gradients[self._n_steps % len(self._gradients)]
        self._n_steps += 1
        start_s = time.perf_counter()
        self.optimizer.step()
        return time.perf_counter() - start_s


def run(training: Replay, *, n_steps: int, pause_s: float) -> list[float]:
    """Return the seconds of each step, without the pause after it."""
    times_s = []
    for _ in range(n_steps):
        times_s.append(training.step())
        time.sleep(pause_s)
    return times_s


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--steps", type=int, default=600, show_default=True)
@click.option("--step-ms", type=float, default=15.0, show_default=True, help="Of a bare step.")
@click.option("--threads", type=int, default=1, show_default=True, help="Of torch.")
def main(source: Path, store: Path, *, steps: int, step_ms: float, threads: int) -> None:
    """Replay the gradients of SOURCE, record them into STORE and print JSON."""
    torch.set_num_threads(threads)
    warm_up = run(Replay(source), n_steps=WARM_UP_STEPS, pause_s=0.0)
    pause_s = max(0.0, step_ms / 1e3 - statistics.median(warm_up))
    bare_s = run(Replay(source), n_steps=steps, pause_s=pause_s)
    training = Replay(source)
    with Recorder(store, training.optimizer, parameter=training.weight, overwrite=True):
        recorded_s = run(training, n_steps=steps, pause_s=pause_s)
    spent = sum(StoreReader.open(store).read_history().overhead.values(), Overhead())
    added_s = np.quantile(recorded_s, (0.5, 0.99)) - np.quantile(bare_s, (0.5, 0.99))
    result = {
        "steps_per_s": spent.n_steps / spent.elapsed_s,
        "bare_median_ms": statistics.median(bare_s) * 1e3,
        "added_median_ms": added_s[0] * 1e3,
        "added_p99_ms": added_s[1] * 1e3,
        "training_share": spent.training_share,
        "writer_share": spent.writer_share,
        "bytes_per_s": spent.bytes_per_s,
    }
    click.echo(json.dumps(result | asdict(spent)))


if __name__ == "__main__":
    main()
