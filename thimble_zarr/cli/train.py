"""`train`, `demo` and `plan`: run Thimble 1 and record it."""

import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from thimble_zarr.cli.check import run_check
from thimble_zarr.cli.exits import terminated_cleanly
from thimble_zarr.cli.options import (
    MEMORY,
    OVERWRITE,
    QUIET,
    STORE,
    config_from,
    config_options,
)
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.format.layout import DEFAULT_MEMORY_BYTES, human_bytes
from thimble_zarr.report.text import aligned

if TYPE_CHECKING:
    from thimble_zarr.experiment.plan import RunPlan
    from thimble_zarr.experiment.recorded import RecordedRun
    from thimble_zarr.experiment.trainer import Progress

VALIDATION_STEPS = (1, 10, 50, 100, 200, 500, 800)
"""Steps of the original notebook's quick validation; the last step is added."""

DEMO = TrainingConfig(steps=150, batch_size=16)

RESUME = click.option(
    "--resume",
    is_flag=True,
    help="Resume the run in STORE with its own settings, from its last checkpoint. Without a "
    "checkpoint, start from the beginning.",
)
FORCE = click.option("--force", is_flag=True, help="Start even if the disk may not hold the run.")


@click.command()
@STORE
@config_options
@MEMORY
@FORCE
@OVERWRITE
@RESUME
@QUIET
@click.pass_context
def train(
    ctx: click.Context,
    /,
    store: Path,
    *,
    config: Path | None,
    memory: int,
    force: bool,
    overwrite: bool,
    resume: bool,
    quiet: bool,
    **settings: object,
) -> None:
    """Train the Thimble 1 model and record every step into STORE.

    A small GPT-2 with tied embeddings learns a text; the recorder streams its embedding, gradient
    and AdamW states to disk with bounded memory. Without --corpus and --tokenizer it trains on the
    documentation in the Python standard library. Ctrl-C or SIGTERM ends it cleanly, and what was
    recorded can be checked. `thimble-zarr train --resume STORE` continues a run that was stopped or
    killed, unless --every or --windows leaves out steps.
    """
    run = None
    if resume:
        if overwrite:
            raise click.UsageError(
                "--resume continues a store and --overwrite replaces it; give one of them"
            )
        run = _recorded_run(store)
        if run is None and store.exists() and not quiet:
            click.echo(
                f"Note: {store} has no settings; the run starts with the ones given here", err=True
            )
    if run is not None and ctx.get_parameter_source("memory") is ParameterSource.DEFAULT:
        memory = run.memory_bytes
    chosen = config_from(config, settings, recorded=None if run is None else run.config)
    if run is not None:
        chosen = run.resolve(chosen)
        _check_ready(run, chosen, memory_bytes=memory)
    run_training(
        chosen,
        store,
        memory_bytes=memory,
        force=force,
        overwrite=overwrite,
        resume=resume,
        quiet=quiet,
    )


def _recorded_run(store: Path) -> "RecordedRun | None":
    from thimble_zarr.experiment.recorded import RecordedRun

    return RecordedRun.read(store)


def _check_ready(run: "RecordedRun", config: TrainingConfig, *, memory_bytes: int) -> None:
    """Raise what training would, before it loads anything."""
    from thimble_zarr.experiment.checkpoints import Checkpoints

    run.check_same(config, {"memory_bytes": memory_bytes})
    if not run.is_finished:
        run.check_free()
        run.check_has(Checkpoints(run.path))


@click.command()
@click.argument("store", type=click.Path(path_type=Path), default=Path("demo.zarr"))
@click.option("--steps", type=int, default=DEMO.steps, show_default=True, help="Optimizer steps.")
@OVERWRITE
@QUIET
@click.pass_context
def demo(ctx: click.Context, store: Path, *, steps: int, overwrite: bool, quiet: bool) -> None:
    """Train, record and check a short run, in about a minute.

    The same as `train` for 150 steps with batches of 16 on the default corpus, then `check`. STORE
    is demo.zarr by default.
    """
    run_training(
        replace(DEMO, steps=steps),
        store,
        memory_bytes=DEFAULT_MEMORY_BYTES,
        force=False,
        overwrite=overwrite,
        resume=False,
        quiet=quiet,
    )
    if not quiet:
        click.echo()
    exit_code = run_check([store], quiet=quiet)
    if not quiet:
        click.echo(
            "\nLook next, in Python:\n"
            "  import thimble_zarr\n"
            f'  ds = thimble_zarr.open_dataset("{store}")\n'
            "  ds.sel(token=ds.dead).adam_residual"
        )
    ctx.exit(exit_code)


