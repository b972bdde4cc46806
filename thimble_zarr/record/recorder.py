"""The recorder: turns every step of an optimizer into a row.

After a step it copies the numbers that the step used (schedules and closures change them) and what
it consumed and produced. A full block goes to the writer thread only when the next step begins: a
loss logged after a step still finds its row, and training waits for the disk before a step only.
"""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from thimble_zarr.errors import OptimizerError, RecordingError
from thimble_zarr.format.audited import AuditCounts
from thimble_zarr.format.coding import CodingName
from thimble_zarr.format.layout import default_memory_bytes
from thimble_zarr.format.schema import Json, Schema, array_path
from thimble_zarr.interrupts import interrupts_held
from thimble_zarr.record.audit.audit import OnFinding
from thimble_zarr.record.concurrency import CallLock, close_at_exit
from thimble_zarr.record.hooks import StepHooks
from thimble_zarr.record.logged import Loggable, Logged, Loss
from thimble_zarr.record.parameters import Labels, Parameters, Rows, choose, declare
from thimble_zarr.record.schedule import as_schedule, row_choice
from thimble_zarr.record.writer_thread import BlockWriter, Keep
from thimble_zarr.store.reader import StorePath
from thimble_zarr.store.remote.spool import Spool


class Recorder:
    """Record every step of an optimizer on one parameter or several.

    Recording starts when the recorder is made and ends with `close`, or with the `with` block. Rows
    of the last, unfinished block are on disk only after `flush` or `close`. Ctrl-C loses no row: it
    takes effect before or after the recorder's work on a step, and a `with` block always closes.
    What was left open is closed when Python ends. If a block cannot be written, the next step and
    every method raise `RecordingError`; what was committed can be read.

    Parameters
    ----------
    path
        Store to create: its path, or its address on a server, such as `s3://bucket/run.zarr`. A run
        with an address is recorded in `spool` and published behind: no step waits for the server.
    optimizer
        One of torch's that `thimble_zarr.optim` has a spec of, such as `torch.optim.AdamW`.
    parameter
        The one parameter to record, owned by the optimizer, of any shape; two axes are taken for
        `(token, dim)`. It lies at the root of the store.
    parameters
        Or several, each in a group of its own: a module, for all of its trainable parameters;
        tensors by name; or a list of tensors, or of patterns of names as `fnmatch` has them
        (`"*.wte.weight"`), which `model` names, or the optimizer if it was made with names. Tied
        weights are recorded once, by their first name.
    model
        What has the parameters: it names them, and what its `torch.nn.Embedding`s hold gets dims
        `(token, dim)`, where any other matrix has `(row, col)`.
    name
        The one parameter's name in its model, kept as a label.
    labels
        What is known of all tokens (counts, live and dead, texts); of several parameters by name.
    variables
        Which of `grad` and the optimizer's states to record beside `W`, of every parameter. All by
        default: the formula needs the states, the replay `grad` too.
    tokens
        Rows to record: ids in any order, or a mask; of several parameters by name. All by default.
    schedule
        Which steps to record: `every(10)`, `windows((0, 100), (1000, 1100))`, `log_spaced()`, two
        of them joined by `|`, or any function that says of a step, counted from 1, whether to. All
        by default. The row before each is recorded too, because a step is checked against it.
    n_steps
        Steps to come: a hint. The store grows beyond it and is trimmed to what was recorded.
    attrs
        Anything to keep with the run that JSON can hold: configuration, seeds, corpus.
    coding
        `plain` writes every array as it is, which any Zarr reader opens. `predicted` writes the
        gradient of each step and of the states one row a block, and what a portable program cannot
        predict of the others: a third of the disk, for readers of this package. Both hold the same
        bits.
    memory_bytes
        Limits the recorder's memory (minimum: one row of all that is recorded, with a warning) and
        so determines the block length; Python's own 20 MB come on top. If only one row fits,
        training waits while each step is written. By default 256 MB, with `predicted` 512 MB.
    max_overhead
        Share of training time that recording may take before it warns, once, with what would help;
        None never warns. Judged after a block, from 50 steps and 10 seconds of training on.
    audit
        Take every step again before its block is written, in the writer thread, and compare bits.
        If something is not what the optimizer makes of the row before, `warn` warns of it once,
        `raise` raises AuditError once, both at training's next call and when it is recorded; a
        function is called in the writer thread with the `AuditFinding` that each block begins with.
        On top of `memory_bytes` come a row and some 20 MB. Only parameters on the CPU.
    audit_every_step
        Audit a row as soon as it is filled, in a thread of its own: the next step begins when that
        is done, and is told what was found. Then what a function is told of may not be on disk yet.
    keep
        Which rows are copied whole in the training thread. `keyframes` copies `W` and the states of
        the first and the last row of a block only, and of the others the gradient, which is a
        quarter: the writer thread takes their steps again and compares where they end. If that is
        not the last row, something else changed `W` or a state; then those between are missing,
        with a warning, and from then on every row is copied whole. Only parameters on the CPU.
    overwrite
        Replace a store at `path`.
    resume
        Resume the store at `path`, closed or cut off by a crash, after its last committed step;
        create one where there is none, so that a script can always ask for it. Model and optimizer
        must be what they were after that step, bit by bit: restore them first. What was recorded
        when the run began stays, `attrs` included.
    after_step
        With `resume`: the step that the loop's own checkpoint was taken after. Recorded steps after
        it are dropped; the run takes them again.
    spool
        Where a run is recorded whose `path` is an address; `overwrite` and `resume` are about what
        is there. It stays. By default the last name of the address, in the current directory.

    Raises
    ------
    OptimizerError, ConfigError
        If optimizer or parameters cannot be recorded, or an argument does not fit.
    ResumeError
        If the store recorded another run or not every step, or model and optimizer do not stand
        where it does. The message names every difference; the store is as it was.
    StoreError, StoreExistsError
        If the store cannot be created.

    Examples
    --------
    >>> with Recorder("run.zarr", optimizer, parameter=weight) as recorder:  # doctest: +SKIP
    ...     for batch in batches:
    ...         loss = train_step(batch)  # ends with optimizer.step()
    ...         recorder.log(loss=loss)
    """

    def __init__(
        self,
        path: StorePath,
        optimizer: torch.optim.Optimizer,
        *,
        parameter: Tensor | None = None,
        parameters: Parameters | None = None,
        model: nn.Module | None = None,
        name: str | None = None,
        labels: Labels = None,
        variables: Sequence[str] | None = None,
        tokens: Rows | Mapping[str, Rows] | None = None,
        schedule: Callable[[int], bool] | None = None,
        n_steps: int | None = None,
        attrs: Mapping[str, Json] | None = None,
        coding: CodingName = "plain",
        memory_bytes: int | None = None,
        max_overhead: float | None = 0.03,
        audit: OnFinding | None = None,
        audit_every_step: bool = False,
        keep: Keep = "all",
        overwrite: bool = False,
        resume: bool = False,
        after_step: int | None = None,
        spool: StorePath | None = None,
    ) -> None:
        self._spool = Spool(path, spool, resume=resume)
        names: dict[str, Any] = {"model": model, "name": name, "labels": labels, "tokens": tokens}
        self._live, recorded = choose(optimizer, parameter, parameters=parameters, **names)
        self._schedule = steps = None if schedule is None else as_schedule(schedule)
        what: dict[str, Any] = {"variables": variables, "attrs": attrs, "coding": coding}
        memory_bytes = default_memory_bytes(coding) if memory_bytes is None else memory_bytes
        self._live.schemas = declare(recorded, schedule=steps, memory_bytes=memory_bytes, **what)
        how: dict[str, Any] = {"max_overhead": max_overhead, "keep": keep}
        how |= {"audit": audit, "audit_every_step": audit_every_step}
        self._writer = BlockWriter(self._live, recorded, memory_bytes=memory_bytes, **how)
        n_rows = None if n_steps is None or steps is not None else n_steps + 1
        self._open(n_rows=n_rows, resume=resume, overwrite=overwrite, after_step=after_step)

    def _open(self, **options: Any) -> None:
        for message in self._writer.refused():
            warnings.warn(message, stacklevel=3)
        self._store = store = self._writer.open(self._spool.path, **options)
        with ExitStack() as undo:
            undo.callback(self._spool.finish)
            # Of a store that is there nothing was changed that a later run cannot go on with.
            undo.callback(store.release if store.n_rows else store.discard)
            self._spool.publish()
            self._start()
            undo.pop_all()

    def _start(self) -> None:
        live, self._stopwatch = self._live, self._writer.stopwatch
        self._on_cuda = any(parameter.is_cuda for parameter in live.parameters.values())
        self._is_recorded = row_choice(self._schedule)
        self._calls, self._scope = CallLock(), ExitStack()
        self._begun = self._store.n_rows > 0
        self._step = max(0, live.counter.last.step)
        group, schema = next(iter(self._store.schemas.items()))
        self._logged = Logged(self._step, group, schema.logged, self._writer.declare)
        self._warned: set[str] = set()
        is_early = any(schema.optimizer.changes_gradient for schema in self.schemas.values())
        self._hooks = StepHooks(
            live.optimizer,
            before=self._before_step,
            after=self._after_step,
            before_update=self._take_gradients if is_early else None,
        )
        self._row_end_s, self._closed = 0.0, False
        self._forget = close_at_exit(self.close)

    @property
    def step(self) -> int:
        """Steps that the optimizer took so far, recorded or not."""
        return self._step

    @property
    def next_step(self) -> int:
        """The step that the loop takes next, counted from 1; steps that were skipped count."""
        return self.step + 1

    @property
    def committed_step(self) -> int:
        """The last step that survives a crash, 0 before there is one."""
        return max(0, self._store.last_step)

    @property
    def is_published(self) -> bool:
        """Whether all that was recorded is at its address, once it is closed; True without one."""
        return self._spool.is_published

    @property
    def schemas(self) -> Mapping[str, Schema]:
        """What the store holds, by group; the group of a single `parameter` is empty."""
        return self._store.schemas

    @property
    def bytes_written(self) -> int:
        """Bytes put on disk so far."""
        return self._store.bytes_written

    @property
    def audited(self) -> AuditCounts | None:
        """How many steps were audited since the recorder was made; None without an audit."""
        return None if self._writer.audit is None else self._writer.audit.counts

    def log(self, *, loss: Loss = None, step: int | None = None, **arrays: Loggable) -> None:
        """Note the loss of a step, and small arrays of it.

        Call it once a step, always on the same side of `optimizer.step()`: logged before, it
        belongs to the step to come; logged after, to the step just taken. The first call tells
        which, unless `step` does: give it where a `GradScaler` may skip the first step. What is
        logged of a step that was skipped, or that the schedule leaves out, is dropped. A loss that
        is not finite is recorded, with a warning the first time.

        Parameters
        ----------
        loss
            A number or a tensor of one element; on a GPU it is waited for.
        step
            The step it is of: `recorder.step`, the last one taken, or `recorder.next_step`. Any
            other is a ConfigError.
        arrays
            Float arrays of at most 64 KB, by name, `log(loss=loss, h_mean=mean)`: from the first
            steps on, always of one shape and dtype. Steps without any have NaN.
        """
        with self._calls.held():
            self._check()
            self._report()
            step = self._logged.step_of(step, self.step)
            if not self._is_recorded(step):
                return
            if message := self._logged.add(loss, arrays, step, self.step, self._writer.block):
                self._warn_once("loss", message)

    def flush(self) -> None:
        """Commit every recorded row. When this returns they survive a crash of the machine.

        A signal handler may call it, and another thread. In a handler that came into the recorder's
        own work it returns at once, and the rows are committed when that is done.
        """
        if self._calls.postpone(self.flush):
            return
        with self._calls.held():
            self._check()
            self._commit()

    def close(self) -> None:
        """Commit what was recorded, remove the hooks and close the store. Safe to call twice.

        A recording without a step leaves no store, nor does one whose schedule includes none of its
        steps, with a warning. In a forked process nothing is done: the recording is its parent's.
        If the run has an address, this waits until all is published, or no file of it arrives for
        60 s. A warning says what is not, and how to publish it.
        """
        try:
            self._close()
        finally:
            self._finish_publishing()

    def _finish_publishing(self) -> None:
        if self._closed and not self._calls.is_forked and (message := self._spool.finish()):
            warnings.warn(message, stacklevel=3)

    def _close(self) -> None:
        if self._closed or self._calls.is_forked or self._calls.postpone(self.close):
            return
        with self._calls.held():
            if self._closed:
                return
            self._hooks.remove()
            try:
                self._check()
                self._commit()
            finally:
                self._closed = True
                self._forget()
                self._writer.close()
            self._report()
            if self._step and not self._writer.n_rows:
                self._warn_once(
                    "schedule",
                    f"none of {self._step:,} steps was recorded, and there is no store at "
                    f"{self._store.path}: the schedule {self._schedule} includes none of them",
                )
            if self._logged.is_late(self._step):
                self._warn_once(
                    "side",
                    f"a loss was logged after the last step, {self.step}: the first one came "
                    "before any step, so each was taken for that of the step to come. If you log "
                    "after optimizer.step(), a GradScaler skipped the first step, and all losses "
                    "are one step late: pass step=recorder.step",
                )

    def __enter__(self) -> Self:
        # A Ctrl-C at the first bytecode of `__exit__` would leave the store open.
        self._scope.enter_context(interrupts_held(within=Recorder.__exit__.__code__))
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self._logged.forget()
        try:
            with self._scope:
                try:
                    self._close()
                except RecordingError as closing_error:
                    if error is None:
                        raise
                    error.add_note(str(closing_error))
        finally:
            self._finish_publishing()

    def _commit(self) -> None:
        """Commit every row; where the last is not whole, with what is there since its step."""
        if not self._hooks.within_step:
            self._writer.block.complete(self._live.variables())
        self._writer.commit()

    def _check(self) -> None:
        if self._closed:
            raise RecordingError(f"the recording into {self._store.path} is closed")
        self._writer.check()

    def _report(self) -> None:
        """Let training know what the writer thread found."""
        for message in (*self._writer.news(), *self._spool.news()):
            self._warn_once(message, message)

    def _before_step(self) -> None:
        if self._on_cuda and torch.cuda.is_current_stream_capturing():
            raise OptimizerError(
                "optimizer.step() is being captured in a CUDA graph, and the recorder does not see "
                "the graph's replays; leave the step out of the graph"
            )
        # Where nothing is to be done, not even interrupts are held, which takes most of a hook.
        if not (self._begun and self._writer.is_idle and not self._is_recorded(self._step + 1)):
            self._begin_row()

    def _after_step(self) -> None:
        # A Ctrl-C in here may lose a step: then the optimizer has counted one more at the next row
        # than there can be, which is refused.
        self._live.counter.count_step()
        if self._is_recorded(self._step + 1):
            self._end_row()
        else:
            self._finish_step()

    def _begin_row(self) -> None:
        with self._calls.held():
            self._check()
            self._writer.wait_for_audit()
            self._report()
            is_recorded = self._is_recorded(self._step + 1)
            if is_recorded or not self._begun:
                self._live.check_unchanged()
                self._live.note_numbers()
            if not self._begun and self._is_recorded(0):
                self._append_row(0)
            self._begun = True
            self._row_end_s = self._row_end_s or time.perf_counter()
            if self._writer.block.is_full:
                self._writer.make_room()
                if message := self._writer.overhead_warning():
                    self._warn_once("overhead", message)
            self._report()
            if is_recorded and self._step > self._live.counter.last.step:
                # Steps before it are not recorded: what it finds is what it starts from.
                self._live.counter.last = self._live.counter.counts(self._step)

    def _take_gradients(self) -> None:
        """Copy gradients before the step, which will overwrite some."""
        if not self._is_recorded(self._step + 1):
            return
        with self._calls.held(), self._stopwatch.time("copy_s"):
            grads = self._live.gradients().items()
            early = {array_path(group, "grad"): grad for group, grad in grads}
            self._writer.block.take_early(early)

    def _end_row(self) -> None:
        with self._calls.held():
            step = self._step + 1
            with self._stopwatch.time("copy_s"):
                self._append_row(step)
            self._logged.end_row(step, self._writer.block)
            self._finish_step()
            grads = self._live.gradients()
            if missing := [group for group, grad in grads.items() if grad is None]:
                which = ", ".join(filter(None, missing))
                self._warn_once(
                    "grad",
                    f"no gradient at step {step}{f' of {which}' if which else ''}: recorded as "
                    "skipped, and any later ones silently. A parameter has none that is frozen, "
                    "unused, or replaced in the model, as by load_state_dict(assign=True)",
                )

    def _append_row(self, step: int) -> None:
        counts = self._live.counter.counts(step)
        whole = self._writer.is_whole(step) or not self._is_recorded(step + 1)
        self._writer.block.append(*self._live.row(counts), step=step, whole=whole)
        self._live.counter.last = counts  # only now: a row that could not be taken was none
        self._writer.end_row()

    def _finish_step(self) -> None:
        """Count a step, and measure it from the end of the row before to the end of its own."""
        self._step += 1
        now_s = time.perf_counter()
        self._stopwatch.add(n_steps=1, elapsed_s=now_s - self._row_end_s)
        self._row_end_s = now_s

    def _warn_once(self, about: str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(message, stacklevel=3)
