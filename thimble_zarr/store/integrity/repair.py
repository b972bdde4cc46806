"""Cut a store down to what can be read, and remove what a crash left beside it.

A file that cannot be decoded is lost. The rows before the first lost block stay, and the rows
behind it go; lost per-step values become missing, and lost labels are left out. Damaged metadata
are written as they were declared. Lines of the ledger that are lost are made from the files whose
own checksums are right. What was done is one more line in the ledger.

A file that decodes but is not the one in the ledger was changed by another program. It is written
again only where its recorded values are certain (`values`). Otherwise most of its values are the
recorded ones and nothing here tells which, so it is left as it is, and the store stays damaged
until the file is restored. The ledger, not the commit record, says how many rows there are.

It is done in an order that can be cut off anywhere and started again::

    values and metadata -> ledger -> commit record -> removal
"""

import zlib
from collections.abc import Iterator
from contextlib import closing

import msgspec

from thimble_zarr.errors import StoreError
from thimble_zarr.format.location import on_disk
from thimble_zarr.format.schema import Json
from thimble_zarr.store.contents import StorePath
from thimble_zarr.store.files.base import Files
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.integrity.expected import read_expected, read_found
from thimble_zarr.store.integrity.metadata import (
    compare_documents,
    is_same,
    was_closed,
    without_copies,
)
from thimble_zarr.store.integrity.numbers import plan_numbers
from thimble_zarr.store.integrity.repair_plan import Plan, plan_blocks
from thimble_zarr.store.integrity.values import plan_values
from thimble_zarr.store.integrity.verify import find_leftovers
from thimble_zarr.store.keys import BOOKKEEPING, COMMIT, HOLDER, LEDGER, array_of, is_chunk_key
from thimble_zarr.store.ledger import Commit
from thimble_zarr.store.lock import WriterLock, check_not_recorded
from thimble_zarr.store.metadata import encoded


def plan_repair(store: StorePath) -> Plan:
    """Find out what `repair` would do. Every byte of the store is read, and nothing is written."""
    files = LocalFiles(on_disk(store).absolute())
    _check_not_recorded(files)
    return _plan(files)


def repair(store: StorePath) -> Plan:
    """Repair a store, and return what was done.

    Raises
    ------
    StoreLockedError
        If it is being recorded.
    StoreError
        If nothing of it can be kept, or it cannot be read or written. Then it is as it was, or
        repairing it again continues where this one stopped.
    """
    files = LocalFiles(on_disk(store).absolute())
    _check_not_recorded(files)
    names_a_writer = HOLDER in files.list(BOOKKEEPING)
    lock = WriterLock(files.path)
    try:
        plan = _plan(files)
        if plan.hopeless:
            raise StoreError(f"cannot repair {files.path}: {'; '.join(plan.hopeless)}")
        _apply(plan)
    finally:
        lock.release()
    if names_a_writer:  # one that is gone: taking the lock replaced its name, before the plan
        plan.steps.append(f"remove {HOLDER}")
    return plan


def _check_not_recorded(files: Files) -> None:
    """Raise an error where there is no store, or one that a writer may be recording."""
    if not read_expected(files).is_complete:
        check_not_recorded(files)


def _plan(files: Files) -> Plan:
    """Plan the repair of a store that nobody records into."""
    try:
        expected = read_expected(files)
        plan = Plan(expected, expected.n_rows)
        directories = {array_of(key) for key in expected.documents}
        plan.hopeless += [
            f"{key} is a link, and is not followed; put back what it stands for"
            for key in files.list()
            if key in directories
        ]
        if expected.n_rows and not plan.hopeless:
            plan_numbers(plan)
            plan_blocks(plan)
            plan_values(plan)
        if plan.hopeless:
            return plan
        repaired = plan.steps.copy()
        _plan_bookkeeping(plan, _plan_metadata(plan), repaired)
        _plan_removal(plan)
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"cannot read {files.path}: {error}") from error
    return plan


