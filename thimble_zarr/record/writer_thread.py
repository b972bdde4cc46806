"""One background thread that commits blocks while training goes on.

Training fills one block while the thread commits the one before, and then they change places, so
memory is bounded and a slow disk slows training down. An error reaches training at its next call.
"""

import warnings
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, Literal, get_args

import torch

from thimble_zarr.errors import ConfigError, RecordingError, ResumeError
from thimble_zarr.format import layout
from thimble_zarr.format.audited import AuditCounts
from thimble_zarr.format.overhead import Overhead, Stopwatch
from thimble_zarr.format.schema import Schema, array_path, row_size
from thimble_zarr.format.stored_array import LoggedArray
from thimble_zarr.record.audit.audit import Audit, OnFinding
from thimble_zarr.record.audit.finding import AuditFinding
from thimble_zarr.record.audit.thread import AuditThread
from thimble_zarr.record.block import Block
from thimble_zarr.record.capture import LiveOptimizer
from thimble_zarr.record.counting import StepCounts
from thimble_zarr.record.parameters import RecordedParameter
from thimble_zarr.record.replay.keyframes import Keyframes
from thimble_zarr.record.replay.torch_steps import prepare
from thimble_zarr.record.transfer import side_stream
from thimble_zarr.store.contents import is_begun
from thimble_zarr.store.reader import StorePath, StoreReader
from thimble_zarr.store.writer import StoreWriter

Keep = Literal["all", "keyframes"]
"""Which rows training copies whole: all of them, or the first and the last of each block."""


