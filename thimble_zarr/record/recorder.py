"""The recorder: installs torch's step hooks and turns every optimizer step into a row.

After a step, before any other hook, it reads the numbers the step used (schedules and closures
change them) and what it consumed and produced. Rows are copied before the hook returns, because
tensors alias. A full block goes to the writer thread only when the next step begins, so that a loss
logged after a step still finds its row, and so that any waiting for the disk is done before the
optimizer moves.
"""

import math
import sys
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Self, cast

import torch
from torch import Tensor, nn

from thimble_zarr.errors import ConfigError, OptimizerError, RecordingError, StoreError
from thimble_zarr.format.layout import (
    DEFAULT_MEMORY_BYTES,
    MAX_BUFFERS,
    count_buffers,
    human_bytes,
    recorder_memory_bytes,
)
from thimble_zarr.format.overhead import Stopwatch
from thimble_zarr.format.schema import (
    VARIABLES,
    Json,
    Schema,
    TokenLabels,
    array_path,
    row_size,
)
from thimble_zarr.interrupts import interrupts_held
from thimble_zarr.record.capture import (
    check_optimizer,
    check_unchanged,
    groups_of,
    hyperparameters,
    missed_step,
    optimizer_step,
    state_tensors,
)
from thimble_zarr.record.committer import BlockWriter
from thimble_zarr.record.declaration import declare
from thimble_zarr.record.ending import close_after, close_at_exit, is_closed
from thimble_zarr.record.parameters import (
    Parameters,
    Rows,
    check_recordable,
    choose_parameter,
    choose_parameters,
    choose_rows,
)
from thimble_zarr.record.resume import Kept, check_beginning, check_state, read_kept
from thimble_zarr.record.schedule import RowChoice, as_schedule
from thimble_zarr.record.turns import Turns, in_turn, in_turn_or_later
from thimble_zarr.store.contents import is_begun
from thimble_zarr.store.reader import StorePath, StoreReader
from thimble_zarr.store.writer import StoreWriter


