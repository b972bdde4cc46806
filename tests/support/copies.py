"""Whether a store on a server is the one on this machine."""

from pathlib import Path

from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.files.objects import ObjectFiles
from thimble_zarr.store.keys import HOLDER, LOCK

BOOKKEEPING_OF_A_WRITER = {LOCK, HOLDER}


def contents(files: LocalFiles | ObjectFiles) -> dict[str, bytes]:
    return {key: files.get(key) for key in files.list() if key not in BOOKKEEPING_OF_A_WRITER}


def is_copied(store: Path, url: str) -> bool:
    return contents(LocalFiles(store)) == contents(ObjectFiles(url))