class BlockWriter:
    """Commits blocks to a store, in order; training fills `block`. All memory is taken at once.

    Call its methods where `interrupts_held`. Errors of committing are `RecordingError`. With one
    block only, training waits while it is committed. While blocks are pending the store belongs to
    the thread. A lap of the stopwatch, which is training's, ends whenever rows are passed on.
    """

    def __init__(
        self,
        live: LiveOptimizer,
        recorded: Mapping[str, RecordedParameter],
        *,
        memory_bytes: int,
        max_overhead: float | None,
        audit: OnFinding | None,
        audit_every_step: bool,
        keep: Keep,
    ) -> None:
        _check_options(audit, keep, max_overhead, audit_every_step=audit_every_step)
        schemas = live.schemas
        ids = {group: one.rows for group, one in recorded.items() if one.rows is not None}
        labels = {group: one.labels for group, one in recorded.items() if one.labels}
        schema = schemas.get("", schemas)
        self._declared: dict[str, Any] = {"schema": schema, "labels": labels, "token_ids": ids}
        self._live, self._max_overhead = live, max_overhead
        self.audit = None if audit is None else Audit(schemas, ids, audit)
        self._auditor = AuditThread(self.audit) if self.audit and audit_every_step else None
        self.keyframes = None if keep == "all" else Keyframes(schemas, ids)
        self._news: deque[str] = deque()
        self.stopwatch = Stopwatch()
        self._n_buffers = _count_buffers(schemas.values(), memory_bytes=memory_bytes)
        devices = {schema.device for schema in schemas.values()}
        streams = {device: stream for device in devices if (stream := side_stream(device))}
        rows = {group: torch.from_numpy(ids[group]).to(schemas[group].device) for group in ids}
        filled_in = () if self.keyframes is None else self.keyframes.groups
        self._free = [Block(schemas, streams, rows, filled_in) for _ in range(self._n_buffers)]
        self._pending: deque[tuple[Future[None], Block]] = deque()
        self._error: BaseException | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="thimble-zarr-writer")
        self.block = self._free.pop()
        self._counts_before = {0: live.counter.last}
        self._store: StoreWriter

    def open(
        self,
        path: StorePath,
        *,
        n_rows: int | None,
        resume: bool,
        overwrite: bool,
        after_step: int | None,
    ) -> StoreWriter:
        """Create the store, or resume it; the arguments are those of `Recorder`."""
        if (resume and overwrite) or (after_step is not None and not resume):
            raise ConfigError(
                "`resume` continues a store and `overwrite` replaces it: choose one; "
                "`after_step` is for `resume`"
            )
        declared = {**self._declared, "n_rows": n_rows}
        if resume and is_begun(path):
            kept = None if after_step is None else after_step + 1
            self._store = StoreWriter.resume(
                path, **declared, kept_rows=kept, approve=self._take_up
            )
        elif after_step:
            raise ResumeError(
                f"cannot resume after step {after_step}: nothing is recorded at {path}; check the "
                "path or leave `after_step` out to record from here on"
            )
        else:
            self._store = StoreWriter.create(path, **declared, overwrite=overwrite or resume)
        if self.audit is not None or self.keyframes is not None:
            self._thread.submit(prepare).result()
        return self._store

    def declare(self, name: str, logged: LoggedArray) -> None:
        """Declare what is logged at each step under a name, which is new, while nothing pends."""
        if self._pending:
            self._wait(self._pending[-1][0])
        self._store.declare_logged(name, logged)
        self._make_room_for(next(iter(self._store.schemas)), {name: logged})

    def _make_room_for(self, group: str, logged: Mapping[str, LoggedArray]) -> None:
        for block in (self.block, *self._free, *(block for _, block in self._pending)):
            for name, of in logged.items():
                block.declare(array_path(group, name), of)

    def _take_up(self, readers: Sequence[StoreReader], n_rows: int) -> None:
        self._live.resume(readers, n_rows)
        for reader in readers:
            self._make_room_for(reader.group, reader.schema.logged)
        before = self.block.load(readers, n_rows)
        if self.audit is not None:
            self.audit.load(readers, self.block.first_row, before)
        self._counts_before = {self.block.first_row: before}

    @property
    def n_rows(self) -> int:
        """Rows there are, committed or not."""
        return self.block.first_row + self.block.n_rows

    def make_room(self) -> None:
        """Pass the full block on, and wait for a free one, in which to go on."""
        next_row = self.n_rows
        self.submit(self.block)
        self.check()
        if not self._free:
            self.stopwatch.add(n_waits=1)
            with self.stopwatch.time("wait_s"):
                self._collect()
        self.block = self._free.pop()
        self.block.start(next_row)

    def end_row(self) -> None:
        """Have the row that was filled audited, if each is as soon as it is."""
        if self._auditor is not None:
            self._auditor.submit(self.block, self._store.path)

    def wait_for_audit(self) -> None:
        """Wait until every row is audited, if each is as soon as it is filled."""
        if self._auditor is not None:
            with self.stopwatch.time("wait_s"):
                self._auditor.wait()

    def submit(self, block: Block) -> None:
        """Pass a block on to be committed."""
        self.stopwatch.add(n_queued=len(self._pending))
        future = self._thread.submit(self._commit, block, *self._lap())
        self._pending.append((future, block))

    def _lap(self) -> tuple[AuditCounts | None, Overhead]:
        """Return how the block was audited, if it was, and what was spent since the last lap."""
        if self._auditor is None:
            return None, self.stopwatch.lap()
        audited, spent = self._auditor.lap()
        return audited, spent + self.stopwatch.lap()

    def commit(self) -> None:
        """Commit all pending blocks and then the rows of the one that training fills."""
        self.wait_for_audit()
        passed_on = self._lap()
        with self.stopwatch.time("wait_s"):
            while self._pending:
                self._collect()
            self.check()
            if self.block.n_rows:
                self._wait(self._thread.submit(self._commit, self.block, *passed_on))

    def check(self) -> None:
        """Raise RecordingError if a block could not be committed."""
        while self._pending and self._pending[0][0].done():
            self._collect()
        if self._error is not None:
            self._fail(self._error)

    @property
    def is_idle(self) -> bool:
        """Whether there is room, nothing is pending, nothing failed and nothing was found."""
        is_silent = not self._news and (self.audit is None or self.audit.is_silent)
        is_silent = is_silent and (self._auditor is None or self._auditor.is_idle)
        return is_silent and not self.block.is_full and not self._pending and self._error is None

    def refused(self) -> Iterator[str]:
        """Yield which parameters' steps cannot be taken again: what that would be for, and why."""
        found = [] if self.audit is None else [(self.audit.unaudited, "audited")]
        if self.keyframes is not None:
            found.append((self.keyframes.refused, "left to keep='keyframes'"))
        for refused, what in found:
            for group, why in refused.items():
                name = self._live.schemas[group].parameter or group or "the parameter"
                yield f"steps of {name} cannot be {what}: {why}"

    def news(self) -> Iterator[str]:
        """Yield what training was not told yet; raise AuditError where that is due."""
        while self._news:
            yield self._news.popleft()
        if self.audit is not None:
            yield from self.audit.news()

    def is_whole(self, step: int) -> bool:
        """Whether all of the next row, that of a step, must be copied."""
        if self.keyframes is None or not self.keyframes.is_on:
            return True
        block, at = self.block, self.block.n_rows
        return at in (0, block.block_steps - 1) or block.steps[at - 1] != step - 1

    def overhead_warning(self) -> str | None:
        """Return what to say if recording took more than `max_overhead` of training time."""
        spent, most = self._store.spent, self._max_overhead
        if most is None or not spent.telling or spent.training_share <= most:
            return None
        advice = spent.advice
        if self._n_buffers == 1 and 2 * spent.wait_s > spent.copy_s:
            advice = "each step waits, because memory_bytes holds one row only: give more, for two"
        return (
            f"recording takes {spent.training_share:.1%} of training time, and max_overhead is "
            f"{most:.1%}: {advice}. This warning is shown once; recording continues as before"
        )

    def stop(self) -> None:
        """Wait for pending blocks and end the thread."""
        self._thread.shutdown()
        if self._auditor is not None:
            self._auditor.stop()

    def close(self) -> None:
        """End the thread; close the store if all rows are committed, or leave it as it is."""
        self.stop()
        if self._store.n_rows != self.n_rows:
            return self._store.release()
        try:
            return self._store.close()
        except OSError as error:
            raise RecordingError(f"cannot close {self._store.path}: {error}") from error

    def _commit(self, block: Block, audited: AuditCounts | None, spent: Overhead) -> None:
        first, before = block.first_row, self._counts_before[block.first_row]
        n_sound = block.settle(before)
        last = block.counts(n_sound, before)
        if n_sound:
            audits_now, watch = self.audit is not None and self._auditor is None, Stopwatch()
            takes_again = audits_now or self.keyframes is not None
            with watch.time("audit_s") if takes_again else nullcontext():
                apart = self._fill(block, n_sound, before)
                if self.audit is not None and audits_now:
                    audited = self.audit.check(block, n_sound, self._store.path)
                    if apart is not None:
                        audited = self.audit.add(apart, apart.step - (apart.since or 0))
            self._store.commit_block(
                first,
                n_sound,
                block.bits(),
                block.scalars,
                spent + watch.lap(),
                block.steps,
                audit=audited,
                marked=block.marked_rows(n_sound),
            )
            if self.audit is not None and audits_now:
                self.audit.tell()
            # The block may be committed again, with more rows.
            self._counts_before = {first: before, first + n_sound: last}
        if n_sound < block.n_rows:
            block.counts(n_sound + 1, before).check(last)

    def _fill(self, block: Block, n_rows: int, before: StepCounts) -> AuditFinding | None:
        """Fill rows in; return what is wrong with them, and warn of it if there is no audit."""
        if self.keyframes is None:
            return None
        try:
            apart = self.keyframes.fill(block, n_rows, before, self._store.path)
        except Exception as error:  # a run is worth more than its rows between keyframes
            self.keyframes.give_up(block, n_rows)
            self._news.append(
                f"rows between keyframes at steps {block.steps[0]:,} to {block.steps[n_rows - 1]:,}"
                f" cannot be worked out: {type(error).__name__}: {error}. W and the states are "
                "missing there, and from now on every row is copied whole"
            )
            return None
        if apart is not None and self.audit is None:
            self._news.append(str(apart))
        return apart

    def _collect(self) -> None:
        future, block = self._pending[0]
        self._wait(future)
        self._pending.popleft()
        self._free.append(block)

    def _wait(self, future: Future[None]) -> None:
        error = future.exception()  # SystemExit, too: the thread's end is not training's
        if error is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._error = error
        n_rows, last = self._store.n_rows, self._store.last_step
        steps = f"steps 0 to {last}" if n_rows == last + 1 else f"the recorded steps up to {last}"
        safe = f"{steps} are committed and safe" if n_rows else "nothing is committed"
        raise RecordingError(
            f"recording into {self._store.path} stopped: {error}; {safe}"
        ) from error


