"""Is a store what its writer committed? Every byte of it is read once; nothing is written.

What is looked at is the same whatever was recorded: files, metadata and bookkeeping are compared
with what the ledger says. What the commit does not know (files a crash left, lines of commits that
never were) is noted only. Blocks are checked one after the other, a chunk at a time.
"""

from collections.abc import Callable
from pathlib import Path

from thimble_zarr.errors import StoreError
from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.integrity.expected import read_expected
from thimble_zarr.store.integrity.files import find_in_file
from thimble_zarr.store.integrity.leftovers import find_leftovers
from thimble_zarr.store.integrity.metadata import compare_documents
from thimble_zarr.store.integrity.result import VerifyResult
from thimble_zarr.store.reader import StorePath


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

    Returns
    -------
    VerifyResult

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
    Look at every byte before a store is published::

        result = thimble_zarr.verify("run.zarr")
        assert result.holds, result.findings
    """
    files = LocalFiles(Path(store).absolute())
    try:
        expected = read_expected(files)
        findings, n_bytes = list(expected.findings), 0
        total = sum(record.n_bytes for record in expected.records.values())
        for key, record in expected.records.items():
            findings += find_in_file(expected, key)
            n_bytes += record.n_bytes
            progress(n_bytes, total)
        documents = compare_documents(expected, expected.n_rows).values()
        findings += [one.finding for one in documents if one.finding is not None]
        findings += find_leftovers(expected)
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"cannot read {store}: {error}") from error
    return VerifyResult(
        path=Path(store),
        n_rows=expected.n_rows,
        n_files=len(expected.records),
        n_bytes=n_bytes,
        findings=findings,
        repairs=expected.repairs,
    )
