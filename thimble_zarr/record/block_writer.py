"""One background thread that commits blocks while training goes on.

Training fills one block while the thread commits the one before, and then they change places. There
are no more, so memory is bounded and a slow disk slows training down. If a commit fails, the error
reaches training at its next call.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from thimble_zarr.errors import RecordingError
from thimble_zarr.format.overhead import Overhead, Stopwatch
from thimble_zarr.record.block import Block
from thimble_zarr.record.counting import StepCounts
from thimble_zarr.record.resume_state import ResumeState
from thimble_zarr.record.setup import Setup
from thimble_zarr.record.transfer import side_stream
from thimble_zarr.store.writer import StoreWriter


class BlockWriter:
    """Commits blocks to a store, in order; training fills `block`.

    Call its methods where `interrupts_held`. Errors of committing are `RecordingError`. With one
    block only, training waits while it is committed. While blocks are pending the store belongs to
    the thread. A lap of training's stopwatch ends whenever rows are passed on. The rows of an
    unfinished block that is `resumed` are committed with it again.
    """

    def __init__(
        self,
        store: StoreWriter,
        stopwatch: Stopwatch,
        *,
        setup: Setup,
        resumed: ResumeState | None = None,
    ) -> None:
        self._store = store
        self._stopwatch = stopwatch
        devices = {schema.device for schema in store.schemas.values()}
        streams = {device: stream for device in devices if (stream := side_stream(device))}
        self._n_buffers = setup.n_buffers
        self._free = [
            Block(store.schemas, streams, setup.row_indices) for _ in range(setup.n_buffers)
        ]
        self._pending: deque[tuple[Future[None], Block]] = deque()
        self._error: BaseException | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="thimble-zarr-writer")
        self.block = self._free.pop()
        first_row = store.n_rows - store.n_rows % self.block.block_steps
        self.block.start(first_row)
        before = StepCounts.before_all(store.schemas)
        if resumed is not None:
            before = resumed.before
            self.block.load(resumed)
        self._counts_before = {first_row: before}

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
            self._stopwatch.add(n_waits=1)
            with self._stopwatch.time("wait_s"):
                self._collect()
        self.block = self._free.pop()
        self.block.start(next_row)

    def submit(self, block: Block) -> None:
        """Pass a block on to be committed."""
        self._stopwatch.add(n_queued=len(self._pending))
        future = self._thread.submit(self._commit, block, self._stopwatch.lap())
        self._pending.append((future, block))

    def commit(self) -> None:
        """Commit all pending blocks and then the rows of the one that training fills."""
        spent = self._stopwatch.lap()
        with self._stopwatch.time("wait_s"):
            while self._pending:
                self._collect()
            self.check()
            if self.block.n_rows:
                self._wait(self._thread.submit(self._commit, self.block, spent))

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

    def overhead_warning(self, most: float | None) -> str | None:
        """Return what to say if recording took more than such a share of training time."""
        spent = self._store.spent
        if most is None or not spent.telling or spent.training_share <= most:
            return None
        advice = spent.advice
        if self._n_buffers == 1 and 2 * spent.wait_s > spent.copy_s:
            advice = (
                "each step waits until it is written, because memory_bytes holds one row only: "
                "give more, for two"
            )
        return (
            f"recording takes {spent.training_share:.1%} of training time, and max_overhead is "
            f"{most:.1%}: {advice}. This warning is shown once; recording continues as before"
        )

    def stop(self) -> None:
        """Wait for pending blocks and end the thread."""
        self._thread.shutdown()

    def _commit(self, block: Block, spent: Overhead) -> None:
        first = block.first_row
        before = self._counts_before[first]
        n_sound = block.settle(before)
        last = block.counts(n_sound - 1) if n_sound else before
        if n_sound:
            self._store.commit_block(
                first, n_sound, block.bits(), block.scalars, spent, block.steps
            )
            # The block may be committed again, with more rows.
            self._counts_before = {first: before, first + n_sound: last}
        if n_sound < block.n_rows:
            block.counts(n_sound).check(last)

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
