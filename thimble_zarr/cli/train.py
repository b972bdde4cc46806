"""`plan`, `train` and `demo`: what a run of Thimble 1 takes; run it and record it."""

import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from thimble_zarr.cli.check import run_check
from thimble_zarr.cli.options import MEMORY, OVERWRITE, QUIET, STORE, config_from, config_options
from thimble_zarr.cli.report import run_report
from thimble_zarr.errors import SelectionError, StoreError
from thimble_zarr.experiment.config import TrainingConfig
from thimble_zarr.format.layout import human_bytes
from thimble_zarr.format.location import Location, Url
from thimble_zarr.interrupts import terminated_cleanly
from thimble_zarr.report.text import aligned

if TYPE_CHECKING:
    from thimble_zarr.experiment.checkpoints import RecordedRun
    from thimble_zarr.experiment.plan import RunPlan
    from thimble_zarr.experiment.trainer import Progress, TrainingData


@click.command()
@click.argument("store", type=click.Path(path_type=Path), default=Path("run.zarr"))
@config_options
@MEMORY
def plan(store: Path, *, config: Path | None, memory: int | None, **settings: object) -> None:
    """Show how much memory and disk a run takes, and how much is free.

    Nothing is started. STORE, run.zarr by default, says which disk.
    """
    click.echo("Working out what the run takes ...", err=True)
    from thimble_zarr.experiment.plan import plan_run

    run = config_from(config, settings)
    found = plan_run(run, store, memory_bytes=memory)
    click.echo(render_plan(found, run))
    warn_of_memory(found)
    found.check_disk()


