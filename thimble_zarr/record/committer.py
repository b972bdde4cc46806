"""One background thread that commits blocks while training goes on.

Blocks go round: training fills one, `submit` passes it on, the thread commits it, `acquire` hands
it out again. There are a few of them and no more, so memory is bounded and a disk that cannot keep
up slows training down. If a commit fails, the error reaches training at its next call.
"""

import math
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from thimble_zarr.errors import RecordingError
from thimble_zarr.format.layout import MAX_BUFFERS
from thimble_zarr.format.overhead import Overhead, Stopwatch
from thimble_zarr.record.block import Block, Counted
from thimble_zarr.record.capture import missed_step
from thimble_zarr.record.transfer import side_stream
from thimble_zarr.store.writer import StoreWriter


class BlockWriter:
    """Commits blocks to a store, in order.

    Its methods stand no KeyboardInterrupt: call them where `interrupts_held`.

    Parameters
    ----------
    store
        The store to commit to. While blocks are pending it belongs to the thread.
    stopwatch
        Training's, which measures how long it waits. A lap ends whenever rows are passed on.
    n_buffers
        Blocks there are. With one, training waits while each is committed.
    """

    def __init__(
        self, store: StoreWriter, stopwatch: Stopwatch, n_buffers: int = MAX_BUFFERS
    ) -> None:
        self._store = store
        self._stopwatch = stopwatch
        devices = {schema.device for schema in store.schemas.values()}
        streams = {device: side_stream(device) for device in devices}
        copies = {device: stream for device, stream in streams.items() if stream is not None}
        self._free = [Block(store.schemas, copies) for _ in range(n_buffers)]
        self._rows_before = {0: Counted(-1, dict.fromkeys(store.schemas, math.nan))}
        self._pending: deque[tuple[Future[None], Block]] = deque()
        self._error: BaseException | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="thimble-zarr-writer")

    def go_on(self, first_row: int, before: Counted) -> None:
        """Begin with the block at `first_row`, given the row before."""
        self._rows_before = {first_row: before}

    def acquire(self) -> Block:
        """Return a free block, waiting until the thread has committed one.

        Raises
        ------
        RecordingError
            If a block could not be committed.
        """
        self.check()
        if not self._free:
            self._stopwatch.add(n_waits=1)
            with self._stopwatch.time("wait_s"):
                self._collect()
        return self._free.pop()

    def submit(self, block: Block) -> None:
        """Pass a block on to be committed; the caller no longer owns it."""
        self._stopwatch.add(n_queued=len(self._pending))
        future = self._thread.submit(self._commit, block, self._stopwatch.lap())
        self._pending.append((future, block))

    def commit(self, block: Block) -> None:
        """Commit all pending blocks and then the rows of `block`, which the caller keeps.

        Raises
        ------
        RecordingError
            If a block could not be committed.
        """
        spent = self._stopwatch.lap()
        with self._stopwatch.time("wait_s"):
            while self._pending:
                self._collect()
            self.check()
            if block.n_rows:
                self._wait(self._thread.submit(self._commit, block, spent))

    def check(self) -> None:
        """Raise RecordingError if a block could not be committed."""
        while self._pending and self._pending[0][0].done():
            self._collect()
        if self._error is not None:
            self._fail(self._error)

    @property
    def settled(self) -> bool:
        """Whether nothing is pending and nothing failed, so that `check` has nothing to do."""
        return not self._pending and self._error is None

    def stop(self) -> None:
        """Wait for pending blocks and end the thread."""
        self._thread.shutdown()

    def _commit(self, block: Block, spent: Overhead) -> None:
        first = block.first_row
        before = self._rows_before[first]
        n_sound = block.settle(before)
        last = block.counted(n_sound - 1) if n_sound else before
        if n_sound:
            self._store.commit_block(
                first, n_sound, block.bits(), block.scalars, spent, block.steps
            )
            # The block may be committed again, with more rows.
            self._rows_before = {first: before, first + n_sound: last}
        if n_sound < block.n_rows:
            found = block.counted(n_sound)
            wrong = next(
                group
                for group, count in found.counts.items()
                if not 0 <= count - last.counts[group] <= found.step - last.step
            )
            raise missed_step(found.counts[wrong], last.counts[wrong], wrong)

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