@click.command()
@click.argument("store", type=click.Path(path_type=Path), default=Path("run.zarr"))
@config_options
@MEMORY
def plan(store: Path, *, config: Path | None, memory: int, **settings: object) -> None:
    """Show how much memory and disk a run takes, and how much is free.

    Nothing is started. STORE, run.zarr by default, says which disk.
    """
    _say_what_is_done("Working out what the run takes", quiet=False)
    from thimble_zarr.experiment.plan import plan_run

    run = config_from(config, settings)
    found = plan_run(run, store, memory_bytes=memory)
    click.echo(render_plan(found, run))
    warn_of_memory(found)
    found.check_disk()


def run_training(
    config: TrainingConfig,
    store: Path,
    *,
    memory_bytes: int,
    force: bool,
    overwrite: bool,
    resume: bool,
    quiet: bool,
) -> None:
    """Plan, train, validate and sum up."""
    _say_what_is_done(f"Training to step {config.steps:,}, recording into {store}", quiet=quiet)
    from thimble_zarr.experiment.plan import plan_run
    from thimble_zarr.store.contents import check_vacant

    def say(text: str = "") -> None:
        if not quiet:
            click.echo(text)

    check_vacant(store, overwrite=overwrite or resume)
    found = plan_run(config, store, memory_bytes=memory_bytes, overwrite=overwrite or resume)
    say(render_plan(found, config))
    warn_of_memory(found)
    if not force:
        found.check_disk()

    _say_what_is_done("Loading the tokenizer and the corpus (longer the first time)", quiet=quiet)
    from thimble_zarr.experiment.trainer import load_data
    from thimble_zarr.experiment.trainer import train as train_model

    data = load_data(config)
    assert data.labels.live is not None
    n_live = int(data.labels.live.sum())
    say(
        f"\nCorpus   {data.corpus_name}: {len(data.ids):,} tokens\n"
        f"Tokens   {config.vocab_size:,}: {n_live:,} live, {config.vocab_size - n_live:,} dead\n"
    )
    bar = _ProgressBar(config, quiet=quiet)
    try:
        with terminated_cleanly():
            train_model(
                config,
                data,
                store,
                memory_bytes=memory_bytes,
                overwrite=overwrite,
                resume=resume,
                on_step=bar,
            )
    except KeyboardInterrupt:
        bar.close()
        say(bar.summary(store))
        if bar.last is not None and config.schedule is None:
            say(f"Resume   thimble-zarr train --resume {shlex.quote(str(store))}{_repeats(store)}")
        raise
    bar.close()
    if not quiet:
        say(render_validation(store))
    is_finished = resume and bar.last is None
    say(f"All {config.steps:,} steps are recorded." if is_finished else bar.summary(store))


def _repeats(store: Path) -> str:
    """Return which step a resumed run starts with: the one after its last checkpoint."""
    from thimble_zarr.experiment.checkpoints import Checkpoints

    return f"  (from step {max(Checkpoints(store).steps(), default=0) + 1:,} on)"


def _say_what_is_done(text: str, *, quiet: bool) -> None:
    """Say on stderr what takes a moment, before it begins."""
    if not quiet:
        click.echo(f"{text} ...", err=True)


class _ProgressBar:
    """Shows loss, steps a second and bytes written on stderr."""

    def __init__(self, config: TrainingConfig, *, quiet: bool) -> None:
        from thimble_zarr.cli.progress import progress

        self.first: Progress | None = None
        self.last: Progress | None = None
        self._chosen = "" if config.schedule is None else f"{config.schedule} of "
        self._bar = progress("training", unit="step", total=config.steps, quiet=quiet)
        self._start_s = time.perf_counter()

    def __call__(self, progress: "Progress") -> None:
        if self.first is None:
            self.first = progress
            self._bar.update(progress.step - 1)  # a resumed run has taken them before
        self.last = progress
        written = human_bytes(progress.bytes_written)
        self._bar.note(f"loss {progress.loss:.3f}, {written} written")
        self._bar.update()

    def close(self) -> None:
        self._bar.close()

    def summary(self, store: Path) -> str:
        """Return what was recorded, where, and what to type next."""
        if self.first is None or self.last is None:
            return "Nothing was recorded."
        elapsed_s = time.perf_counter() - self._start_s
        n_steps = self.last.step - self.first.step + 1
        is_resumed = self.first.step > 1
        which = f" ({self.first.step:,} to {self.last.step:,})" if is_resumed else ""
        recorded = f"{self._chosen}{n_steps:,} step{'s' * (n_steps != 1)}{which}"
        return (
            f"Recorded {recorded} in {elapsed_s:.0f} s "
            f"({n_steps / elapsed_s:.1f} steps/s); "
            f"loss {self.first.loss:.3f} -> {self.last.loss:.3f}\n"
            f"Store    {store}\n"
            f"Next     thimble-zarr {_next_command(store)} {shlex.quote(str(store))}"
        )