def _plan_metadata(plan: Plan) -> dict[str, Json]:
    """Write metadata again that are not as they should be; return all, without copies of others."""
    documents, findings = compare_documents(plan.expected, plan.n_rows, plan.dropped)
    plan.hopeless += [f"{one.where}: {one.what}" for one in findings if one.is_beyond_repair]
    for key, document in documents.items():
        found, _ = read_found(plan.expected.files, key)
        if not is_same(document, found):
            plan.written[key] = encoded(document)
            is_declared = is_same(without_copies(document), without_copies(found))
            how = "consolidate the metadata in {}" if is_declared else "write {} again"
            plan.steps.append(how.format(key))
    return {key: without_copies(document) for key, document in documents.items()}


def _plan_bookkeeping(plan: Plan, documents: dict[str, Json], repaired: list[str]) -> None:
    """Add lines to the ledger that say what is there, and make the commit record fit it."""
    expected, commit = plan.expected, plan.expected.commit
    kinds = {finding.kind for finding in expected.findings}
    is_other = plan.n_rows < expected.n_rows or any(
        record is not expected.ledger.records.get(key) for key, record in plan.records.items()
    )
    if expected.n_rows and (is_other or plan.dropped or expected.doubtful_bytes):
        plan.lines = [plan.line(*rows, repaired="rebuilt") for rows in plan.rebuilt.items()]
        last_block = max(row for row in (*expected.ledger.ends, *plan.rebuilt) if row < plan.n_rows)
        last = plan.line(
            last_block,
            plan.n_rows,
            metadata=documents,
            dropped=plan.dropped,
            repaired=repaired,
            replaces=None if commit is None else [*msgspec.structs.astuple(commit)],
        )
        plan.lines.append(last)
        plan.steps.append(f"write {LEDGER} again: its sound lines, and what was repaired")
    elif "uncommitted-line" in kinds:
        plan.lines = []
        plan.steps.append(f"cut off what was not committed from {LEDGER}")
    if "commit-record" in kinds or plan.lines:
        n_bytes = crc32 = 0
        for content in _ledger(plan):
            n_bytes, crc32 = n_bytes + len(content), zlib.crc32(content, crc32)
        plan.commit = Commit(
            n_rows=plan.n_rows,
            complete=was_closed(expected),
            ledger_bytes=n_bytes,
            ledger_crc32=crc32,
        )
        plan.steps.append(f"write {COMMIT} again: {plan.n_rows} rows, as the ledger has them")


def _ledger(plan: Plan) -> Iterator[bytes]:
    """Yield the new ledger: the sound lines of rows that stay, and those that are added."""
    for line in plan.expected.lines(stop=plan.expected.ledger_bytes):
        if line.entry is not None and line.entry.rows[0] < plan.n_rows:
            yield line.content
    yield from plan.lines or ()


def _plan_removal(plan: Plan) -> None:
    """Remove what lies behind the rows that stay, and what else a crash left."""
    files, chunks = plan.expected.files, filter(is_chunk_key, plan.expected.files.list())
    arrays = plan.expected.arrays if plan.expected.n_rows else {}
    dropped = [key for array in plan.dropped for key in files.list(array)]
    behind = [key for key in chunks if array_of(key) in arrays and key not in plan.records]
    leftovers = [one.where for one in find_leftovers(plan.expected) if one.kind == "leftover"]
    plan.removed = list(dict.fromkeys([*dropped, *behind, *leftovers]))
    plan.steps += [f"remove {key}" for key in plan.removed]


def _apply(plan: Plan) -> None:
    content = {key: [content] for key, content in plan.written.items()}
    ledger = {LEDGER: _ledger(plan)} if plan.lines is not None else {}
    commit = {COMMIT: [plan.commit.to_bytes()]} if plan.commit is not None else {}
    with closing(plan.expected.files.writer()) as writer:
        for stage in (content, ledger, commit):
            for key, parts in stage.items():
                writer.put(key, parts)
            writer.sync()
        writer.delete(plan.removed)
