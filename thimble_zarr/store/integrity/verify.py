"""Is a store what its writer committed? Every byte of it is read once; nothing is written.

What is looked at is the same whatever was recorded: files, metadata and bookkeeping are compared
with what the ledger says. What the commit does not know (files a crash left, lines of commits that
never were) is noted only. Blocks are checked one after the other, a chunk at a time.
"""

from collections.abc import Callable, Iterator

from thimble_zarr.errors import StoreError
from thimble_zarr.format.location import located
from thimble_zarr.format.reader import State
from thimble_zarr.store.contents import StorePath
from thimble_zarr.store.files.base import PARTIAL
from thimble_zarr.store.files.place import files_at
from thimble_zarr.store.integrity.expected import Expected, read_expected
from thimble_zarr.store.integrity.files import find_in_file
from thimble_zarr.store.integrity.metadata import compare_documents
from thimble_zarr.store.integrity.verify_result import Discrepancy, VerifyResult
from thimble_zarr.store.keys import COMMIT, HOLDER, LEDGER, LOCK, METADATA, PUBLISHER, is_chunk_key
from thimble_zarr.store.lock import Holder, recording_of


def verify(
    store: StorePath, progress: Callable[[int, int], object] = lambda done, total: None
) -> VerifyResult:
    """Compare a store with what was committed. It may be recorded meanwhile.

    Parameters
    ----------
    store
        The store.
    progress
        Called with the bytes that were read and those there are to read.

    Raises
    ------
    NotAStoreError, UnsupportedFormatError
        If there is no store there, or one of another format version.
    DamagedStoreError
        If too little is left to tell what it should hold.
    StoreError
        If it cannot be read.

    Examples
    --------
    Look at every byte before a store is published:

    >>> import thimble_zarr
    >>> thimble_zarr.verify("run.zarr").holds
    True
    """
    try:
        expected = read_expected(files_at(store))
        findings, n_bytes = list(expected.findings), 0
        total = sum(record.n_bytes for record in expected.ledger.records.values())
        for key, record in expected.ledger.records.items():
            findings += find_in_file(expected, key)
            n_bytes += record.n_bytes
            progress(n_bytes, total)
        findings += compare_documents(expected, expected.n_rows)[1]
        findings += find_leftovers(expected)
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"cannot read {store}: {error}") from error
    return VerifyResult(
        path=located(store),
        n_rows=expected.n_rows,
        n_files=len(expected.ledger.records),
        n_bytes=n_bytes,
        findings=findings,
        repairs=expected.ledger.repairs,
    )


def find_leftovers(expected: Expected) -> Iterator[Discrepancy]:
    """Find what no committed line knows, unless a writer is at work that may be making it.

    Without a sound ledger nobody can tell which chunks are left over; a web
    server tells of none.
    """
    files, holder = expected.files, Holder.read(expected.files)
    is_ours = holder is not None and holder.is_this_process
    if not (is_ours or expected.is_complete or recording_of(files).state is State.CUT_OFF):
        return
    known = {
        METADATA,
        COMMIT,
        LEDGER,
        LOCK,
        PUBLISHER,
        *expected.ledger.metadata,
        *expected.ledger.records,
    }
    has_whole_ledger = expected.ledger.ends and not expected.doubtful_bytes
    for key in expected.listed():
        kind, what, repair = "leftover", "", "remove it"
        if key in known or (key == HOLDER and is_ours):
            continue
        if key == HOLDER:
            what = f"left by a writer that is gone, {holder or 'unknown'}"
        elif key.endswith(PARTIAL):
            what = "a file that was not written to its end"
        elif is_chunk_key(key) and has_whole_ledger:
            what = "a file of a block that was never committed"
        elif not (is_chunk_key(key) or key.endswith(METADATA)):
            kind, what = "stray", "a file or link that no store has"
            repair = "none: whoever put it there may want it"
        if what:
            yield Discrepancy(kind, key, what, repair, is_damage=False)
