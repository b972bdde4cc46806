"""Train with or without recording, and print peak memory at two steps."""

import json
import resource
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import click

from thimble_zarr import Recorder
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.experiment.trainer import PARAMETER, Training, load_data


def peak_rss_bytes() -> int:
    """Return the largest resident set of this process so far."""
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo


@click.command()
@click.argument("store", type=click.Path(path_type=Path), required=False)
@click.option("--steps", type=int, required=True)
@click.option("--batch-size", type=int, required=True)
@click.option("--early", type=int, required=True, help="The first of the two steps to look at.")
def main(store: Path | None, *, steps: int, batch_size: int, early: int) -> None:
    """Train; record into STORE where it is given."""
    config = TrainingConfig(steps=steps, batch_size=batch_size)
    data = load_data(config)
    training = Training(config, data)
    recording: AbstractContextManager[Recorder | None] = nullcontext()
    if store is not None:
        recording = Recorder(
            store,
            training.optimizer,
            parameter=training.embedding,
            name=PARAMETER,
            labels=data.labels,
            n_steps=steps,
            attrs={"config": training.config.to_json(), **data.attrs},
            overwrite=True,
        )
    early_bytes = 0
    with recording as recorder:
        for step in range(1, steps + 1):
            loss = training.step()
            if recorder is not None:
                recorder.log(loss=loss)
            if step == early:
                early_bytes = peak_rss_bytes()
            if step % 100 == 0:
                click.echo(f"  step {step}, loss {loss:.3f}", err=True)
    click.echo(json.dumps({"early_bytes": early_bytes, "end_bytes": peak_rss_bytes()}))


if __name__ == "__main__":
    main()