def render_plan(plan: "RunPlan", config: TrainingConfig) -> str:
    """Return what a run takes, by array and in total, beside the notebook's way."""
    storage, notebook_bytes = plan.storage, plan.notebook_bytes
    is_likely_less = storage.likely_bytes < storage.disk_bytes
    of_prediction = (
        {"Disk, about": (storage.likely_bytes, notebook_bytes)} if is_likely_less else {}
    )
    sizes = {
        f"  {name}": (n_bytes, plan.notebook_array_bytes[name])
        for name, n_bytes in storage.array_bytes.items()
    } | {
        **of_prediction,
        "Disk, at most": (storage.disk_bytes, notebook_bytes),
        "RAM for recording": (storage.memory_bytes, notebook_bytes),
        "RAM for training, about": (plan.training_bytes, plan.notebook_training_bytes),
        "RAM in all, about": (plan.memory_bytes, plan.notebook_training_bytes + notebook_bytes),
    }
    title = f"{config.steps:,} steps of {config.vocab_size:,} x {config.hidden_dim}, {config.dtype}"
    rows = [(title, "this run", "notebook's way")]
    rows += [(name, human_bytes(ours), human_bytes(its)) for name, (ours, its) in sizes.items()]
    compute = plan.compute_dtype
    why = f" ({compute.reason})" if compute.reason else ""
    loss = f"chunks of {config.loss_chunk:,} positions" if config.loss_chunk else "one piece"
    return (
        f"{aligned(rows)}\n"
        f"Forward and backward run in {compute.name}{why}, the loss in {loss}. The record is "
        f"{config.dtype}.\n"
        f"This machine has {human_bytes(plan.free_memory_bytes)} of RAM and "
        f"{human_bytes(plan.free_disk_bytes)} of disk free.\n"
        f"A crash costs at most the last block of {storage.layout.block_steps} steps, or two if "
        "the disk lags."
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


VALIDATION_STEPS = (1, 10, 50, 100, 200, 500, 800)
"""Steps of the original notebook's quick validation; the last step is added."""

DEMO = TrainingConfig(steps=150, batch_size=16)


@click.command()
@STORE
@click.option(
    "--spool",
    type=click.Path(path_type=Path),
    help="Where a run is recorded whose STORE is the address of a server.  "
    "[default: the last name of the address, in the current directory]",
)
@config_options
@MEMORY
@click.option("--force", is_flag=True, help="Start even if the disk may not hold the run.")
@OVERWRITE
@click.option(
    "--resume",
    is_flag=True,
    help="Resume the run in STORE with its own settings, from its last checkpoint. Without a "
    "checkpoint, start from the beginning.",
)
@click.option(
    "--audit",
    type=click.Choice(["warn", "raise"]),
    help="Take every step again while training goes on, and warn of the first that the optimizer "
    "does not explain, or stop at it.",
)
@click.option(
    "--audit-every-step",
    is_flag=True,
    help="With --audit: report a step at the next one, not only when its block is written.",
)
@click.option(
    "--keep",
    type=click.Choice(["all", "keyframes"]),
    default="all",
    show_default=True,
    help="Copy every row whole, or only the first and the last of each block: of the others the "
    "gradient, from which the writer works out the rest, and compares where it ends.",
)
@QUIET
def train(
    store: Location,
    *,
    spool: Path | None,
    config: Path | None,
    memory: int | None,
    audit: Literal["warn", "raise"] | None,
    audit_every_step: bool,
    keep: Literal["all", "keyframes"],
    force: bool,
    overwrite: bool,
    resume: bool,
    quiet: bool,
    **settings: object,
) -> None:
    """Train the Thimble 1 model and record every step into STORE.

    A small GPT-2 with tied embeddings learns a text; the recorder streams its embedding, gradient
    and optimizer states to disk with bounded memory. Without --corpus and --tokenizer it trains on
    the documentation in the Python standard library. Ctrl-C or SIGTERM ends it cleanly, and what
    was recorded can be checked. `thimble-zarr train --resume STORE` continues a run that was
    stopped or killed, unless --every or --windows leaves out steps.

    STORE may be an address, such as s3://bucket/run.zarr: the run is recorded in --spool, and
    published from there meanwhile. The exit code is 3 if not all of it could be published.
    """
    if resume and overwrite:
        raise click.UsageError(
            "--resume continues a store and --overwrite replaces it; give one of them"
        )
    if audit_every_step and (audit is None or keep != "all"):
        raise click.UsageError("--audit-every-step needs --audit, and --keep all")
    from thimble_zarr.store.remote.spool import Spool, publish_command

    at = Spool(store, spool, resume=resume)
    run = _resumed(at.path, quiet=quiet) if resume else None
    chosen = config_from(config, settings, recorded=None if run is None else run.config)
    if run is not None:
        chosen, memory = run.resolve(chosen), memory or run.memory_bytes
        run.check_same(chosen, {"memory_bytes": memory})
        run.check_resumable()
    options: dict[str, Any] = {"overwrite": overwrite, "resume": resume}
    options |= {"audit": audit, "audit_every_step": audit_every_step, "keep": keep}
    options |= {"force": force, "quiet": quiet}
    if not run_training(chosen, at.path, memory, url=at.url, **options):
        command = publish_command(at.path, at.url or "")
        raise StoreError(
            f"the run is recorded in {at.path}, but not all of it is published at {at.url}; "
            f"publish the rest with `{command}`"
        )


def _resumed(store: Path, *, quiet: bool) -> "RecordedRun | None":
    """Return the run to resume; None if there is none, of which a store that is there is told."""
    from thimble_zarr.experiment.checkpoints import RecordedRun

    run = RecordedRun.read(store)
    if run is None and store.exists() and not quiet:
        click.echo(
            f"Note: {store} has no settings; the run starts with the ones given here", err=True
        )
    return run


@click.command()
@click.argument("store", type=click.Path(path_type=Path), default=Path("demo.zarr"))
@click.option("--steps", type=int, default=DEMO.steps, show_default=True, help="Optimizer steps.")
@OVERWRITE
@QUIET
@click.pass_context
def demo(ctx: click.Context, store: Path, *, steps: int, overwrite: bool, quiet: bool) -> None:
    """Train, record, check and draw a short run, in about a minute.

    The same as `train` for 150 steps with batches of 16 on the default corpus, then `check` and
    `report`. STORE is demo.zarr by default.
    """
    run_training(replace(DEMO, steps=steps), store, overwrite=overwrite, quiet=quiet)
    if not quiet:
        click.echo()
    exit_code = run_check([store], quiet=quiet)
    page = store.with_suffix(".html")
    if not quiet:
        click.echo()
    run_report([str(store)], page, quiet=quiet)
    if not quiet:
        click.echo(
            f"\nLook next, in a browser: {page}\n"
            f"  thimble-zarr view {shlex.quote(str(store))}\n"
            "in Python:\n"
            "  import thimble_zarr\n"
            f'  ds = thimble_zarr.open_dataset("{store}")\n'
            "  ds.sel(token=ds.dead).adam_residual"
        )
    ctx.exit(exit_code)


def run_training(
    config: TrainingConfig,
    store: Path,
    memory: int | None = None,
    *,
    overwrite: bool,
    quiet: bool,
    url: Url | None = None,
    force: bool = False,
    resume: bool = False,
    audit: Literal["warn", "raise"] | None = None,
    audit_every_step: bool = False,
    keep: Literal["all", "keyframes"] = "all",
) -> bool:
    """Plan, train, validate and sum up; return whether all is published that has an address."""

    def say(text: str, *, err: bool = False) -> None:
        if not quiet:
            click.echo(text, err=err)

    say(f"Training to step {config.steps:,}, recording into {store} ...", err=True)
    plan = _planned(config, store, memory, audited=bool(audit), overwrite=overwrite or resume)
    say(render_plan(plan, config))
    _check_room(plan, force=force)
    say("Loading the tokenizer and the corpus (longer the first time) ...", err=True)
    from thimble_zarr.experiment import trainer

    data, training = trainer.load_data(config), _Training(config, quiet=quiet)
    say(_in_words(data))
    how: dict[str, Any] = {"keep": keep, "overwrite": overwrite, "resume": resume, "url": url}
    how |= {"audit": audit, "audit_every_step": audit_every_step, "memory_bytes": memory}
    try:
        with terminated_cleanly(), training.bar:
            is_published = trainer.train(config, data, store, on_step=training, **how)
    except KeyboardInterrupt:
        say(training.summary(store))
        if training.last is not None and config.schedule is None:
            say(_how_to_resume(store, url))
        raise
    if not quiet:
        say(render_validation(store))
    is_finished = resume and training.last is None
    say(f"All {config.steps:,} steps are recorded." if is_finished else training.summary(store))
    return is_published


def _check_room(plan: "RunPlan", *, force: bool) -> None:
    """Warn if the memory may not do, and raise if the disk may not hold the run."""
    warn_of_memory(plan)
    if not force:
        plan.check_disk()


def _planned(
    config: TrainingConfig, store: Path, memory: int | None, *, audited: bool, overwrite: bool
) -> "RunPlan":
    from thimble_zarr.experiment.plan import plan_run
    from thimble_zarr.store.contents import check_vacant

    check_vacant(store, overwrite=overwrite)
    return plan_run(config, store, memory_bytes=memory, audited=audited, overwrite=overwrite)


def _in_words(data: "TrainingData") -> str:
    assert data.labels.live is not None
    n_tokens, n_live = len(data.labels.live), int(data.labels.live.sum())
    return (
        f"\nCorpus   {data.corpus_name}: {len(data.ids):,} tokens\n"
        f"Tokens   {n_tokens:,}: {n_live:,} live, {n_tokens - n_live:,} dead\n"
    )


def _how_to_resume(store: Path, url: Url | None) -> str:
    """Return what to type, and the step it starts with: the one after the last checkpoint."""
    from thimble_zarr.experiment.checkpoints import Checkpoints

    step, path = max(Checkpoints(store).steps(), default=0) + 1, shlex.quote(str(store))
    where = f"{shlex.quote(url)} --spool {path}" if url else path
    return f"Resume   thimble-zarr train --resume {where}  (from step {step:,} on)"


class _Training:
    """How far training is: shown on stderr, and summed up at its end."""

    def __init__(self, config: TrainingConfig, *, quiet: bool) -> None:
        from thimble_zarr.cli.progress import progress

        self.first: Progress | None = None
        self.last: Progress | None = None
        self._config, self._start_s = config, time.perf_counter()
        self.bar = progress("training", unit="step", total=config.steps, quiet=quiet)

    def __call__(self, progress: "Progress") -> None:
        self.first, self.last = self.first or progress, progress
        written = human_bytes(progress.bytes_written)
        audited = f", audited {progress.audited}" if progress.audited else ""
        self.bar.note(f"loss {progress.loss:.3f}, {written} written{audited}")
        self.bar.reach(progress.step, self._config.steps)  # a resumed run has taken some before

    def summary(self, store: Path) -> str:
        """Return what was recorded, where, and what to type next."""
        if self.first is None or self.last is None:
            return "Nothing was recorded."
        elapsed_s, first_step = time.perf_counter() - self._start_s, self.first.step
        n_steps, schedule = self.last.step - first_step + 1, self._config.schedule
        chosen = "" if schedule is None else f"{schedule} of "
        which = f" ({first_step:,} to {self.last.step:,})" if first_step > 1 else ""
        return (
            f"Recorded {chosen}{n_steps:,} step{'s' * (n_steps != 1)}{which} in {elapsed_s:.0f} s "
            f"({n_steps / elapsed_s:.1f} steps/s); "
            f"loss {self.first.loss:.3f} -> {self.last.loss:.3f}\n"
            f"{'' if self.last.audited is None else _audited(store)}"
            f"Store    {store}\n"
            f"Next     thimble-zarr {_next_command(store)} {shlex.quote(str(store))}"
        )


def _audited(store: Path) -> str:
    """Return a line that says how many steps of the store were audited, now that it is closed."""
    from thimble_zarr.format.audited import AuditCounts
    from thimble_zarr.store.reader import StoreReader

    audits = StoreReader.open(store).read_history().audits
    return f"Audit    {sum(audits.values(), AuditCounts())}\n"


def _next_command(store: Path) -> str:
    """Return what can be done with what was recorded."""
    from thimble_zarr.analysis.compute.variables import missing_inputs
    from thimble_zarr.store.reader import StoreReader

    schema = StoreReader.open(store).schema
    if missing_inputs("residual", schema):
        return "info"
    return "check --no-replay" if missing_inputs("unexplained", schema) else "check"


def render_validation(store: Path) -> str:
    """Return the original notebook's quick validation: ratio and cosine over all tokens."""
    import numpy as np

    from thimble_zarr.analysis.audit.audit import Audit
    from thimble_zarr.analysis.audit.table import tabulated
    from thimble_zarr.analysis.compute.source import Source
    from thimble_zarr.analysis.selection import select
    from thimble_zarr.store.reader import StoreReader

    source = Source.of(StoreReader.open(store))
    if (optimizer := source.reader.schema.optimizer).formula is None:
        return f"No formula of {optimizer.name} is known. `check` takes its steps again.\n"
    whole, _ = select(source, "all", None)
    checkable = source.steps[source.follows]
    steps = np.intersect1d(checkable, [*VALIDATION_STEPS, *checkable[-1:]])
    try:
        audit = Audit.of(replace(whole, rows=np.searchsorted(source.steps, steps)), replay=False)
    except SelectionError:  # there are no such steps, or something was not recorded
        return "No recorded step can be checked.\n"
    (table,) = tabulated(audit, audit.reduction.compute())
    numbers = zip(steps, table["ratio"], table["cosine_similarity"], strict=True)
    title = (
        "Predicted over observed weight change, all tokens (ratio 1, cosine 1: the formula fits)"
    )
    lines = (
        f"  t={step:4d}: ratio={ratio:.3f}, cosine={cosine:+.3f}" for step, ratio, cosine in numbers
    )
    return "\n".join([title, *lines, ""])
