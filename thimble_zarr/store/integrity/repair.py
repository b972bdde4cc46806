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

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import astuple, replace
from pathlib import Path

from thimble_zarr.errors import StoreError
from thimble_zarr.format.overhead import Stopwatch
from thimble_zarr.format.schema import Json
from thimble_zarr.store.files.documents import is_chunk_key, leads_out
from thimble_zarr.store.files.local import Disk, remove_file
from thimble_zarr.store.integrity.blocks import plan_blocks
from thimble_zarr.store.integrity.expected import Document, read_expected
from thimble_zarr.store.integrity.leftovers import files_below, find_leftovers
from thimble_zarr.store.integrity.metadata import (
    compare_documents,
    find_undeclared,
    is_per_step,
    is_same,
    was_closed,
    without_copies,
)
from thimble_zarr.store.integrity.plan import Plan
from thimble_zarr.store.integrity.values import plan_values
from thimble_zarr.store.ledger import read_lines, seal
from thimble_zarr.store.lock import WriterLock, check_not_recorded
from thimble_zarr.store.reader import (
    COMMIT,
    HOLDER,
    LEDGER,
    METADATA,
    Commit,
    StorePath,
    array_of,
)


def plan_repair(store: StorePath) -> Plan:
    """Find out what a repair would do. Every byte of the store is read, and nothing is written.

    Raises
    ------
    StoreLockedError
        If it is being recorded.
    NotAStoreError, UnsupportedFormatError, DamagedStoreError
        If there is no store there, or too little of one.
    StoreError
        If it cannot be read.
    """
    path = Path(store).absolute()
    _check_not_recorded(path)
    return _plan(path)


def repair(store: StorePath) -> Plan:
    """Repair a store, and return what was done.

    Raises
    ------
    StoreLockedError
        If it is being recorded.
    StoreError
        If nothing of it can be kept, or it cannot be written. Then it is as it was, or repairing it
        again continues where this one stopped.
    """
    path = Path(store).absolute()
    _check_not_recorded(path)
    names_a_writer = (path / HOLDER).exists()
    lock = WriterLock(path)
    try:
        plan = _plan(path)
        if plan.hopeless:
            raise StoreError(f"cannot repair {path}: {'; '.join(plan.hopeless)}")
        _apply(plan)
    finally:
        lock.release()
    if names_a_writer:  # one that is gone: taking the lock replaced its name, before the plan
        plan.steps.append(f"remove {HOLDER}")
    return plan


def _check_not_recorded(path: Path) -> None:
    """Raise an error where there is no store, or one that a writer may be recording."""
    if not read_expected(path).is_complete:
        check_not_recorded(path)


# --- what is to be done --------------------------------------------------------------------------


def _plan(path: Path) -> Plan:
    """Plan the repair of a store that nobody records into."""
    try:
        expected = read_expected(path)
        plan = Plan(expected, expected.n_rows)
        plan.hopeless += [
            f"{array} is a link that leads out of the store, and is not followed"
            for array, _ in plan.arrays()
            if leads_out(path / array, path)
        ]
        if expected.n_rows and not plan.hopeless:
            plan_blocks(plan)
            if plan.n_rows:
                plan_values(plan)
        if plan.n_rows or not plan.hopeless:
            repaired = plan.steps.copy()
            documents = _plan_metadata(plan)
            _plan_bookkeeping(plan, documents, repaired)
            _plan_removal(plan)
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error}") from error
    return plan


def _plan_metadata(plan: Plan) -> dict[str, Document]:
    """Write metadata again that are not as they should be; return all as they will be."""
    if not plan.expected.metadata:
        found = find_undeclared(plan.expected)
        plan.hopeless += [f"{finding.where}: {finding.what}" for finding in found]
    states = compare_documents(plan.expected, plan.n_rows, plan.dropped)
    for key, state in states.items():
        if not is_same(state.right, state.found):
            plan.written[key] = json.dumps(state.right, indent=2).encode()
            is_declared = is_same(without_copies(state.right), without_copies(state.found))
            how = "consolidate the metadata in {}" if is_declared else "write {} again"
            plan.steps.append(how.format(key))
    return {key: without_copies(state.right) for key, state in states.items()}


