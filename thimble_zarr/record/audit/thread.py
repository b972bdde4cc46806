"""A thread that audits each row as soon as it is filled."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from thimble_zarr.format.audited import AuditCounts
from thimble_zarr.format.overhead import Overhead, Stopwatch
from thimble_zarr.record.audit.audit import Audit
from thimble_zarr.record.block import Block
from thimble_zarr.record.replay.torch_steps import prepare


class AuditThread:
    """Checks rows while training goes on to the next step, which begins when that is done.

    The writer thread could not: it may be busy with the block before for as long as many steps
    take. Training fills other rows meanwhile: one that is filled does not change any more. When a
    block is passed on to be committed, all of its rows are checked.
    """

    def __init__(self, audit: Audit) -> None:
        self._audit, self._watch = audit, Stopwatch()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="thimble-zarr-audit")
        self._thread.submit(prepare).result()
        self._pending: Future[AuditCounts | None] | None = None
        self._of_block: AuditCounts | None = None

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to wait for."""
        return self._pending is None

    def submit(self, block: Block, path: Path) -> None:
        """Have the rows of a block that are not checked yet checked, and told of."""
        self._pending = self._thread.submit(self._check, block, block.n_rows, path)

    def wait(self) -> None:
        """Wait until every row is checked."""
        if self._pending is not None:
            self._of_block, self._pending = self._pending.result(), None

    def lap(self) -> tuple[AuditCounts | None, Overhead]:
        """Return what is known of the block, and what was spent since the last lap."""
        self.wait()
        return self._of_block, self._watch.lap()

    def stop(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _check(self, block: Block, n_rows: int, path: Path) -> AuditCounts | None:
        with self._watch.time("audit_s"):
            block.derive(n_rows)
            counts = self._audit.check(block, n_rows, path)
        self._audit.tell()
        return counts
