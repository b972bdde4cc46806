"""What lies in a store that no committed line knows."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from thimble_zarr.store.files.documents import is_chunk_key
from thimble_zarr.store.files.local import PARTIAL
from thimble_zarr.store.integrity.expected import Expected
from thimble_zarr.store.integrity.result import Discrepancy
from thimble_zarr.store.lock import Holder, Recording, State
from thimble_zarr.store.reader import COMMIT, HOLDER, LEDGER, LOCK, METADATA


def find_leftovers(expected: Expected) -> Iterator[Discrepancy]:
    """Find what no committed line knows. A writer that is at work may be making it.

    Without a sound ledger nobody can tell which chunks are left over, and none is called so.
    """
    if _is_at_work(expected):
        return
    known = {METADATA, COMMIT, LEDGER, LOCK, *expected.metadata, *expected.files}
    holder = Holder.read(expected.path)
    if holder is not None and holder.is_this_process:
        known.add(HOLDER)
    for key in files_below(expected.path):
        if key in known:
            continue
        if what := _what_is_left(expected, key):
            yield Discrepancy("leftover", key, what, is_damage=False)
        elif not (is_chunk_key(key) or key.endswith(f"/{METADATA}")):
            what = f"{_kind_of_file(expected.path / key)} that no store has"
            yield Discrepancy("stray", key, what, is_damage=False)


def _is_at_work(expected: Expected) -> bool:
    """Whether another process may be recording."""
    if expected.is_complete:
        return False
    recording = Recording.of_open_store(expected.path)
    is_this_process = recording.writer is not None and recording.writer.is_this_process
    return recording.state is not State.CUT_OFF and not is_this_process


def _what_is_left(expected: Expected, key: str) -> str:
    """Return what a crash left a file as, nothing where it was no crash or nobody can tell."""
    if key == HOLDER:
        return f"left by a writer that is gone, {Holder.read(expected.path) or 'unknown'}"
    if key.endswith(PARTIAL):
        return "a file that was not written to its end"
    if is_chunk_key(key) and expected.lines and expected.has_whole_ledger:
        return "a file of a block that was never committed"
    return ""


def _kind_of_file(file: Path) -> str:
    mode = file.lstat().st_mode
    if stat.S_ISLNK(mode):
        return "a link"
    return "a file" if stat.S_ISREG(mode) else "something that is not a plain file and"


def files_below(path: Path) -> Iterator[str]:
    """Yield everything below a store that is no directory."""
    for directory, names, files in os.walk(path):
        links = [name for name in names if (Path(directory) / name).is_symlink()]
        for name in sorted([*files, *links]):
            yield (Path(directory) / name).relative_to(path).as_posix()
