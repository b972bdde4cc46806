"""Whether a copy of a store on a server is the store."""

from pathlib import Path

from thimble_zarr.store.files.local import LocalFiles
from thimble_zarr.store.files.objects import ObjectFiles
from thimble_zarr.store.keys import HOLDER, LOCK


def contents(files: LocalFiles | ObjectFiles) -> dict[str, bytes]:
    """Return every file but a writer's bookkeeping, by its key."""
    return {key: files.get(key) for key in files.list() if key not in (LOCK, HOLDER)}


def is_copied(store: Path, url: str) -> bool:
    return contents(LocalFiles(store)) == contents(ObjectFiles(url))