def _plan_bookkeeping(plan: Plan, documents: dict[str, Document], repaired: list[str]) -> None:
    """Add lines to the ledger that say what is there, and make the commit record fit it."""
    expected = plan.expected
    kinds = {finding.kind for finding in expected.findings}
    is_told = plan.is_cut or plan.rebuilt or plan.settled or plan.dropped or "ledger" in kinds
    if expected.n_rows and (is_told or plan.changes_ledger):
        plan.changes_ledger = True
        lines = [{**entry, "repaired": "rebuilt"} for entry in plan.rebuilt.values()]
        lines.append(_last_entry(plan, documents, repaired))
        plan.lines += [seal(entry) + b"\n" for entry in lines]
        plan.steps.append(f"write {LEDGER} again: its sound lines, and what was repaired")
    elif "uncommitted-line" in kinds:
        plan.changes_ledger = True
        plan.steps.append(f"cut off what was not committed from {LEDGER}")
    if "commit-record" in kinds or plan.lines:
        plan.changes_commit = True
        plan.steps.append(f"write {COMMIT} again: {plan.n_rows} rows, as the ledger has them")


def _last_entry(plan: Plan, documents: dict[str, Document], repaired: list[str]) -> dict[str, Json]:
    """Return a line for the last block as it is, and for all values as they are."""
    expected = plan.expected
    first_row = max(row for row in (*expected.lines, *plan.rebuilt) if row < plan.n_rows)
    block = plan.rebuilt.get(first_row) or expected.entry(expected.lines[first_row][0])
    chunks: dict[str, Json] = dict(block["chunks"])
    files = {key: file for key, file in block["files"].items() if array_of(key) in chunks}
    for key, record in plan.settled.items():
        if key in files:
            files[key] = {"bytes": record.n_bytes}
            chunks[array_of(key)] = expected.entry(record.line)["chunks"][array_of(key)]
    return {
        "rows": (first_row, plan.n_rows),
        "files": {**files, **plan.values},
        "chunks": chunks,
        "metadata": documents,
        "dropped": plan.dropped,
        "repaired": repaired,
        "replaces": None if expected.commit is None else [*astuple(expected.commit)],
    }


def _plan_removal(plan: Plan) -> None:
    """Remove what lies behind the rows that stay, and what else a crash left."""
    expected = plan.expected
    lengths = {
        array: declared.file_shape[0]
        for array, declared in plan.arrays()
        if is_per_step(expected.documents[f"{array}/{METADATA}"])
    }
    plan.removed += [
        key
        for key in (files_below(expected.path) if expected.n_rows else ())
        if is_chunk_key(key)
        and array_of(key) in lengths
        and _index(key) * lengths[array_of(key)] >= plan.n_rows
    ]
    leftovers = [one.where for one in find_leftovers(expected) if one.kind == "leftover"]
    plan.removed += [key for key in leftovers if key not in plan.removed]
    plan.steps += [f"remove {key}" for key in plan.removed]


def _index(key: str) -> int:
    """Return the number of a chunk file along the first axis."""
    return int(key.rpartition("/c.")[2].partition(".")[0])


# --- doing it ------------------------------------------------------------------------------------


def _apply(plan: Plan) -> None:
    path = plan.expected.path
    disk = Disk(Stopwatch())
    try:
        for key, content in plan.written.items():
            disk.write(path / key, [content])
        disk.sync((path / key).parent for key in plan.written)
        commit = _commit(plan)  # before the ledger that it counts is another
        if plan.changes_ledger:
            disk.write(path / LEDGER, _ledger(plan))
            disk.sync([(path / LEDGER).parent])
        if plan.changes_commit:
            disk.write(path / COMMIT, [commit.to_bytes()])
            disk.sync([(path / COMMIT).parent])
    finally:
        disk.close()
    for key in plan.removed:
        with suppress(FileNotFoundError):
            remove_file(path / key)
    for array in plan.dropped:
        with suppress(OSError):
            os.rmdir(path / array)  # noqa: PTH106


def _ledger(plan: Plan) -> Iterator[bytes]:
    """Yield the new ledger: the sound lines of rows that stay, and those that are added."""
    expected = plan.expected
    for line in read_lines(expected.path / LEDGER, stop=expected.end) if expected.end else ():
        if line.entry is not None and line.entry["rows"][0] < plan.n_rows:
            yield line.content
    yield from plan.lines


def _commit(plan: Plan) -> Commit:
    """Return the commit record that fits the new ledger."""
    n_bytes = crc32 = 0
    for content in _ledger(plan):
        n_bytes, crc32 = n_bytes + len(content), zlib.crc32(content, crc32)
    commit = plan.expected.commit or Commit(complete=was_closed(plan.expected))
    return replace(commit, n_rows=plan.n_rows, ledger_bytes=n_bytes, ledger_crc32=crc32)