def _next_command(store: Path) -> str:
    """Return what can be done with what was recorded."""
    from thimble_zarr.analysis.compute.variables import missing_inputs
    from thimble_zarr.store.reader import StoreReader

    schema = StoreReader.open(store).schema
    if missing_inputs("adam_residual", schema):
        return "info"
    return "check --no-replay" if missing_inputs("unexplained", schema) else "check"


def render_validation(store: Path) -> str:
    """Return the original notebook's quick validation: ratio and cosine over all tokens."""
    from thimble_zarr.analysis.audit.accounting import accounting, selected
    from thimble_zarr.analysis.dataset.open import open_dataset

    ds = open_dataset(store)
    checkable = ds.step.values[selected(ds).is_checkable].tolist()
    if "adam_residual" not in ds or not checkable:
        return "No recorded step can be checked.\n"
    steps = sorted({*VALIDATION_STEPS} & {*checkable} | {checkable[-1]})
    table = accounting(ds.sel(step=steps), replay=False)
    lines = [
        f"  t={int(row.step):4d}: ratio={float(row.ratio):.3f}, "
        f"cosine={float(row.cosine_similarity):+.3f}"
        for row in (table.sel(step=step) for step in steps)
    ]
    title = (
        "Predicted over observed weight change, all tokens (ratio 1, cosine 1: the formula fits)"
    )
    return "\n".join([title, *lines, ""])


def render_plan(plan: "RunPlan", config: TrainingConfig) -> str:
    """Return what a run takes, by array and in total, beside the notebook's way."""
    title = f"{config.steps:,} steps of {config.vocab_size:,} x {config.hidden_dim}, {config.dtype}"
    storage = plan.storage
    rows = [(title, "this run", "notebook's way")]
    rows += [
        (f"  {name}", human_bytes(n_bytes), human_bytes(plan.notebook_array_bytes[name]))
        for name, n_bytes in storage.array_bytes.items()
    ]
    rows += [
        ("Disk, at most", human_bytes(storage.disk_bytes), human_bytes(plan.notebook_bytes)),
        ("RAM for recording", human_bytes(storage.memory_bytes), human_bytes(plan.notebook_bytes)),
        (
            "RAM for training, about",
            human_bytes(plan.training_bytes),
            human_bytes(plan.notebook_training_bytes),
        ),
        (
            "RAM in all, about",
            human_bytes(plan.memory_bytes),
            human_bytes(plan.notebook_training_bytes + plan.notebook_bytes),
        ),
    ]
    compute, block_steps = plan.compute_dtype, storage.layout.block_steps
    why = f" ({compute.reason})" if compute.reason else ""
    loss = f"chunks of {config.loss_chunk:,} positions" if config.loss_chunk else "one piece"
    return (
        f"{aligned(rows)}\n"
        f"Forward and backward run in {compute.name}{why}, the loss in {loss}. The record is "
        f"{config.dtype}.\n"
        f"This machine has {human_bytes(plan.free_memory_bytes)} of RAM and "
        f"{human_bytes(plan.free_disk_bytes)} of disk free.\n"
        f"A crash costs at most the last block of {block_steps} steps, or two if the disk lags."
    )


def warn_of_memory(plan: "RunPlan") -> None:
    """Say on stderr that memory is short, where it is."""
    if plan.memory_is_short:
        click.echo(
            f"Warning: the run needs about {human_bytes(plan.memory_bytes)} of memory, but only "
            f"{human_bytes(plan.free_memory_bytes)} is free; a smaller --batch-size or "
            "--seq-len needs less",
            err=True,
        )