class Recorder:
    """Record every step of an optimizer on one parameter or several.

    Recording starts when the recorder is made and ends with `close`, or with the `with` block. Rows
    of the last, unfinished block are on disk only after `flush` or `close`. Ctrl-C loses no row: it
    takes effect before or after the recorder's work on a step, and a `with` block always closes.
    What was left open is closed when Python ends.

    Parameters
    ----------
    path
        Store to create.
    optimizer
        A `torch.optim.Adam` or `AdamW`.
    parameter
        The one parameter to record, owned by the optimizer, of any shape; two axes are taken for
        `(token, dim)`. It lies at the root of the store.
    parameters
        Or several, each in a group of its own: patterns of names as `fnmatch` has them
        (`"*.wte.weight"`), or a list of them; a module, for all of its trainable parameters;
        tensors by name; or a list of tensors, which `model` names (or the optimizer, where it was
        made with names). Tied weights are recorded once, by their first name.
    model
        What has the parameters: it names them, and what its `torch.nn.Embedding`s hold gets dims
        `(token, dim)`, where any other matrix has `(row, col)`.
    name
        The one parameter's name in its model, kept as a label.
    labels
        What is known of the tokens: counts in the corpus, live and dead, texts. Of several
        parameters by name.
    variables
        Which of `W`, `grad`, `exp_avg`, `exp_avg_sq` and `max_exp_avg_sq` to record, of every
        parameter; `W` always. All by default. The formula needs `W` and the moments, the replay
        `grad` too.
    tokens
        Which rows of the parameter to record: ids in any order, or a mask. Of several parameters by
        name. All by default. Labels are still those of all rows.
    schedule
        Which steps to record: `every(10)`, `windows((0, 100), (1000, 1100))`, `log_spaced()`, two
        of them joined by `|`, or any function that says of a step, counted from 1, whether to. All
        by default. The row before each of them is recorded too, for a step is checked against it.
    n_steps
        Steps to come, where known. Only a hint: the store grows beyond it and is trimmed to what
        was recorded. With a schedule it is not needed.
    attrs
        Anything to keep with the run that JSON can hold: configuration, seeds, corpus.
    memory_bytes
        Limits the recorder's memory, for all parameters together, and so determines how many steps
        make a block. The recorder takes at most this much or one row of all that is recorded,
        whichever is more, and beside it some 20 MB of Python's own. If two rows do not fit it holds
        one, and training waits while each step is written. If one row does not fit it warns.
    max_overhead
        Share of training time that recording may take before it warns, once, with what would help;
        None never warns. Judged after a block, from 50 steps and 10 seconds of training on. What is
        recorded does not depend on it.
    overwrite
        Replace a store that lies at `path`.
    resume
        Go on with the store that lies at `path`, closed or cut off by a crash, after its last
        committed step; begin one where there is none, so that a script can always ask for it. Model
        and optimizer must be what they were after that step, bit by bit: restore them first.
        Whatever was recorded when the run began stays as it is, `attrs` included.
    after_step
        With `resume`: the step that the loop's own checkpoint was taken after. Recorded steps after
        it are dropped; the run takes them again.

    Raises
    ------
    OptimizerError
        If the optimizer is not of the Adam family, does not own a parameter, or a parameter cannot
        be recorded.
    ConfigError
        If it is not clear which parameters are meant, a pattern matches none, labels or `attrs` do
        not fit, `max_overhead` is not above 0, or variables, tokens or steps are none that can be
        recorded.
    ResumeError
        If the store recorded another run or not every step, or model and optimizer do not stand
        where it does. The message names every difference; the store is as it was.
    StoreError, StoreExistsError
        If the store cannot be created.

    Examples
    --------
    >>> with Recorder("run.zarr", optimizer, parameter=model.wte.weight) as recorder:
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
        labels: TokenLabels | Mapping[str, TokenLabels] | None = None,
        variables: Sequence[str] | None = None,
        tokens: Rows | Mapping[str, Rows] | None = None,
        schedule: Callable[[int], bool] | None = None,
        n_steps: int | None = None,
        attrs: Mapping[str, Json] | None = None,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        max_overhead: float | None = 0.03,
        overwrite: bool = False,
        resume: bool = False,
        after_step: int | None = None,
    ) -> None:
        if max_overhead is not None and not max_overhead > 0:
            raise ConfigError(
                f"max_overhead is {max_overhead}; give a share of training time above 0, such as "
                "0.03, or None for no warning"
            )
        if (resume and overwrite) or (after_step is not None and not resume):
            raise ConfigError(
                "`resume` continues a store and `overwrite` replaces it: choose one; "
                "`after_step` is for `resume`"
            )
        check_optimizer(optimizer)
        if parameter is not None and parameters is None:
            chosen = choose_parameter(parameter, name=name, model=model, labels=labels)
        elif parameters is not None and parameter is None and name is None:
            chosen = choose_parameters(optimizer, parameters, model=model, labels=labels)
        else:
            raise ConfigError(
                "expected either `parameter=`, one tensor, perhaps with its `name=`, or "
                "`parameters=`, which has its names in it; pass one of them"
            )
        check_recordable(optimizer, chosen.values())
        chosen, steps = choose_rows(chosen, tokens), as_schedule(schedule)
        self._optimizer = optimizer
        self._parameters = {group: of.tensor for group, of in chosen.items()}
        self._rows = {
            array_path(group, name): torch.from_numpy(of.rows).to(of.tensor.device)
            for group, of in chosen.items()
            for name in VARIABLES
            if of.rows is not None
        }
        self._on_cuda = any(parameter.is_cuda for parameter in self._parameters.values())
        self._schedule = steps
        self._is_recorded = RowChoice(steps)
        schemas = declare(
            optimizer,
            chosen,
            variables=variables,
            schedule=None if steps is None else str(steps),
            attrs=attrs or {},
            memory_bytes=memory_bytes,
        )
        self._n_buffers = _check_memory(schemas.values(), memory_bytes)
        self._max_overhead = max_overhead
        self._kept: Kept | None = None
        labels = {group: of.labels for group, of in chosen.items() if of.labels is not None}
        token_ids = {group: of.rows for group, of in chosen.items() if of.rows is not None}
        n_rows = None if n_steps is None or steps is not None else n_steps + 1
        if resume and is_begun(path):
            self._store = StoreWriter.resume(
                path,
                schemas.get("", schemas),
                labels=labels,
                token_ids=token_ids,
                n_rows=n_rows,
                kept_rows=None if after_step is None else after_step + 1,
                approve=self._approve,
            )
        else:
            check_beginning(path, after_step)
            self._store = StoreWriter.create(
                path,
                schemas.get("", schemas),
                labels=labels,
                token_ids=token_ids,
                n_rows=n_rows,
                overwrite=overwrite or resume,
            )
        with ExitStack() as undo:
            # Of a store that is there nothing was changed that a later run cannot go on with.
            undo.callback(self._store.release if self._kept else self._store.discard)
            self._start(optimizer)
            undo.pop_all()

    def _start(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the memory, and hook into the optimizer."""
        self._turns = Turns()
        self._stopwatch = Stopwatch()
        self._row_end_s = 0.0
        self._writer = BlockWriter(self._store, self._stopwatch, self._n_buffers)
        self._block = self._writer.acquire()
        # The call of `optimizer.step()` that training is in; of one that failed it is left behind.
        self._stepping: FrameType | None = None
        self._begun = False
        self._step = 0
        self._last_row = -1
        self._optimizer_steps: dict[str, float | Tensor] = {}
        self._start_block()
        self._loss: float | None = None
        self._loss_follows_step: bool | None = None
        self._loss_step = self._start_step = self.step
        self._warned: set[str] = set()
        self._scope = ExitStack()
        # Where somebody compiles the step, torch would compile what the hooks do, too.
        uncompiled: Callable[..., Callable[..., None]] = torch.compiler.disable
        self._begin_row = uncompiled(self._begin_row_uncompiled)
        self._end_row = uncompiled(self._end_row_uncompiled)
        self._hooks = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )
        # Other hooks may clear the gradient or change the learning rate.
        hooks = cast("OrderedDict[int, object]", optimizer._optimizer_step_post_hooks)
        hooks.move_to_end(self._hooks[1].id, last=False)
        self._closed = False
        close_at_exit(self.close)

    @property
    def step(self) -> int:
        """Steps that the optimizer took so far, recorded or not."""
        return self._step

    @property
    def next_step(self) -> int:
        """The step that the loop takes next, counted from 1: after a resumption, where it goes on.

        A step that the optimizer skips counts.
        """
        return self.step + 1

    @property
    def committed_step(self) -> int:
        """The last step that survives a crash, 0 before there is one."""
        return max(0, self._store.last_step)

    @property
    def schemas(self) -> Mapping[str, Schema]:
        """What the store holds, by group; the group of a single `parameter` is empty."""
        return self._store.schemas

    @property
    def bytes_written(self) -> int:
        """Bytes put on disk so far."""
        return self._store.bytes_written

    @in_turn
    def log(self, *, loss: float | Tensor, step: int | None = None) -> None:
        """Note the loss of a step.

        Call it once a step, always on the same side of `optimizer.step()`: logged before, it
        belongs to the step to come; logged after, to the step just taken. The first call tells
        which, unless `step` does. Say it where a `GradScaler` may skip steps, for it may skip the
        first: `step=recorder.step` after a step. A loss logged after a step that the optimizer
        skipped belongs to no row and is dropped, and so is that of a step that the schedule leaves
        out. A loss that is not finite is recorded, with a warning the first time.

        Parameters
        ----------
        loss
            A number or a tensor of one element; on a GPU it is waited for.
        step
            The step it is of: `recorder.step`, the last one taken, or `recorder.next_step`.

        Raises
        ------
        ConfigError
            If `step` is neither of these.
        RecordingError
            If the recording is closed, or a block could not be written.
        """
        self._check()
        if step is None:
            step = self._told_step()
        elif step not in (self.step, self.next_step):
            raise ConfigError(
                f"a loss of step {step} was logged when {self.step} steps were taken; log it right "
                "before its step (step=recorder.next_step) or right after it (step=recorder.step)"
            )
        if not self._is_recorded(step):
            return
        value = float(torch.as_tensor(loss).item())
        if not math.isfinite(value):
            self._warn_once(
                "loss",
                f"the loss of step {step} is {value}; it is recorded as it is, and so are any "
                "further ones, without a warning",
            )
        if step > self.step:
            self._loss = value
        elif step > self._loss_step:
            self._block.set_loss(self._block.n_rows - 1, value)
            self._loss_step = step

    def _told_step(self) -> int:
        """Return the step of a loss by the order of calls: the first one tells for all."""
        if self._loss_follows_step is None:
            self._loss_follows_step = self.step > self._start_step
        return self.step if self._loss_follows_step else self.next_step

    @in_turn_or_later
    def flush(self) -> None:
        """Commit every recorded row. When this returns they survive a crash of the machine.

        A handler of a signal may call it, and another thread. In a handler that came into the
        recorder's own work it returns at once, and the rows are committed when that is done.

        Raises
        ------
        RecordingError
            If the recording is closed, or a block could not be written.
        """
        self._check()
        self._writer.commit(self._block)

    def close(self) -> None:
        """Commit what was recorded, remove the hooks and close the store. Safe to call twice.

        A recording without a step leaves no store, nor does one whose schedule includes none of its
        steps, with a warning. In a process that was forked off nothing is done: the recording is
        its parent's.

        Raises
        ------
        RecordingError
            If a block could not be written. What was committed before can be read.
        """
        if not (self._closed or self._turns.is_forked):
            self._close()

    @in_turn_or_later
    def _close(self) -> None:
        if self._closed:
            return
        for hook in self._hooks:
            hook.remove()
        try:
            self._check()
            self._writer.commit(self._block)
        finally:
            self._closed = True
            is_closed(self.close)
            self._writer.stop()
            if self._store.n_rows == self._n_rows:
                self._close_store()
            else:
                self._store.release()
        if self._step and not self._n_rows:
            self._warn_once(
                "schedule",
                f"none of {self._step:,} steps was recorded, and there is no store at "
                f"{self._store.path}: the schedule {self._schedule} includes none of them",
            )
        if self._step > self._start_step and self._loss is not None:
            self._warn_once(
                "side",
                f"a loss was logged after the last step, {self.step}: the first one came before "
                "any step, so each was taken for that of the step to come. If you log after "
                "optimizer.step(), a GradScaler skipped the first step, and all losses are one "
                "step late: pass step=recorder.step",
            )

    def __enter__(self) -> Self:
        # A Ctrl-C at the first bytecode of `__exit__` would leave the store open.
        self._scope.enter_context(interrupts_held(within=Recorder.__exit__.__code__))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._loss = None  # of the step that was not reached
        with self._scope:
            close_after(error, self.close)

    @property
    def _n_rows(self) -> int:
        return self._block.first_row + self._block.n_rows

    def _approve(self, readers: Sequence[StoreReader], n_rows: int) -> None:
        check_state(self._optimizer, self._parameters, readers, n_rows)
        self._kept = read_kept(readers, n_rows)

    def _start_block(self) -> None:
        """Begin behind the committed rows; those of an unfinished block are committed with it."""
        n_rows = self._store.n_rows
        self._block.start(n_rows - n_rows % self._block.block_steps)
        if self._kept is None:
            return
        self._begun = True
        self._step = self._last_row = self._kept.last.step
        self._optimizer_steps = dict(self._kept.last.counts)
        self._writer.go_on(self._block.first_row, self._kept.before)
        if self._kept.bits:
            self._block.load(self._kept.bits, self._kept.scalars, self._kept.steps)
        self._kept = None  # it is as large as a block

    def _check(self) -> None:
        if self._closed:
            raise RecordingError(f"the recording into {self._store.path} is closed")
        self._writer.check()

    def _close_store(self) -> None:
        try:
            self._store.close()
        except (OSError, StoreError) as error:
            raise RecordingError(f"cannot close {self._store.path}: {error}") from error

    def _before_step(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        # Only in a frame that torch compiles, as it does this one with the step, is this true.
        if torch.compiler.is_compiling():
            self._begin_row(compiled=True)
            return
        calling = sys._getframe(1)
        if self._stepping is not None and _is_within(self._stepping, calling):
            return  # a subclass whose step calls that of its base class: hooks run for both
        # Where nothing is to be done, not even interrupts are held back, which takes most of the
        # time of a hook.
        if not self._is_idle:
            self._begin_row(compiled=False)
        self._stepping = calling

    def _after_step(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        if self._stepping is not sys._getframe(1):
            return  # of the base class: the subclass has not done its part yet
        if self._is_recorded(self._step + 1):
            self._end_row()
        else:
            # A Ctrl-C in here may lose a step: then the optimizer has counted one more at the next
            # row than there can be, which is refused.
            self._stepping = None
            self._step += 1
            self._count_step()

    @property
    def _is_idle(self) -> bool:
        """Whether there is nothing to do before a step: it is not recorded, and all is written."""
        return (
            self._begun
            and not self._is_recorded(self._step + 1)
            and not self._block.full
            and self._writer.settled
            and not (self._on_cuda and torch.cuda.is_current_stream_capturing())
        )

    @in_turn
    def _begin_row_uncompiled(self, *, compiled: bool) -> None:
        self._check()
        if compiled:
            raise OptimizerError(
                "optimizer.step() is compiled, which rounds differently from any replay; "
                "compile the model and call the step uncompiled"
            )
        if self._on_cuda and torch.cuda.is_current_stream_capturing():
            raise OptimizerError(
                "optimizer.step() is being captured in a CUDA graph, and the recorder does "
                "not see the graph's replays; leave the step out of the graph"
            )
        is_recorded = self._is_recorded(self._step + 1)
        if is_recorded or not self._begun:
            check_unchanged(self._optimizer, self._parameters, self.schemas)
        if not self._begun and self._is_recorded(0):
            self._append_row({}, step=0)
        self._begun = True
        self._row_end_s = self._row_end_s or time.perf_counter()
        self._make_room()
        if is_recorded:
            self._look_ahead()

    def _look_ahead(self) -> None:
        """Note the counts that a recorded step finds, where steps before it are not recorded."""
        n_unrecorded = self._step - self._last_row
        if n_unrecorded:
            self._optimizer_steps = self._counted_steps(most=n_unrecorded)

    @in_turn
    def _end_row_uncompiled(self) -> None:
        self._stepping = None
        step = self._step + 1
        with self._stopwatch.time("copy_s"):
            self._append_row(self._scalars(), step=step)
        if self._loss is not None:
            self._block.set_loss(self._block.n_rows - 1, self._loss)
            self._loss, self._loss_step = None, step
        self._step = step
        self._count_step()
        missing = [name for name, grad in self._gradients().items() if grad is None]
        if missing:
            which = ", ".join(filter(None, missing))
            self._warn_once(
                "grad",
                f"no gradient at step {self.step}{f' of {which}' if which else ''}: recorded as a "
                "step that the optimizer skipped, and so are any further ones, without a warning. "
                "A parameter has none that is frozen, unused, or no longer the model's "
                "(load_state_dict(assign=True) replaces parameters)",
            )

    def _gradients(self) -> dict[str, Tensor | None]:
        """Return the gradient of each parameter of which it is recorded."""
        return {
            group: parameter.grad
            for group, parameter in self._parameters.items()
            if "grad" in self.schemas[group].dtypes
        }

    def _scalars(self) -> dict[str, float | Tensor]:
        """Return the numbers that the step used on each parameter, those of its group."""
        groups = groups_of(self._optimizer, self._parameters.values())
        numbers = {id(group): hyperparameters(group) for group in groups}
        return {
            array_path(name, scalar): number
            for name, group in zip(self._parameters, groups, strict=True)
            for scalar, number in numbers[id(group)].items()
        }

    def _warn_once(self, about: str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(message, stacklevel=4)  # past what holds Ctrl-C back

    def _count_step(self) -> None:
        """Measure a step from the end of the row before to the end of its own row."""
        now_s = time.perf_counter()
        self._stopwatch.add(n_steps=1, elapsed_s=now_s - self._row_end_s)
        self._row_end_s = now_s

    def _append_row(self, scalars: Mapping[str, float | Tensor], *, step: int) -> None:
        """Copy the row after a step, of every parameter; that of step 0 has no gradient."""
        tensors: dict[str, Tensor | None] = {}
        counted = self._counted_steps(most=1)
        for group, parameter in self._parameters.items():
            states = state_tensors(self._optimizer, parameter)
            zeros = parameter.detach().new_zeros(()).expand(parameter.shape)
            for name in self.schemas[group].dtypes:
                tensors[array_path(group, name)] = states.get(name, zeros)
        gradients = self._gradients() if step else dict.fromkeys(self._parameters)
        for group, grad in gradients.items():
            consumed = self._consumed(group, grad, counted[group], step=step)
            tensors[array_path(group, "grad")] = consumed
        counts = {array_path(group, "optimizer_step"): count for group, count in counted.items()}
        self._block.append(tensors, {**counts, **scalars}, step=step, chosen=self._rows)
        self._optimizer_steps = counted
        self._last_row = step

    def _counted_steps(self, *, most: int) -> dict[str, float | Tensor]:
        """Return the optimizer's counts, which grew by so many steps at most.

        Counts on a device are looked at when they have come from there (`Block.settle`).
        """
        counts: dict[str, float | Tensor] = {}
        for group, parameter in self._parameters.items():
            count = optimizer_step(self._optimizer, parameter)
            before = self._optimizer_steps.get(group, count)
            counts[group] = count
            if isinstance(count, Tensor) or isinstance(before, Tensor):
                continue
            if not 0 <= count - before <= most:
                raise missed_step(count, before, group)
        return counts

    def _consumed(
        self, group: str, grad: Tensor | None, count: float | Tensor, *, step: int
    ) -> Tensor | None:
        """Return the gradient that a step consumed: none where it is known to have been skipped."""
        before = self._optimizer_steps.get(group, count)
        if isinstance(count, Tensor) or isinstance(before, Tensor):
            return grad
        if grad is None and count != before:
            of = f" of {group}" if group else ""
            raise RecordingError(
                f"the gradient{of} of step {step} was gone before it could be recorded: "
                "something within the step cleared it; clear it after the step"
            )
        return None if count == before else grad

    def _make_room(self) -> None:
        """Pass a full block on and go on in a free one, before the optimizer takes its step."""
        if self._block.full:
            next_row = self._n_rows
            self._writer.submit(self._block)
            block = self._writer.acquire()
            block.start(next_row)
            self._block = block
            self._check_overhead()

    def _check_overhead(self) -> None:
        spent, most = self._store.spent, self._max_overhead
        if most is not None and spent.telling and spent.training_share > most:
            advice = spent.advice
            if self._n_buffers == 1 and 2 * spent.wait_s > spent.copy_s:
                advice = (
                    "each step waits until it is written, because memory_bytes holds one row only: "
                    "give more, for two"
                )
            self._warn_once(
                "overhead",
                f"recording takes {spent.training_share:.1%} of training time, and max_overhead is "
                f"{most:.1%}: {advice}. This warning is shown once; recording continues as before",
            )


def _check_memory(schemas: Collection[Schema], memory_bytes: int) -> int:
    """Return how many blocks are held, and warn if even one row takes more than the limit."""
    rows = [row_size(schema.shape, schema.dtypes) for schema in schemas]
    (block_steps,) = {schema.layout.block_steps for schema in schemas}
    n_buffers = count_buffers(rows, block_steps, memory_bytes)
    needed, wished = (recorder_memory_bytes(rows, block_steps, n) for n in (n_buffers, MAX_BUFFERS))
    if needed > memory_bytes:
        warnings.warn(
            f"one row of what is recorded takes {human_bytes(sum(row.n_bytes for row in rows))}: "
            f"the recorder needs {human_bytes(needed)}, more than memory_bytes "
            f"({human_bytes(memory_bytes)}), and training waits while each step is written. With "
            f"memory_bytes={wished} it need not wait; to need less, record fewer rows (tokens=), "
            "variables or parameters",
            stacklevel=3,
        )
    return n_buffers


def _is_within(call: FrameType, frame: FrameType) -> bool:
    """Return whether a frame was called, directly or not, by a call that goes on."""
    caller = frame.f_back
    while caller is not None and caller is not call:
        caller = caller.f_back
    return caller is not None