def _check_options(
    audit: OnFinding | None, keep: Keep, max_overhead: float | None, *, audit_every_step: bool
) -> None:
    """Raise ConfigError if options of a recorder are not what they can be, or do not fit."""
    if keep not in get_args(Keep):
        raise ConfigError(f"keep is {keep!r}, and can be {' or '.join(get_args(Keep))}")
    if max_overhead is not None and not max_overhead > 0:
        raise ConfigError(
            f"max_overhead is {max_overhead}; give a share of training time above 0, or None"
        )
    if audit_every_step and (audit is None or keep != "all"):
        raise ConfigError(
            "audit_every_step says when to audit, and needs `audit` and keep='all': a row that "
            "is filled in with its block cannot be audited before"
        )


def _count_buffers(schemas: Collection[Schema], *, memory_bytes: int) -> int:
    """Return how many blocks to hold in memory, and warn if even one row is more than the limit."""
    rows = [row_size(schema.shape, schema.dtypes, schema.coding) for schema in schemas]
    steps = next(iter(schemas)).layout.block_steps
    n_buffers = layout.count_buffers(rows, steps, memory_bytes)
    needed = layout.recorder_memory_bytes(rows, steps, n_buffers)
    if needed > memory_bytes:
        sizes = sum(row.n_bytes for row in rows), needed, memory_bytes
        row, needs, given = map(layout.human_bytes, sizes)
        warnings.warn(
            f"one row of what is recorded takes {row}: the recorder needs {needs}, more than "
            f"memory_bytes ({given}), and training waits while each step is written. With "
            f"memory_bytes={layout.recorder_memory_bytes(rows, steps)} it need not wait; to need "
            "less, record fewer rows (tokens=), variables or parameters",
            stacklevel=4,
        )
    return n_buffers
