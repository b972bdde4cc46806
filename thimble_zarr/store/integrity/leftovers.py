"""What lies in a store that no committed line knows."""

from collections.abc import Iterator

from thimble_zarr.format.reader import State
from thimble_zarr.store.files.base import PARTIAL, NotPlainFileError
from thimble_zarr.store.integrity.expected import Expected
from thimble_zarr.store.integrity.result import Discrepancy
from thimble_zarr.store.keys import COMMIT, HOLDER, LEDGER, LOCK, METADATA, is_chunk_key
from thimble_zarr.store.lock import Holder, recording_of


def find_leftovers(expected: Expected) -> Iterator[Discrepancy]:
    """Find what no committed line knows, unless a writer is at work that may be making it."""
    files, known = expected.files, {METADATA, COMMIT, LEDGER, LOCK}
    holder = Holder.read(files)
    if holder is not None and holder.is_this_process:
        known.add(HOLDER)
    elif not expected.is_complete and recording_of(files).state is not State.CUT_OFF:
        return
    for key in files.list():
        if key in known or key in expected.metadata or key in expected.records:
            continue
        if what := _what_is_left(expected, key, holder):
            yield Discrepancy("leftover", key, what, is_damage=False)
        elif not (is_chunk_key(key) or key.endswith(f"/{METADATA}")):
            try:
                files.size(key)
                what = "a file that no store has"
            except NotPlainFileError:
                what = "a link, or something else that is no plain file, and that no store has"
            yield Discrepancy("stray", key, what, is_damage=False)


def _what_is_left(expected: Expected, key: str, holder: Holder | None) -> str:
    """Return what a crash left a file as, nothing where it was no crash or nobody can tell.

    Without a sound ledger nobody can tell which chunks are left over.
    """
    if key == HOLDER:
        return f"left by a writer that is gone, {holder or 'unknown'}"
    if key.endswith(PARTIAL):
        return "a file that was not written to its end"
    if is_chunk_key(key) and expected.ends and not expected.doubtful_bytes:
        return "a file of a block that was never committed"
    return ""
